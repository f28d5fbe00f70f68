"""A needle evaluation is kept, printed and drawn without a question lost, counted twice or rounded up."""

import json
from dataclasses import replace
from math import comb

import numpy as np
import pytest

from moe.probes.needle.positions import ContextLoss
from moe.probes.needle.record import NeedleRecord, NeedleRow, ask_once, merge, tally
from moe.probes.needle.table import (
    format_count,
    format_length,
    format_percent,
    needle_table,
    verdict,
    verdicts,
)

pytest.importorskip("matplotlib")

import matplotlib
import matplotlib.image

from moe.report.needle import RECALL_COLOURS, draw_needles, draw_positions, needle_figure

TEXT = {"root": "site-packages", "digest": "abc", "files": 12, "repeated": False}
ROW = NeedleRow(
    run="tiny",
    step=2496,
    total=261_342,
    active=112_000,
    variant="",
    length=2**16,
    template="sentence",
    haystacks=2,
    needles=256,
    depths=(0.0, 0.1, 0.25, 0.5, 0.95, 1.0),
    correct=(True, True, False, True, True, False),
    prefill_seconds=0.64,
    answer_seconds=0.3,
    cache_bytes=33_554_432,
    peak_bytes=1_200_000_000,
    path="early exit, chunks of 8192",
    dtype="float32",
    text=TEXT,
    trained_length=3072,
)
RECORD = NeedleRecord((ROW,), {"device": "cpu", "versions": {"torch": "2.13"}, "commit": "abc1234"})


def asked(right: int, count: int, **changes) -> NeedleRow:
    """A row with so many questions at even depths; the last ones are wrong."""
    depths = tuple((i + 0.5) / count for i in range(count))
    return replace(ROW, depths=depths, correct=tuple(i < right for i in range(count)), **changes)


# The record


def test_a_record_comes_back_from_json_bit_for_bit(tmp_path):
    odd = replace(ROW, depths=(0.1 + 0.2, 1 / 3), correct=(True, False), prefill_seconds=1e-17, peak_bytes=0)
    record = NeedleRecord((ROW, odd), RECORD.environment)
    record.save(tmp_path / "needle.json")
    assert NeedleRecord.load(tmp_path / "needle.json") == record


def test_a_file_without_a_key_that_has_a_default_is_read(tmp_path):
    record = NeedleRecord((replace(ROW, trained_length=0),), {})
    record.save(tmp_path / "needle.json")
    data = json.loads((tmp_path / "needle.json").read_text())
    del data["rows"][0]["trained_length"]
    (tmp_path / "needle.json").write_text(json.dumps(data))
    assert NeedleRecord.load(tmp_path / "needle.json") == record


def test_right_asked_and_recall():
    assert (ROW.right, ROW.asked, ROW.recall) == (4, 6, 4 / 6)


@pytest.mark.parametrize(("right", "count"), [(300, 300), (199, 200), (496, 500), (3, 7)])
def test_at_the_bound_so_many_successes_have_a_chance_of_one_in_twenty(right, count):
    p = asked(right, count).lower_bound
    chance = sum(comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(right, count + 1))
    assert chance == pytest.approx(0.05, rel=1e-6)


