"""A model asked for likelihoods and for text, many at a time; opened from a run folder or a model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint import load_config
from moe.decoder import Decoder
from moe.generate import STOPPED, SamplingOptions, stream
from moe.probes.likelihood import Ids, Score, Window, score_window, windows_of
from moe.train.device import autocast, choose_device, choose_precision
from moe.train.run_folder import RunFolder
from moe.train.runs import open_run
from moe.train.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILE,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
)

DEFAULT_BATCH = 8


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Prober:
    """A model with its tokenizer, and how it is run.

    length  tokens that it reads at most
    batch   windows at a time. A batch changes no answer, but for experts with a capacity, which drop tokens
    """

    model: Decoder
    tokenizer: Tokenizer
    length: int
    batch: int = 8
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("length", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Score]:
        """The continuation of each (context, continuation), given the context, which must not be empty.

        A context that is too long loses its beginning. A continuation longer than `length` is scored in
        windows, each token once.

        Raises:
            ValueError: an empty context.
        """
        owners: list[int] = []
        windows: list[Window] = []
        for owner, (context, continuation) in enumerate(pairs):
            for window in windows_of(context, continuation, self.length):
                owners.append(owner)
                windows.append(window)
        totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for owner, score in zip(owners, self._score_windows(windows), strict=True):
            totals[owner] += score.log_probability
            greedy[owner] &= score.is_greedy
        return [Score(*score) for score in zip(totals, greedy, strict=True)]

    def _score_windows(self, windows: Sequence[Window]) -> list[Score]:
        """Longest first, so that a batch holds windows of nearly one length."""
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
        scores: dict[int, Score] = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            scores |= zip(chosen, self._score_batch([windows[i] for i in chosen]), strict=True)
        return [scores[i] for i in range(len(windows))]

    def _score_batch(self, windows: Sequence[Window]) -> list[Score]:
        ids, mask = self._padded([window.ids[:-1] for window in windows], left=False)
        with torch.inference_mode(), autocast(ids.device, self.dtype):
            states = self.model.hidden(ids, mask=mask).states  # (b s d)
            # Only what counts meets the head: the logits of a whole batch would be (b s v).
            logits = [
                self.model.logits(row[len(window.ids) - 1 - window.count : len(window.ids) - 1])
                for row, window in zip(states, windows, strict=True)
            ]
        return [score_window(row, window) for row, window in zip(logits, windows, strict=True)]

    def write(
        self, contexts: Sequence[Ids], *, stops: Sequence[str] = (), options: SamplingOptions
    ) -> list[str]:
        """What the model writes after each context, up to the end or the first of `stops`, which is left out.

        Half of `length` is kept for the context where both do not fit: the answer is then shorter than
        `max_new_tokens`, and the context loses its beginning.
        """
        new = min(options["max_new_tokens"], max(self.length // 2, 1))
        room = max(self.length - new, 1)
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        texts: dict[int, str] = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            written = self._write_batch([contexts[i][-room:] for i in chosen], stops, options, new)
            texts |= zip(chosen, written, strict=True)
        return [texts[i] for i in range(len(contexts))]

    def _write_batch(
        self, contexts: Sequence[Ids], stops: Sequence[str], options: SamplingOptions, new: int
    ) -> list[str]:
        ids, mask = self._padded(contexts, left=True)
        options = {**options, "max_new_tokens": new, "stop": self.tokenizer.end_of_text, "mask": mask}
        written: list[Ids] = [[] for _ in contexts]
        texts = [""] * len(contexts)
        going = set(range(len(contexts)))
        with autocast(ids.device, self.dtype):
            for tokens in stream(self.model, ids, **options):
                for row, token in enumerate(tokens.tolist()):
                    if row not in going or token == STOPPED:
                        going.discard(row)
                        continue
                    written[row].append(token)
                    texts[row] = self.text(written[row])
                    if any(stop in texts[row] for stop in stops):
                        going.discard(row)
                if not going:
                    break
        return [before(text, stops) for text in texts]

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, without the end of text; bytes that are no UTF-8 become U+FFFD."""
        return self.tokenizer.decode(ids).decode("utf-8", errors="replace")

    def ids(self, text: str) -> Ids:
        """The ids of a text."""
        return self.tokenizer.encode(text.encode("utf-8")).tolist()

    def _padded(self, rows: Sequence[Ids], *, left: bool) -> tuple[Tensor, Tensor]:
        """ids (b s) and mask (b s), with the padding left or right."""
        width = max(map(len, rows))
        padding = [[0] * (width - len(row)) for row in rows]
        pairs = list(zip(rows, padding, strict=True))
        ids = torch.tensor([pad + row if left else row + pad for row, pad in pairs])
        real = [[False] * len(pad) + [True] * len(row) for row, pad in pairs]
        mask = torch.tensor(real if left else [row[::-1] for row in real])
        device = next(self.model.parameters()).device
        return ids.to(device), mask.to(device)


def before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops in it."""
    return text[: min([len(text), *(text.index(stop) for stop in stops if stop and stop in text)])]


def open_prober(
    folder: Path,
    *,
    checkpoint: str | None = None,
    device: str | None = None,
    batch: int = DEFAULT_BATCH,
    length: int | None = None,
) -> Prober:
    """The model of a run folder or of a model folder, ready to be asked."""
    if RunFolder(folder).config_file.exists():
        run = open_run(folder, checkpoint=checkpoint, device=device)
        dtype = choose_precision(run.config.train, next(run.model.parameters()).device)
        length = length or run.config.data.sequence_length
        return Prober(model=run.model, tokenizer=run.tokenizer, length=length, batch=batch, dtype=dtype)
    if checkpoint is not None:
        raise ValueError(f"{folder} holds no run, so there is no checkpoint {checkpoint!r} to choose.")
    tokenizer = find_tokenizer(folder)
    model = Decoder.from_pretrained(folder, device=choose_device(device or "auto"))
    return Prober(
        model=model, tokenizer=tokenizer, length=length or model.config.max_position_embeddings, batch=batch
    )


def find_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: its tokenizer.json, or bytes for a vocabulary of 256.

    Raises:
        ValueError: neither, or a tokenizer.json without <|endoftext|>.
    """
    file = folder / TOKENIZER_FILE
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        if END_OF_TEXT not in text:
            raise ValueError(f"{file} has no token {END_OF_TEXT}, which this adapter begins a document with.")
        return BPETokenizer(text)
    size = load_config(folder).vocab_size
    if size != ByteTokenizer.vocab_size:
        raise ValueError(
            f"{folder} has no {TOKENIZER_FILE}, and vocab_size={size} is not 256, which would mean bytes. "
            f"Copy the tokenizer into the folder."
        )
    return ByteTokenizer()
