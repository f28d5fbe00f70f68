"""The tables of the committed results, from their JSON alone: nothing is measured again.

python -m benchmarks.tables            print the newest result of every benchmark
python -m benchmarks.tables --write    put them into benchmarks/README.md, between their marks
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import layer_tables, scaling_tables
from benchmarks.record import RESULTS

README = Path(__file__).parent / "README.md"
RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "layer": layer_tables.render,
    "scaling_full": scaling_tables.render,
    "scaling_quick": scaling_tables.render,
}


def newest(name: str, folder: Path) -> Path | None:
    """The result of this benchmark with the latest date, or None."""
    return max(folder.glob(f"{name}_*.json"), key=lambda path: path.stem.rsplit("_", 1)[1], default=None)


def render(path: Path, name: str) -> str:
    """The tables of one result, with the file and the figures they come from."""
    record = json.loads(path.read_text(encoding="utf-8"))
    figures = sorted(path.parent.glob(f"{path.stem}_*.png"))
    parts = [f"From `results/{path.name}`.", RENDER[name](record)]
    parts += [f"![{figure.stem.rsplit('_', 1)[1]}](results/{figure.name})" for figure in figures]
    return "\n\n".join(parts)


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
    found = {name: path for name in RENDER if (path := newest(name, options.results))}
    rendered = {name: render(path, name) for name, path in found.items()}
    if options.write:
        options.readme.write_text(
            fill(options.readme.read_text(encoding="utf-8"), rendered), encoding="utf-8"
        )
    else:
        print("\n\n".join(rendered.values()) or f"no results in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
