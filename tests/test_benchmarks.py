"""The benchmarks run, end to end and tiny; refuse wrong results; and do their arithmetic right."""

import importlib
import json
import math
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    accuracy,
    goals,
    layer,
    layer_tables,
    measure,
    record,
    scaling,
    scaling_figures,
    scaling_learning,
    scaling_store,
    scaling_tables,
    tables,
)
from benchmarks.candidates import DENSE, HF_GROUPED, OURS, Candidate, make_candidates, make_layer, why_not
from benchmarks.measure import Budget, Timing, digits, peak_bytes, time_in_turns
from benchmarks.scaling_learning import LearningSetting
from benchmarks.scaling_store import Run
from benchmarks.scaling_verdicts import compared, judge, seed_noise
from benchmarks.shapes import SHAPES, Shape, experts_flops
from benchmarks.statistics import compare, t_cdf, t_quantile
from moe.decoder import Decoder
from moe.losses import max_violation
from moe.parameters import count_parameters

CPU = torch.device("cpu")
SMALL = Shape(d=16, h=8, e=4, k=2)
CORPUS = "".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(400))


# FLOPs and shapes


def test_experts_take_6_p_d_h_flops_forward_and_three_times_that_with_backward():
    assert experts_flops(10, 4, 3) == 6 * 10 * 4 * 3
    assert experts_flops(10, 4, 3, backward=True) == 18 * 10 * 4 * 3


def test_the_counted_flops_are_those_torch_counts_for_the_dense_layer():
    from torch.utils.flop_counter import FlopCounterMode

    dense = next(c for c in make_candidates(make_layer(SMALL, zipf=False), SMALL) if c.name == DENSE)
    x = torch.randn(5, SMALL.d, requires_grad=True)
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            y = dense.run(x)
            if backward:
                y.sum().backward()
        assert counter.get_total_flops() == experts_flops(5 * SMALL.k, SMALL.d, SMALL.h, backward=backward)


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_is_a_layer_whose_dense_twin_has_its_active_width(name):
    shape = SHAPES[name]
    assert shape.config().num_experts == shape.e
    assert shape.dense_width == shape.k * shape.h
    assert shape.with_experts(2 * shape.e).dense_width == shape.dense_width


# Measuring


def test_slow_candidates_run_once_and_the_others_in_turns(monkeypatch):
    calls: list[str] = []

    def prepare(name: str, seconds: float):
        def work() -> float:
            calls.append(name)
            return seconds

        return lambda number: work

    works = {"quick": prepare("quick", 1e-4), "other": prepare("other", 1e-4), "slow": prepare("slow", 0.03)}
    monkeypatch.setattr(measure, "SLOW_RUN_S", 0.02)
    monkeypatch.setattr(measure, "_timed", lambda work, device: work())  # a busy machine stops anything
    timings = time_in_turns(works, CPU, Budget(seconds=0.0, warmups=1, min_rounds=3))
    assert timings["slow"].runs == 1 and timings["slow"].ms == pytest.approx(30)
    assert timings["quick"].runs == timings["other"].runs == 3
    assert sorted(calls[-2:]) == ["other", "quick"] and calls.count("slow") == 2


def test_a_timing_is_a_median_with_percentiles():
    timing = Timing.of([0.005, 0.001, 0.002, 0.003, 0.004, 0.1])
    assert (timing.ms, timing.p20, timing.p80, timing.runs) == (3.5, 2.0, 5.0, 6)
    assert str(timing) == "3.50 (2.00-5.00)"
    assert [digits(x) for x in (0.1234, 1.234, 12.34, 123.4, 1234.0)] == [
        "0.123",
        "1.23",
        "12.3",
        "123",
        "1234",
    ]


def test_peak_memory_sees_buffers_that_live_together_also_those_of_numpy():
    import numpy as np

    def work() -> None:
        first = torch.ones(5_000_000)  # 20 MB
        second = np.ones(5_000_000, np.float32)
        del first, second
        torch.ones(5_000_000)

    peak = peak_bytes(work, CPU)
    if peak is None:
        pytest.skip("this system does not tell its peak memory")
    assert 38e6 < peak < 50e6


