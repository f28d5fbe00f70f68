"""The benchmark on a GPU, without a GPU: it refuses wrong results, keeps what it has, and judges right."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import gpu, gpu_goals, gpu_tables
from benchmarks.accuracy import WrongResultError
from benchmarks.gpu_candidates import (
    COMPILED,
    DENSE,
    GROUPED_MM,
    LIGER,
    MOE_OPS,
    OURS,
    OURS_SORTED,
    TRANSFORMERS,
    Candidate,
    DenseProducts,
    make,
    why_absent,
)
from benchmarks.gpu_cell import BOTH, FORWARD, Bench, measure
from benchmarks.gpu_cells import (
    NAMED,
    QUICK,
    TINY,
    Cell,
    all_cells,
    chosen_cells,
    key,
    memory_needed,
    participants,
    seconds_needed,
    why_not_memory,
    why_not_time,
)
from benchmarks.gpu_compile import jobs, keep_share, run_all
from benchmarks.gpu_passes import kernel_name, pass_names
from benchmarks.gpu_problem import (
    check_forward,
    check_gradients,
    complain,
    expected_of,
    make_problem,
)
from benchmarks.gpu_store import load, new_path, write
from benchmarks.gpu_timing import Budget, DeadDeviceError, Stopwatch, failure_of, time_in_turns
from benchmarks.published import LIGER as LIGER_PUBLISHED
from benchmarks.published import SONIC, sonic_both
from benchmarks.shapes import SHAPES, SONIC_SHAPES, experts_flops
from moe.ops.reference import experts_ffn, moe_definition

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
GPT_OSS = replace(TINY, gpt_oss=True)
WATCH = Stopwatch(CPU)


def _problem(shape=TINY, tokens=12, dtype=torch.float32, zipf=False):
    return make_problem(shape, tokens, zipf=zipf, device=CPU, dtype=dtype)


def _reference(problem):
    plan = problem.plan
    return experts_ffn(
        problem.x, problem.weights, plan.pair_of_row, plan.row_of_pair, plan.offsets, problem.up_proj,
        problem.down_proj, problem.up_bias, problem.down_bias, activation=problem.activation,
        interleaved=problem.shape.gpt_oss,
    )  # fmt: skip


def _gradients(problem, run, upstream):
    leaves = problem.leaves
    gradients = torch.autograd.grad(run(problem), list(leaves.values()), upstream)
    return dict(zip(leaves, gradients, strict=True))


# The truth


@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=["swiglu", "gpt-oss"])
def test_the_sampled_truth_is_the_definition_in_value_and_every_gradient(shape):
    problem = _problem(shape, tokens=50)
    expected = expected_of(problem)
    doubled = {name: leaf.detach().double().requires_grad_() for name, leaf in problem.leaves.items()}
    y = moe_definition(
        doubled["x"], problem.experts, *(doubled[name] for name in list(doubled)[1:]),
        activation=problem.activation, interleaved=shape.gpt_oss,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, list(doubled.values()), expected.upstream.double())
    by_name = dict(zip(doubled, gradients, strict=True))
    truth = expected.truth
    torch.testing.assert_close(truth.y, y.detach()[expected.rows])
    torch.testing.assert_close(truth.of_x, by_name["x"][expected.rows])
    torch.testing.assert_close(truth.of_weights, by_name["weights"][expected.rows])
    for name in set(doubled) - {"x", "weights"}:
        for i, factors in truth.factors.items():
            torch.testing.assert_close(factors.gradient(name), by_name[name][i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=["swiglu", "gpt-oss"])
@pytest.mark.parametrize("name", [GROUPED_MM, TRANSFORMERS])
def test_what_torch_brings_is_right(name, shape, dtype):
    if why_absent(name, shape):
        pytest.skip(f"{name}: {why_absent(name, shape)}")
    problem = _problem(shape, tokens=40, dtype=dtype, zipf=True)
    candidate, expected = make(name, shape), expected_of(problem)
    check_forward(expected, candidate.run(problem), name)
    check_gradients(expected, _gradients(problem, candidate.run, expected.upstream), name)


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_a_wrong_value_is_refused(factor):
    problem = _problem(tokens=40, dtype=torch.bfloat16)
    with pytest.raises(WrongResultError, match="it: y"):
        check_forward(expected_of(problem), _reference(problem) * factor, "it")


@pytest.mark.parametrize("name", ["x", "weights", "up_proj", "down_proj", "up_bias", "down_bias"])
def test_a_wrong_gradient_is_refused(name):
    problem = _problem(GPT_OSS, tokens=40)
    expected = expected_of(problem)
    gradients = _gradients(problem, _reference, expected.upstream)
    check_gradients(expected, gradients, "it")
    with pytest.raises(WrongResultError, match=f"gradient of {name}"):
        check_gradients(expected, gradients | {name: gradients[name] * 1.01}, "it")


def test_an_error_is_seen_by_its_size_and_by_its_worst_element():
    truth = torch.randn(64, 64, dtype=torch.float64)
    same_dtype = truth.bfloat16()
    assert complain(same_dtype, same_dtype, truth) is None
    assert "mean square" in str(complain(same_dtype * 1.05, same_dtype, truth))
    spoilt = same_dtype.clone()
    spoilt[3, 4] += 0.3
    assert "maximum" in str(complain(spoilt, same_dtype, truth))
    assert complain(same_dtype * float("nan"), same_dtype, truth) is not None


def test_zipf_skews_the_load_and_experts_of_a_token_are_distinct():
    shape = replace(TINY, e=16)
    balanced, skewed = (_problem(shape, 500, zipf=zipf) for zipf in (False, True))
    assert skewed.max_violation > 2 * balanced.max_violation
    assert all(len(set(row)) == shape.k for row in skewed.experts.tolist())
    assert balanced.active == 16


def test_the_dense_line_does_the_operations_of_the_layer():
    from torch.utils.flop_counter import FlopCounterMode

    dense = DenseProducts(TINY, 24, CPU, torch.float32)
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            dense.work(backward=backward)()
        assert counter.get_total_flops() == experts_flops(24, TINY.d, TINY.h, backward=backward)


# What is measured


def test_the_first_cells_are_those_of_the_goals():
    cells = all_cells()
    assert len(set(cells)) == len(cells) and set(QUICK) < set(cells)
    assert cells[0] == Cell("qwen3_30b", 8192)
    assert {cell.shape for cell in cells if cell.is_sonic} == set(SONIC_SHAPES) == set(SONIC)
    assert all(Cell(shape, tokens) in cells for shape, tokens in gpu_goals.DENSE_GOALS)
    assert all(Cell(shape, tokens) in cells for shape, tokens in LIGER_PUBLISHED if tokens in (128, 8192))
    assert {cell.shape for cell in cells if cell.zipf} >= {"qwen3_30b", "deepseek_v3"}


def test_options_choose_among_the_cells_and_make_new_ones():
    assert chosen_cells(None, None, quick=True) == list(QUICK)
    assert {cell.shape for cell in chosen_cells(("olmoe",), None, quick=False)} == {"olmoe"}
    assert Cell("olmoe", 256) in chosen_cells(("olmoe",), (256,), quick=False)
    kinds = {cell.kind for cell in chosen_cells(("tiny",), (8,), quick=False)}
    assert kinds == {"layer", "passes", "operations"}


def test_who_takes_part():
    assert participants(Cell("qwen3_30b", 8192))[:3] == [DENSE, OURS, OURS_SORTED]
    assert COMPILED not in participants(Cell("qwen3_30b", 1024))
    assert LIGER not in participants(Cell("sonic_7b_h256", 24576))


def test_cells_that_do_not_fit_are_named_with_a_reason():
    total = 80 * 2.0**30
    big = Cell("deepseek_v3", 32768)
    assert memory_needed(SHAPES["mixtral"], 8192, backward=True) < total / 4
    assert why_not_memory(Cell("qwen3_30b", 32768), total, backward=True, item=2) is None
    assert "GiB" in str(why_not_memory(big, total / 2, backward=True, item=2))


def test_candidates_that_tune_themselves_wait_for_time():
    assert why_not_time(LIGER, tuned=False, compiled=True, left_s=300.0) is None
    assert "340 s" in str(why_not_time(LIGER, tuned=False, compiled=False, left_s=300.0))
    assert why_not_time(LIGER, tuned=True, compiled=False, left_s=1.0) is None
    assert why_not_time(OURS, tuned=False, compiled=False, left_s=1.0) is None


def test_a_larger_cell_is_expected_to_take_longer():
    small, large = (seconds_needed(Cell("mixtral", t), 7e14, 3e12, 1.0) for t in (1024, 32768))
    assert small < large < 120


# Compiling ahead


def test_the_longest_work_comes_first_and_each_kind_of_cell_once(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_compile.why_absent", lambda name, shape: None)
    found = jobs(all_cells())
    assert [job[2] for job in found[:11]] == [LIGER] * 8 + [MOE_OPS] * 3
    assert len(set(found)) == len(found) < 60
    assert {job[0] for job in found if job[2] == LIGER} == {"qwen3_30b", "olmoe"}
    ours = [job[:2] for job in found if job[2] == OURS_SORTED]
    assert ours[:3] == [("qwen3_30b", 8192), ("olmoe", 8192), ("mixtral", 8192)]
    assert not any(job[0] == "deepseek_v3" and job[1] == 1 for job in found), "its weights are too large"


def test_what_is_cut_off_is_said(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_compile.sys.executable", "sleep")
    slow = [("30", 1, "x", 0, 1)]
    real = subprocess.Popen
    monkeypatch.setattr(
        "benchmarks.gpu_compile.subprocess.Popen", lambda command, **o: real(["sleep", "30"], **o)
    )
    assert run_all(slow * 1, at_once=1, limit_s=0.3) == slow
    monkeypatch.setattr("benchmarks.gpu_compile.subprocess.Popen", lambda command, **o: real(["true"], **o))
    assert run_all(slow, at_once=1, limit_s=20) == []


def test_a_share_is_every_nth_schedule(monkeypatch):
    import types

    module = types.ModuleType("some_kernels")
    module.kernel = types.SimpleNamespace(configs=list(range(10)))
    module.other = types.SimpleNamespace(configs=[7])
    monkeypatch.setitem(sys.modules, "some_kernels", module)
    monkeypatch.setattr("benchmarks.gpu_compile.TUNED_MODULES", {LIGER: ("some_kernels",)})
    keep_share(LIGER, 1, 4)
    assert module.kernel.configs == [1, 5, 9] and module.other.configs == [7]


# Timing


def test_a_candidate_that_fails_loses_its_row_and_the_run_goes_on():
    calls = []

    def breaks_later() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("no")

    def breaks() -> None:
        raise ValueError("never\nworks")

    works = {"good": lambda: None, "bad": breaks, "late": breaks_later}
    timings, failed = time_in_turns(works, WATCH, Budget(0.0, 2, 3, 3), queued=True)
    assert set(timings) == {"good"} and timings["good"].runs == 3
    assert failed == {"bad": "ValueError: never", "late": "out of memory"}


def test_when_all_fail_nothing_is_timed():
    def breaks() -> None:
        raise RuntimeError("no")

    assert time_in_turns({"bad": breaks}, WATCH, Budget(), queued=False)[0] == {}


def test_a_dead_device_is_told_apart(monkeypatch):
    watch = Stopwatch(CPU)

    def dead() -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(watch, "synchronize", dead)
    with pytest.raises(DeadDeviceError, match="x: RuntimeError: first") as caught:
        failure_of(lambda: (_ for _ in ()).throw(RuntimeError("first")), watch, "x")
    assert caught.value.candidate == "x"


def _bench(**more):
    import time

    return Bench(WATCH, torch.float32, 1e12, Budget(0.0, 1, 1, 1), time.perf_counter() + 1000, **more)


def test_a_wrong_candidate_gets_no_speed(monkeypatch):
    def spoilt(shape):
        return Candidate(OURS, lambda problem: _reference(problem) * 1.01)

    monkeypatch.setattr("benchmarks.gpu_cell.participants", lambda cell: [DENSE, OURS, GROUPED_MM])
    monkeypatch.setattr("benchmarks.gpu_cell.why_absent", lambda name, shape: None)
    monkeypatch.setitem(__import__("benchmarks.gpu_candidates", fromlist=["x"]).MAKERS, OURS, spoilt)
    result = measure(Cell("tiny", 12), _bench())
    assert "wrong: ours: y" in result["skipped"][OURS]
    assert set(result["timings"][BOTH]) == {DENSE, GROUPED_MM}


def test_who_stopped_the_gpu_stays_out_of_its_cell(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_cell.participants", lambda cell: [DENSE, GROUPED_MM])
    cell = Cell("tiny", 12)
    result = measure(cell, _bench(banned={(GROUPED_MM, str(cell)): "stopped the GPU: x"}))
    assert result["skipped"] == {GROUPED_MM: "stopped the GPU: x"}
    assert set(result["timings"][FORWARD]) == {DENSE}


def test_a_cell_that_fails_altogether_says_why(monkeypatch):
    def breaks(*args, **kwargs):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("benchmarks.gpu_cell.make_problem", breaks)
    assert measure(Cell("tiny", 12), _bench())["skipped"] == {"the cell": "out of memory"}


class _FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.recorded = True

    def elapsed_time(self, end):
        assert self.recorded and end.recorded
        return 2.0


class _FakeGraph:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def replay(self):
        pass


def test_what_runs_on_a_gpu_only_calls_torch_as_torch_is(monkeypatch):
    """Every function of torch.cuda is replaced by one with its signature; events tell 2 ms."""
    answers = {
        "synchronize": None, "empty_cache": None, "memory_allocated": 100, "max_memory_allocated": 500,
        "reset_peak_memory_stats": None, "mem_get_info": (1 << 20, 1 << 30), "stream": _FakeGraph(),
        "current_stream": mock.MagicMock(), "Stream": mock.MagicMock(), "CUDAGraph": _FakeGraph(),
    }  # fmt: skip
    for name, answer in answers.items():
        specified = mock.create_autospec(getattr(torch.cuda, name), return_value=answer)
        monkeypatch.setattr(torch.cuda, name, specified)
    monkeypatch.setattr(torch.cuda, "Event", _FakeEvent)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr("benchmarks.gpu_timing.FLUSHED_BYTES", 64)
    monkeypatch.setattr("benchmarks.gpu_cell.participants", lambda cell: [DENSE, GROUPED_MM])
    bench = _bench()
    bench.watch = Stopwatch(CPU)
    bench.watch.on_gpu = True
    few = measure(Cell("tiny", 12), bench)
    assert few["skipped"] == {}
    assert few["timings"][BOTH][GROUPED_MM]["ms"] == few["graphs"][FORWARD][GROUPED_MM]["ms"] == 2.0
    many = measure(Cell("tiny", 200), bench)
    x_bytes = y_bytes = 200 * TINY.d * 4
    assert many["memory"][GROUPED_MM] == {"kept": x_bytes - y_bytes, "peak": 400}


def test_launches_are_named_after_the_passes_they_belong_to():
    forward = ["tile_map_kernel", "up_kernel", "linear_kernel", "sum_kernel"]
    backward = ["grad_pre_kernel", "grad_weight_kernel", "weight_grads_kernel", "linear_kernel", "sum_kernel",
                "grad_weight_kernel"]  # fmt: skip
    launches = [("forward", name) for name in forward] + [("backward", name) for name in backward]
    assert pass_names(launches) == [
        "tile_map", "up", "down", "combine", "grad_pre", "grad_down", "weight_grads", "grad_rows", "reduce",
        "grad_up",
    ]  # fmt: skip


def test_a_kernel_is_named_under_its_decorators():
    class Wrapped:
        def __init__(self, fn):
            self.fn = fn

    def up_kernel():
        pass

    assert kernel_name(Wrapped(Wrapped(up_kernel))) == "up_kernel"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_name_of_torch_exists(path):
    """A wrong one would be noticed on a GPU only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            words = ast.unparse(node).split(".")
            if words[0] == "torch" and all(word.isidentifier() for word in words):
                found = reduce(lambda owner, word: getattr(owner, word, None), words[1:3], torch)
                assert found is not None or words[1:3] in (["version", "hip"], ["version", "cuda"]), words


