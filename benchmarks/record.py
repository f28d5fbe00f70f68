"""What a result is worth: which machine, which versions, which commit, when; and where it is kept."""

import json
import os
import platform
import re
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moe import doctor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("triton", "transformers", "numpy")
FULL, QUICK, PARTIAL = "full", "quick", "partial"
NOT_A_SELECTION = ("quick", "full", "device", "jobs", "store", "results", "no_save")


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the processor and how many cores it shows."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {_cores()} cores"


def environment(device: torch.device) -> dict[str, Any]:
    """What `moe.doctor` says, and hardware, commit ("+dirty" when the working tree differs from it), date."""
    facts = doctor.environment(device)
    return facts | {
        "hardware": hardware(device),
        "cores": _cores(),
        "versions": {"torch": facts["torch"], **{name: facts["packages"][name] for name in PACKAGES}},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def headline(facts: dict[str, Any]) -> str:
    """One line over a table."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    return (
        f"{facts['hardware']}, {facts['threads']} threads, {versions}, "
        f"commit {facts['commit']}, {facts['date']}"
    )


def commit(root: Path = ROOT) -> str:
    """The short commit of this checkout, or "unknown" outside one. Results do not make it dirty."""
    try:
        name = _git("rev-parse", "--short", "HEAD", cwd=root)
        changes = _git("status", "--porcelain", "--", ":!benchmarks/results", cwd=root)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+dirty" if changes else name


def kind_of(parser: ArgumentParser, options: Namespace, *, quick: bool) -> str:
    """Full or quick when every option that selects what is measured has its default, else partial."""
    chosen = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    if chosen - {*NOT_A_SELECTION}:
        return PARTIAL
    return QUICK if quick else FULL


def save(name: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Write `result`, which holds its "environment", as NAME_HARDWARE_DATE.json and say where.

    The same measurement of the same day is replaced. Partial ones differ from each other: they are numbered.
    """
    facts = result["environment"]
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{slug(facts['hardware'])}_{facts['date']}"
    path, number = folder / f"{stem}.json", 1
    while name.endswith(f"_{PARTIAL}") and path.exists():
        number += 1
        path = folder / f"{stem}_{number}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def slug(text: str) -> str:
    """Letters and digits with single hyphens between them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of numbers: the first column stands left, the others right."""
    rows = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _git(*words: str, cwd: Path) -> str:
    return subprocess.run(["git", *words], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
