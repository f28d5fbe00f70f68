"""A decoder of ours as an architecture that transformers has: which one computes the same, and its config.

The tables that read configs are read backwards: a family fits when the config that it would write describes
the decoder again.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from moe.config import MoEConfig
from moe.decoder_config import DecoderConfig

from .families import FAMILIES, DecoderFamily, decoder_config
from .router_table import FAMILIES as ROUTERS
from .router_table import Key, Settings

NEGLIGIBLE = 1e-12  # an epsilon in the sum of k scores that no float32 result shows
ALIASES = ("kimi_k2",)  # no class of its own in transformers
# What a config class calls the number of experts and of choices; the table of routers has one name for each.
LOCAL, ROUTED = {"num_experts": "num_local_experts"}, {"num_experts": "n_routed_experts"}
WRITTEN_AS: dict[str, dict[str, str]] = {
    "mixtral": LOCAL,
    "granitemoe": LOCAL,
    "gpt_oss": LOCAL,
    "minimax_m2": LOCAL,
    "deepseek_v2": ROUTED,
    "deepseek_v3": ROUTED,
    "glm4_moe": ROUTED,
    "ernie4_5_moe": {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
}
# Settings that change no result in exact arithmetic: precision, order, how weights were drawn, losses
WITHOUT_EFFECT = (
    "initializer_range",
    "embedding_initializer_range",
    "attention_init",
    "router_dtype",
    "router_logits_dtype",
    "routing_weights_dtype",
    "topk_sorted",
    "router_aux_loss_coef",
    "router_aux_loss_convention",
    "router_aux_loss_granularity",
    "router_z_loss_coef",
    "router_jitter_noise",
    "jitter_experts",
    "capacity_policy",
)


def describe_as(config: DecoderConfig) -> dict[str, Any]:
    """config.json of the first family whose mathematics are this decoder's.

    Raises:
        ValueError: none fits; what keeps the nearest ones from it.
    """
    ours, reasons, refused = essence(config), dict[str, list[str]](), dict[str, list[str]]()
    for model_type, family in FAMILIES.items():
        if model_type in ALIASES or family.is_moe != (config.num_experts > 0):
            continue
        written = _write(model_type, family, config)
        try:
            theirs = essence(decoder_config(written))
        except ValueError as error:
            refused[model_type] = [str(error)]
            continue
        reasons[model_type] = [
            f"{key} would be {theirs.get(key)!r} instead of {ours.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if not reasons[model_type]:
            return written
    nearest = [*sorted(reasons, key=lambda name: len(reasons[name])), *refused][:3]
    listing = "\n  ".join(f"{name}: {'; '.join((reasons | refused)[name])}" for name in nearest)
    raise ValueError(
        f"no architecture of transformers that is known here computes what this decoder does. Nearest:\n"
        f"  {listing}"
    )


def essence(config: DecoderConfig) -> dict[str, Any]:
    """What decides the results of a decoder, in one form for all configs that mean the same."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in WITHOUT_EFFECT}
    layers = range(config.num_hidden_layers)
    sparse = tuple(map(config.is_moe_layer, layers))
    for derived in ("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers"):
        del values[derived]
    for derived in ("sliding_window", "layer_types", "partial_rotary_factor", "head_dim"):
        del values[derived]
    values |= {
        "layers with experts": sparse,
        "windows": tuple(map(config.window, layers)),
        "channels that turn": config.rotary_size,
        "head_dim": config.head_size,
        "num_key_value_heads": config.kv_heads,
        "attention_multiplier": config.attention_multiplier or config.head_size**-0.5,
        "rope_scaling": asdict(config.rope_scaling) if config.rope_scaling else None,
    }
    for name in _meaningless(config, all(sparse), any(sparse)):
        values.pop(name, None)
    for name in ("norm_topk_eps", "norm_topk_min"):
        if values.get(name, 0) <= NEGLIGIBLE:
            values.pop(name, None)
    if config.topk_before_score and config.scoring_func == "softmax":  # the same as to renormalise afterwards
        values |= {"topk_before_score": False, "norm_topk_prob": True}
    return values