# Records, tables, goals


def _timing(ms):
    return {"ms": ms, "p20": ms, "p80": ms, "runs": 9}


def _result(cell, *, ours=1.0, dense=0.9, peer=2.0, graph=0.4):
    modes = (FORWARD, BOTH)
    times = {DENSE: dense, OURS: ours, GROUPED_MM: peer, TRANSFORMERS: peer, LIGER: 3 * ours}
    return {
        "cell": key(cell),
        "skipped": {MOE_OPS: "is not installed"},
        "active": NAMED[cell.shape].e,
        "max_violation": 0.5,
        "timings": {mode: {name: _timing(ms) for name, ms in times.items()} for mode in modes},
        "graphs": {mode: {OURS: _timing(graph)} for mode in modes} if cell.tokens <= 128 else {},
        "memory": {OURS: {"kept": 2 * cell.tokens * (2048 + 2 * 8 * 768), "peak": 9}}
        if cell.tokens > 128
        else {},
        "seconds": 1.0,
    }


def _record(*results, dtype="bfloat16", device="H100 SXM"):
    rates = {"flops_per_second": 7e14, "bytes_per_second": 3e12}
    facts = {
        "hardware": "X",
        "threads": 1,
        "versions": {"torch": "2"},
        "commit": "c",
        "date": "d",
        "driver": "5",
    }
    return {
        "environment": facts,
        "dtype": dtype,
        "rates": rates,
        "datasheet": {"name": device, "source": "s", "flops_per_second": 989e12, "bytes_per_second": 3.35e12},
        "results": list(results),
        "left_out": {"olmoe t=1 balanced": "takes about 9 s, 1 s were left"},
        "dead": [],
        "compiled": [],
    }


