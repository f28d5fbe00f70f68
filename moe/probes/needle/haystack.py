"""A haystack: real text, never repeated, with needles of all templates inserted at random places.

All its needles compete: keys differ over all templates, and many keys and values are almost those of others.
Every question is to be asked alone, after the whole haystack. Building one moves whole slices, so that ten
million bytes take little more than two copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.probes.needle.needles import RANDOM_TEMPLATES, Template, draw_needles, swap_values
from moe.probes.needle.placement import Needle, Writing, choose_places, insert, needles_at, starts_of

BYTES_PER_NEEDLE = 256
LONG = 2**20  # bytes; a longer haystack may have more needles
MOST_NEEDLES, MOST_NEEDLES_LONG = 2000, 5000
QUINTILES = 5


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked after the haystack.

    `depth` is the place of the needle as a share of the haystack, `place` the position of its first byte.
    """

    query: bytes
    answer: bytes
    depth: float
    template: str
    place: int

    @property
    def quintile(self) -> int:
        """0 for a needle in the first fifth of the haystack, 4 for one in the last."""
        return int(self.depth * QUINTILES)


AnyQuestion = TypeVar("AnyQuestion", bound=Question)


@dataclass(frozen=True, slots=True, eq=False)
class Haystack:
    """ids (n) uint8, the questions in random order, and all needles in the order of their places.

    With `shuffled_values` the values in `ids` and `needles` are not the answers of the questions.
    """

    ids: NDArray[np.uint8]
    questions: tuple[Question, ...]
    needles: tuple[Needle, ...]
    shuffled_values: bool = False

    @property
    def prompt(self) -> Tensor:
        """ids (1 n) uint8."""
        return torch.from_numpy(np.ascontiguousarray(self.ids))[None]


def default_needles(length: int) -> int:
    """One needle per 256 bytes; at most 2000 up to a million bytes, and 5000 beyond."""
    return min(length // BYTES_PER_NEEDLE, MOST_NEEDLES if length <= LONG else MOST_NEEDLES_LONG)


def build_haystack(
    text: NDArray[np.uint8],
    *,
    length: int,
    queries: int,
    seed: int,
    needles: int | None = None,
    templates: Sequence[str] = ("key_value", "sentence"),
    near_duplicate_keys: float = 0.3,
    near_duplicate_values: float = 0.5,
    shuffle_values: bool = False,
) -> Haystack:
    """A haystack of exactly `length` bytes, and `queries` questions for each template.

    The text in it is consecutive, from a random place of `text`. `needles` (None: `default_needles`) are
    shared equally by the templates. The questions of a template are as many in each fifth of the depth as the
    needles allow. `shuffle_values` is the control: after the questions are made, every needle is given the
    value of another one, so that recall must be at chance. needles=1 is a needle without competitors.

    Raises:
        ValueError: a text shorter than the haystack needs, more questions than needles, no question,
            templates that do not exist, or needles that do not fit.
    """
    rng = np.random.default_rng([seed, length])
    chosen = _templates(templates)
    count = default_needles(length) if needles is None else needles
    _check_counts(count, queries, chosen, length)
    facts = draw_needles(
        rng, count, near_duplicate_keys=near_duplicate_keys, near_duplicate_values=near_duplicate_values
    )
    template_of = [chosen[i] for i in rng.permutation(np.arange(count) % len(chosen)).tolist()]
    order = rng.permutation(count).tolist()  # near-duplicates are drawn one after another, but lie anywhere
    writings = [Writing(template_of[i], facts[i]) for i in order]
    points, window = choose_places(rng, text, length, writings)
    questions = _ask(rng, writings, starts_of(points, writings), length, queries)
    if shuffle_values:
        shuffled = swap_values(rng, [writing.fact for writing in writings])
        writings = [Writing(w.template, fact) for w, fact in zip(writings, shuffled, strict=True)]
    ids = insert(window, points, writings)
    return Haystack(ids, questions, needles_at(points, writings), shuffle_values)


def choose_balanced(
    rng: np.random.Generator, questions: Sequence[AnyQuestion], count: int
) -> list[AnyQuestion]:
    """`count` of the questions, as many from each fifth of the depth as there are; at random otherwise."""
    turn: list[tuple[int, float, int]] = []
    asked = [0] * QUINTILES
    for i in rng.permutation(len(questions)).tolist():
        quintile = questions[i].quintile
        turn.append((asked[quintile], rng.random(), i))  # one of each fifth before a second one of any
        asked[quintile] += 1
    return [questions[i] for _, _, i in sorted(turn)[:count]]


def _templates(names: Sequence[str]) -> list[Template]:
    unknown = [name for name in names if name not in RANDOM_TEMPLATES]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"templates={list(names)} must be different ones of {list(RANDOM_TEMPLATES)}, at least one."
        )
    return [RANDOM_TEMPLATES[name] for name in names]


def _check_counts(needles: int, queries: int, templates: list[Template], length: int) -> None:
    if queries < 1:
        raise ValueError(f"queries={queries} must be at least 1: recall is measured by asking.")
    fewest = needles // len(templates)
    if queries > fewest:
        raise ValueError(
            f"queries={queries} for each of {len(templates)} templates, but a haystack of {length} bytes "
            f"with {needles} needles has {fewest} of each: every needle is asked for once. "
            f"Ask fewer, build more haystacks, or raise needles."
        )


def _ask(
    rng: np.random.Generator,
    writings: Sequence[Writing],
    starts: NDArray[np.int64],
    length: int,
    queries: int,
) -> tuple[Question, ...]:
    questions = [
        Question(template.ask(fact.key), fact.value, start / length, template.name, start)
        for (template, fact), start in zip(writings, starts.tolist(), strict=True)
    ]
    chosen = []
    for name in dict.fromkeys(question.template for question in questions):
        of_template = [question for question in questions if question.template == name]
        chosen += choose_balanced(rng, of_template, queries)
    return tuple(chosen[i] for i in rng.permutation(len(chosen)).tolist())
