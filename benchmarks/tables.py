"""The tables of the committed results, from their JSON alone: nothing is measured again.

Shown are full measurements, the newest of every hardware; where a benchmark has none, the quick ones, or
else those of some parts.

python -m benchmarks.tables            print them
python -m benchmarks.tables --write    put them into benchmarks/README.md, between their marks
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    gpu_attention_tables,
    gpu_needle_tables,
    gpu_tables,
    hf,
    hf_loading,
    layer_tables,
    long_context_tables,
    scaling_tables,
)
from benchmarks.record import FULL, PARTIAL, QUICK, RESULTS

README = Path(__file__).parent / "README.md"
RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "layer": layer_tables.render,
    "scaling_full": scaling_tables.render,
    "gpu": gpu_tables.render,
    "gpu_attention": gpu_attention_tables.render,
    "gpu_needle": gpu_needle_tables.render,
    "long_context": long_context_tables.render,
    "hf": hf.render,
    "hf_loading": hf_loading.render,
}
NOTES = {
    FULL: "",
    QUICK: " **Quick settings: few sizes or seeds; a full measurement has not been made yet.**",
    PARTIAL: " **Some parts; a full measurement has not been made yet.**",
}


def newest(name: str, folder: Path) -> list[Path]:
    """NAME_HARDWARE_DATE.json with the latest date, one of every hardware."""
    pattern = re.compile(rf"{name}_([^_]+)_\d{{4}}-\d\d-\d\d\.json")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):  # of one hardware by date: a later one replaces
        if match := pattern.fullmatch(path.name):
            found[match[1]] = path
    return list(found.values())


def render(path: Path, name: str) -> str:
    """The tables of one result, with the file and the figures they come from."""
    record = json.loads(path.read_text(encoding="utf-8"))
    figures = sorted(path.parent.glob(f"{path.stem}_*.png"))
    parts = [f"From `results/{path.name}`.{NOTES[record['mode']]}", RENDER[name](record)]
    parts += [f"![{figure.stem.rsplit('_', 1)[1]}](results/{figure.name})" for figure in figures]
    return "\n\n".join(parts)


def render_newest(folder: Path) -> dict[str, str]:
    """The tables of every benchmark that has results."""
    found = {}
    for name in RENDER:
        less = [f"{name.removesuffix('_full')}_{mode}" for mode in (QUICK, PARTIAL)]
        found[name] = next(filter(None, (newest(kind, folder) for kind in (name, *less))), [])
    return {name: "\n\n".join(render(path, name) for path in paths) for name, paths in found.items() if paths}


def fill(text: str, rendered: dict[str, str]) -> str:
    """Replace what stands between `<!-- NAME -->` and `<!-- end NAME -->`."""
    for name, body in rendered.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text = marks.sub(lambda match, body=body: f"{match[1]}\n{body}\n\n{match[2]}", text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Print, or write into the README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into benchmarks/README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(argv)
    rendered = render_newest(options.results)
    if options.write:
        options.readme.write_text(
            fill(options.readme.read_text(encoding="utf-8"), rendered), encoding="utf-8"
        )
    else:
        print("\n\n".join(rendered.values()) or f"no results in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
