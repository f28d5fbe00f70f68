"""A haystack of every sense: runs of text, images, video and sound, with needles of each between them.

All its needles compete: keys differ over all modalities, and many keys and values are almost those of others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.modality_config import Modality
from moe.modality_sequence import Interleaved
from moe.probes.needle.haystack import Question, choose_balanced, default_needles
from moe.probes.needle.needles import Fact, draw_needles, swap_values
from moe.probes.senses.bank import Bank
from moe.probes.senses.config import NAMES, TEMPLATE, VALUE_DIGITS, check_modalities
from moe.probes.senses.filler import draw_filler
from moe.probes.senses.tokens import Tokens, write_needle


class HiddenNeedle(NamedTuple):
    """A fact in a haystack: its modality, the position of its first token, and its tokens."""

    fact: Fact
    modality: Modality
    place: int
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class SensesQuestion(Question):
    """A question, whose `template` is the name of a modality, and the needle as it lies in the haystack."""

    needle: HiddenNeedle


@dataclass(frozen=True, slots=True, eq=False)
class SensesHaystack:
    """The sequence, the questions in random order, and all needles in the order of their places."""

    prompt: Interleaved
    questions: tuple[SensesQuestion, ...]
    needles: tuple[HiddenNeedle, ...]


def build_senses_haystack(
    bank: Bank,
    text: NDArray[np.uint8],
    *,
    length: int,
    queries: int,
    seed: int,
    needles: int | None = None,
    modalities: Sequence[str] = tuple(NAMES),
    near_duplicate_keys: float = 0.3,
    near_duplicate_values: float = 0.5,
    shuffle_values: bool = False,
) -> SensesHaystack:
    """A haystack of exactly `length` tokens, and `queries` questions for each modality.

    `needles` (None: as many as in a haystack of text) are shared equally by the modalities, and stand where a
    run of filler ends. The questions of a modality are as many in each fifth of the depth as the needles
    allow. `shuffle_values` is the control: every needle is given the value of another one after the
    questions are made, so that recall must be at chance.

    Raises:
        ValueError: too little text, more questions than needles, no question, modalities that do not exist,
            or needles that do not fit.
    """
    check_modalities(modalities, "modalities")
    count = default_needles(length) if needles is None else needles
    _check_counts(count, queries, modalities, length)
    rng = np.random.default_rng([seed, length])
    facts = draw_needles(
        rng,
        count,
        near_duplicate_keys=near_duplicate_keys,
        near_duplicate_values=near_duplicate_values,
        digits=VALUE_DIGITS,
    )
    facts = [facts[i] for i in rng.permutation(count)]  # near-duplicates are drawn in turn, but lie anywhere
    numbers = rng.permutation(np.arange(count) % len(modalities))
    senses = [NAMES[modalities[int(i)]] for i in numbers]
    shown = swap_values(rng, facts) if shuffle_values else facts
    lines = [write_needle(rng, bank, sense, fact) for sense, fact in zip(senses, shown, strict=True)]
    sizes = np.array([len(line) for line in lines], np.int64)
    filler, runs = draw_filler(rng, bank, text, _room(length, sizes))
    points = _choose_points(rng, runs, count)
    hidden = [
        HiddenNeedle(fact, sense, place, line)
        for fact, sense, place, line in zip(
            shown, senses, (points + sizes.cumsum() - sizes).tolist(), lines, strict=True
        )
    ]
    questions = _ask(rng, hidden, facts, length, queries)
    pieces = filler.split(points)
    tokens = Tokens.concatenate(
        [part for pair in zip(pieces, lines, strict=False) for part in pair] + pieces[-1:]
    )
    return SensesHaystack(tokens.interleaved(bank), questions, tuple(hidden))


def _check_counts(needles: int, queries: int, modalities: Sequence[str], length: int) -> None:
    if queries < 1:
        raise ValueError(f"queries={queries} must be at least 1: recall is measured by asking.")
    fewest = needles // len(modalities)
    if queries > fewest:
        raise ValueError(
            f"queries={queries} for each of {len(modalities)} modalities, but a haystack of {length} tokens "
            f"with {needles} needles has {fewest} of each: every needle is asked for once. "
            f"Ask fewer, build more haystacks, or raise needles."
        )


def _room(length: int, sizes: NDArray[np.int64]) -> int:
    room = length - int(sizes.sum())
    if room < 1:
        raise ValueError(
            f"{len(sizes)} needles have {sizes.sum()} tokens and the haystack only {length}. "
            f"Take fewer needles or a longer haystack."
        )
    return room


def _choose_points(rng: np.random.Generator, runs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Where runs begin, `count` of them at random, in ascending order."""
    if count > len(runs):
        raise ValueError(
            f"{count} needles for {len(runs)} runs of filler: one stands before each at most. "
            f"Take fewer needles or a longer haystack."
        )
    return np.sort(rng.choice(runs, size=count, replace=False))


def _ask(
    rng: np.random.Generator,
    hidden: Sequence[HiddenNeedle],
    facts: Sequence[Fact],
    length: int,
    queries: int,
) -> tuple[SensesQuestion, ...]:
    """Questions about the facts, which are those of the needles unless these were shuffled."""
    by_modality: dict[str, list[SensesQuestion]] = {}
    for needle, fact in zip(hidden, facts, strict=True):
        name = needle.modality.name.lower()
        question = SensesQuestion(
            TEMPLATE.ask(fact.key), fact.value, needle.place / length, name, needle.place, needle
        )
        by_modality.setdefault(name, []).append(question)
    chosen = [one for found in by_modality.values() for one in choose_balanced(rng, found, queries)]
    return tuple(chosen[i] for i in rng.permutation(len(chosen)))