def test_every_question_is_in_the_fifth_of_its_depth():
    assert ROW.quintiles == [(2, 2), (0, 1), (1, 1), (0, 0), (1, 2)]  # depth 1 belongs to the last
    edges = replace(ROW, depths=(0.2, 0.4, 0.6, 0.8), correct=(True,) * 4)
    assert edges.quintiles == [(0, 0), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_merging_keeps_every_row_once_and_says_where_environments_differ():
    other = NeedleRecord((ROW, replace(ROW, length=2**20)), {**RECORD.environment, "device": "cuda"})
    merged = merge([RECORD, other, RECORD])
    assert merged.rows == (ROW, other.rows[1])
    assert merged.environment == {**RECORD.environment, "device": ["cpu", "cuda"]}
    assert merge([merged, RECORD]) == merged
    assert merge([]) == NeedleRecord((), {})


def test_a_question_that_was_asked_again_counts_once():
    again = replace(ROW, dtype="bfloat16", correct=(True,) * 6)
    elsewhere = replace(ROW, text={**TEXT, "digest": "other"})
    assert ask_once([ROW, again, elsewhere]) == [again, elsewhere]
    assert tally(ask_once([ROW, again, elsewhere])) == (10, 12)
    assert len(ask_once([ROW, replace(ROW, step=100), replace(ROW, variant="shuffled values")])) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (0.5,)}, "depths has 1 questions and correct has 6"),
        ({"depths": (), "correct": ()}, "correct is empty"),
        ({"depths": (0.1, 0.1, 0.1, 0.1, 0.1, 1.5)}, r"depths=\[.*\] must be a list of numbers from 0 to 1"),
        ({"correct": (1, 1, 0, 1, 1, 0)}, "correct=.* must be a list of true and false"),
        ({"length": 0}, "length=0 must be at least 1"),
        ({"length": 65536.0}, "length=65536.0 must be a whole number"),
        ({"needles": True}, "needles=True must be a whole number"),
        ({"answer_seconds": float("nan")}, "answer_seconds=nan must be a number of seconds"),
        ({"run": None}, "run=None must be a string"),
        ({"text": {"root": "a", "digest": "b", "files": 3}}, "key 'repeated' is missing"),
        ({"text": {**TEXT, "repeated": "no"}}, "text.repeated='no' must be true or false"),
    ],
)
def test_a_row_refuses_what_no_evaluation_measures(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ROW, **change)


def _damage(path, damage):
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("rows"), "key 'rows' is missing"),
        (lambda data: data.update(rows={}), r"rows=\{\} must be a list"),
        (lambda data: data.update(environment=[]), r"environment=\[\] must be an object"),
        (lambda data: data["rows"].append(7), r"rows\[1\]=7 must be an object"),
        (lambda data: data["rows"][0].pop("correct"), r"rows\[0\]: the key 'correct' is missing"),
        (lambda data: data["rows"][0].update(recal=1), r"rows\[0\]: the key 'recal' is unknown"),
        (lambda data: data["rows"][0].update(length="64k"), r"rows\[0\]: length='64k' must be a whole"),
        (
            lambda data: data["rows"][0]["correct"].pop(),
            r"rows\[0\]: depths has 6 questions and correct has 5",
        ),
        (lambda data: data["rows"][0]["text"].update(files=-1), r"rows\[0\]: text.files=-1 must be"),
        (
            lambda data: data["rows"][0].update(prefill_seconds=float("inf")),
            r"rows\[0\]: prefill_seconds=inf",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_the_key(tmp_path, damage, message):
    path = tmp_path / "needle.json"
    RECORD.save(path)
    _damage(path, damage)
    with pytest.raises(ValueError, match=message) as refusal:
        NeedleRecord.load(path)
    assert str(path) in str(refusal.value)


def test_half_a_file_is_refused_with_its_name(tmp_path):
    path = tmp_path / "needle.json"
    RECORD.save(path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match=r"needle\.json is not valid JSON"):
        NeedleRecord.load(path)


# The table


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (2**14, "16k"),
        (2**16, "64k"),
        (2**18, "256k"),
        (2**20, "1M"),
        (5 * 2**20, "5M"),
        (10**7, "10M"),
        (10 * 2**20, "10240k"),
        (10**6, "1,000,000"),
        (1000, "1,000"),
    ],
)
def test_lengths_are_written_as_people_say_them(length, text):
    assert format_length(length) == text


def test_no_two_lengths_look_alike():
    lengths = {i * unit for unit in (1, 1000, 2**10, 10**6, 2**20) for i in range(1, 2000)}
    assert len({format_length(length) for length in lengths}) == len(lengths)


def test_shares_are_cut_off_and_never_rounded_up():
    assert [format_percent(right / 2000) for right in (2000, 1999, 1140, 0)] == [
        "100.0",
        "99.9",
        "57.0",
        "0.0",
    ]
    for right in range(1001):
        assert format_percent(right / 1000) == f"{right // 10}.{right % 10}"