def _goal(record, *words):
    (goal,) = [g for g in gpu_goals.judge(record) if all(word in g["goal"] for word in words)]
    return goal


def test_goals_are_met_not_met_or_not_measured():
    record = _record(_result(Cell("qwen3_30b", 8192), ours=1.0, dense=0.65))
    forward, both = (_goal(record, "qwen3_30b, t=8192", f", {mode}:") for mode in (FORWARD, BOTH))
    assert (forward["met"], both["met"]) == (False, True) and forward["measured"] == pytest.approx(0.65)
    assert _goal(record, "olmoe", f", {FORWARD}:")["met"] is None
    assert _goal(record, "liger")["measured"] == 3 and _goal(record, "liger")["met"]
    assert _goal(record, "faster than transformers")["met"]
    assert _goal(record, "never slower")["met"] and _goal(record, "kept")["measured"] == pytest.approx(1)
    slow = _record(_result(Cell("qwen3_30b", 8192)), _result(Cell("olmoe", 1), peer=0.9))
    assert _goal(slow, "never slower")["met"] is False and "olmoe t=1" in _goal(slow, "never slower")["note"]


def test_decode_is_judged_by_bandwidth_in_a_graph():
    """One token of Qwen3-30B-A3B moves 75.5 MB: at 75 % of 3.35 TB/s 0.030 ms."""
    for graph, met in ((0.029, True), (0.033, False)):
        result = _result(Cell("qwen3_30b", 1), graph=graph) | {"active": 8}
        goal = _goal(_record(result), "bandwidth")
        assert goal["met"] is met


