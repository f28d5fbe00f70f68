"""A finished (or interrupted) run, opened again: its model, what it writes, how well it predicts."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe.decoder import Decoder
from moe.train.data import Windows
from moe.train.device import autocast, choose_device, choose_precision
from moe.train.evaluate import compressors, evaluate, evaluated_text
from moe.train.files import write_json
from moe.train.run_folder import RunFolder, step_of
from moe.train.settings import RunConfig
from moe.train.tokenizer import Tokenizer, load_tokenizer
from moe.train.tokens import TokenisedCorpus, load_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A model with everything needed to use it. `step` is that of its checkpoint."""

    folder: Path
    config: RunConfig
    step: int
    model: Decoder
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.folder.resolve().name

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head_weight.device

    @property
    def precision(self) -> torch.dtype:
        """The dtype of matrix products: that of training, or what training would choose on this device."""
        return choose_precision(self.config.train, self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, the model computes in `precision`."""
        return autocast(self.device, self.precision)


def open_run(folder: Path, *, checkpoint: str | None = None, device: str | None = None) -> Run:
    """Load the newest checkpoint of a run folder, or the one with this name, such as step_00000400.

    Raises:
        FileNotFoundError: no run, or no such checkpoint, in the folder.
        ValueError: a damaged file, or a device that this machine lacks.
    """
    files = RunFolder(folder)
    config = files.read_config()
    names = {path.name: path for path in files.checkpoints()}
    path = files.latest_checkpoint() if checkpoint is None else names.get(checkpoint)
    if path is None:
        wanted = "no checkpoint yet" if checkpoint is None else f"no checkpoint {checkpoint!r}"
        raise FileNotFoundError(f"{folder} has {wanted}. It has: {', '.join(names) or 'none'}.")
    place = choose_device(config.train.device if device is None else device)
    model = Decoder.from_pretrained(path, backend=config.train.backend, device=place).eval()
    return Run(folder, config, step_of(path), model, load_tokenizer(config, folder))


def evaluate_run(
    run: Run,
    *,
    max_tokens: int | None = None,
    corpus: TokenisedCorpus | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Validation loss and bits per byte beside gzip and xz on the same bytes; also written to eval.json.

    corpus: the tokens of the run where they are at hand; else they are found and verified again.

    Raises:
        ValueError: the text of the run changed since it began; or as `load_tokens`.
    """
    corpus = corpus or load_tokens(run.config, tokenizer=run.tokenizer, log=log)
    RunFolder(run.folder).claim_corpus(corpus.manifest)
    windows = Windows(corpus.validation, run.config.data.sequence_length)
    limit = run.config.train.final_eval_tokens if max_tokens is None else max_tokens
    result = evaluate(run.model, windows, run.tokenizer, max_tokens=limit, dtype=run.precision)
    record = {
        "step": run.step,
        **asdict(result),
        **compressors(evaluated_text(windows, run.tokenizer, limit)),
    }
    write_json(run.folder / "eval.json", record)
    return record


def sample_text(
    run: Run,
    prompt: str = "",
    *,
    tokens: int = 300,
    seed: int = 0,
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> str:
    """Text that continues the prompt (included); without one, a document from its beginning.

    The model never looks further back than the length that it was trained on: when that is full, it goes
    on from the last half of it.
    """
    tokenizer, length = run.tokenizer, run.config.data.sequence_length
    start = tokenizer.encode(prompt.encode("utf-8")).tolist() or [tokenizer.end_of_text]
    ids = list(start)
    while (left := len(start) + tokens - len(ids)) > 0:
        context = ids[-max(length // 2, 1) :]
        with run.autocast():
            text = run.model.generate(
                torch.tensor([context], device=run.device),
                max_new_tokens=min(left, max(length - len(context), 1)),
                temperature=temperature,
                top_p=top_p,
                stop=tokenizer.end_of_text,
                seed=seed + len(ids),
            )
        ids += text[0, len(context) :].tolist()
        if ids[-1] == tokenizer.end_of_text:
            break
    return tokenizer.decode(ids).decode("utf-8", errors="replace")


def held_out_excerpt(run: Run, tokens: int = 160, *, corpus: TokenisedCorpus | None = None) -> str:
    """Text from the middle of the validation split, whole lines where they are short: a prompt never seen."""
    validation = (corpus or load_tokens(run.config, tokenizer=run.tokenizer)).validation
    middle = len(validation) // 2
    text = run.tokenizer.decode(validation[middle : middle + tokens].tolist()).decode("utf-8", "ignore")
    first, last = text.find("\n") + 1, text.rfind("\n") + 1
    return text[first:last] or text[first:]