def test_parameters_have_three_digits_at_most():
    counts = (999, 1000, 261_342, 999_600, 1_400_000, 7_240_000_000)
    assert [format_count(count) for count in counts] == ["999", "1k", "261k", "1M", "1.4M", "7.24B"]


def test_a_verdict_is_one_line_with_n_and_the_bound():
    assert verdict(asked(500, 500)) == "64k sentence: 500/500 = 100.0 % (>= 99.4 %)"
    row = asked(498, 500, length=10**7, text={**TEXT, "repeated": True})
    assert verdict(row) == "10M sentence, repeated text: 498/500 = 99.6 % (>= 98.7 %)"


def test_verdicts_pool_haystacks_and_keep_models_apart():
    half = asked(250, 250, text={**TEXT, "digest": "second"})
    again = asked(249, 250, dtype="bfloat16")
    assert verdicts(NeedleRecord((again, asked(250, 250), half), {})) == [
        "64k sentence: 500/500 = 100.0 % (>= 99.4 %)"
    ]
    control = asked(0, 250, variant="shuffled values")
    assert verdicts(NeedleRecord((asked(250, 250), control), {})) == [
        "tiny: 64k sentence: 250/250 = 100.0 % (>= 98.8 %)",
        "tiny, shuffled values: 64k sentence: 0/250 = 0.0 % (>= 0.0 %)",
    ]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_of_the_table_holds_what_was_measured():
    first, empty, head, _, line, _, path = needle_table(RECORD)
    assert (first, empty) == ("device: cpu; versions: torch 2.13; commit: abc1234", "")
    assert dict(zip(_cells(head), _cells(line), strict=True)) == {
        "run": "tiny",
        "template": "sentence",
        "length": "64k",
        "haystacks x needles": "2 x 256",
        "n": "6",
        "right": "4",
        "recall %": "66.6",
        ">= %": "27.1",
        "worst fifth of the depth": "0/1 at 20-40 %",
        "prefill s": "0.64",
        "tokens/s": "102,400",
        "ms a query": "50",
        "memory (cache / peak)": "33.6 MB float32 / 1.20 GB",
        "text": "12 files",
    }
    assert path == (
        "tiny: 261k parameters, 112k active, step 2496; early exit, chunks of 8192; float32 (64k)"
    )


def test_repeated_text_and_what_was_not_measured_are_marked():
    row = replace(ROW, text={**TEXT, "repeated": True}, peak_bytes=0, prefill_seconds=0.0)
    cells = _cells(needle_table(NeedleRecord((row,), {}))[2])
    assert cells[-2:] == ["33.6 MB float32 / -", "REPEATED text"]
    assert cells[-4] == "-"


def test_steps_of_one_run_are_told_apart_and_lengths_share_a_path():
    rows = (ROW, replace(ROW, step=100), replace(ROW, length=2**20), replace(ROW, variant="shuffled values"))
    lines = needle_table(NeedleRecord(rows, {}))
    names = [_cells(line)[0] for line in lines[2:6]]
    assert names == ["tiny, step 2496", "tiny, step 100", "tiny, step 2496", "tiny, shuffled values"]
    assert [line.rpartition("(")[2] for line in lines[7:]] == ["64k, 1M)", "64k)", "64k)"]


def test_of_equal_fifths_the_one_with_the_fewest_questions_is_the_worst():
    row = replace(ROW, depths=(0.1, 0.1, 0.3, 0.9, 0.9), correct=(True,) * 5)
    assert "1/1 at 20-40 %" in needle_table(NeedleRecord((row,), {}))[2]
    lost = replace(row, correct=(True, False, True, True, True))
    assert "1/2 at 0-20 %" in needle_table(NeedleRecord((lost,), {}))[2]


# The figures

KNOWN = {(0, 0): (2, 2), (1, 0): (1, 2), (3, 0): (0, 3), (1, 1): (9, 10)}  # (depth, length): right, asked


