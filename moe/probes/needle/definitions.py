"""Functions of real code and the files that define them: what the template `definition` asks for.

The fact is the name of a function and the path of its file, closed by an end of line. The context is laid out
so that the answer is in it: every `def name(` carries the path of its file as a comment, right after the
parenthesis, and what else was on its line follows on the next one. That is still the same Python
(an example of a definition in a docstring is given its path as well).

    def name(  # package/module.py
    x, y=0):
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe.probes.needle.needles import DEFINITION, LONGEST_NAME, LONGEST_PATH, Fact
from moe.train.corpus import Document, read_pieces

NEAR = 20  # a near-duplicate path is at most so many definitions away in the order of the paths
DEEPEST = 3  # folders that a training sequence puts above all its paths, at most

_ANY_DEFINITION = re.compile(rb"^[ \t]*(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)
_DEFINITION = re.compile(rb"^([ \t]*(?:async[ \t]+)?)def[ \t]+(\w+)[ \t]*\(", re.MULTILINE)


def defined_names(source: bytes) -> list[bytes]:
    """The names of all functions and methods that a file defines, as often as it does."""
    return _ANY_DEFINITION.findall(source)


def annotate(source: bytes, path: str) -> bytes:
    """The source with the path as a comment after every `def name(`, which are then needles."""

    def needle(match: re.Match[bytes]) -> bytes:
        return match[1] + DEFINITION.write(Fact(match[2], path_value(path)))

    return _DEFINITION.sub(needle, source)


def path_value(path: str) -> bytes:
    """A path as a value: closed, since lengths differ."""
    return path.encode() + b"\n"


@dataclass(frozen=True, slots=True, eq=False)
class Definitions:
    """Facts in the order of their names, and `by_path` (f), their numbers in the order of their paths."""

    facts: tuple[Fact, ...]
    by_path: NDArray[np.int64]
    place_by_path: NDArray[np.int64]  # the inverse of by_path

    @classmethod
    def of(cls, facts: Iterable[Fact]) -> "Definitions":
        """Sort the facts, whose names are different.

        Raises:
            ValueError: no facts.
        """
        by_name = tuple(sorted(facts))
        if not by_name:
            raise ValueError(
                "there is no function whose name is defined exactly once. Give more Python source."
            )
        by_path = np.array(sorted(range(len(by_name)), key=lambda i: by_name[i].value), np.int64)
        return cls(by_name, by_path, np.argsort(by_path))

    def draw(
        self,
        rng: np.random.Generator,
        count: int,
        *,
        near_duplicate_keys: float,
        near_duplicate_values: float,
    ) -> list[Fact]:
        """`count` different facts, or all when there are fewer.

        Real names have near-duplicates enough: with probability `near_duplicate_keys` a fact is the neighbour
        by name of one drawn before, else with probability `near_duplicate_values` a neighbour by path,
        unless that one is drawn already.
        """
        count = min(count, len(self.facts))
        chosen: dict[int, None] = {}  # in the order drawn
        fresh = rng.permutation(len(self.facts)).tolist() if count else []
        choices = zip(*rng.random((3, count)).tolist(), strict=True)
        for by_name, by_path, which in choices:
            drawn = list(chosen)
            near = -1
            if drawn and by_name < near_duplicate_keys:
                near = self._beside(drawn[int(which * len(drawn))], 1)
            elif drawn and by_path < near_duplicate_values:
                near = self._near_by_path(drawn[int(which * len(drawn))], 1 + int(rng.integers(NEAR)))
            while near < 0 or near in chosen:
                near = fresh.pop()
            chosen[near] = None
        return [self.facts[i] for i in chosen]

    def move_deeper(self, rng: np.random.Generator, facts: Sequence[Fact]) -> list[Fact]:
        """The facts, all their files moved into 0 to `DEEPEST` folders with made-up names.

        The paths of a package share long beginnings, which those of the standard library do not: where they
        part, only the name of the function, many bytes before, says how to go on. No path becomes longer than
        `LONGEST_PATH`.
        """
        room = LONGEST_PATH - max((len(fact.value) for fact in facts), default=0)
        above = b""
        for i in rng.integers(len(self.facts), size=int(rng.integers(DEEPEST + 1))).tolist():
            folder = self.facts[i].key.strip(b"_").lower() + b"/"
            if 1 < len(folder) <= room - len(above):
                above += folder
        return [Fact(fact.key, above + fact.value) for fact in facts]

    def _beside(self, i: int, distance: int) -> int:
        return (i + distance) % len(self.facts)

    def _near_by_path(self, i: int, distance: int) -> int:
        return int(self.by_path[self._beside(int(self.place_by_path[i]), distance)])


def find_definitions(documents: Iterable[Document], root: Path) -> Definitions:
    """All functions whose name these files define exactly once, with paths relative to `root`.

    Very long names and paths are left out: training sequences are short.

    Raises:
        ValueError: there is none.
        OSError: a file cannot be read.
    """
    counts: Counter[bytes] = Counter()
    facts: dict[bytes, Fact] = {}
    for document in documents:
        names = defined_names(b"".join(read_pieces(document)))
        value = path_value(document.path.relative_to(root).as_posix())
        counts.update(names)
        facts.update((name, Fact(name, value)) for name in names)
    return Definitions.of(
        fact
        for name, fact in facts.items()
        if counts[name] == 1 and len(name) <= LONGEST_NAME and len(fact.value) <= LONGEST_PATH
    )
