"""Where a run on a GPU is kept: one JSON file that is replaced, never half written, after every cell."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.record import PARTIAL, RESULTS, slug


def new_path(name: str, facts: dict[str, Any], folder: Path | None) -> Path:
    """NAME_HARDWARE_DATE.json; a partial run never replaces another one."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{slug(facts['hardware'])}_{facts['date']}"
    path, number = folder / f"{stem}.json", 1
    while name.endswith(f"_{PARTIAL}") and path.exists():
        number += 1
        path = folder / f"{stem}_{number}.json"
    return path


def write(record: dict[str, Any], path: Path) -> None:
    """Replace the file in one step."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: whoever reads it finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def load(path: Path) -> dict[str, Any]:
    """A record that was written."""
    return json.loads(path.read_text(encoding="utf-8"))
