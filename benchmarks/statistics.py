"""Paired comparisons of few seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paired:
    """Differences before - after of n pairs: mean, standard deviation, t with n - 1 degrees of freedom.

    p           one-sided: the chance of a t at least as large if there were no difference
    half_width  mean ± half_width holds the true difference in 95 % of experiments like this one
    """

    mean: float
    sigma: float
    t: float
    p: float
    half_width: float
    pairs: int


def compare(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Student's t-test of pairs that share a seed; mean > 0 says that `after` is lower.

    Raises:
        ValueError: the lengths differ, or there are fewer than two pairs.
    """
    n = len(before)
    if n != len(after) or n < 2:
        raise ValueError(f"{n} and {len(after)} values: a paired test needs at least two pairs.")
    differences = [b - a for b, a in zip(before, after, strict=True)]
    mean, sigma = statistics.fmean(differences), statistics.stdev(differences)
    error = sigma / math.sqrt(n)
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return Paired(mean, sigma, t, 1 - t_cdf(t, n - 1), t_quantile(0.975, n - 1) * error, n)


def t_cdf(t: float, degrees: int) -> float:
    """Probability of a value up to t under Student's distribution with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4 in the angle atan(t / sqrt(degrees)): exact.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"degrees={degrees} must be at least 1.")
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for j in range(degrees // 2):
        total += term
        term *= cosine**2 * ((2 * j + 2) / (2 * j + 3) if is_odd else (2 * j + 1) / (2 * j + 2))
    central = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return (1 + central) / 2


def t_quantile(probability: float, degrees: int) -> float:
    """The t that `t_cdf` sends to a probability in (0, 1), by bisection.

    Raises:
        ValueError: a probability outside (0, 1).
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability={probability} must be between 0 and 1.")
    low, high = -1.0, 1.0
    while t_cdf(low, degrees) > probability:
        low *= 2
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def fisher_lower(right: int, asked: int, other_right: int, other_asked: int) -> float:
    """One-sided p of Fisher's exact test: so few of `asked` right, given what both got right together.

    Small where the first is worse than the other by more than luck.

    Raises:
        ValueError: nothing asked, or more right than asked.
    """
    if not 0 <= right <= asked or not 0 <= other_right <= other_asked or not asked or not other_asked:
        raise ValueError(
            f"{right} of {asked} and {other_right} of {other_asked}: ask both at least one question."
        )
    together, whole = right + other_right, asked + other_asked
    least = max(0, together - other_asked)
    ways = sum(math.comb(asked, k) * math.comb(other_asked, together - k) for k in range(least, right + 1))
    return ways / math.comb(whole, together)
