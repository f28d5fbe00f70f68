"""Made-up handwriting, so that tests of needles in every sense need no scikit-learn; and small runs."""

from pathlib import Path

import numpy as np
import pytest
from needle_helpers import write_text
from train_helpers import write_corpus

from moe.probes.senses import bank
from moe.probes.senses.handwriting import Handwriting, Split
from moe.train.overrides import load_settings
from moe.train.settings import RunConfig

IMAGES = {"train": 120, "test": 60}


def write_by_hand(split: Split) -> Handwriting:
    """Ten different random patterns, each with noise of its own in every image."""
    patterns = np.random.default_rng(0).random((10, 8, 8))
    rng = np.random.default_rng(1 if split == "train" else 2)
    labels = np.arange(IMAGES[split]) % 10
    images = (0.8 * patterns[labels] + 0.2 * rng.random((len(labels), 8, 8))).astype(np.float32)
    return Handwriting(images, labels, f"made-up digits, {split}")


@pytest.fixture(autouse=True)
def handwriting(monkeypatch) -> None:
    """Import it to have made-up digits in every test of a file."""
    monkeypatch.setattr(bank, "load_handwriting", write_by_hand)
    monkeypatch.setattr(bank, "TONES", {"train": 12, "test": 12})
    monkeypatch.setattr(bank, "SOUNDS", 40)
    monkeypatch.setattr(bank, "SCRAMBLED", 40)


SMALL = (
    "model.hidden_size=16",
    "model.head_dim=16",
    "model.moe_intermediate_size=8",
    "model.num_experts=4",
    "model.sliding_window=8",
    "data.sequence_length=240",
    "senses.short_length=120",
    "senses.short_fraction=0.5",
    "senses.image_copies=1",
    "train.steps=12",
    "train.batch_size=4",
    "train.log_every=5",
    "train.checkpoint_every=5",
    "train.eval_tokens=400",
    "train.final_eval_tokens=400",
    "train.tensorboard=false",
    "optim.warmup_steps=4",
)


def places(root: Path) -> tuple[str, ...]:
    """Overrides that keep text and cache under `root`, which also gets text for haystacks."""
    if not (root / "trained").exists():
        write_corpus(root / "trained")
        write_text(root / "text")
    return f'data.folder="{root / "trained"}"', f'data.cache="{root / "cache"}"'


def senses_run(root: Path, *more: str) -> RunConfig:
    """The preset senses made small: 6 steps of short sequences, 6 of long ones."""
    return load_settings("senses", None, [*SMALL, *places(root), *more])
