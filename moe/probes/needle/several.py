"""Several needles at once, as in RULER (2404.06654): many keys in one suffix, or one key with many values.

A question is a list of steps, each a query and the answers that it accepts. To ask it, decode greedily: read
the query of a step, write an answer, read the next query, so that later steps see the model's own answers.
RULER's multi-key task, one of many keys asked alone, is what `build_haystack` makes anyway.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe.probes.needle.haystack import Haystack, default_needles
from moe.probes.needle.needles import RANDOM_TEMPLATES, Fact, draw_needles, draw_value
from moe.probes.needle.placement import Needle, Writing, choose_places, insert, needles_at


@dataclass(frozen=True, slots=True)
class Step:
    """What is read, and the answers that are right. All answers have the same length."""

    key: bytes
    query: bytes
    accepted: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SeveralQuestion:
    """Steps that are asked one after another, in one suffix."""

    steps: tuple[Step, ...]

    def count_correct(self, answers: Sequence[bytes]) -> int:
        """How many of the answers, one a step, are right; the same answer to the same key counts once."""
        right = defaultdict(set)
        for step, answer in zip(self.steps, answers, strict=True):
            if answer in step.accepted:
                right[step.key].add(answer)
        return sum(map(len, right.values()))


def ask_several(haystack: Haystack, *, keys: int, questions: int, seed: int) -> tuple[SeveralQuestion, ...]:
    """Questions of `keys` steps each, about different needles of the haystack, whatever their templates.

    keys=100 and questions=1 in a haystack of 100 needles asks for all of them in one suffix.

    Raises:
        ValueError: no key, no question, or fewer needles than are to be asked for.
    """
    if keys < 1 or questions < 1:
        raise ValueError(f"keys={keys} and questions={questions} must be at least 1.")
    if keys * questions > len(haystack.needles):
        raise ValueError(
            f"{questions} questions about {keys} keys each need {keys * questions} needles, "
            f"and the haystack has {len(haystack.needles)}. "
            f"Ask for fewer, or build a haystack with needles={keys * questions}."
        )
    rng = np.random.default_rng([seed, keys, questions])
    chosen = [haystack.needles[i] for i in rng.permutation(len(haystack.needles))[: keys * questions]]
    return tuple(
        SeveralQuestion(_steps([(needle, (needle.fact.value,)) for needle in chosen[i : i + keys]]))
        for i in range(0, len(chosen), keys)
    )


def build_multi_value(
    text: NDArray[np.uint8],
    *,
    length: int,
    keys: int,
    values: int,
    seed: int,
    template: str = "key_value",
    needles: int | None = None,
    near_duplicate_keys: float = 0.3,
    near_duplicate_values: float = 0.5,
) -> tuple[Haystack, tuple[SeveralQuestion, ...]]:
    """A haystack in which `keys` keys have `values` values each, at different places, and the other keys one.

    Every question asks for one of those keys `values` times: all its values are to come, in any order. The
    other arguments are those of `build_haystack`. The haystack has no questions of its own.

    Raises:
        ValueError: as `build_haystack`, or more values than needles.
    """
    if template not in RANDOM_TEMPLATES:
        raise ValueError(f"template={template!r} must be one of {list(RANDOM_TEMPLATES)}.")
    count = default_needles(length) if needles is None else needles
    if keys < 1 or values < 2 or keys * values > count:
        raise ValueError(
            f"keys={keys} with values={values} each, and {count} needles: "
            f"give at least one key and two values, and keys * values needles."
        )
    rng = np.random.default_rng([seed, length, keys, values])
    facts = draw_needles(
        rng, count, near_duplicate_keys=near_duplicate_keys, near_duplicate_values=near_duplicate_values
    )
    facts = _share_keys(rng, facts, keys, values)
    writings = [Writing(RANDOM_TEMPLATES[template], facts[i]) for i in rng.permutation(count).tolist()]
    points, window = choose_places(rng, text, length, writings)
    hidden = needles_at(points, writings)
    return Haystack(insert(window, points, writings), (), hidden), _ask_for_all_values(hidden, values)


def _share_keys(rng: np.random.Generator, facts: list[Fact], keys: int, values: int) -> list[Fact]:
    """The facts, of which `keys` groups of `values` have one key a group and different values."""
    order = rng.permutation(len(facts)).tolist()  # near-duplicates of a key are in other groups, or in none
    shared = list(facts)
    for i in range(0, keys * values, values):
        taken: set[bytes] = set()
        for j in order[i : i + values]:
            value = facts[j].value
            while value in taken:
                value = draw_value(rng)
            taken.add(value)
            shared[j] = Fact(facts[order[i]].key, value)
    return shared


def _ask_for_all_values(needles: Sequence[Needle], values: int) -> tuple[SeveralQuestion, ...]:
    by_key: defaultdict[bytes, list[Needle]] = defaultdict(list)
    for needle in needles:
        by_key[needle.fact.key].append(needle)
    groups = [group for group in by_key.values() if len(group) == values]
    return tuple(
        SeveralQuestion(_steps([(group[0], tuple(needle.fact.value for needle in group))] * values))
        for group in groups
    )


def _steps(asked: Sequence[tuple[Needle, tuple[bytes, ...]]]) -> tuple[Step, ...]:
    """A query for each needle; all but the first begin with what closes the answer before."""
    steps, close = [], b""
    for needle, accepted in asked:
        template, key = RANDOM_TEMPLATES[needle.template], needle.fact.key
        steps.append(Step(key, close + template.ask(key), accepted))
        close = template.close
    return tuple(steps)