def known_record(**changes) -> NeedleRecord:
    """Key-value needles in the cells of KNOWN, four depths by the lengths 64k and 10M; sentences at 64k."""
    rows = []
    for column, length in enumerate((2**16, 10**7)):
        cells = {depth: cell for (depth, at), cell in KNOWN.items() if at == column}
        depths = tuple((depth + 0.5) / 4 for depth, (_, count) in cells.items() for _ in range(count))
        correct = tuple(i < right for right, count in cells.values() for i in range(count))
        changed = {"length": length, "template": "key_value", "depths": depths, "correct": correct} | changes
        rows.append(replace(ROW, **changed))
    return NeedleRecord((*rows, asked(6, 6, **changes)), {})


def colours_of_cell(path, figure, panel, column, depth) -> np.ndarray:
    """Colours (n 3) of the pixels in the upper left of a cell, beside its text."""
    pixels = matplotlib.image.imread(path)[..., :3]
    x, y = np.linspace(column + 0.05, column + 0.2, 40), np.linspace(25 * depth + 3, 25 * depth + 8, 40)
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    shares = figure.transFigure.inverted().transform(figure.axes[panel].transData.transform(points))
    rows, columns = (1 - shares[:, 1]) * len(pixels), shares[:, 0] * pixels.shape[1]
    return pixels[rows.astype(int), columns.astype(int)]


def test_every_cell_has_the_colour_of_its_recall(tmp_path):
    path = draw_needles(known_record(), tmp_path / "needle.png", depths=4)
    figure = needle_figure(known_record(), depths=4)
    figure.savefig(tmp_path / "again.png", dpi=140)
    for (depth, column), (right, count) in KNOWN.items():
        found = colours_of_cell(path, figure, 0, column, depth)
        assert np.abs(found - RECALL_COLOURS(right / count)[:3]).max() < 2 / 255, (depth, column)


def test_a_cell_without_questions_is_grey_and_hatched(tmp_path):
    path = draw_needles(known_record(), tmp_path / "needle.png", depths=4)
    figure = needle_figure(known_record(), depths=4)
    figure.savefig(tmp_path / "again.png", dpi=140)
    for panel, column, depth in ((0, 0, 2), (0, 1, 0), (1, 1, 3)):  # sentences were not asked at 10M
        found = colours_of_cell(path, figure, panel, column, depth)
        assert np.ptp(found, axis=1).max() < 2 / 255
        assert np.ptp(found[:, 0]) > 0.1
        assert np.median(found) == pytest.approx(0xE4 / 255, abs=2 / 255)


def test_there_is_a_panel_for_each_template_and_its_words_are_right():
    again = known_record(dtype="bfloat16").rows  # the same questions: they count once
    figure = needle_figure(merge([known_record(), NeedleRecord(again, {})]), depths=4)
    key_value, sentence, _ = figure.axes
    assert key_value.get_title() == "key_value\n12/17 = 70.5 % (≥ 47.8 %)"
    assert sentence.get_title() == "sentence\n6/6 = 100.0 % (≥ 60.6 %)"
    assert {text.get_text() for text in key_value.texts} == {"2/2", "1/2", "0/3", "9/10"}
    labels = [label.get_text() for label in key_value.get_xticklabels()]
    assert labels == ["64k\n3/7\n≥ 12.8 %", "10M\n9/10\n≥ 60.5 %"]
    assert [label.get_text() for label in sentence.get_xticklabels()][1] == "10M"
    assert key_value.get_ylim() == (100, 0)  # the beginning of the haystack is at the top
    assert figure.get_suptitle() == (
        "tiny: 261k parameters, 112k active, trained on sequences of 3,072 bytes\n"
        "18/23 = 78.2 % (≥ 59.6 %), one-sided 95 % bound"
    )


def test_many_cells_are_annotated_only_where_something_is_missing():
    rows = tuple(asked(99, 100, length=2**power) for power in range(10, 20))
    figure = needle_figure(NeedleRecord(rows, {}))
    assert [text.get_text() for text in figure.axes[0].texts] == ["9/10"] * 10
    few = needle_figure(NeedleRecord(rows[:6], {}))
    assert len(few.axes[0].texts) == 60


