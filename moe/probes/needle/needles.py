"""What is hidden and how it is asked for: the templates, and facts that are easy to mistake for each other.

A *fact* is a key and its value. A template writes it down as a *needle* and asks for it with a *query*,
after which the value is the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KEY_LETTERS = (4, 8)  # fewest and most
VALUE_DIGITS = 6
LONGEST_NAME = 40  # bytes, in training; 95 % of the names of the standard library are not longer
LONGEST_PATH = 60  # with the end of line
RECENT_VALUES = 20  # a near-duplicate value imitates one of so many before it
_A, _LETTERS, _ZERO = ord("a"), 26, ord("0")


class Fact(NamedTuple):
    """What a needle says: the value of a key."""

    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Template:
    """How a fact is written down and asked for.

    The needle is needle[0], key, needle[1], value, needle[2]; the query is query[0], key, query[1]. What
    stands before the value is the same byte in both, so that attention to "the byte after what I just saw"
    finds it. `close` follows the answer where another text comes after it.

    An answer ends where its value ends: after the last of a fixed number of digits, or, where lengths differ,
    after the end of line that is then part of the value.

    To plan with: `mean_key` and `mean_value` are mean lengths, `fact_bytes` the least and the most
    of both together.
    """

    name: str
    needle: tuple[bytes, bytes, bytes]
    query: tuple[bytes, bytes]
    close: bytes = b"\n"
    mean_key: float = sum(KEY_LETTERS) / 2
    mean_value: float = VALUE_DIGITS
    fact_bytes: tuple[int, int] = (KEY_LETTERS[0] + VALUE_DIGITS, KEY_LETTERS[1] + VALUE_DIGITS)

    def write(self, fact: Fact) -> bytes:
        """The needle."""
        before, between, after = self.needle
        return b"".join((before, fact.key, between, fact.value, after))

    def ask(self, key: bytes) -> bytes:
        """The query; the value is to follow."""
        return key.join(self.query)

    def value_start(self, key: bytes) -> int:
        """Where in the needle the value begins."""
        return len(self.needle[0]) + len(key) + len(self.needle[1])

    @property
    def mean_pair_bytes(self) -> float:
        """Mean length of a needle, its query and the closed answer, which hold the fact twice."""
        return self._own_bytes + 2 * (self.mean_key + self.mean_value)

    @property
    def least_pair_bytes(self) -> int:
        """Least length of the same."""
        return self._own_bytes + 2 * self.fact_bytes[0]

    @property
    def most_pair_bytes(self) -> int:
        """Greatest length of the same."""
        return self._own_bytes + 2 * self.fact_bytes[1]

    @property
    def _own_bytes(self) -> int:
        return sum(map(len, (*self.needle, *self.query, self.close)))


# The templates whose keys and values are random.
RANDOM_TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("key_value", needle=(b"@", b"=", b";\n"), query=(b"?", b"=")),
        Template(
            "sentence",
            needle=(b"# the magic number of ", b" is ", b".\n"),
            query=(b"# what is the magic number of ", b"? it is "),
        ),
    )
}
# Where a function is defined; names and paths are those of real code (see `moe.probes.needle.definitions`).
DEFINITION = Template(
    "definition",
    needle=(b"def ", b"(  # ", b""),
    query=(b"# where is def ", b"? "),
    close=b"",
    mean_key=20,
    mean_value=31,  # of the standard library, in the folders that training puts above it
    fact_bytes=(len(b"fa.py\n"), LONGEST_NAME + LONGEST_PATH),
)
TEMPLATES = {**RANDOM_TEMPLATES, DEFINITION.name: DEFINITION}


def draw_needles(
    rng: np.random.Generator,
    count: int,
    *,
    near_duplicate_keys: float,
    near_duplicate_values: float,
    digits: int = VALUE_DIGITS,
) -> list[Fact]:
    """Facts with different keys of 4 to 8 lower-case letters and values of so many digits.

    Each key is, with probability `near_duplicate_keys`, an earlier one with one letter changed; each value,
    with probability `near_duplicate_values`, one of the last 20 with one digit changed.
    """
    keys = _draw_keys(rng, count, near_duplicate_keys)
    values = _draw_values(rng, count, near_duplicate_values, digits)
    return [Fact(key, value) for key, value in zip(keys, values, strict=True)]


def draw_value(rng: np.random.Generator) -> bytes:
    """A value of 6 random digits."""
    return b"%0*d" % (VALUE_DIGITS, rng.integers(10**VALUE_DIGITS))


def swap_values(rng: np.random.Generator, facts: Sequence[Fact]) -> list[Fact]:
    """Every fact with the value of another one; with another digit where that is the same value."""
    order = rng.permutation(len(facts))
    shuffled = list(facts)
    for to, source in zip(order.tolist(), np.roll(order, 1).tolist(), strict=True):
        key, value = facts[to].key, facts[source].value
        if value == facts[to].value:
            value = change_one(value, 0, int(rng.integers(1, 10)), _ZERO, 10)
        shuffled[to] = Fact(key, value)
    return shuffled


def change_one(text: bytes, place: int, shift: int, first: int, size: int) -> bytes:
    """`text` with one character moved on by `shift` in the cycle of `size` characters that begins at `first`.

    Another character for every shift from 1 to size - 1.
    """
    changed = bytearray(text)
    changed[place] = first + (text[place] - first + shift) % size
    return bytes(changed)


def _draw_keys(rng: np.random.Generator, count: int, near_duplicates: float) -> list[bytes]:
    """Different keys, in the order drawn. A key that is there already is drawn again."""
    keys: list[bytes] = []
    seen: set[bytes] = set()
    while len(keys) < count:
        for key, imitates, which, where, shift in _key_draws(rng, count - len(keys), near_duplicates):
            if imitates and keys:
                earlier = keys[int(which * len(keys))]
                key = change_one(earlier, int(where * len(earlier)), shift, _A, _LETTERS)
            if key not in seen:
                seen.add(key)
                keys.append(key)
    return keys


def _key_draws(
    rng: np.random.Generator, count: int, near_duplicates: float
) -> Sequence[tuple[bytes, bool, float, float, int]]:
    """All random choices for `count` keys at once: a fresh key, or which letter of which key to change."""
    least, most = KEY_LETTERS
    letters = rng.integers(_A, _A + _LETTERS, (count, most), dtype=np.uint8).tobytes()
    lengths = rng.integers(least, most + 1, count).tolist()
    fresh = [letters[i * most : i * most + length] for i, length in enumerate(lengths)]
    imitates, which, where = rng.random((3, count))
    shifts = rng.integers(1, _LETTERS, count).tolist()
    return list(
        zip(fresh, (imitates < near_duplicates).tolist(), which.tolist(), where.tolist(), shifts, strict=True)
    )


def _draw_values(rng: np.random.Generator, count: int, near_duplicates: float, digits: int) -> list[bytes]:
    drawn = rng.integers(_ZERO, _ZERO + 10, (count, digits), dtype=np.uint8).tobytes()
    values = [drawn[i : i + digits] for i in range(0, len(drawn), digits)]
    imitates, which = rng.random((2, count))
    places, shifts = rng.integers(digits, size=count).tolist(), rng.integers(1, 10, count).tolist()
    for i in np.flatnonzero(imitates[1:] < near_duplicates).tolist():
        recent = min(i + 1, RECENT_VALUES)
        earlier = values[i + 1 - recent + int(which[i] * recent)]
        values[i + 1] = change_one(earlier, places[i], shifts[i], _ZERO, 10)
    return values