def test_peak_memory_is_not_asked_for_where_it_cannot_be_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_bytes(lambda: pytest.fail("the work was run"), CPU) is None


# Wrong results


def test_every_candidate_is_right_balanced_and_skewed():
    for zipf in (False, True):
        sparse = make_layer(SMALL, zipf=zipf)
        expected = accuracy.expected_of(sparse, [torch.randn(40, SMALL.d)])
        names = []
        for candidate in make_candidates(sparse, SMALL):
            accuracy.check(candidate, expected, backward=True)
            names.append(candidate.name)
        assert {DENSE, OURS} < set(names)


def _scaled(candidate: Candidate) -> Candidate:
    return replace(candidate, run=lambda x: candidate.run(x) * 1.001)


def _no_router_gradient(candidate: Candidate) -> Candidate:
    def run(x: torch.Tensor) -> torch.Tensor:
        sparse = candidate.layer
        assert sparse is not None
        routing = sparse.router(x)
        from moe.plan import RoutingPlan

        plan = RoutingPlan.from_experts(routing.experts, routing.num_experts)
        return sparse.experts(x, routing.weights.detach(), plan)

    return replace(candidate, run=run)


def _nan_in_the_last_token(candidate: Candidate) -> Candidate:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = candidate.run(x)
        return torch.cat([y[:-1], y[-1:] * float("nan")])

    return replace(candidate, run=run)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [(_scaled, "y"), (_no_router_gradient, "gradient of x"), (_nan_in_the_last_token, "y")],
)
def test_a_wrong_candidate_is_refused(spoil, what):
    sparse = make_layer(SMALL, zipf=False)
    wrong = spoil(next(c for c in make_candidates(sparse, SMALL) if c.name == OURS))
    expected = accuracy.expected_of(sparse, [torch.randn(40, SMALL.d)])
    with pytest.raises(accuracy.WrongResultError, match=rf"ours, t=40: {what}: error"):
        accuracy.check(wrong, expected, backward=True)


def test_no_speed_is_printed_for_a_wrong_result(monkeypatch, tmp_path, capsys):
    def with_a_wrong_one(sparse, shape):
        return [*make_candidates(sparse, shape)[:1], _scaled(make_candidates(sparse, shape)[1])]

    monkeypatch.setitem(layer.SHAPES, "cpu_small", SMALL)
    monkeypatch.setattr(layer, "make_candidates", with_a_wrong_one)
    _without_long_probes(monkeypatch)
    with pytest.raises(accuracy.WrongResultError):
        layer.main([*TINY_LAYER, "--results", str(tmp_path)])
    assert "|" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_candidates_that_would_swap_or_stall_are_named_with_a_reason():
    shape = Shape(d=512, h=256, e=256, k=4)
    assert "GB of weights" in str(why_not("hf batched_mm", shape, 2048, backward=False, item_bytes=4))
    assert "s a run" in str(why_not("hf eager", shape, 2048, backward=True, item_bytes=4))
    assert why_not("hf eager", shape, 2048, backward=False, item_bytes=4) is None
    assert why_not(OURS, shape, 16384, backward=True, item_bytes=4) is None


def test_zipf_load_is_far_more_uneven_than_balanced_load():
    x, shape = torch.randn(2048, 64), Shape(d=64, h=8, e=64, k=4)
    loads = [
        max_violation(make_layer(shape, zipf=zipf).router(x).tokens_per_expert()).item()
        for zipf in (False, True)
    ]
    assert loads[0] < 1 < 5 < loads[1]


# benchmarks.layer, end to end

TINY_LAYER = ["--tokens", "1,20", "--experts", "4", "--load", "both", "--seconds", "0", "--imports", "1"]


