"""What each ingredient of the preset `needle` is worth: the run without it, as overrides of the preset."""

from moe.config import did_you_mean

VARIANTS: dict[str, tuple[str, ...]] = {
    "no pointer loss": ("needle.pointer_loss=0.0",),
    "constant logit scale": ("model.use_ssmax=false", "model.ssmax_power=1.0"),
    "logarithm not squared": ("model.ssmax_power=1.0",),
    "no sequences of text": ("needle.text_sequences=0.0",),
    "rotary in the global layer": ("model.no_rope_layers=[1, 1, 1]",),
    "random init": ("model.attention_init=normal",),
    "no convolutions but on q, k, v": ('model.canon_set=["", "", "B"]',),
    "key shift alone": ('model.canon_set=["AC", "AC", "AK"]',),
    "dense of equal active size": ("model.num_experts=0", "model.intermediate_size=96"),
    "32 experts": ("model.num_experts=32",),
    "one sliding layer": (
        "model.num_hidden_layers=2",
        "model.layer_types=LG",
        "model.no_rope_layers=[1, 0]",
        'model.canon_set=["AC", "AB"]',
    ),
    "code": (
        'needle.templates=["key_value", "sentence", "definition"]',
        "needle.text_sequences=0.0",
        "model.sliding_window=64",
        "model.ssmax_power=1.0",
    ),
}
"""The name of each variant and its overrides; `code` asks another question: a template
more, and the settings that find most paths."""

SENSES_VARIANTS: dict[str, tuple[str, ...]] = {
    "no pointer loss": ("senses.pointer_loss=0.0",),
    "no reading loss": ("senses.reading_loss=0.0",),
    "short sequences alone": ("senses.short_fraction=1.0",),
    "random init": ("model.attention_init=normal",),
    "48 experts": ("model.num_experts=48",),
}
"""The same of the preset `senses`."""

_OF_PRESET = {"needle": VARIANTS, "senses": SENSES_VARIANTS}


def overrides_of(name: str | None, preset: str = "needle") -> tuple[str, ...]:
    """The overrides of a variant of a preset, whose words may be joined by hyphens; none without a name.

    Raises:
        ValueError: there is no such variant.
    """
    if name is None:
        return ()
    known = {slug(variant): overrides for variant, overrides in _OF_PRESET[preset].items()}
    if slug(name) not in known:
        near = did_you_mean(slug(name), list(known))
        raise ValueError(f"there is no variant {name!r}.{near} There are: {', '.join(known)}.")
    return known[slug(name)]


def slug(name: str) -> str:
    """The name of a variant as one word."""
    return name.replace(",", "").replace(" ", "-")
