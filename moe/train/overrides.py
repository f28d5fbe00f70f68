"""Preset <- TOML file <- dotted overrides: one strict path from text to a `RunConfig`.

Every value, whatever it came from, meets the same check: its key must exist and its type must be the
field's own. Messages name the source, the key, the value and the type that was expected.
"""

import tomllib
import types
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moe.config import did_you_mean
from moe.train.presets import PRESETS
from moe.train.settings import PARTS, RunConfig, differences


def load_settings(preset: str, file: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The preset, changed by a TOML file, changed by overrides such as "optim.lr=1e-3".

    Raises:
        ValueError: an unknown preset, part or key; a value of the wrong type; values that do not fit.
        FileNotFoundError: no such TOML file.
    """
    return change(find_preset(preset), file, overrides)


def change(base: RunConfig, file: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The base, changed by a TOML file, changed by overrides; raises as `load_settings`."""
    values = base.to_dict()
    if file is not None:
        for key, value in read_toml(file):
            set_value(values, key, value, source=str(file))
    for text in overrides:
        key, value = parse_override(text)
        set_value(values, key, value, source=f"override {text!r}")
    return RunConfig.from_dict(values)


def describe_changes(base: RunConfig, config: RunConfig) -> str:
    """ " with optim.lr=0.001 (was 0.003)", or nothing."""
    changes = [f"{key}={new} (was {old})" for key, (old, new) in differences(base, config).items()]
    return f" with {', '.join(changes)}" if changes else ""


def find_preset(name: str) -> RunConfig:
    """The preset of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}.{did_you_mean(name, list(PRESETS))}")
    return PRESETS[name]()


def read_toml(file: Path) -> Iterator[tuple[str, Any]]:
    """The (dotted key, value) pairs of a TOML file whose tables are model, data, optim and train.

    Raises:
        ValueError: not TOML, or not UTF-8.
        FileNotFoundError: no such file.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no settings file {file}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from None
    for part, table in tables.items():
        if isinstance(table, dict):
            yield from ((f"{part}.{key}", value) for key, value in table.items())
        else:
            yield part, table


def parse_override(text: str) -> tuple[str, Any]:
    """Split "optim.lr=1e-3" into its key and its value: TOML syntax, and a bare word is a string.

    Raises:
        ValueError: there is no equals sign.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"override {text!r} must look like part.key=value, for example optim.lr=1e-3.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def set_value(values: dict[str, dict[str, Any]], key: str, value: Any, *, source: str) -> None:
    """Put one checked value into the nested plain data of a run.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    part, dot, name = key.partition(".")
    if part not in PARTS:
        raise ValueError(f"{source}: a run has no part {part!r}.{did_you_mean(part, list(PARTS))}")
    if not dot:
        first = next(iter(get_type_hints(PARTS[part])))
        raise ValueError(f"{source}: {part!r} is a table; name one of its keys, such as {part}.{first}.")
    hints = get_type_hints(PARTS[part])
    if name not in hints:
        raise ValueError(f"{source}: {part} has no key {name!r}.{did_you_mean(name, list(hints))}")
    values.setdefault(part, {})[name] = convert(value, hints[name], f"{source}: {key}={value!r}")


def convert(value: Any, expected: Any, what: str) -> Any:
    """The value as the expected type: an int may stand for a float, a list for a tuple, "none" for None.

    Raises:
        ValueError: the value has another type; the message starts with `what`.
    """
    if get_origin(expected) in (Union, types.UnionType):
        return _convert_optional(value, expected, what)
    if get_origin(expected) is Literal:
        if value in get_args(expected):
            return value
        raise ValueError(f"{what} must be one of {list(get_args(expected))}.")
    if get_origin(expected) is tuple:
        item = get_args(expected)[0]
        if isinstance(value, list):
            return [convert(v, item, what) for v in value]
        raise ValueError(f"{what} must be a list of {item.__name__}, got {type(value).__name__}.")
    if isinstance(value, dict) and is_dataclass(expected):
        return value  # a table, whose keys the config checks
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, expected) and isinstance(value, bool) == (expected is bool):
        return value
    raise ValueError(f"{what} must be {expected.__name__}, got {type(value).__name__}.")


def _convert_optional(value: Any, expected: Any, what: str) -> Any:
    """A union of one type and None, or text; TOML has no null, so the word none stands for it."""
    inner = next(kind for kind in get_args(expected) if kind is not types.NoneType)
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return None
    if isinstance(value, str) and str in get_args(expected):
        return value
    return convert(value, inner, what)
