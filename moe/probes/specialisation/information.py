"""Mutual information of two counted variables, and what it would be by chance.

All of it in bits and by the plug-in estimator, which puts counts / their sum in the place of probabilities:

    H(X) = - sum over x of p(x) log2 p(x)          I(X; Y) = H(X) + H(Y) - H(X, Y)

The estimate of I is too high for few counts (Miller 1955: by about (x - 1)(y - 1) / (2 n ln 2) for n
independent ones, more for dependent ones). It is not corrected; the null says what it is worth: the
same estimate with labels shuffled, so that no information is left. p = (r + 1) / (permutations + 1), r of the
permutations being at least what was found (Phipson and Smyth 2010): never 0.

Axes: n blocks, y labels, m sets, r permutations; the others as in `moe`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.float64] | NDArray[np.int64]
_ROUNDING = 1e-12  # bits: equal tables, summed in another order, must count as equal


@dataclass(frozen=True, slots=True)
class Null:
    """The mutual information of shuffled labels beside the one found, in bits.

    found       of the same statistic, with the true labels
    units       how many labels were shuffled: of blocks, or of tokens
    unit_slots  how many slots each of them brought; for tokens at most, less dropped pairs
    """

    found: float
    units: int
    unit_slots: int
    permutations: int
    mean: float
    quantile_95: float
    quantile_99: float
    p_value: float

    @classmethod
    def of(cls, found: float, shuffled: Floats, units: int, unit_slots: int) -> "Null":
        """Compare with the information of shuffled labels (r)."""
        as_large = int((shuffled >= found - _ROUNDING).sum())
        q95, q99 = np.quantile(shuffled, (0.95, 0.99)).tolist()
        p_value = (as_large + 1) / (len(shuffled) + 1)
        return cls(found, units, unit_slots, len(shuffled), float(shuffled.mean()), q95, q99, p_value)


def entropy(counts: Counts) -> Floats:
    """Bits of the last axis of counts (... x) -> (...); 0 where nothing was counted."""
    total = counts.sum(-1, keepdims=True)
    p = counts / np.where(total > 0, total, 1)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)


def mutual_information(table: Counts) -> Floats:
    """Bits that one axis of table (... y e) tells of the other -> (...)."""
    both = entropy(table.reshape(*table.shape[:-2], -1))
    return np.maximum(entropy(table.sum(-1)) + entropy(table.sum(-2)) - both, 0)


def block_null(
    slots: NDArray[np.int64], labels: NDArray[np.int64], num_labels: int, *, permutations: int, seed: int
) -> Null:
    """The null in which whole blocks of slots (n e) exchange their labels (n).

    Tokens of a block stay together, so what neighbours share is no evidence. Of every block the same number
    of slots is drawn, `unit_slots`; blocks with fewer are left out. Were they of their own lengths, shuffling
    would also change how noisy each label is, and where one label has few short blocks the test would find
    information where there is none. As it is, p is exact where labels tell nothing of a block but its length.
    """
    rng = np.random.default_rng(seed)
    size = _common_size(slots.sum(1), labels)
    whole = np.flatnonzero((slots.sum(1) >= size) & (size > 0))
    if not len(whole):
        return Null.of(0.0, np.zeros(permutations), 0, 0)
    thinned = np.stack([rng.multivariate_hypergeometric(row, size) for row in slots[whole]])
    names = np.arange(num_labels)[:, None]

    def table(labels: NDArray[np.int64]) -> Floats:
        return (labels == names).astype(np.float64) @ thinned  # (y e)

    labels = labels[whole]
    shuffled = np.stack([table(rng.permutation(labels)) for _ in range(permutations)])
    found = float(mutual_information(table(labels)))
    return Null.of(found, mutual_information(shuffled), len(whole), size)


def _common_size(sizes: NDArray[np.int64], labels: NDArray[np.int64]) -> int:
    """The median size of the blocks of the label where that is least; blocks without slots do not count."""
    medians = [np.median(sizes[(labels == y) & (sizes > 0)]) for y in np.unique(labels[sizes > 0])]
    return int(min(medians, default=0))


def token_null(
    sets: NDArray[np.int64],
    tokens: NDArray[np.int64],
    num_experts: int,
    *,
    permutations: int,
    seed: int,
) -> Null:
    """The null in which tokens exchange their labels one by one: sets (m k) of experts, tokens (m y).

    The choices of a token stay together. Neighbouring tokens are alike, and this null does not know it: it
    is too easy to pass. Tokens of one set are alike to it, so labels are dealt to sets (multivariate
    hypergeometric), which is the same distribution as shuffling them all, and needs no token to be kept.
    """
    rng = np.random.default_rng(seed)
    contains = (sets[:, :, None] == np.arange(num_experts)).sum(1).astype(np.float64)  # (m e)
    tables = np.stack([_deal(tokens, rng) @ contains for _ in range(permutations)])  # (r y e)
    shuffled = mutual_information(tables)
    found = float(mutual_information(tokens.T @ contains))
    return Null.of(found, shuffled, int(tokens.sum()), sets.shape[1])


def _deal(tokens: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Labels of tokens (m y) dealt anew, with the same sums -> (y m)."""
    left = tokens.sum(1)
    hands: list[NDArray[np.int64]] = []
    for wanted in tokens.sum(0)[:-1].tolist():
        hands.append(rng.multivariate_hypergeometric(left, wanted, method="marginals"))
        left = left - hands[-1]
    return np.stack([*hands, left])