def _without_long_probes(monkeypatch) -> None:
    monkeypatch.setattr(layer, "gemm_flops_per_second", lambda device, dtype: 1e11)
    monkeypatch.setattr(layer, "bytes_per_second", lambda device: 1e10)
    monkeypatch.setattr(layer, "import_seconds", lambda module, rounds: 1.0)


def test_the_layer_benchmark_prints_tables_and_writes_where_when_and_with_what(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(layer.SHAPES, "cpu_small", SMALL)
    monkeypatch.setattr(layer, "MEMORY_TOKENS", 20)
    _without_long_probes(monkeypatch)
    assert layer.main([*TINY_LAYER, "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("| tokens | experts |") == 4 and "**Goals**" in text and "selected sizes" in text
    (path,) = tmp_path.glob("layer_partial_*.json")
    saved = json.loads(path.read_text())
    _assert_says_where_and_when(saved)
    assert len(saved["results"]) == 1 * 2 * 2 * 2
    assert all({DENSE, OURS} <= result["timings"].keys() for result in saved["results"])
    assert tables.render(path, "layer").endswith(text.split("\n\nwritten")[0].split("\n", 1)[1])


def _assert_says_where_and_when(saved: dict) -> None:
    facts = saved["environment"]
    assert facts["device"] == "cpu" and facts["hardware"] and facts["threads"] >= 1
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["commit"] and len(facts["date"].split("-")) == 3


def _fake_record(ours: float, hf: float) -> dict:
    def timing(ms: float) -> dict:
        return {"ms": ms, "p20": ms, "p80": ms, "runs": 3}

    def result(tokens: int, experts: int, backward: bool) -> dict:
        cell = {"tokens": tokens, "experts": experts, "backward": backward, "zipf": False}
        return {"cell": cell, "timings": {DENSE: timing(10), OURS: timing(ours), HF_GROUPED: timing(hf)}}

    sizes = [(2048, e, backward) for e in (16, 256) for backward in (False, True)] + [(1, 256, False)]
    return {
        "mode": "full",
        "environment": {"device": "cpu"},
        "settings": {"shape": "cpu_small", "d": 512, "h": 256, "k": 4, "dtype": "float32"},
        "bytes_per_second": 1e10,
        "import_seconds": {"torch": 1.0, "moe": 1.2},
        "results": [result(*size) for size in sizes],
    }


def test_goals_are_judged_by_ratios_and_missing_sizes_are_not_called_met():
    assert all(goal["met"] for goal in goals.judge(_fake_record(ours=12, hf=20)))
    slow = {goal["goal"]: goal["met"] for goal in goals.judge(_fake_record(ours=22, hf=20))}
    assert [met for goal, met in slow.items() if "2.5 x" in goal] == [True]
    assert sum(met is False for met in slow.values()) == 6
    nothing = goals.judge(_fake_record(12, 20) | {"results": []})
    assert [goal["met"] for goal in nothing] == [None] * 7 + [True]


@pytest.mark.parametrize(
    "other",
    [
        {"environment": {"device": "cuda"}},
        {"settings": {"shape": "olmoe", "d": 2048, "h": 1024, "k": 8, "dtype": "float32"}},
        {"settings": {"shape": "cpu_small", "d": 512, "h": 256, "k": 4, "dtype": "bfloat16"}},
    ],
)
def test_there_are_no_goals_but_for_the_small_float32_layer_on_a_cpu(other):
    assert goals.judge(_fake_record(12, 20) | other) == []
    assert layer_tables.goals_table({"goals": []}) == ""


def test_goals_say_over_which_and_how_many_sizes_they_are_judged():
    full = goals.judge(_fake_record(12, 20))
    assert "5 sizes" in full[5]["note"] and "2 sizes" in full[6]["note"]
    assert not any("quick" in goal["goal"] for goal in full)
    quick = goals.judge(_fake_record(12, 20) | {"mode": "quick"})
    assert ["of the quick sizes" in goal["goal"] for goal in quick] == [False] * 5 + [True, True, False]


# Statistics


@pytest.mark.parametrize(
    ("t", "degrees", "probability"),
    [
        (0.0, 3, 0.5),
        (1.0, 1, 0.75),
        (2.919986, 2, 0.95),
        (2.131847, 4, 0.95),
        (-2.570582, 5, 0.025),
        (3.169273, 10, 0.995),
    ],
)
def test_student_s_distribution_has_its_tabulated_values(t, degrees, probability):
    assert math.isclose(t_cdf(t, degrees), probability, abs_tol=1e-6)
    assert math.isclose(t_quantile(probability, degrees), t, abs_tol=1e-4)


def test_student_s_distribution_is_the_integral_of_its_density():
    degrees, grid = 7, torch.linspace(-60, 1.3, 400_001, dtype=torch.float64)
    constant = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    density = constant * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    assert math.isclose(t_cdf(1.3, degrees), torch.trapezoid(density, grid).item(), abs_tol=1e-8)


def test_a_paired_test_by_hand():
    pair = compare([1.0, 2.0, 3.0], [0.9, 1.8, 2.7])
    assert math.isclose(pair.mean, 0.2) and math.isclose(pair.sigma, 0.1)
    assert math.isclose(pair.t, 0.2 / (0.1 / math.sqrt(3)))
    assert math.isclose(pair.p, 1 - t_cdf(pair.t, 2))
    assert math.isclose(pair.half_width, 4.302653 * 0.1 / math.sqrt(3), rel_tol=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        compare([1.0], [1.0])


# benchmarks.scaling


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> list[str]:
    """Arguments of a run that takes seconds, on a corpus of its own."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.py").write_text(f"# file {i}\n" + CORPUS[i * 900 :])
    monkeypatch.setenv("SPARSE_MOE_CACHE", str(tmp_path / "cache"))
    learning = {
        "hidden_size": 16,
        "heads": 2,
        "width": 32,
        "sequence": 32,
        "batch": 4,
        "validation_tokens": 512,
    }
    cost = {
        "hidden_size": 16,
        "layers": 1,
        "heads": 2,
        "expert_width": 8,
        "batch": 1,
        "sequence": 80,
        "seconds": 0.0,
        "experts": [4, 8],
    }
    return [
        *("--corpus", str(folder), "--results", str(tmp_path / "results"), "--jobs", "1"),
        *("--steps", "6", "--seeds", "2", "--experts", "4,8"),
        *("--set", json.dumps(learning), "--set-cost", json.dumps(cost)),
    ]


def test_the_scaling_benchmark_prints_writes_draws_and_goes_on_where_it_stopped(
    tiny, tmp_path, capsys, monkeypatch
):
    assert scaling.main(tiny) == 0
    text = capsys.readouterr()
    assert "**Cost**" in text.out and "**Learning**" in text.out and "one-sided p" in text.out
    (path,) = (tmp_path / "results").glob("scaling_partial_*.json")
    saved = json.loads(path.read_text())
    _assert_says_where_and_when(saved)
    assert {figure.suffix for figure in path.parent.iterdir()} == {".json", ".png"}
    assert len(list(path.parent.glob("*.png"))) == 2
    assert [model["experts"] for model in saved["cost"]["models"]] == [0, 4, 4, 8, 8]
    assert len(saved["learning"]["runs"]) == 2 * 4

    monkeypatch.setattr(scaling_learning, "train_run", lambda *run: pytest.fail(f"{run} was trained again"))
    assert scaling.main([*tiny, "--learning-only"]) == 0
    again = json.loads(path.with_name(f"{path.stem}_2.json").read_text())
    assert again["learning"]["runs"] == saved["learning"]["runs"] and "cost" not in again
    assert json.loads(path.read_text()) == saved


def test_a_store_that_was_cut_off_loses_one_run_only(tmp_path):
    path = tmp_path / "store.jsonl"
    run = Run("dense", 0, 1.0, 1.0, 10, 1.0, 1.0, 10, [], 0, "abc")
    scaling_store.append_store(path, run)
    with path.open("a") as file:
        file.write('{"arm": "e=4", "se')
    scaling_store.append_store(path, replace(run, seed=1))
    assert list(scaling_store.read_store(path)) == [("dense", 0), ("dense", 1)]


def test_a_changed_source_has_another_store(tmp_path):
    def store() -> Path:
        return scaling_store.default_store({"lr": 1}, "corpus", [source])

    source = tmp_path / "arms.py"
    source.write_text("width = 1")
    before = store()
    assert store() == before
    source.write_text("width = 2")
    assert store() != before
    names = {path.name for path in scaling_learning.sources()}
    assert {"scaling_learning.py", "decoder.py", "trainer.py"} <= names


def test_after_a_failed_run_no_other_is_begun_and_those_under_way_are_kept(monkeypatch):
    def train(setting, arm: str, seed: int) -> str:
        begun.append(seed)
        if seed == 1:
            raise OSError("the disk is full")
        both.wait()
        return f"{arm} {seed}"

    def failed(future) -> None:
        if future.exception():
            both.set()

    class Pool(ThreadPoolExecutor):
        def __init__(self, jobs: int, mp_context) -> None:
            super().__init__(jobs)

        def submit(self, *arguments):
            future = super().submit(*arguments)
            future.add_done_callback(failed)
            return future

    begun, both = [], threading.Event()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(scaling_learning, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(scaling_learning, "train_run", train)
    kept = []
    with pytest.raises(OSError, match="disk is full"):
        for run in scaling_learning._train_all(LearningSetting(), [("a", seed) for seed in range(50)], 2):
            kept.append(run)
    assert "a 0" in kept and len(kept) == len(begun) - 1 < 49


@pytest.mark.parametrize("full", [False, True])
def test_arms_have_equal_active_parameters_router_included(full):
    setting = scaling.learning_setting(scaling.parse(["--full"] if full else []))
    counts = {arm: count_parameters(config) for arm, config in setting.arms().items()}
    dense = counts.pop("dense").non_embedding_active
    wide = counts.pop(f"dense, total of e={setting.experts[0]}")
    for arm, count in counts.items():
        assert abs(count.non_embedding_active / dense - 1) < 0.01, arm
    assert abs(wide.total / counts[f"e={setting.experts[0]}"].total - 1) < 0.01


def test_arms_of_a_seed_start_from_the_same_attention_norms_and_embedding():
    setting = LearningSetting(hidden_size=16, heads=2, width=32)
    models = {}
    for arm, config in setting.arms().items():
        models[arm] = Decoder(config)
        scaling_learning.share_initial_weights(models[arm], setting.model(0), seed=3)
    dense = models["dense"].state_dict()
    for arm, model in models.items():
        shared = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
        assert shared and all(torch.equal(tensor, dense[name]) for name, tensor in shared.items()), arm


def test_runs_of_a_seed_stand_together_so_that_an_interrupted_benchmark_has_pairs():
    setting = replace(LearningSetting(), seeds=2, seeds_of_extra_arms=1)
    seeds = [seed for _, seed in setting.runs()]
    assert seeds == sorted(seeds) and len(seeds) == 2 * len(setting.arms()) - 1


def _learning(losses: dict[str, list[float]], max_violation: float = 0.2, dead: int = 0) -> dict:
    """A record as `learn` makes it, with invented losses."""
    setting = replace(LearningSetting(), experts=(4, 16))
    runs = [
        {
            "arm": arm, "seed": seed, "validation_loss": loss, "training_loss": loss,
            "validation_tokens": 262_144, "cpu_seconds": 1.0, "tokens": 100,
            "max_violation": [max_violation] if arm.startswith("e=") else [], "dead_experts": dead,
            "commit": "abc",
        }
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]  # fmt: skip
    arms = {name: scaling_learning._arm_facts(config, setting) for name, config in setting.arms().items()}
    facts = {"folder": None, **{name: getattr(setting, name) for name in setting.__dataclass_fields__}}
    return {
        "setting": facts,
        "corpus": {"digest": "0" * 64},
        "epochs": 0.2,
        "jobs": 1,
        "arms": arms,
        "runs": runs,
    }


GOOD = {"dense": [1.50, 1.52, 1.51], "e=4": [1.47, 1.50, 1.49], "e=16": [1.44, 1.46, 1.46]}


def test_rules_pass_when_they_hold_and_fail_when_they_do_not():
    assert [v["holds"] for v in judge(_learning(GOOD))] == [True] * 6
    one_seed_above = GOOD | {"e=4": [1.47, 1.53, 1.49]}
    assert [v["holds"] for v in judge(_learning(one_seed_above))] == [False, True, True, True, True, True]
    no_better = GOOD | {"e=16": [1.49, 1.50, 1.52]}
    assert [v["holds"] for v in judge(_learning(no_better))] == [True, False, False, True, True, True]
    assert not judge(_learning(GOOD, max_violation=1.5))[3]["holds"]
    assert not judge(_learning(GOOD, dead=1))[3]["holds"]


def test_failures_are_printed_as_failures():
    text = scaling_tables.verdict_table(_learning(GOOD, dead=1))
    assert text.count("**FAILED**") == 1 and text.count("passed") == 5


def test_differences_are_paired_by_seed():
    pair = compared(_learning(GOOD))["e=16"]
    assert pair["pairs"] == 3 and math.isclose(pair["mean"], (0.06 + 0.06 + 0.05) / 3)


def test_every_expert_chosen_must_equal_dense_within_seed_noise_when_that_arm_ran():
    equal, unequal = {"e=2 (= k)": [1.505, 1.515]}, {"e=2 (= k)": [1.60, 1.61]}
    assert [v["holds"] for v in judge(_learning(GOOD | equal))] == [True] * 7
    assert [v["holds"] for v in judge(_learning(GOOD | unequal))] == [True] * 6 + [False]
    one_seed = {arm: values[:1] for arm, values in (GOOD | equal).items()}
    assert judge(_learning(one_seed))[-1]["seen"] == "fewer than two pairs"


def test_seed_noise_by_hand():
    learning = _learning({"dense": [1.0, 1.0, 1.0], "e=4": [1.1, 1.2, 1.3], "e=2 (= k)": [1.0, 1.2]})
    pooled = math.sqrt((2 * 0.1**2 + 1 * 0.02) / 3)  # variances 0.01 and 0.02
    assert math.isclose(seed_noise(learning, "e=2 (= k)"), 3.182446 * pooled / math.sqrt(2), rel_tol=1e-6)


def test_what_holds_without_the_pilots_seed_is_shown():
    pair = compared(_learning(GOOD), without=(0,))["e=16"]
    assert pair["pairs"] == 2 and math.isclose(pair["mean"], (0.06 + 0.05) / 2)
    assert "Without seed 0" in (text := scaling_tables.verdict_table(_learning(GOOD)))
    assert "-0.0550 ± " in text
    two_seeds = {arm: values[:2] for arm, values in GOOD.items()}
    assert "Without seed" not in scaling_tables.verdict_table(_learning(two_seeds))


def test_the_commits_of_the_runs_are_shown_when_they_differ_from_the_headline():
    def shown(commit: str) -> str:
        facts = record.environment(CPU) | {"commit": commit}
        return scaling_tables.render({"environment": facts, "learning": _learning(GOOD)})

    assert "the runs are of commits abc" in shown("def") and "of commits" not in shown("abc")


def test_figures_are_drawn_from_the_record_alone(tmp_path):
    facts = {"environment": record.environment(CPU), "learning": _learning(GOOD)}
    assert scaling_figures.draw_learning(facts, tmp_path / "learning.png").stat().st_size > 10_000


# Tables


def test_tables_go_between_their_marks_and_nowhere_else():
    kept = "after\n<!-- scaling_full -->\nkept\n<!-- end scaling_full -->\n"
    text = f"before\n<!-- layer -->\nold\n<!-- end layer -->\n{kept}"
    filled = tables.fill(text, {"layer": "| new |"})
    assert filled == text.replace("old", "\n| new |\n")
    assert tables.fill(filled, {"layer": "| new |"}) == filled


def test_shown_is_the_newest_full_result_of_every_hardware(tmp_path):
    for name in (
        "layer_zen_2026-01-02.json",
        "layer_a-cpu_2026-11-01.json",
        "layer_a-cpu_2026-02-11.json",
        "layer_quick_a-cpu_2027-01-01.json",
        "layer_partial_a-cpu_2027-01-01.json",
        "layer_partial_a-cpu_2027-01-01_2.json",
        "scaling_full_a_2027-01-01.json",
    ):
        (tmp_path / name).touch()
    newest = [path.name for path in tables.newest("layer", tmp_path)]
    assert newest == ["layer_a-cpu_2026-11-01.json", "layer_zen_2026-01-02.json"]
    assert tables.newest("other", tmp_path) == []


def test_quick_results_are_shown_only_where_there_are_no_full_ones_and_say_so(tmp_path):
    def keep(name: str, mode: str, folder: Path) -> None:
        facts = {"environment": record.environment(CPU), "mode": mode, "learning": _learning(GOOD)}
        record.save(name, facts, folder)

    keep("scaling_quick", "quick", tmp_path)
    keep("scaling_partial", "partial", tmp_path)
    assert "Quick settings" in tables.render_newest(tmp_path)["scaling_full"]
    keep("scaling_full", "full", tmp_path)
    assert "Quick settings" not in tables.render_newest(tmp_path)["scaling_full"]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ("", "quick"),
        ("--jobs 1 --store x --results y", "quick"),
        ("--full --store x", "full"),
        ("--full --learning-only", "partial"),
        ("--cost-only", "partial"),
        ("--full --seeds 2", "partial"),
        ('--full --set {"lr":1}', "partial"),
    ],
)
def test_only_the_whole_grid_of_scaling_counts_as_full(arguments, kind):
    assert scaling.parse(arguments.split()).kind == kind


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ("", "full"),
        ("--device cpu --no-save", "full"),
        ("--quick", "quick"),
        ("--tokens 1", "partial"),
        ("--quick --load zipf", "partial"),
        ("--dtype bfloat16", "partial"),
        ("--threads 1", "partial"),
    ],
)
def test_only_the_whole_grid_of_the_layer_counts_as_full(arguments, kind):
    assert layer.parse(arguments.split()).kind == kind


def test_results_do_not_make_the_checkout_dirty(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "--quiet"), (*author, "commit", "--quiet", "--allow-empty", "-m", "first")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (results / "layer.json").touch()
    assert not record.commit(tmp_path).endswith("+dirty")
    (tmp_path / "benchmarks" / "layer.py").touch()
    assert record.commit(tmp_path).endswith("+dirty")


def test_every_committed_result_says_where_it_was_measured_and_can_be_shown():
    for path in record.RESULTS.glob("*.json"):
        saved = json.loads(path.read_text(encoding="utf-8"))
        _assert_names_its_origin(saved, path)
        names = [n for n in tables.RENDER if path.name.startswith(f"{n.removesuffix('_full')}_")]
        name = max(names, key=len)
        assert "|" in tables.render(path, name)


def _assert_names_its_origin(saved: dict, path: Path) -> None:
    facts = saved["environment"]
    assert record.slug(facts["hardware"]) in path.name and facts["date"] in path.name
    assert facts["versions"]["torch"] and facts["commit"]


@pytest.mark.parametrize("name", ["layer", "scaling", "tables"])
def test_every_benchmark_explains_itself(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0 and "python -m benchmarks" in capsys.readouterr().out
