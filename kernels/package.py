"""moe_triton as a folder for the Hugging Face kernel hub: `make kernel-package`, which needs no packages.

    FOLDER/build/torch-cuda/...     what `kernels.get_kernel` loads, one folder a backend
    FOLDER/torch-ext/moe_triton/    the same sources as `kernel-builder` wants them, beside build.toml
    FOLDER/README.md, LICENSE       the card, the licence

Two builds can live in one process, and beside an installed moe_triton: each registers its operators under a
namespace of its own, made of backend and sources. Only that name differs from the package in this folder.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME, PACKAGE = "moe-triton", "moe_triton"
VERSION = 1  # of the interface; the hub keeps a branch for each
KERNELS_MINVER = "0.17.0"  # of the package `kernels`: the layout without a folder inside the variant
BACKENDS = {"cuda": "CUDA", "rocm": "ROCm", "cpu": "CPU"}
PUBLISHED = ("cuda", "rocm")  # on a CPU the kernels run in Triton's interpreter alone

OPERATOR = re.compile(rf'custom_op\("{PACKAGE}::(\w+)"')
IMPORT_OF_PREFIX = "from ._ops import add_op_namespace_prefix"
ALLOWED_IMPORTS = {"torch", "triton", *sys.stdlib_module_names}


def build_package(folder: Path, backends: tuple[str, ...] = PUBLISHED) -> list[Path]:
    """Write the folder; returns its variants. A folder that this wrote earlier is replaced as a whole.

    Raises:
        ValueError: an unknown backend, a folder that holds something else, or sources that the hub refuses.
    """
    unknown = [backend for backend in backends if backend not in BACKENDS]
    if unknown or not backends:
        raise ValueError(f"backends {unknown or 'none'} must be among {', '.join(BACKENDS)}.")
    if folder.exists() and any(folder.iterdir()) and not _is_ours(folder):
        raise ValueError(f"{folder} holds something else; name a new folder, or remove it.")
    sources = hub_sources()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.tmp-") as temporary:
        new = Path(temporary) / "package"
        _write(new / "torch-ext" / PACKAGE, sources)
        for backend in backends:
            _write(new / "build" / f"torch-{backend}", sources | _own_files(backend, sources))
        _write(new, {"build.toml": _build_toml(backends), "README.md": _card(backends)})
        shutil.copy(HERE.parent / "LICENSE", new / "LICENSE")
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    return [folder / "build" / f"torch-{backend}" for backend in backends]


def hub_sources() -> dict[str, str]:
    """The files of moe_triton by name, with operators named by `_ops.add_op_namespace_prefix`.

    Raises:
        ValueError: an import or the name of an operator that would not work in the hub.
    """
    files = sorted(path for pattern in ("*.py", "tables/*.json") for path in (HERE / PACKAGE).glob(pattern))
    texts = {path.relative_to(HERE / PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in files}
    return {name: _hub_source(name, text) if name.endswith(".py") else text for name, text in texts.items()}


def unique_id(sources: Mapping[str, str]) -> str:
    """Seven letters that change whenever a source does."""
    digest = hashlib.sha256()
    for name, text in sorted(sources.items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:7]


def _hub_source(name: str, text: str) -> str:
    new, count = OPERATOR.subn(r'custom_op(add_op_namespace_prefix("\1")', text)
    if count:
        last = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)][-1]
        lines = new.splitlines(keepends=True)
        new = "".join([*lines[: last.end_lineno], IMPORT_OF_PREFIX + "\n", *lines[last.end_lineno :]])
    _check(name, new)
    return new


def _check(name: str, text: str) -> None:
    """Refuse imports that the hub does not have, and operators that keep their name."""
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        for module in modules:
            if module.split(".")[0] not in ALLOWED_IMPORTS:
                raise ValueError(
                    f"{name} imports {module}; in the hub there are torch, triton and relative ones."
                )
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and f"{PACKAGE}::" in node.value:
            raise ValueError(
                f"{name} names the operator {node.value!r} itself, which would clash between builds."
            )


def _own_files(backend: str, sources: Mapping[str, str]) -> dict[str, str]:
    """What differs between variants: the namespace of the operators, and metadata.json."""
    namespace = f"_{PACKAGE}_{backend}_{unique_id(sources)}"
    metadata = {
        "id": namespace,
        "name": NAME,
        "version": VERSION,
        "kernels-minver": KERNELS_MINVER,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    return {
        "_ops.py": OPS.format(namespace=namespace),
        "metadata.json": json.dumps(metadata, indent=2) + "\n",
    }


OPS = '''"""The namespace under which this build registers its operators."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"{namespace}::{{op_name}}"
'''


def _build_toml(backends: tuple[str, ...]) -> str:
    listed = ", ".join(f'"{backend}"' for backend in backends)
    return BUILD_TOML.format(name=NAME, version=VERSION, backends=listed)


BUILD_TOML = """[general]
edition = 5
name = "{name}"
version = {version}
license = "apache-2.0"
backends = [{backends}]

[torch-noarch]
"""


def _card(backends: tuple[str, ...]) -> str:
    return CARD.format(name=NAME, version=VERSION, backends=", ".join(BACKENDS[b] for b in backends))


CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- mixture-of-experts
---

# {name}

Every operation of a sparse Mixture-of-Experts layer in Triton, forward and backward: `sort_by_expert`,
`dispatch`, `grouped_linear`, `activate`, `combine`, and `experts_ffn`, which is all of them at once.
Pure Python and Triton, for {backends}.

```python
import torch
from kernels import get_local_kernel          # or get_kernel("OWNER/{name}", version={version})
from pathlib import Path

moe = get_local_kernel(Path("this folder"))
t, k, e, d, h = 1024, 2, 8, 512, 256          # tokens, choices, experts, model width, expert width
x = torch.randn(t, d, device="cuda", dtype=torch.bfloat16)
up_proj = torch.randn(e, 2 * h, d, device="cuda", dtype=torch.bfloat16) / d**0.5
down_proj = torch.randn(e, d, h, device="cuda", dtype=torch.bfloat16) / h**0.5
weights, experts = torch.randn(t, e, device="cuda").softmax(-1).topk(k)
y = moe.experts_ffn(x, weights, *moe.sort_by_expert(experts, e), up_proj, down_proj)
```
"""


def _is_ours(folder: Path) -> bool:
    toml = folder / "build.toml"
    return toml.is_file() and f'name = "{NAME}"' in toml.read_text(encoding="utf-8")


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Build the folder named on the command line."""
    parser = argparse.ArgumentParser(description="moe_triton as a folder for the Hugging Face kernel hub")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backends", nargs="+", default=list(PUBLISHED), choices=list(BACKENDS))
    arguments = parser.parse_args()
    try:
        variants = build_package(arguments.folder, tuple(arguments.backends))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, variants)))


if __name__ == "__main__":
    main()
