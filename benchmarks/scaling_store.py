"""Finished runs of benchmarks.scaling, kept one JSON line each: an interrupted benchmark goes on."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe.train.tokens import cache_folder


@dataclass(frozen=True, slots=True)
class Run:
    """What one run gave. Losses are nats a byte; `cpu_seconds` is what it would take alone on a core."""

    arm: str
    seed: int
    validation_loss: float
    training_loss: float
    validation_tokens: int
    seconds: float
    cpu_seconds: float
    tokens: int
    max_violation: list[float]
    dead_experts: int
    commit: str


def default_store(setting: dict[str, Any], digest: str, sources: Iterable[Path]) -> Path:
    """Under the user's cache folder; another setting, corpus, torch or source file has another store."""
    source = hashlib.sha256()
    for file in sources:
        source.update(file.read_bytes())
    identity = json.dumps([setting, digest, torch.__version__, source.hexdigest()])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_folder(None) / "benchmarks" / f"scaling-{key}.jsonl"


def read_store(path: Path) -> dict[tuple[str, int], Run]:
    """The finished runs; a last line that was cut off is not one."""
    runs: dict[tuple[str, int], Run] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            run = Run(**json.loads(line))
        except ValueError:
            continue
        runs[run.arm, run.seed] = run
    return runs


def append_store(path: Path, run: Run) -> None:
    """Keep one finished run, on a line of its own whatever came before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut_off else "") + json.dumps(asdict(run)) + "\n")