def test_all_twelve_published_sizes_are_needed_for_that_goal():
    cells = [Cell(name, 40960) for name in SONIC_SHAPES]
    fast = [_result(cell, ours=1e-3) for cell in cells]
    assert _goal(_record(*fast), "SonicMoE")["met"] is True
    assert _goal(_record(*fast[:-1]), "SonicMoE")["met"] is None
    assert _goal(_record(_result(cells[0], ours=1e3)), "SonicMoE")["met"] is False


def test_a_rate_of_both_is_between_the_two():
    assert sonic_both("sonic_7b_h1024") == pytest.approx(468)
    assert 340 < sonic_both("sonic_1.4b_h256") < 368


def test_other_devices_and_dtypes_have_no_goals():
    result = _result(Cell("qwen3_30b", 8192))
    assert gpu_goals.judge(_record(result, device="H200 SXM")) == []
    assert gpu_goals.judge(_record(result, dtype="float16")) == []


def test_the_tables_show_everything_and_mark_what_others_published():
    works = {"up": {"ms": 1.0, "flops": 4e11, "bytes": 1e9}, "odd": {"failed": "RuntimeError: no"}}
    passes = {"cell": key(Cell("qwen3_30b", 8192, kind="passes")), "skipped": {}, "passes": works}
    results = [_result(Cell("qwen3_30b", 8192)), _result(Cell("qwen3_30b", 128)), passes,
               _result(Cell("sonic_7b_h256", 24576))]  # fmt: skip
    record = _record(*results)
    record["goals"] = gpu_goals.judge(record)
    text = gpu_tables.render(record)
    for words in ("**Forward**", "**Forward + backward**", "**In a CUDA graph**", "**Passes of ours**",
                  "**SonicMoE's sizes**", "**Memory**", "**Goals**", "Not run:", "is not installed",
                  "forward published", "driver 5", "% of dense", "odd: RuntimeError: no"):  # fmt: skip
        assert words in text, words
    assert "365" in text and "2.096" in text
    assert gpu_tables.render(json.loads(json.dumps(record))) == text


