"""Where something was measured, and files for what was."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moe import doctor
from moe.train.device import device_name
from moe.train.files import write_json

_PACKAGES = ("numpy", "einops", "triton")
_ROOT = Path(__file__).resolve().parents[3]  # of the checkout, where this is one


def measured_on(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date, for a record; the commit is None outside a checkout."""
    facts = doctor.environment(device)
    versions = {name: facts[name] for name in ("sparse_moe", "python", "torch")}
    return {
        "device": device_name(device),
        "platform": facts["platform"],
        "threads": facts["threads"],
        "cuda": facts["cuda"],
        "versions": {**versions, **{name: facts["packages"][name] for name in _PACKAGES}},
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def save_results(path: Path, results: Sequence[Any], environment: dict[str, Any]) -> None:
    """Write dataclasses as JSON, as a whole or not at all.

    Raises:
        ValueError: a number that JSON does not have.
        OSError: as `moe.train.files.write_bytes`.
    """
    write_json(path, {"environment": environment, "results": [asdict(result) for result in results]})


def check_target(path: Path, suffix: str) -> None:
    """Refuse a file that cannot be written, before anything is measured for it.

    Raises:
        ValueError: it does not end in `suffix`.
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
        PermissionError: its folder cannot be written to.
    """
    if path.suffix != suffix:
        raise ValueError(f"{path} must end in {suffix}: that is what will be written there.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the name of a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} is in a folder that does not exist. Make {path.parent} first.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written to. Give a file in another folder.")


def _commit() -> str | None:
    """The short commit of the checkout that this package is in, "+dirty" when the working tree differs.

    None outside one. Results do not make it dirty.
    """
    if not (_ROOT / ".git").exists():
        return None
    try:
        name, changes = (
            subprocess.run(["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True).stdout
            for words in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--", ":!benchmarks/results"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name.strip()}+dirty" if changes.strip() else name.strip()
