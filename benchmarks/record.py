"""What a result is worth: which machine, which versions, which commit, when; and where it is kept."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy")


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the processor and how many cores it shows."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {_cores()} cores"


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, threads, versions, commit ("+dirty" when the working tree differs from it) and date."""
    return {
        "device": device.type,
        "hardware": hardware(device),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _installed(name) for name in PACKAGES},
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


def commit() -> str:
    """The short commit of this checkout, or "unknown" outside one."""
    here = Path(__file__).parent
    try:
        name = _git("rev-parse", "--short", "HEAD", cwd=here)
        changes = _git("status", "--porcelain", "--", ":!results", cwd=here.parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+dirty" if changes else name


def save(name: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Write `result`, which holds its "environment", as NAME_HARDWARE_DATE.json and say where."""
    facts = result["environment"]
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{slug(facts['hardware'])}_{facts['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def slug(text: str) -> str:
    """Letters and digits with single hyphens between them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column stands left, the others right."""
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


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