def test_a_record_is_replaced_in_one_step_and_partial_ones_are_numbered(tmp_path):
    facts = {"hardware": "NVIDIA H100 80GB HBM3", "date": "2026-11-24"}
    path = new_path("gpu", facts, tmp_path)
    assert path.name == "gpu_nvidia-h100-80gb-hbm3_2026-11-24.json"
    write({"a": 1}, path)
    write({"a": 2}, path)
    assert load(path) == {"a": 2} and list(tmp_path.iterdir()) == [path]
    assert new_path("gpu", facts, tmp_path) == path
    first = new_path("gpu_partial", facts, tmp_path)
    write({}, first)
    assert new_path("gpu_partial", facts, tmp_path) != first


# The whole


def test_without_a_gpu_it_says_so_and_returns_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"{gpu.NO_GPU}\n" and captured.out == ""


def test_unknown_shapes_are_named(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--shapes", "qwen4"])
    assert "qwen4" in capsys.readouterr().err


def test_a_dead_gpu_starts_a_fresh_process_that_goes_on(monkeypatch, tmp_path):
    import time

    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    record = _record() | {"dead": [["moe-ops", "tiny t=1 balanced", "x"]]}
    error = DeadDeviceError("moe-ops", "x")
    gpu.start_again(error, record, tmp_path / "r.json", time.perf_counter() + 120, ["--quick"])
    assert started[0][1:4] == ["-m", "benchmarks.gpu", "--quick"] and "--resume" in started[0]
    options = gpu.parse(started[0][3:])
    assert options.quick and options.jobs == 0 and 1.9 < options.minutes <= 2
    record["dead"] *= 2
    assert gpu.start_again(error, record, tmp_path / "r.json", time.perf_counter() + 120, []) == 1
    assert len(started) == 1 and (tmp_path / "r.json").exists()


def test_the_whole_benchmark_runs_on_the_interpreter_and_resumes(tmp_path):
    pytest.importorskip("triton")
    words = ["--device", "cpu", "--dtype", "float32", "--shapes", "tiny", "--tokens", "2", "--minutes", "5",
             "--seconds", "0.01", "--warmups", "1", "--results", str(tmp_path)]  # fmt: skip
    done = _run_benchmark(words)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    layer, passes, operations = record["results"]
    assert {DENSE, OURS, OURS_SORTED, GROUPED_MM} <= set(layer["timings"][BOTH])
    assert set(passes["passes"]) >= {"up", "down", "combine", "grad_pre", "grad_down", "grad_rows", "reduce",
                                     "grad_up"}  # fmt: skip
    assert set(operations["operations"]) == {
        "sort_by_expert", "dispatch", "combine", "activate", "grouped_linear", "grouped_linear_grad_rows",
        "grouped_linear_grad_weight",
    }  # fmt: skip
    assert not any("failed" in entry for entry in operations["operations"].values())
    assert path.with_suffix(".md").read_text(encoding="utf-8").strip() in done.stdout
    again = _run_benchmark([*words, "--resume", str(path)])
    assert again.returncode == 0 and "s left" not in again.stderr, "nothing is measured twice"


def _run_benchmark(words):
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
