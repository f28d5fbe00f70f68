"""What a count of successes proves: the exact one-sided lower bound of a proportion."""

import math

import numpy as np

_HALVINGS = 60  # of the interval [0, 1]: more than a float can tell apart


def lower_bound(successes: int, trials: int, *, confidence: float = 0.95) -> float:
    """The least probability of success that so many successes leave possible (Clopper and Pearson 1934).

    At this p, `successes` or more of `trials` independent trials have probability 1 - confidence. 0 without a
    success; (1 - confidence)^(1 / trials) without a failure.

    Raises:
        ValueError: no trial, more successes than trials, or a confidence that is not between 0 and 1.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"{successes} successes in {trials} trials: give at least one trial and "
            f"from 0 to {trials} successes."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, such as 0.95.")
    if successes == 0:
        return 0.0
    counts = np.arange(successes, trials + 1)
    log_ways = math.lgamma(trials + 1) - np.array(
        [math.lgamma(k + 1) + math.lgamma(trials - k + 1) for k in counts.tolist()]
    )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        log_tail = log_ways + counts * math.log(middle) + (trials - counts) * math.log1p(-middle)
        if np.exp(log_tail).sum() < 1 - confidence:
            low = middle
        else:
            high = middle
    return low
