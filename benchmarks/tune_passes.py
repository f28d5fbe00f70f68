"""Time one pass of moe_triton with many schedules; each must give the result of today's."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_problem import Problem
from benchmarks.gpu_timing import Budget, Stopwatch, failure_of, time_in_turns
from benchmarks.measure import Timing
from benchmarks.tune_space import first_round, variations
from moe_triton.config import Config, Pass, choose_config, override
from moe_triton.experts_ffn import empty_like_weight
from moe_triton.grad_pre import grad_pre
from moe_triton.grad_weight import grad_weight
from moe_triton.launch import target_of
from moe_triton.linear import linear
from moe_triton.rows import sum_rows
from moe_triton.settings import Settings
from moe_triton.tiles import Plan
from moe_triton.up import up

FINALISTS = 5
ERROR = {2: 1e-2, 4: 1e-4}  # relative, against today's schedule, by bytes of the dtype: sums in another order

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Found:
    """One pass at one size: today's schedule, the fastest one, and their times.

    ms: of every schedule that was timed.
    """

    shape: str
    tokens: int
    rows_per_expert: int
    what: Pass
    today: Config
    best: Config
    today_ms: Timing | None
    best_ms: Timing
    ms: dict[Config, float]
    failed: dict[str, str]


@torch.no_grad()
def steps_of(problem: Problem) -> dict[str, Step]:
    """Every pass as a call without arguments, on operands that the passes before it have made.

    A down-projection in parts is timed together with the sum of its parts.
    """
    shape, tensors = problem.shape, {name: leaf.detach() for name, leaf in problem.leaves.items()}
    x, weights, up_proj, down_proj = (tensors[name] for name in ("x", "weights", "up_proj", "down_proj"))
    up_bias, down_bias, grad = tensors.get("up_bias"), tensors.get("down_bias"), problem.upstream
    settings = Settings(problem.activation, interleaved=shape.gpt_oss)
    routed = problem.plan.pair_of_row, problem.plan.row_of_pair, problem.plan.offsets
    plan = Plan(*routed, shape.k, {})

    def config(what: Pass) -> Config:
        return choose_config(what, target_of(x.device), x.dtype, plan.pairs, shape.e, shape.d, shape.h)

    def run_up() -> tuple[Tensor, ...]:
        hidden, pre = up(x, up_proj, up_bias, None, plan, settings, keep_pre=True)
        assert pre is not None
        return hidden, pre

    def run_down() -> tuple[Tensor, ...]:
        rows = linear(hidden, down_proj, down_bias, plan, config("down"))
        return (sum_rows(rows, routed[1], routed[2], shape.k, weights, dtype=x.dtype),)

    def run_grad_pre() -> tuple[Tensor, ...]:
        of_pre, scaled, parts = grad_pre(grad, down_proj, pre, weights, plan, settings)
        assert parts is not None
        return of_pre, scaled, parts.sum(0)

    def run_grad_down() -> tuple[Tensor, ...]:
        out = empty_like_weight(down_proj)
        grad_weight(grad, scaled, out, plan, config("grad_down"), gather_a=True)
        return (out,)

    def run_grad_rows() -> tuple[Tensor, ...]:
        return (linear(of_pre, up_proj.mT, None, plan, config("grad_rows").whole()),)

    def run_grad_up() -> tuple[Tensor, ...]:
        out = empty_like_weight(up_proj)
        grad_weight(of_pre, x, out, plan, config("grad_up"), gather_b=True)
        return (out,)

    hidden, pre = run_up()
    of_pre, scaled, _ = run_grad_pre()
    return {
        "up": run_up, "down": run_down, "grad_pre": run_grad_pre, "grad_down": run_grad_down,
        "grad_rows": run_grad_rows, "grad_up": run_grad_up,
    }  # fmt: skip


@torch.no_grad()
def tune_pass(what: Pass, name: str, problem: Problem, watch: Stopwatch, until: float) -> Found | None:
    """Three rounds: everything that fits, the neighbours of the best, the finalists against today's."""
    step, target = steps_of(problem)[what], target_of(problem.x.device)
    today = todays(what, problem)
    expected = step()
    trial = Trial(what, step, expected, watch, until)
    trial.measure([today, *candidates(what, problem)])
    for config in trial.best(2):
        trial.measure(variations(what, config, target))
    finalists = [c for c in trial.best(FINALISTS) if c != today]
    timings = trial.in_turns([today, *finalists], Budget(seconds=1.0, warmups=10, min_rounds=20))
    if not timings:
        return None
    best = min(timings, key=lambda config: timings[config].ms)
    ms = trial.ms | {config: timing.ms for config, timing in timings.items()}
    size = name, len(problem.x), rows_per_expert(problem)
    return Found(*size, what, today, best, timings.get(today), timings[best], ms, trial.failed)


def candidates(what: Pass, problem: Problem) -> list[Config]:
    """The schedules of the first round at this size, cut into as many splits as today's."""
    splits = todays(what, problem).splits
    found = first_round(what, target_of(problem.x.device), rows_per_expert(problem))
    return [replace(config, splits=splits) for config in found]


def todays(what: Pass, problem: Problem) -> Config:
    """The schedule that a call of this size takes now."""
    shape, x = problem.shape, problem.x
    return choose_config(
        what, target_of(x.device), x.dtype, problem.experts.numel(), shape.e, shape.d, shape.h
    )


def rows_per_expert(problem: Problem) -> int:
    """The mean, rounded down, as `choose_config` counts."""
    return max(1, problem.experts.numel() // problem.shape.e)


@torch.no_grad()
def run_forced(what: Pass, config: Config, step: Step) -> tuple[Tensor, ...]:
    """A pass with this schedule."""
    with override(what, config):
        return step()


class Trial:
    """Times one pass with many schedules; remembers the median of each, and why others failed."""

    def __init__(
        self, what: Pass, step: Step, expected: tuple[Tensor, ...], watch: Stopwatch, until: float
    ) -> None:
        self.what: Pass = what
        self.step, self.expected, self.watch, self.until = step, expected, watch, until
        self.ms: dict[Config, float] = {}
        self.failed: dict[str, str] = {}

    def measure(self, configs: Sequence[Config]) -> None:
        """Check each schedule and time it for a few runs, while there is time."""
        for config in configs:
            if config in self.ms or str(config) in self.failed:
                continue
            if time.perf_counter() > self.until and self.ms:
                return
            reason = failure_of(lambda config=config: self._check(config), self.watch, str(config))
            if reason is None:
                for timed, timing in self.in_turns([config], Budget(0.0, 2, 5, 5)).items():
                    self.ms[timed] = timing.ms
            else:
                self.failed[str(config)] = reason

    def in_turns(self, configs: Sequence[Config], budget: Budget) -> dict[Config, Timing]:
        """Time some schedules side by side."""
        by_name = {str(config): config for config in configs}
        runs = {
            name: lambda c=config: run_forced(self.what, c, self.step) for name, config in by_name.items()
        }
        timings, failed = time_in_turns(runs, self.watch, budget, queued=True)
        self.failed |= failed
        return {by_name[name]: timing for name, timing in timings.items()}

    def best(self, count: int) -> list[Config]:
        """The fastest schedules so far."""
        return sorted(self.ms, key=lambda config: self.ms[config])[:count]

    def _check(self, config: Config) -> None:
        for ours, expected in zip(run_forced(self.what, config, self.step), self.expected, strict=True):
            error = ((ours.float() - expected.float()).norm() / expected.float().norm()).item()
            if not error <= ERROR[expected.element_size()]:
                raise ValueError(f"differs from today's schedule by {error:.1e}")