def _meaningless(config: DecoderConfig, all_sparse: bool, any_sparse: bool) -> list[str]:
    """Settings that nothing reads in this decoder."""
    names: list[str] = ["intermediate_size", "mlp_bias"] if all_sparse else []
    if not any_sparse:
        kept = ("hidden_size", "initializer_range")
        names += [f.name for f in fields(MoEConfig) if f.name not in kept]
    layers = range(config.num_hidden_layers)
    if all(map(config.is_rotary, layers)):
        names += ["no_rope_layers"]
    if not any(map(config.canon_letters, layers)):
        names += ["canon_set", "canon_kernel"]
    if config.n_group == 1:
        names += ["group_score", "topk_group"]
    if not config.n_shared_experts:
        names += [f.name for f in fields(config) if f.name.startswith("shared_expert")]
    else:
        names += ["n_shared_experts", "shared_expert_intermediate_size"]
    if config.activation != "clamped_swiglu":
        names += ["swiglu_limit", "swiglu_alpha"]
    if not config.use_qk_norm:
        names += ["qk_norm"]
    if config.kv_lora_rank is None:
        names += ["q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    else:
        names += ["num_key_value_heads"]
    return names


def _write(model_type: str, family: DecoderFamily, config: DecoderConfig) -> dict[str, Any]:
    """The config.json with which this family comes nearest to a decoder."""
    written: dict[str, Any] = {"model_type": model_type, "architectures": [family.architecture]}
    written |= {"hidden_act": "silu", "torch_dtype": "float32"}
    if family.is_moe:
        written |= _write_experts(model_type, config)
    values = {"head_dim": config.head_size, "num_key_value_heads": config.kv_heads}
    for ours, key in _keys(family.settings):
        value = values.get(ours, getattr(config, ours))
        if ours == "intermediate_size" and value is None:
            value = config.moe_intermediate_size  # of dense layers, of which there are none
        if ours == "attention_multiplier" and value is None:
            value = config.head_size**-0.5
        written[key] = list(value) if isinstance(value, tuple) else value
    if "moe_layer_end_index" in family.defaults:
        dense_at_end = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
        written["moe_layer_end_index"] = max(dense_at_end, default=-1)
    return written | _write_windows(family, config) | _write_rope(family, config)


def _write_experts(model_type: str, config: DecoderConfig) -> dict[str, Any]:
    row = ROUTERS[model_type]
    written = {key: getattr(config, ours) for ours, key in _keys(row.settings)}
    written |= {key: value for key, value in row.defaults.items() if key not in written}
    if "shared_expert_intermediate_size" in written:
        written["shared_expert_intermediate_size"] = config.shared_width
    for key, choices in row.choices.items():
        fitting = [word for word, settings in choices.items() if _holds(settings, config)]
        if fitting:
            written[key] = max(fitting, key=lambda word: len(choices[word]))
    if "topk_method" in row.defaults and config.n_group > 1:
        written |= {"n_group": config.n_group, "topk_group": config.topk_group}
    names = WRITTEN_AS.get(model_type, {})
    return {names.get(key, key): value for key, value in written.items() if value is not None}


def _keys(settings: Settings) -> list[tuple[str, str]]:
    return [(ours, str(value)) for ours, value in settings.items() if isinstance(value, Key)]


def _holds(settings: Mapping[str, Any], config: DecoderConfig) -> bool:
    return all(getattr(config, name) == value for name, value in settings.items())


def _write_windows(family: DecoderFamily, config: DecoderConfig) -> dict[str, Any]:
    if family.slides is None:
        return {}
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    written: dict[str, Any] = {"sliding_window": config.sliding_window, "layer_types": kinds}
    if "use_sliding_window" in family.defaults and not family.defaults["use_sliding_window"]:
        written["use_sliding_window"] = any(windows)
    if family.slides(0, family.defaults) and family.slides(1, family.defaults):
        del written["layer_types"]  # all layers or none
    return written


def _write_rope(family: DecoderFamily, config: DecoderConfig) -> dict[str, Any]:
    scaling = asdict(config.rope_scaling) if config.rope_scaling else {"rope_type": "default"}
    parameters = {key: list(v) if isinstance(v, tuple) else v for key, v in scaling.items() if v is not None}
    parameters["rope_theta"] = config.rope_theta
    if config.partial_rotary_factor != family.defaults.get("partial_rotary_factor", 1.0):
        parameters["partial_rotary_factor"] = config.partial_rotary_factor
    return {"rope_parameters": parameters}
