"""Which router and which experts a Hugging Face config describes; nothing here imports transformers."""

from collections.abc import Mapping
from typing import Any

from moe.config import did_you_mean

from .router_table import ALIASES, FAMILIES, UNSUPPORTED, Family, Key, Settings


def moe_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `MoEConfig` for the MoE block that a Hugging Face config describes.

    config: plain data, from config.json or `config.to_dict()`. Keys that equal the default of transformers'
    config class may be missing. A config that wraps another under `text_config` stands for the inner one.

    Raises:
        ValueError: an unknown `model_type` (with the nearest supported one), a missing size, or a setting
            that needs mathematics we do not have (with its key and value).
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES and isinstance(config.get("text_config"), Mapping):
        return moe_settings(config["text_config"])
    family = find_family(name)
    settings = dict(family.settings)
    for key, choices in family.choices.items():
        settings |= _choose(name, key, _look_up(config, family, key), choices)
    for ours, value in settings.items():
        if isinstance(value, Key):
            settings[ours] = _convert(name, ours, value, _look_up(config, family, value))
    return settings


def find_family(model_type: str) -> Family:
    """The row of a `model_type`.

    Raises:
        ValueError: there is none; the nearest, or why the family is left out.
    """
    if model_type in UNSUPPORTED:
        raise ValueError(f"model_type={model_type!r} is not supported: {UNSUPPORTED[model_type]}.")
    if model_type not in FAMILIES:
        hint = did_you_mean(model_type, list(FAMILIES))
        raise ValueError(f"model_type={model_type!r} is not a supported MoE family.{hint}")
    return FAMILIES[model_type]


def _look_up(config: Mapping[str, Any], family: Family, key: str) -> Any:
    """The value under a key or one of its aliases, or the family's default."""
    found = {name: config[name] for name in ALIASES.get(key, (key,)) if name in config}
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise ValueError(f"the config contradicts itself: {found} name one setting. Keep one of them.")
    return values[0] if values else family.defaults[key]


def _convert(model_type: str, ours: str, key: str, value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):
        value = value[0]  # one number a layer (HunYuan), the same for each
    if isinstance(value, list | tuple):
        raise ValueError(f"{key}={value!r} of {model_type} differs by layer; one MoEConfig has one {ours}.")
    if ours == "router_logit_softcap":
        return value or None  # they write 0 for no cap
    if value is None:
        raise ValueError(f"{key}=None: the config of {model_type} must give {key}.")
    return value


def _choose(model_type: str, key: str, value: Any, choices: Mapping[Any, Settings]) -> Settings:
    for choice, settings in choices.items():
        if choice == value and type(choice) is type(value):  # 0 is not False
            return settings
    raise ValueError(
        f"{key}={value!r} of {model_type}: no mathematics for it here. Supported: {list(choices)}."
    )
