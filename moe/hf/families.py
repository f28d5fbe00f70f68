"""What a Hugging Face config says about a decoder, as data; nothing here imports transformers.

A family is a row: where our settings stand in its config, what its class assumes for missing keys, and what
its code fixes. The experts and routers of the same families are rows of moe/hf/routers.py. Read in the
`configuration_*.py` and `modeling_*.py` of transformers 5.24.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.config import DecoderConfig, as_tuple, did_you_mean
from moe.hf.routers import moe_settings
from moe.rotary import RopeScaling

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """One row.

    architecture  the class of transformers that computes it
    keys          our setting -> the key of their config that holds it
    defaults      their key -> what their config class assumes when the key is missing
    fixed         our settings that their code hard-wires
    slides        layer number, config -> whether the layer has the sliding window, when `layer_types` does not
                  say it; None: the family has no sliding window
    is_moe        whether it has routed experts
    """

    architecture: str
    keys: Mapping[str, str]
    defaults: Settings
    fixed: Settings = field(default_factory=dict)
    slides: Callable[[int, Settings], bool] | None = None
    is_moe: bool = True


# What rows share

SAME = (
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "hidden_size",
    "initializer_range",
)
BASE = {name: name for name in SAME}
HEAD = {"head_dim": "head_dim"}
DENSE = {"intermediate_size": "intermediate_size"}
BIAS = {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias"}
PATTERN = {"decoder_sparse_step": "decoder_sparse_step", "mlp_only_layers": "mlp_only_layers"}
LATENT = {
    name: name for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
}
GRANITE = {
    name: name
    for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
}
FULL_NORM = {"use_qk_norm": True, "qk_norm": "full"}
HEAD_NORM = {"use_qk_norm": True, "qk_norm": "head"}

DEFAULTS = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
    "clip_qkv": None,
    "use_sliding_window": True,  # the key of a family that has a switch; the others slide where they can
    "sliding_window": None,
}
LATENT_DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
QWEN = {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _always(layer: int, config: Settings) -> bool:
    return True


def _every_other(layer: int, config: Settings) -> bool:
    return layer % 2 == 0


DEEPSEEK_V3 = DecoderFamily(
    architecture="DeepseekV3ForCausalLM",
    keys=BASE
    | DENSE
    | BIAS
    | LATENT
    | {"first_k_dense_replace": "first_k_dense_replace", "rope_interleave": "rope_interleave"},
    defaults=DEFAULTS
    | LATENT_DEFAULTS
    | {"max_position_embeddings": 4096, "first_k_dense_replace": 3, "rope_interleave": True}
    | {"intermediate_size": 18432, "num_key_value_heads": 128},
)

FAMILIES: dict[str, DecoderFamily] = {
    "llama": DecoderFamily(
        architecture="LlamaForCausalLM",
        keys=BASE | HEAD | DENSE | BIAS | {"mlp_bias": "mlp_bias"},
        defaults=DEFAULTS,
        is_moe=False,
    ),
    "mistral": DecoderFamily(
        architecture="MistralForCausalLM",
        keys=BASE | HEAD | DENSE,
        defaults=DEFAULTS
        | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        slides=_always,
        is_moe=False,
    ),
    "qwen3": DecoderFamily(
        architecture="Qwen3ForCausalLM",
        keys=BASE | HEAD | DENSE | BIAS,
        defaults=DEFAULTS | QWEN | {"head_dim": 128, "num_key_value_heads": 32, "max_window_layers": 28},
        fixed=HEAD_NORM,
        slides=lambda layer, config: layer >= config["max_window_layers"],
        is_moe=False,
    ),
    "mixtral": DecoderFamily(
        architecture="MixtralForCausalLM",
        keys=BASE | HEAD,
        defaults=DEFAULTS
        | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
        | {"rope_theta": 1e6},
        slides=_always,
    ),
    "olmoe": DecoderFamily(
        architecture="OlmoeForCausalLM",
        keys=BASE | BIAS | {"clip_qkv": "clip_qkv"},
        defaults=DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        fixed=FULL_NORM,
    ),
    "qwen2_moe": DecoderFamily(
        architecture="Qwen2MoeForCausalLM",
        keys=BASE | DENSE | PATTERN | {"attention_bias": "qkv_bias"},
        defaults=DEFAULTS
        | QWEN
        | {"qkv_bias": True, "max_window_layers": 28, "num_key_value_heads": 16, "intermediate_size": 5632},
        slides=lambda layer, config: layer % 2 == 0 and layer < config["max_window_layers"],
    ),
    "qwen3_moe": DecoderFamily(
        architecture="Qwen3MoeForCausalLM",
        keys=BASE | HEAD | DENSE | PATTERN | BIAS,
        defaults=DEFAULTS | QWEN | {"num_key_value_heads": 4, "intermediate_size": 6144},
        fixed=HEAD_NORM,
        slides=_always,
    ),
    "granitemoe": DecoderFamily(
        architecture="GraniteMoeForCausalLM",
        keys=BASE | BIAS | GRANITE,
        defaults=DEFAULTS | dict.fromkeys(GRANITE, 1.0),
    ),
    "gpt_oss": DecoderFamily(
        architecture="GptOssForCausalLM",
        keys=BASE | HEAD | BIAS,
        defaults=DEFAULTS
        | {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128, "attention_bias": True}
        | {"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "max_position_embeddings": 131072}
        | {"rope_parameters": GPT_OSS_ROPE},
        fixed={"attention_sinks": True},
        slides=_every_other,
    ),
    "deepseek_v2": DecoderFamily(
        architecture="DeepseekV2ForCausalLM",
        keys=BASE | DENSE | BIAS | LATENT | {"first_k_dense_replace": "first_k_dense_replace"},
        defaults=DEFAULTS | LATENT_DEFAULTS | {"first_k_dense_replace": 0, "intermediate_size": 11008},
        fixed={"rope_interleave": True},
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "glm4_moe": DecoderFamily(
        architecture="Glm4MoeForCausalLM",
        keys=BASE
        | HEAD
        | DENSE
        | {"attention_bias": "attention_bias", "use_qk_norm": "use_qk_norm"}
        | {"first_k_dense_replace": "first_k_dense_replace"},
        defaults=DEFAULTS
        | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
        | {"first_k_dense_replace": 1, "intermediate_size": 10944, "use_qk_norm": False}
        | {"partial_rotary_factor": 0.5},
    ),
    "ernie4_5_moe": DecoderFamily(
        architecture="Ernie4_5_MoeForCausalLM",
        keys=BASE
        | HEAD
        | DENSE
        | {"first_k_dense_replace": "moe_layer_start_index", "decoder_sparse_step": "moe_layer_interval"},
        defaults=DEFAULTS
        | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
        | {"tie_word_embeddings": True, "rope_theta": 500000.0, "intermediate_size": 12288}
        | {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
        fixed={"rope_interleave": True},
    ),
    "minimax_m2": DecoderFamily(
        architecture="MiniMaxM2ForCausalLM",
        keys=BASE | HEAD,
        defaults=DEFAULTS
        | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196608}
        | {"rope_theta": 5e6},
        fixed=FULL_NORM,
    ),
}


def decoder_config(config: Settings) -> DecoderConfig:
    """Our config for the decoder that a Hugging Face config.json describes.

    Raises:
        ValueError: an unknown `model_type` (with the nearest known one, or why code of a repository is not
            run), a missing key, or a setting that needs mathematics we do not have.
    """
    family = find_family(config)
    values = family.defaults | config
    settings = dict(family.fixed)
    for ours, key in family.keys.items():
        if key not in values:
            raise ValueError(f"config.json of a {config['model_type']} needs the key {key!r}.")
        settings[ours] = as_tuple(values[key])
    settings |= moe_settings(config) if family.is_moe else _dense_settings(config)
    settings["mlp_only_layers"] = settings.get("mlp_only_layers") or ()
    settings |= _after_the_last(values) | _windows(family, values) | _rope(values)
    return DecoderConfig(**settings)


def find_family(config: Settings) -> DecoderFamily:
    """The row of a config.

    Raises:
        ValueError: there is none; the nearest, or why code of a repository is not run.
    """
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if config.get("auto_map"):
        raise ValueError(
            f"model_type={model_type!r} comes with code of its own (auto_map), which is never run: a checkpoint "
            f"is data. Known: {', '.join(FAMILIES)}."
        )
    raise ValueError(
        f"model_type={model_type!r} is no decoder known here.{did_you_mean(str(model_type), list(FAMILIES))}"
    )


def _dense_settings(config: Settings) -> dict[str, Any]:
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act={activation!r}: dense layers here are SwiGLU, which is 'silu'.")
    return {}


def _after_the_last(values: Settings) -> dict[str, Any]:
    """ERNIE: the layers after the last sparse one are dense."""
    layers, end = values["num_hidden_layers"], values.get("moe_layer_end_index", -1)
    return {"mlp_only_layers": tuple(range(end + 1, layers))} if 0 <= end < layers - 1 else {}


def _windows(family: DecoderFamily, values: Settings) -> dict[str, Any]:
    """The sliding window, and which layers have it."""
    if family.slides is None or not values["use_sliding_window"] or not values["sliding_window"]:
        return {}
    layers = range(values["num_hidden_layers"])
    kinds: Sequence[str] = values.get("layer_types") or [
        "sliding_attention" if family.slides(layer, values) else "full_attention" for layer in layers
    ]
    if "sliding_attention" not in kinds:
        return {}
    window = {"sliding_window": values["sliding_window"]}
    return window if "full_attention" not in kinds else window | {"layer_types": tuple(kinds)}


# Keys of rope parameters that stand elsewhere in our config
ELSEWHERE = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
UNSCALED = (None, "default")


def _rope(values: Settings) -> dict[str, Any]:
    """Theta, the share of channels that turn, and the scaling: from `rope_parameters`, or the older keys."""
    given = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    share = given.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if "rotary_dim" in values and "partial_rotary_factor" not in given:  # MiniMax-M2
        share = values["rotary_dim"] / values["head_dim"]
    settings = {
        "rope_theta": float(given.get("rope_theta", values["rope_theta"])),
        "partial_rotary_factor": share,
    }
    kind = given.get("rope_type", given.get("type"))
    if kind in UNSCALED:
        return settings
    parameters = {key: value for key, value in given.items() if key not in ELSEWHERE and value is not None}
    if "original_max_position_embeddings" in values:
        parameters["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    return settings | {"rope_scaling": RopeScaling.from_dict({"rope_type": kind, **parameters})}
