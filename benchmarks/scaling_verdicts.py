"""What the runs of benchmarks.scaling prove, and what they fail to prove."""

import math
import statistics
from collections.abc import Collection
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from benchmarks.scaling_learning import DENSE
from benchmarks.statistics import compare, t_quantile

ACTIVE_TOLERANCE = 0.01
SIGNIFICANCE = 0.05
VALIDATION_TOKENS = 200_000
PILOT_SEEDS = (0,)  # the settings were chosen on them, so the tables also say what holds without them


def losses(learning: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Validation loss by arm and seed, arms in their order."""
    found: dict[str, dict[int, float]] = {arm: {} for arm in learning["arms"]}
    for run in learning["runs"]:
        found[run["arm"]][run["seed"]] = run["validation_loss"]
    return {arm: by_seed for arm, by_seed in found.items() if by_seed}


def sparse_arms(learning: dict[str, Any]) -> list[str]:
    """The arms of the claim: more experts than a token uses."""
    k = learning["setting"]["top_k"]
    return [arm for arm, facts in learning["arms"].items() if facts["experts"] > k]


def every_expert_arm(learning: dict[str, Any]) -> str:
    """The arm with e = k."""
    k = learning["setting"]["top_k"]
    return next(arm for arm, facts in learning["arms"].items() if facts["experts"] == k)


def compared(learning: dict[str, Any], without: Collection[int] = ()) -> dict[str, dict[str, float]]:
    """Each arm against dense on the seeds that both have: difference dense - arm, σ, t, one-sided p."""
    by_arm = losses(learning)
    results = {}
    for arm, by_seed in by_arm.items():
        seeds = sorted((by_seed.keys() & by_arm[DENSE].keys()) - {*without})
        if arm != DENSE and len(seeds) >= 2:
            pair = compare([by_arm[DENSE][s] for s in seeds], [by_seed[s] for s in seeds])
            results[arm] = asdict(pair)
    return results


def seed_noise(learning: dict[str, Any], arm: str) -> float:
    """How far the mean difference of an arm that equals dense strays from 0 in 95 % of experiments.

    t * σ / sqrt(pairs). σ is pooled: the standard deviation of the paired differences to dense of all arms,
    each around its own mean, since one arm alone has too few pairs to tell its own. Without two pairs in
    some arm: NaN.
    """
    by_arm, pairs = losses(learning), compared(learning)
    degrees = int(sum(pair["pairs"] - 1 for pair in pairs.values()))
    if not degrees:
        return math.nan
    pooled = sum((pair["pairs"] - 1) * pair["sigma"] ** 2 for pair in pairs.values()) / degrees
    return t_quantile(0.975, degrees) * math.sqrt(pooled / len(by_arm[arm].keys() & by_arm[DENSE].keys()))


def judge(learning: dict[str, Any]) -> list[dict[str, Any]]:
    """Each rule, what was seen, and whether it holds. e = k is judged when that arm ran."""
    by_arm, arms = losses(learning), sparse_arms(learning)
    pairs, every = compared(learning), every_expert_arm(learning)
    return [
        _first_below_dense(by_arm, arms[0]),
        _falls_with_experts(by_arm, [DENSE, *arms]),
        _significant(pairs.get(arms[-1]), arms[-1]),
        _balanced(learning, arms),
        _equal_active(learning, arms),
        _fresh_data(learning),
        *([_equals_dense(learning, by_arm, every)] if every in by_arm else []),
    ]


def _first_below_dense(by_arm: dict[str, dict[int, float]], arm: str) -> dict[str, Any]:
    differences = [by_arm[DENSE][seed] - loss for seed, loss in sorted(by_arm[arm].items())]
    seen = ", ".join(f"{-d:+.4f}" for d in differences)
    return _verdict(f"{arm} is below dense in every seed", seen, all(d > 0 for d in differences))


def _falls_with_experts(by_arm: dict[str, dict[int, float]], arms: list[str]) -> dict[str, Any]:
    means = [statistics.fmean(by_arm[arm].values()) for arm in arms]
    seen = ", ".join(f"{arm} {mean:.4f}" for arm, mean in zip(arms, means, strict=True))
    falls = all(after < before for before, after in pairwise(means))
    return _verdict("mean loss falls with every step in experts", seen, falls)


def _significant(pair: dict[str, float] | None, arm: str) -> dict[str, Any]:
    rule = f"{arm} against dense: one-sided paired p < {SIGNIFICANCE}"
    if pair is None:
        return _verdict(rule, "fewer than two pairs", False)
    seen = f"p = {pair['p']:.1e}, t = {pair['t']:.1f}, {pair['pairs'] - 1:.0f} degrees of freedom"
    return _verdict(rule, seen, pair["p"] < SIGNIFICANCE)


def _balanced(learning: dict[str, Any], arms: list[str]) -> dict[str, Any]:
    runs = [run for run in learning["runs"] if run["arm"] in arms]
    worst = max(value for run in runs for value in run["max_violation"])
    dead = sum(run["dead_experts"] for run in runs)
    return _verdict(
        "MaxVio < 1 in every layer, no dead experts",
        f"MaxVio {worst:.2f}, {dead} dead",
        worst < 1 and not dead,
    )


def _equal_active(learning: dict[str, Any], arms: list[str]) -> dict[str, Any]:
    dense = learning["arms"][DENSE]["non_embedding_active"]
    shares = {arm: learning["arms"][arm]["non_embedding_active"] / dense - 1 for arm in arms}
    seen = ", ".join(f"{arm} {share:+.1%}" for arm, share in shares.items())
    within = all(abs(share) <= ACTIVE_TOLERANCE for share in shares.values())
    return _verdict("active parameters without embedding within 1 % of dense, router included", seen, within)


def _fresh_data(learning: dict[str, Any]) -> dict[str, Any]:
    tokens = min(run["validation_tokens"] for run in learning["runs"])
    seen = f"{learning['epochs']:.2f} epochs, {tokens} held-out bytes"
    enough = learning["epochs"] <= 1 and tokens >= VALIDATION_TOKENS
    return _verdict(f"at most one epoch, at least {VALIDATION_TOKENS} held-out bytes", seen, enough)


def _equals_dense(learning: dict[str, Any], by_arm: dict[str, dict[int, float]], arm: str) -> dict[str, Any]:
    differences = [loss - by_arm[DENSE][seed] for seed, loss in by_arm[arm].items() if seed in by_arm[DENSE]]
    mean, noise = statistics.fmean(differences), seed_noise(learning, arm)
    rule = f"{arm} equals dense within seed noise (t * pooled sd of paired differences / sqrt(pairs), 95 %)"
    if math.isnan(noise):
        return _verdict(rule, "fewer than two pairs", False)
    seen = f"{mean:+.4f} of {len(differences)} pairs, noise ± {noise:.4f}"
    return _verdict(rule, seen, abs(mean) <= noise)


def _verdict(rule: str, seen: str, holds: bool) -> dict[str, Any]:
    return {"rule": rule, "seen": seen, "holds": holds}
