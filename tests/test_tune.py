"""Schedules worth trying fit the chip, and winners are kept without harm to what is there."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from benchmarks import tune
from benchmarks.tune_space import (
    accumulators,
    fastest_for_all,
    first_round,
    fits,
    merged,
    row_bound,
    shared_bytes,
    shared_limit,
    size_of,
    variations,
    winner_row,
    write_rows,
)
from moe_triton.config import PASSES, TABLES, Config, as_row, choose_config, heuristic, read_table
from moe_triton.launch import Target

H100 = Target("cuda", 90, 132)
A100 = Target("cuda", 80, 108)
MI300X = Target("hip", "gfx942", 304)
ROOT = Path(__file__).parents[1]
SMALL = Config(64, 128, 64, 4, 3)


@pytest.mark.parametrize("rows", [1, 16, 64, 512, 4096])
@pytest.mark.parametrize("what", PASSES)
def test_every_schedule_that_is_tried_fits_the_chip(what, rows):
    for target in (H100, A100):
        tried = first_round(what, target, rows)
        assert 8 <= len(tried) <= 200 and len(set(tried)) == len(tried)
        assert all(shared_bytes(what, c) <= shared_limit(target) for c in tried)
        assert all(accumulators(what, c) <= 160 for c in tried)


def test_a_tile_is_as_high_as_an_expert_has_rows():
    assert {c.rows for c in first_round("down", H100, 8)} == {16, 32}
    assert {c.rows for c in first_round("down", H100, 64)} == {32, 64, 128}
    assert {c.rows for c in first_round("down", H100, 4096)} == {64, 128}


def test_small_tiles_are_swapped_where_the_matrix_units_take_64_rows():
    assert all(c.swap == (c.rows < 64) for c in first_round("up", H100, 32))
    assert not any(c.swap for c in first_round("up", A100, 32))
    assert not any(c.swap for c in first_round("grad_up", H100, 32))


def test_shared_memory_and_registers_are_those_computed_by_hand():
    """up: 128 rows and 2 * 128 weight rows of 64 bf16, 4 stages: 4 * 384 * 128 bytes = 192 KiB."""
    config = Config(128, 128, 64, 8, 4)
    assert shared_bytes("up", config) == 192 * 1024 and fits("up", config, H100)
    assert shared_bytes("down", config) == 128 * 1024
    assert shared_bytes("grad_up", replace(config, rows=64, ins=256)) == 4 * 384 * 128
    assert accumulators("up", config) == 128 and accumulators("down", config) == 64
    assert not fits("up", config, A100) and not fits("grad_pre", replace(config, outs=256, num_warps=4), H100)
    assert shared_limit(MI300X) == 64 * 1024


def test_neighbours_differ_and_only_dense_operands_are_walked_over():
    for what in PASSES:
        found = variations(what, SMALL, H100)
        assert found and SMALL not in found and all(fits(what, c, H100) for c in found)
        assert any(c.persistent for c in found) == (what in ("down", "grad_rows"))
        wide = variations(what, replace(SMALL, num_warps=8), H100)
        assert [c.registers for c in found + wide if c.registers] == [128]  # two programs of 8 warps


@pytest.mark.parametrize(
    ("rows", "bound"), [(1, 1), (9, 16), (512, 512), (513, 1024), (1024, None), (9999, None)]
)
def test_a_measurement_speaks_up_to_the_next_power_of_two(rows, bound):
    assert row_bound(rows) == bound


def _row(what="up", rows=512, config=SMALL, size="small"):
    return as_row(what, rows, size, config, None)


def test_a_new_row_replaces_its_own_and_no_other():
    old = [_row(), _row("down"), _row(rows=16), _row(size="large"), _row(rows=None)]
    new = _row(config=replace(SMALL, num_stages=4))
    rows = merged(old, [new])
    assert len(rows) == 5 and new in rows and _row() not in rows
    assert all(row in rows for row in old[1:])
    assert merged(rows, [new]) == rows


def test_rows_of_one_size_come_before_rows_of_any_size_because_the_first_of_equals_is_taken():
    rows = merged([_row(size=None)], [_row(config=replace(SMALL, num_stages=4))])
    assert [row["size"] for row in rows] == ["small", None]


def test_written_rows_are_what_moe_triton_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_TRITON_TABLES", str(tmp_path))
    path = tmp_path / "sm_90.json"
    write_rows(path, [_row("down", None)])
    write_rows(path, [winner_row("up", 512, 2048, 768, replace(SMALL, splits=2), {"ms": 1.0})])
    assert len(read_table(path)) == 2 and len(list(tmp_path.iterdir())) == 1
    assert choose_config("up", H100, torch.bfloat16, 65536, 128, 2048, 768) == SMALL
    assert choose_config("down", H100, torch.bfloat16, 65536, 128, 2048, 768) == SMALL
    assert choose_config("grad_up", H100, torch.bfloat16, 65536, 128, 2048, 768) != SMALL


def test_a_broken_table_is_left_as_it_is(tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text("[{}]", encoding="utf-8")
    with pytest.raises(ValueError, match="no table of schedules"):
        write_rows(path, [_row()])
    assert path.read_text(encoding="utf-8") == "[{}]"


def test_a_users_row_for_many_rows_does_not_hide_the_shipped_ones_for_few(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_TRITON_TABLES", str(tmp_path))
    before = choose_config("up", H100, torch.bfloat16, 128 * 8, 128, 2048, 768)
    path = tmp_path / "sm_90.json"
    write_rows(path, [_row(config=replace(SMALL, num_stages=2))])
    assert choose_config("up", H100, torch.bfloat16, 65536, 128, 2048, 768).num_stages == 2
    assert choose_config("up", H100, torch.bfloat16, 128 * 8 + 1, 128, 2048, 768) == before


def test_what_the_tuner_writes_into_the_package_keeps_its_form():
    """One row a line, so that a change of one is a change of one line."""
    for path in sorted(TABLES.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) == len(json.loads(text)) + 2, path.name


def test_size_classes_are_those_of_the_package():
    assert (size_of(2048, 768), size_of(4096, 14336)) == ("small", "large")


def test_the_heuristic_itself_would_be_tried_or_fits():
    for what in PASSES:
        for rows in (1, 64, 1024):
            assert fits(what, heuristic(what, H100, torch.bfloat16, rows), H100)


def test_without_a_gpu_it_says_so_and_returns_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == f"{tune.NO_GPU}\n"


def test_tables_for_float32_are_refused_because_nobody_would_read_them(capsys):
    with pytest.raises(SystemExit):
        tune.parse(["--dtype", "float32", "--write", "user"])
    assert "not read for float32" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.parse(["--passes", "up,sideways"])


def test_of_several_shapes_the_least_mean_of_relative_times_wins():
    a, b, c = (replace(SMALL, group=group) for group in (1, 2, 4))
    times = [{a: 1.0, b: 1.2, c: 0.5}, {a: 30.0, b: 20.0}]
    assert fastest_for_all(times) == b  # c is not timed everywhere; a: (2 + 1.5) / 2, b: (2.4 + 1) / 2
    assert fastest_for_all(times[:1]) == c


def test_a_row_is_for_one_size_class(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tune.main(["--shape", "olmoe,mixtral", "--write", "user"]) == 2
    assert "olmoe is small, mixtral is large" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.parse(["--shape", "olmoe,nobody"])


def test_a_schedule_reads_like_one():
    assert tune.in_words(Config(128, 256, 64, 8, 3, persistent=True)) == "128x256x64 w8 s3 g8 persistent tma"
    assert tune.in_words(Config(16, 64, 64, 4, 3, tma=False, splits=4)) == "16x64x64 w4 s3 g8 splits 4"


def _trial(monkeypatch, ms_of, result_of, until=float("inf")):
    """A pass whose result and time depend on the schedule that is forced."""
    from benchmarks import tune_passes
    from benchmarks.gpu_timing import Stopwatch
    from benchmarks.measure import Timing

    def step():
        return (result_of(choose_config("up", H100, torch.bfloat16, 64, 8, 64, 64)),)

    def timed(works, watch, budget, *, queued):
        for work in works.values():
            work()
        return {name: Timing(ms_of(name), 0.0, 0.0, 5) for name in works}, {}

    monkeypatch.setattr(tune_passes, "time_in_turns", timed)
    expected = (torch.ones(4),)
    return tune_passes.Trial("up", step, expected, Stopwatch(torch.device("cpu")), until)


def test_the_fastest_schedule_with_the_right_result_wins(monkeypatch):
    fast, slow, wrong, broken = (replace(SMALL, group=group) for group in (1, 2, 4, 16))

    def result_of(config):
        if config == broken:
            raise RuntimeError("out of resource: shared memory")
        return torch.ones(4) * (1.1 if config == wrong else 1.0)

    trial = _trial(monkeypatch, lambda name: 1.0 if name == str(fast) else 2.0, result_of)
    trial.measure([slow, wrong, broken, fast])
    assert trial.best(5) == [fast, slow]
    assert "differs from today's" in trial.failed[str(wrong)] and "shared memory" in trial.failed[str(broken)]
    trial.measure([slow, wrong])
    assert len(trial.ms) == 2


def test_when_the_time_is_up_what_was_timed_counts(monkeypatch):
    trial = _trial(monkeypatch, lambda name: 1.0, lambda config: torch.ones(4), until=0.0)
    trial.measure([SMALL, replace(SMALL, group=1)])
    assert trial.best(5) == [SMALL]


def test_the_whole_tuner_runs_on_the_interpreter(tmp_path):
    code = (
        "import sys; from benchmarks import tune, tune_passes\n"
        "space = tune_passes.first_round\n"
        "tune_passes.first_round = lambda *a, **k: [c for c in space(*a, **k) if c.outs == 64][:1]\n"
        "tune_passes.variations = lambda *a, **k: []\n"
        "budget = tune_passes.Budget\n"
        "tune_passes.Budget = lambda *a, **k: budget(0.0, 1, 1, 1)\n"
        "sys.exit(tune.main(sys.argv[1:]))"
    )
    words = ["--device", "cpu", "--dtype", "float16", "--shape", "tiny,tiny", "--tokens", "2", "--jobs", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--passes", "down,grad_up", "--write", "user"],
        cwd=ROOT, capture_output=True, text=True,
        env=_environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| tiny  |      2 |") == 4  # two passes at two shapes
    rows = read_table(tmp_path / "cpu.json")
    assert [row["pass"] for row in rows] == ["down", "grad_up"]
    assert set(rows[0]["measured"]) == {"date", "command", "device", "ms", "torch", "triton"}


def _environment(tables: Path) -> dict[str, str]:
    import os

    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    extra = {
        "TRITON_INTERPRET": "1",
        "MOE_TRITON_TABLES": str(tables),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
    }
    return {**os.environ, **extra}
