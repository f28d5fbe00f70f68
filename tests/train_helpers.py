"""A small text corpus and a run that takes a second, for the tests of training."""

import random
from pathlib import Path

from moe.train.overrides import load_settings
from moe.train.settings import RunConfig

SENTENCE = "the expert router sends every token to two of many small layers and sums what they say é ü"
WORDS = SENTENCE.split()


def write_corpus(folder: Path, files: int = 12, words: int = 400) -> Path:
    """`files` text files of random words, the same at every call."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        text = " ".join(draw.choice(WORDS) + ("\n" if draw.random() < 0.1 else "") for _ in range(words))
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def tiny_overrides(root: Path, *more: str) -> list[str]:
    """Overrides of the preset tiny that keep everything under `root`."""
    return [f'data.folder="{root / "text"}"', f'data.cache="{root / "cache"}"', "train.steps=12", *more]


def tiny_run(root: Path, *more: str) -> RunConfig:
    """A run of 12 steps on a corpus under `root`, with checkpoints after 10 and 12."""
    if not (root / "text").exists():
        write_corpus(root / "text")
    return load_settings("tiny", None, tiny_overrides(root, *more))
