"""What is installed, and which backend each operation would use here and why not a faster one."""

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from moe.ops.choose import describe
from moe.version import __version__

EXTRAS = {
    "triton": "GPU kernels: pip install triton (Windows: triton-windows)",
    "tokenizers": "BPE: pip install '.[train]' in a clone of the repository",
    "matplotlib": "figures: pip install '.[train]' in a clone of the repository",
    "tensorboard": "live curves: pip install '.[track]' in a clone of the repository",
    "transformers": "Hugging Face models: pip install '.[hf]' in a clone of the repository",
    "gguf": "files for llama.cpp: pip install '.[hf]' in a clone of the repository",
    "lm_eval": "tasks of lm-eval: pip install '.[eval]' in a clone of the repository",
}


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and devices as plain data, for env.json."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "sparse_moe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": {name: installed(name) for name in ("einops", "safetensors", "numpy", *EXTRAS)},
    }


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def report(device: torch.device | None = None) -> list[str]:
    """The lines of `sparse-moe doctor`, made to be pasted into an issue."""
    facts = environment(device)
    rows = [
        ("sparse-moe", facts["sparse_moe"], ""),
        ("python", facts["python"], sys.executable),
        ("platform", facts["platform"], ""),
        ("torch", facts["torch"], f"CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"),
        ("GPU", ", ".join(facts["gpus"]) or "none", "" if facts["gpus"] else "training uses the CPU"),
        ("CPU threads", str(facts["threads"]), ""),
    ]
    rows += [(name, facts["packages"][name], "") for name in ("einops", "safetensors", "numpy")]
    rows += [_extra(name, facts["packages"][name]) for name in EXTRAS]
    operations = describe(torch.device(facts["device"]))
    return [
        *table(("what", "version", "note"), rows),
        "",
        *table(("operation", f"backend on {facts['device']}", "why"), operations),
    ]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A Markdown table with aligned columns."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _extra(name: str, found: str | None) -> tuple[str, str, str]:
    return (name, found, "") if found else (name, "missing", EXTRAS[name])
