"""What the values of a record may be. Every refusal begins with the key."""

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from moe.config import did_you_mean

_MAY_BE_ZERO = ("step", "cache_bytes", "peak_bytes", "trained_length", "files")


def check_keys(data: Mapping[str, Any], *, known: Collection[str], required: Collection[str]) -> None:
    """Refuse a key that is missing or unknown.

    Raises:
        ValueError: there is one; names it.
    """
    if missing := sorted(set(required) - set(data)):
        raise ValueError(f"the key {missing[0]!r} is missing.")
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"the key {unknown[0]!r} is unknown.{did_you_mean(unknown[0], sorted(known))}")


def check_value(name: str, kind: Any, value: Any) -> None:
    """Refuse a value that is not of the `kind`, a type as it stands in an annotation, or is out of range.

    Counts are at least 1, but for those that may be 0; seconds are finite and from 0; depths are shares.

    Raises:
        ValueError: names the key, the value and the rule.
    """
    words, holds = _RULES.get(kind, _OBJECT)
    if not holds(value):
        raise ValueError(f"{name}={shorten(value)} must be {words}.")
    if kind is int and value == 0 and name.split(".")[-1] not in _MAY_BE_ZERO:
        raise ValueError(f"{name}=0 must be at least 1.")


def shorten(value: Any) -> str:
    """A value as it may stand in a message, lists cut short."""
    return reprlib.repr(list(value) if isinstance(value, tuple) else value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_OBJECT = ("an object", lambda value: isinstance(value, dict))
_RULES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a string", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number from 0", lambda value: type(value) is int and value >= 0),
    float: ("a number of seconds from 0", lambda value: _is_number(value) and 0 <= value < math.inf),
    tuple[float, ...]: (
        "a list of numbers from 0 to 1",
        lambda value: isinstance(value, tuple) and all(_is_number(one) and 0 <= one <= 1 for one in value),
    ),
    tuple[int, ...]: (
        "a list of whole numbers from 0",
        lambda value: isinstance(value, tuple) and all(type(one) is int and one >= 0 for one in value),
    ),
    tuple[bool, ...]: (
        "a list of true and false",
        lambda value: isinstance(value, tuple) and all(isinstance(one, bool) for one in value),
    ),
}