def test_models_have_rows_of_panels_and_variants_figures_of_their_own():
    other = known_record(run="other", variant="")
    control = known_record(variant="shuffled values")
    record = NeedleRecord((*known_record().rows, *other.rows, *control.rows), {})
    titles = [axes.get_title().partition("\n")[0] for axes in needle_figure(record).axes[:-1]]
    assert titles == ["tiny, key_value", "tiny, sentence", "other, key_value", "other, sentence"]
    assert len(needle_figure(record, variant="shuffled values").axes) == 3


def test_repeated_text_is_said_under_its_length():
    repeated = known_record(text={**TEXT, "repeated": True})
    labels = [label.get_text() for label in needle_figure(repeated).axes[0].get_xticklabels()]
    assert all(label.endswith("\nrepeated text") for label in labels)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"no row of variant='dense' to draw; its variants: \[''\]"):
        needle_figure(RECORD, variant="dense")
    with pytest.raises(ValueError, match="depths=0 must be at least 1"):
        needle_figure(RECORD, depths=0)


def _as_seen(colours, vision):
    """CIELAB of sRGB colours (n 3) as people with such a colour vision see them (Machado et al. 2009)."""
    linear = np.where(colours < 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(linear @ vision.T, 1e-3, 1) @ xyz.T / [0.9505, 1, 1.089]).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


VISIONS = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


@pytest.mark.parametrize("vision", VISIONS)
def test_people_who_confuse_red_and_green_tell_recalls_apart_better_than_with_those(vision):
    def nearest(colour_map):
        seen = _as_seen(colour_map([0.0, 0.5, 0.9, 1.0])[:, :3], np.array(VISIONS[vision]))
        return min(np.linalg.norm(seen[i] - seen[j]) for i in range(4) for j in range(i))

    assert nearest(RECALL_COLOURS) > nearest(matplotlib.colormaps["RdYlGn"])


LOSSES = [ContextLoss(context=2**k, loss=2 - k / 20, stderr=0.01) for k in (20, 9, 14)]
NOTHING_BEFORE = ContextLoss(context=0, loss=3.0, stderr=0.2)


def test_losses_are_drawn_by_context_in_ascending_order_a_line_for_each_run(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "errorbar",
        lambda self, x, y, yerr, label, **_: drawn.append((label, x, y, yerr)),
    )
    monkeypatch.setattr(matplotlib.axes.Axes, "legend", lambda self: None)
    draw_positions({"a": LOSSES, "b": [LOSSES[0], NOTHING_BEFORE]}, tmp_path / "loss.png")
    assert drawn == [
        ("a", [2**9, 2**14, 2**20], [2 - 9 / 20, 2 - 14 / 20, 1.0], [0.01] * 3),
        ("b", [0, 2**20], [3.0, 1.0], [0.2, 0.01]),
    ]


def test_the_loss_has_a_figure_with_something_to_see(tmp_path):
    path = draw_positions({"tiny": [*LOSSES, NOTHING_BEFORE]}, tmp_path / "loss.png")
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    blue = (np.abs(pixels - [0x2B, 0x5C, 0x8A]).max(-1) < 3).nonzero()
    assert np.ptp(blue[0]) > 0.6 * len(pixels) and np.ptp(blue[1]) > 0.6 * pixels.shape[1]
    assert draw_positions({"tiny": LOSSES[:1]}, tmp_path / "one").exists()  # without a suffix it is a PNG
    assert draw_positions({"tiny": [NOTHING_BEFORE]}, tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "no loss to draw"),
        ({"a": LOSSES, "b": []}, "no loss to draw"),
        ({"a": [replace(LOSSES[0], context=-1)]}, r"a: losses\[0\] has context=-1"),
        ({"a": [*LOSSES, replace(LOSSES[0], loss=float("nan"))]}, r"a: losses\[3\] has loss=nan"),
    ],
)
def test_losses_that_cannot_be_drawn_are_refused(tmp_path, losses, message):
    with pytest.raises(ValueError, match=message):
        draw_positions(losses, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = draw_needles(RECORD, tmp_path / "needle.png")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not supported"):
        draw_needles(RECORD, tmp_path / "needle.odd")
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", _stop)
    with pytest.raises(KeyboardInterrupt):
        draw_needles(RECORD, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def _stop(self, *_, **__):
    raise KeyboardInterrupt
