"""A decoder that knows where everything is, and a run of it: for tests of what is asked and counted."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.decoder_config import DecoderConfig
from moe.generate import generate
from moe.kv_cache import KVCache
from moe.probes.needle.needles import TEMPLATES
from moe.train.overrides import change, find_preset
from moe.train.runs import Run
from moe.train.tokenizer import ByteTokenizer


class Oracle(nn.Module):
    """Looks every answer up in the bytes that its cache holds; a cache that forgets or mixes them shows.

    Asked for a key again in the same suffix, it gives its next value. `read` counts the tokens it was given.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.head_weight = nn.Parameter(torch.zeros(256, 1))
        self.read = 0

    def hidden(self, ids: Tensor, *, mask=None, cache: KVCache | None = None, at: int | None = None):
        return self.model(ids, mask, cache, at)

    def model(self, ids: Tensor, mask, cache: KVCache | None, at: int | None):
        assert cache is not None and mask is None
        self.read += ids.numel()
        (own,) = cache.append(0, ids[:, None, :, None].float())
        shared = cache.shared(0)
        cache.advance(ids.shape[1], None)
        count = ids.shape[1] if at is None else at
        states = torch.zeros(len(ids), count, 256)
        if count:
            before = b"" if shared is None else as_bytes(shared[0])
            for row, tokens in enumerate(own):
                states[row, -1] = F.one_hot(torch.tensor(self.next(before, as_bytes(tokens))), 256)
        return SimpleNamespace(states=states)

    def next(self, text: bytes, suffix: bytes) -> int:
        """The byte that follows."""
        *asked, line = suffix.split(b"\n")
        if text:  # else it is the text itself that is read
            assert all(re.search(rb"(=|it is )\d{6}$", one) for one in asked), "an answer has lost its end"
        for template in TEMPLATES.values():
            start, end = map(re.escape, template.query)
            if query := re.fullmatch(start + rb"(\w+)" + end + rb"(.*)", line):
                again = sum(template.ask(query[1]) in one for one in asked)
                needle = template.needle[0] + query[1] + template.needle[1]
                values = re.findall(re.escape(needle) + rb"([^;.\n]+(?:\.py\n)?)", text)
                value = values[again][len(query[2]) :]
                return value[0] if value else ord("\n")
        return 0

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def generate(self, ids: Tensor, **options) -> Tensor:
        return generate(self, ids, **options)  # pyright: ignore[reportArgumentType]


def as_bytes(kept: Tensor) -> bytes:
    return bytes(kept.flatten().to(torch.int64).tolist())


def write_text(folder: Path, *, files: int = 6, lines: int = 2000, word: str = "text") -> Path:
    """`files` files of different lines, about 40 bytes each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        rows = (f"{word} {number}: this is line {line} of a real file\n" for line in range(lines))
        (folder / f"{word}{number}.txt").write_text("".join(rows))
    return folder


def oracle_run(root: Path, *overrides: str, model: type[Oracle] = Oracle) -> Run:
    """A run of the preset needle, trained on the text in `root`/trained, whose model is an oracle."""
    if not (root / "trained").exists():
        write_text(root / "trained", files=2, lines=50, word="trained")
    folder = f'data.folder="{root / "trained"}"'
    config = change(find_preset("needle"), None, [folder, *overrides])
    (root / "oracle").mkdir(exist_ok=True)
    return Run(root / "oracle", config, 7, model(config.model), ByteTokenizer())  # pyright: ignore[reportArgumentType]
