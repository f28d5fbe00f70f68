"""Every example runs as a reader would run it, and shows what it promises to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

# One fact that each example has to print: a pattern, and what its groups must satisfy.
SHOWS = {
    "01_one_layer.py": (r"without a token: (\[.*\]); experts without a gradient: (.*)", lambda a, b: a == b),
    "02_inside_routing.py": (r"bias alone: ([\d.]+) -> ([\d.]+)", lambda a, b: float(b) < float(a) / 4),
    "03_train_tiny.py": (r"bits per byte ([\d.]+) -> ([\d.]+)", lambda a, b: float(b) < float(a) / 2),
    "04_moe_in_your_model.py": (
        r"accuracy (\d+)%; guessing gives ([\d.]+)",
        lambda a, b: int(a) > 3 * float(b),
    ),
    "05_compare_backends.py": (r"the backends agree: (True)", bool),
    "07_olmoe_with_our_layers.py": (
        r"balancing loss: ([\d.]+) -> ([\d.]+)",
        lambda a, b: float(b) < 0.7 * float(a),
    ),
    "08_qwen3_moe_balanced_by_a_bias.py": (
        r"bias alone: ([\d.]+) -> ([\d.]+)",
        lambda a, b: float(b) < 0.5 * float(a),
    ),
    "09_a_long_context.py": (r"of rain = ' looks at byte (\d+), what follows it is at (\d+)", str.__eq__),
    "10_several_senses.py": (
        r"(\d+) of 20 held-out captions are right; guessing gives (\S+)",
        lambda a, b: int(a) > 8 * float(b),
    ),
    "06_kernels_alone.py": (r"difference from the definition (\S+) of", lambda error: float(error) < 1e-2),
}


def test_every_example_is_listed_here():
    assert sorted(SHOWS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_an_example_shows_what_it_promises(name, tmp_path):
    if "transformers" in (EXAMPLES / name).read_text(encoding="utf-8"):
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    pattern, holds = SHOWS[name]
    found = re.search(pattern, done.stdout)
    assert found, f"{pattern!r} is not in:\n{done.stdout}"
    assert holds(*found.groups()), found.group()


@pytest.mark.parametrize("name", ["07_olmoe_with_our_layers.py", "08_qwen3_moe_balanced_by_a_bias.py"])
def test_an_example_that_needs_transformers_says_so_without_it(name, tmp_path):
    hide = "import sys, runpy; sys.modules['transformers'] = None; runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", hide, EXAMPLES / name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "skipped: this example needs transformers" in done.stdout


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_an_example_is_short(name):
    lines = len((EXAMPLES / name).read_text(encoding="utf-8").splitlines())
    assert lines < (60 if name == "06_kernels_alone.py" else 100)
