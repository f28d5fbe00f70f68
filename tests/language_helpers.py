"""A decoder that reads the book in its cache and translates by it, and runs that are made small."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from needle_helpers import Oracle, as_bytes, write_text
from torch import Tensor

from moe.kv_cache import KVCache
from moe.probes.language.grammar import Language, Phrase, Sentence
from moe.train.overrides import change, find_preset
from moe.train.runs import Run
from moe.train.tokenizer import ByteTokenizer

GRAMMAR = re.compile(rb"\n!(\w{3}) (an|na) (pn|np) s([A-Z]+) ;")
ENTRY = re.compile(rb"\n([a-z]{3})([A-Z]+) ;")


def parse(english: str) -> Sentence:
    """The sentence that reads so."""
    words: dict[str, list[str]] = {"S": [], "V": [], "O": []}
    for word in english.split():
        words[word[0]].append(word[1:])
    (verb,) = words["V"]
    return Sentence(parse_phrase(words["S"], "S"), verb, parse_phrase(words["O"], "O"))


def parse_phrase(words: list[str], role: str) -> Phrase:
    """The noun phrase of one adjective or none and a noun."""
    *adjective, noun = words
    return Phrase(noun[:3], len(noun) == 4, adjective[0] if adjective else "", role)


class Translator(Oracle):
    """Knows what the book in its cache says, and nothing else: writes ? where the book has no word.

    Without a grammar line it takes the order to be SVO, adjectives and plural words to come first.
    """

    def model(self, ids: Tensor, mask, cache: KVCache | None, at: int | None):
        assert cache is not None and mask is None
        self.read += ids.numel()
        (own,) = cache.append(0, ids[:, None, :, None].float())
        shared = cache.shared(0)
        cache.advance(ids.shape[1], None)
        count = ids.shape[1] if at is None else at
        states = torch.zeros(len(ids), count, 256)
        before = b"" if shared is None else as_bytes(shared[0])
        for row, tokens in enumerate(own):
            suffix = as_bytes(tokens)
            for place in range(count):
                end = len(suffix) - count + place + 1
                states[row, place] = F.one_hot(torch.tensor(self.next(before, suffix[:end])), 256)
        return SimpleNamespace(states=states)

    def next(self, text: bytes, suffix: bytes) -> int:
        line = suffix.split(b"\n")[-1]
        if not text or b">" not in line or line.endswith(b";"):
            return 0
        english, written = line[1:].split(b">")
        words = {a.decode(): b.decode() for a, b in ENTRY.findall(text)}
        order, adjective, plural, some = (
            found.groups() if (found := GRAMMAR.search(text)) else (b"SVO", b"an", b"pn", b"?")
        )
        language = Language(
            Known(words | {"s": some.decode()}), order.decode(), adjective == b"an", plural == b"pn"
        )
        parts = language.translate(parse(english.decode()))
        answer = "".join(f"{part.gloss}{part.foreign} " for part in parts) + ";"
        return ord(answer[len(written)]) if answer.encode().startswith(written) else ord("!")


class Known(dict[str, str]):
    """A dictionary that has a ? for every word that it lacks."""

    def __missing__(self, word: str) -> str:
        return "?"


def translator_run(root: Path, *overrides: str, model: type[Oracle] = Translator) -> Run:
    """A run of the preset language, trained on the text in `root`/trained, whose model reads the book."""
    if not (root / "trained").exists():
        write_text(root / "trained", files=2, lines=50, word="trained")
    config = change(find_preset("language"), None, [f'data.folder="{root / "trained"}"', *overrides])
    (root / "translator").mkdir(exist_ok=True)
    decoder = model(config.model)
    return Run(root / "translator", config, 7, decoder, ByteTokenizer())  # pyright: ignore[reportArgumentType]


def code(size: int = 5000) -> np.ndarray:
    """Text to stand between pieces; it has nothing that looks like one."""
    return np.resize(np.frombuffer(b"def f(x):\n    return g(x) + 1\n\n", np.uint8), size)
