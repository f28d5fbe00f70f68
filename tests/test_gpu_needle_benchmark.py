"""benchmarks.gpu_needle without a GPU: it trains, asks and times within its minutes, and judges right."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_needle, gpu_needle_parts, gpu_needle_tables, tables
from benchmarks.gpu_needle_parts import Clock, OutOfTimeError, ask_about, read_strictly, tallies
from benchmarks.gpu_needle_tables import RECALL_GOALS, STRICT_RECALL
from benchmarks.gpu_needle_train import ROUND, steps_within
from moe.probes.statistics import lower_bound

MILLION, TEN_MILLION = 2**20, 10**7
SMALL = (
    *("model.hidden_size=16", "model.head_dim=16", "model.moe_intermediate_size=8"),
    *("data.sequence_length=200", "needle.short_fraction=0.0", "train.batch_size=1", "train.steps=50"),
)


def write_lines(folder: Path, files: int) -> Path:
    """Files of 3 kB of lines, none twice."""
    folder.mkdir()
    for i in range(files):
        lines = [f"line {j} of {folder.name} {i}: {j * j + i}\n" for j in range(100)]
        (folder / f"{i}.py").write_text("".join(lines))
    return folder


# Time


def test_steps_are_whole_intervals_that_fit_and_at_least_one():
    assert steps_within(100.0, 0.05, 2400) == 1800
    assert steps_within(1000.0, 0.05, 2430) == 2400
    assert steps_within(-3.0, 0.05, 2400) == ROUND


def test_what_takes_longer_than_is_left_does_not_begin_and_stops_in_the_middle():
    clock = Clock(time.perf_counter() + 50)
    clock.need(40)
    clock.guard(1, 2, 3.0)
    with pytest.raises(OutOfTimeError, match="about 60 s"):
        clock.need(60)
    over = Clock(time.perf_counter() - 1)
    assert over.left_s == 0
    with pytest.raises(OutOfTimeError, match="1 of 2 tokens"):
        over.guard(1, 2, 3.0)


def _job(clock: Clock, run=None) -> gpu_needle_parts.Job:
    return gpu_needle_parts.Job(torch.device("cpu"), run, clock, None, "float32", "bfloat16")


def test_the_time_of_all_pairs_is_foretold_by_the_square_of_the_length():
    job, earlier = _job(Clock(time.perf_counter() + 50)), {"length": 100, "seconds": 1.0}
    with pytest.raises(OutOfTimeError, match="about 64 s"):
        read_strictly(job, 800, earlier)


def test_without_a_run_the_pairs_are_timed_and_nobody_is_asked():
    job = _job(Clock(time.perf_counter() + 500))
    cell = read_strictly(job, 300, None)
    assert (cell["pattern"], cell["length"], cell["weights"]) == ("LLGL", 300, "random")
    assert cell["flops"] == 2 * 300**2 * 2 * 64 and "all pairs of places in layers [2]" in cell["path"]
    assert cell["cache_bytes"] >= 300 * 2 * 64 * 2
    with pytest.raises(ValueError, match="--run"):
        next(ask_about(job, 300, 1, 1))


def test_answers_are_counted_by_template():
    answers = [("key_value", 0.1, True), ("sentence", 0.2, False), ("key_value", 0.3, False)]
    assert tallies(answers) == [
        {"template": "key_value", "right": 1, "asked": 2},
        {"template": "sentence", "right": 0, "asked": 1},
    ]


# Goals


def haystack(right: int, asked: int, length: int) -> dict:
    """One haystack whose first questions of each template were answered right."""
    answers = [[name, i / asked, i < right] for name in ("key_value", "sentence") for i in range(asked)]
    return {
        "answers": answers, "needles": 2000, "path": "p", "prefill_seconds": 2.0, "answer_seconds": 4.0,
        "cache_bytes": 10**8, "peak_bytes": 10**9, "seconds": 7.0,
        "text": {"root": "r", "digest": f"{right}" * 20, "files": 3, "repeated": False},
    }  # fmt: skip


def record_of(
    right: list[int], asked: int = 100, *, length: int = MILLION, strict: dict | None = None
) -> dict:
    """A record with one haystack of recall-1M for each number, and what else is given."""
    part = "recall-1M" if length <= MILLION else "recall-10M"
    facts = {
        "hardware": "X",
        "threads": 1,
        "versions": {"torch": "2"},
        "commit": "c",
        "date": "d",
        "driver": "5",
    }
    return {
        "mode": "full",
        "environment": facts,
        "rates": {"flops_per_second": 7e14, "bytes_per_second": 3e12},
        "dtypes": {"recall": "float32", "strict": "bfloat16"},
        "model": {"run": "r", "step": 1, "total": 9, "active": 5, "trained_length": 3072},
        "training": {"seconds": 90.0, "steps": 2400, "step_ms": 30.0, "changes": {"train.batch_size": 8}},
        "recall": {part: {"length": length, "haystacks": [haystack(r, asked, length) for r in right]}},
        "strict": strict or {},
        "left_out": {"strict-10M": "takes about 900 s, 12 s were left"},
    }


def met(record: dict, *words: str) -> bool | None:
    (found,) = [g for g in gpu_needle_tables.judge(record) if all(word in g["goal"] for word in words)]
    return found["met"]


@pytest.mark.parametrize(
    ("right", "is_met"),
    [
        ([100] * 10, True),
        ([100] * 9 + [97], True),
        ([100] * 9 + [96], False),
        ([100] * 9, None),  # too few haystacks to be a success ...
        ([90] * 9, False),  # ... but enough to fail
    ],
)
def test_997_of_1000_over_ten_haystacks_are_enough_and_fewer_questions_are_not(right, is_met):
    record = record_of(right)
    assert met(record, "1M, key_value: at least 997") is met(record, "1M, sentence: at least 997") is is_met
    assert met(record, "10M, key_value") is None


def test_496_of_500_over_five_haystacks_of_ten_million():
    assert met(record_of([99] * 4 + [100], length=TEN_MILLION), "10M, sentence") is True
    assert met(record_of([99] * 5, length=TEN_MILLION), "10M, sentence") is False
    assert met(record_of([100] * 5, length=TEN_MILLION // 2), "10M, sentence") is None, "another length"


def strict_cell(length: int, seconds: float, **more) -> dict:
    cell = {"length": length, "pattern": "LLGL", "path": "p", "dtype": "bfloat16", "seconds": seconds,
            "cache_bytes": 1, "peak_bytes": 1, "flops": 2.8e14, "weights": "random",
            "recall": []}  # fmt: skip
    return cell | more


def test_exact_attention_has_a_minute_for_one_million_and_eight_for_ten():
    cells = {"strict-1M": strict_cell(MILLION, 59.0), "strict-10M": strict_cell(TEN_MILLION, 481.0)}
    record = record_of([], strict=cells)
    assert (met(record, "under 60 s"), met(record, "under 480 s")) == (True, False)
    cells["strict-1M"]["length"] = 2**13
    assert met(record, "under 60 s") is None


def test_a_strict_read_needs_99_of_100_answers():
    def judged(right: int, asked: int) -> bool | None:
        recall = [{"template": "key_value", "right": right, "asked": asked}]
        cells = {STRICT_RECALL: strict_cell(MILLION, 9.0, recall=recall)}
        return met(record_of([], strict=cells), "every pair of 1M places, key_value")

    assert [judged(99, 100), judged(98, 100), judged(50, 50)] == [True, False, None]


def test_the_tables_show_recall_rates_and_what_was_left_out():
    cells = {"strict-1M": strict_cell(MILLION, 2.0)}
    record = record_of([100] * 9 + [99], strict=cells)
    record["goals"] = gpu_needle_tables.judge(record)
    text = gpu_needle_tables.render(json.loads(json.dumps(record)))
    bound = math.floor(1000 * lower_bound(999, 1000)) / 10
    for words in (
        "999",
        f"{bound}",
        "10 x 2000",
        "140",
        "20%",
        "takes about 900 s",
        "train.batch_size=8",
        "driver 5",
    ):
        assert words in text, words


def test_every_part_has_a_goal():
    judged = {*RECALL_GOALS, *gpu_needle_tables.STRICT_GOALS, STRICT_RECALL}
    assert judged == set(gpu_needle.PARTS)


# The whole


def test_without_a_gpu_it_says_so_and_returns_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_needle.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"{gpu_needle.NO_GPU}\n" and captured.out == ""


def test_unknown_parts_and_settings_are_refused_before_anything_runs(capsys):
    for words in (["--parts", "2M"], ["--set", "train.stepz=5"]):
        with pytest.raises(SystemExit):
            gpu_needle.parse(words)
    told = capsys.readouterr().err
    assert "no part 2M" in told and "train has no key 'stepz'" in told


@pytest.mark.parametrize(
    ("words", "kind"),
    [("", "full"), ("--run a --commit c --minutes 5 --folder t", "full"), ("--parts recall-1M", "partial"),
     ("--queries 9", "partial"), ("--strict-dtype float32", "partial")],
)  # fmt: skip
def test_only_all_parts_at_their_sizes_are_a_whole_run(words, kind):
    assert gpu_needle.parse(words.split()).kind == kind


def test_the_whole_benchmark_trains_asks_times_and_goes_on_after_a_part_that_fails(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu_needle, "bytes_per_second", lambda device: 1e10)
    monkeypatch.setattr(gpu_needle_parts, "chunk_of", lambda device: 512)  # texts in several pieces
    trained_on = write_lines(tmp_path / "train", 3)
    text = write_lines(tmp_path / "haystacks", 2)  # enough for recall-1M, too little for recall-10M
    settings = [*SMALL, f'data.folder="{trained_on}"', f'data.cache="{tmp_path / "cache"}"']
    words = [
        *("--device", "cpu", "--shorten", "500", "--queries", "2", "--haystacks", "1"),
        *("--folder", str(text), "--results", str(tmp_path / "results"), "--minutes", "9"),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    assert gpu_needle.main(words) == 0
    shown = capsys.readouterr().out
    (path,) = (tmp_path / "results").glob("gpu_needle_partial_*.json")
    saved = json.loads(path.read_text())
    assert saved["training"]["steps"] == saved["model"]["step"] == 50
    assert saved["training"]["changes"]["train.precision"] == "float32"
    (found,) = saved["recall"]["recall-1M"]["haystacks"]
    assert len(found["answers"]) == 4 and saved["recall"]["recall-1M"]["length"] == MILLION // 500
    assert set(saved["strict"]) == {"strict-1M", STRICT_RECALL, "strict-10M"}
    assert saved["strict"][STRICT_RECALL]["weights"] == "trained"
    assert list(saved["left_out"]) == ["recall-10M"] and "larger folder" in saved["left_out"]["recall-10M"]
    assert all(goal["met"] is None for goal in saved["goals"])
    assert tables.render(path, "gpu_needle").endswith(shown.split("\n\nwritten")[0])
    assert path.with_suffix(".md").read_text() == shown.split("\n\nwritten")[0] + "\n"

    assert gpu_needle.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out.strip() == shown.split("\n\nwritten")[0].strip()


def test_training_that_fails_leaves_the_parts_that_need_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_needle, "bytes_per_second", lambda device: 1e10)
    settings = [*SMALL, f'data.folder="{tmp_path / "nowhere"}"']
    words = [word for setting in settings for word in ("--set", setting)]
    where = ["--device", "cpu", "--shorten", "5000", "--results", str(tmp_path)]
    assert gpu_needle.main([*words, *where, "--parts", "recall-1M,strict-1M"]) == 0
    (path,) = tmp_path.glob("gpu_needle_partial_*.json")
    saved = json.loads(path.read_text())
    assert set(saved["left_out"]) == {"training", "recall-1M"} and set(saved["strict"]) == {"strict-1M"}
    assert "nowhere" in saved["left_out"]["training"] and "--run" in saved["left_out"]["recall-1M"]
    assert "FileNotFoundError" in capsys.readouterr().out
