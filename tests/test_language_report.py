"""The figure of an evaluation of languages shows what was measured, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from moe.probes.language.exam import BOTH, CONDITIONS, DICTIONARY
from moe.probes.language.record import LanguageRecord, LanguageRow

pytest.importorskip("matplotlib")

from matplotlib.container import ErrorbarContainer

from moe.report.language import draw_languages, language_figure

ROW = LanguageRow(
    run="a",
    step=100,
    total=300_000,
    active=200_000,
    condition=BOTH,
    words=11,
    letters="3",
    examples=0,
    filler=0,
    languages=2,
    exact=(True, True, True, False),
    shown=(True, False, False, False),
    given=(True, True, True, True),
    words_right=20,
    words_asked=22,
    read_seconds=0.1,
    seconds=1.0,
    path="early exit",
    dtype="float32",
    text={"root": "", "digest": "", "files": 0, "repeated": False},
)


def record(*rows: LanguageRow) -> LanguageRecord:
    return LanguageRecord(rows, {})


def bars(axes) -> dict[str, ErrorbarContainer]:
    """Every line that has a name."""
    return {str(one.get_label()): one for one in axes.containers if isinstance(one, ErrorbarContainer)}


def lines(axes) -> dict[str, np.ndarray]:
    """Their points (n 2)."""
    return {name: np.asarray(one.lines[0].get_xydata()) for name, one in bars(axes).items()}


def test_lines_are_the_shares_right_by_number_of_examples():
    rows = (ROW, replace(ROW, examples=4, exact=(True,) * 4), replace(ROW, condition=DICTIONARY))
    left, _ = language_figure(record(*rows)).axes
    found = lines(left)
    assert found[BOTH].tolist() == [[0, 75], [1, 100]]
    assert found[DICTIONARY].tolist() == [[0, 75]]
    assert found[f"{DICTIONARY}, sentences whose rules were shown"].tolist() == [[0, 100]]
    assert [label.get_text() for label in left.get_xticklabels()] == ["0", "4"]


def test_bars_reach_down_to_the_bound():
    left, _ = language_figure(record(ROW)).axes
    (bar,) = bars(left)[BOTH].lines[2]
    (segment,) = bar.get_segments()
    assert np.allclose(segment[:, 1], [100 * ROW.tally.lower_bound, 75])


def test_runs_are_pooled_and_each_is_a_dot():
    other = replace(ROW, run="b", exact=(False,) * 4)
    left, _ = language_figure(record(ROW, other)).axes
    assert lines(left)[BOTH].tolist() == [[0, 37.5]]
    dots = [line.get_ydata() for line in left.lines if line.get_marker() == "."]
    assert np.concatenate(dots).tolist() == [75, 0]


def test_fillers_are_compared_over_the_examples_that_all_of_them_have():
    rows = (ROW, replace(ROW, examples=8, exact=(False,) * 4), replace(ROW, filler=65536, exact=(True,) * 4))
    _, right = language_figure(record(*rows)).axes
    assert lines(right)[BOTH].tolist() == [[0, 75], [1, 100]]
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "64k"]


def test_every_condition_has_a_line_of_its_own_colour(tmp_path):
    rows = [replace(ROW, condition=condition, filler=f) for condition in CONDITIONS for f in (0, 1024)]
    left, right = language_figure(record(*rows)).axes
    colours = {one.lines[0].get_color() for name, one in bars(left).items() if name in CONDITIONS}
    assert len(colours) == len(CONDITIONS) == len(lines(right))
    path = draw_languages(record(*rows), tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_smallest_dictionary_is_drawn():
    left, _ = language_figure(record(replace(ROW, words=64, exact=(False,) * 4), ROW)).axes
    assert lines(left)[BOTH].tolist() == [[0, 75]]


def test_a_record_without_rows_is_refused():
    with pytest.raises(ValueError, match="no row to draw"):
        language_figure(record())
