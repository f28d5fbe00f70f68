"""What a Hugging Face config says about a decoder, as data; nothing here imports transformers.

A family is a row: where our settings stand in its config, what its class assumes for missing keys, and what
its code fixes. The experts and routers of the same families are rows of moe/hf/routers.py. Read in the
`configuration_*.py` and `modeling_*.py` of transformers 5.24.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe.config import as_tuple, did_you_mean
from moe.decoder_config import DecoderConfig
from moe.rotary import RopeScaling

from .router_table import Key, Settings, keys
from .routers import moe_settings


@dataclass(frozen=True)
class DecoderFamily:
    """One row.

    architecture  the class of transformers that computes it
    settings      our setting -> the value that their code hard-wires, or the `Key` of their config
    defaults      their key -> what their config class assumes when the key is missing
    slides        (layer number, config) -> whether a layer has the sliding window, where `layer_types` does
                  not say so; None: the family has no sliding window
    is_moe        whether it has routed experts, a row of moe.hf.router_table
    """

    architecture: str
    settings: Settings
    defaults: Settings
    slides: Callable[[int, Settings], bool] | None = None
    is_moe: bool = True


# What rows share

BASE = keys(
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
HEAD, DENSE = keys("head_dim"), keys("intermediate_size")
BIAS = keys("attention_bias", attention_output_bias="attention_bias")
PATTERN = keys("decoder_sparse_step", "mlp_only_layers")
FIRST_DENSE = keys("first_k_dense_replace")
LATENT = keys("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
GRANITE = keys("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
FULL_NORM = {"use_qk_norm": True, "qk_norm": "full"}
HEAD_NORM = {"use_qk_norm": True, "qk_norm": "head"}

DEFAULTS: Settings = {
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
    "use_sliding_window": True,  # the switch of Qwen; the others slide where they can
    "sliding_window": None,
}
LATENT_DEFAULTS: Settings = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
QWEN: Settings = {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}
LONG = {"max_position_embeddings": 131072}
EPS = {"rms_norm_eps": 1e-5}
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
    "DeepseekV3ForCausalLM",
    BASE | DENSE | BIAS | LATENT | FIRST_DENSE | keys("rope_interleave"),
    DEFAULTS
    | LATENT_DEFAULTS
    | {"max_position_embeddings": 4096, "first_k_dense_replace": 3, "rope_interleave": True}
    | {"intermediate_size": 18432, "num_key_value_heads": 128},
)

FAMILIES: dict[str, DecoderFamily] = {
    # Dense
    "llama": DecoderFamily(
        "LlamaForCausalLM", BASE | HEAD | DENSE | BIAS | keys("mlp_bias"), DEFAULTS, is_moe=False
    ),
    "mistral": DecoderFamily(
        "MistralForCausalLM",
        BASE | HEAD | DENSE,
        DEFAULTS | LONG | {"num_key_value_heads": 8, "sliding_window": 4096},
        slides=_always,
        is_moe=False,
    ),
    "qwen3": DecoderFamily(
        "Qwen3ForCausalLM",
        BASE | HEAD | DENSE | BIAS | HEAD_NORM,
        DEFAULTS | QWEN | {"head_dim": 128, "num_key_value_heads": 32, "max_window_layers": 28},
        slides=lambda layer, config: layer >= config["max_window_layers"],
        is_moe=False,
    ),
    # With experts
    "mixtral": DecoderFamily(
        "MixtralForCausalLM",
        BASE | HEAD,
        DEFAULTS | LONG | EPS | {"num_key_value_heads": 8, "rope_theta": 1e6},
        slides=_always,
    ),
    "olmoe": DecoderFamily(
        "OlmoeForCausalLM",
        BASE | BIAS | keys("clip_qkv") | FULL_NORM,
        DEFAULTS | EPS | {"max_position_embeddings": 4096},
    ),
    "qwen2_moe": DecoderFamily(
        "Qwen2MoeForCausalLM",
        BASE | DENSE | PATTERN | keys(attention_bias="qkv_bias"),
        DEFAULTS
        | QWEN
        | {"qkv_bias": True, "max_window_layers": 28, "num_key_value_heads": 16, "intermediate_size": 5632},
        slides=lambda layer, config: layer % 2 == 0 and layer < config["max_window_layers"],
    ),
    "qwen3_moe": DecoderFamily(
        "Qwen3MoeForCausalLM",
        BASE | HEAD | DENSE | PATTERN | BIAS | HEAD_NORM,
        DEFAULTS | QWEN | {"num_key_value_heads": 4, "intermediate_size": 6144},
        slides=_always,
    ),
    "granitemoe": DecoderFamily(
        "GraniteMoeForCausalLM", BASE | BIAS | GRANITE, DEFAULTS | dict.fromkeys(GRANITE, 1.0)
    ),
    "gpt_oss": DecoderFamily(
        "GptOssForCausalLM",
        BASE | HEAD | BIAS | {"attention_sinks": True},
        DEFAULTS
        | LONG
        | EPS
        | {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128, "attention_bias": True}
        | {"rope_theta": 150000.0, "rope_parameters": GPT_OSS_ROPE},
        slides=_every_other,
    ),
    "deepseek_v2": DecoderFamily(
        "DeepseekV2ForCausalLM",
        BASE | DENSE | BIAS | LATENT | FIRST_DENSE | {"rope_interleave": True},
        DEFAULTS | LATENT_DEFAULTS | {"first_k_dense_replace": 0, "intermediate_size": 11008},
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "glm4_moe": DecoderFamily(
        "Glm4MoeForCausalLM",
        BASE | HEAD | DENSE | FIRST_DENSE | keys("attention_bias", "use_qk_norm"),
        DEFAULTS
        | LONG
        | EPS
        | {"num_key_value_heads": 8, "first_k_dense_replace": 1, "intermediate_size": 10944}
        | {"use_qk_norm": False, "partial_rotary_factor": 0.5},
    ),
    "ernie4_5_moe": DecoderFamily(
        "Ernie4_5_MoeForCausalLM",
        BASE
        | HEAD
        | DENSE
        | keys(first_k_dense_replace="moe_layer_start_index", decoder_sparse_step="moe_layer_interval")
        | {"rope_interleave": True},
        DEFAULTS
        | LONG
        | EPS
        | {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 500000.0}
        | {"intermediate_size": 12288}
        | {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
    ),
    "minimax_m2": DecoderFamily(
        "MiniMaxM2ForCausalLM",
        BASE | HEAD | FULL_NORM,
        DEFAULTS
        | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196608, "rope_theta": 5e6},
    ),
}


MAY_BE_NULL = ("num_key_value_heads", "head_dim", "q_lora_rank", "clip_qkv", "mlp_only_layers")


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Our config for the decoder that a Hugging Face config.json describes.

    Raises:
        ValueError: an unknown `model_type` (with the nearest known one, or why code of a repository is not
            run), a missing key, or a setting that needs mathematics we do not have.
    """
    family = find_family(config)
    values = {**family.defaults, **config}
    settings = {
        ours: _look_up(values, value) if isinstance(value, Key) else value
        for ours, value in family.settings.items()
    }
    if family.is_moe:
        settings |= moe_settings(config)
    settings["mlp_only_layers"] = settings.get("mlp_only_layers") or ()
    settings |= _after_the_last(values) | _windows(family, values) | _rope(values)
    decoder = DecoderConfig(**settings)
    if not all(map(decoder.is_moe_layer, range(decoder.num_hidden_layers))):
        _check_dense(config)
    return decoder


def find_family(config: Mapping[str, Any]) -> DecoderFamily:
    """The row of a config.

    Raises:
        ValueError: there is none; the nearest, or why code of a repository is not run.
    """
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if config.get("auto_map"):
        raise ValueError(
            f"model_type={model_type!r} comes with code of its own (auto_map), which is never run: a "
            f"checkpoint is data. Known: {', '.join(FAMILIES)}."
        )
    raise ValueError(
        f"model_type={model_type!r} is no decoder known here.{did_you_mean(str(model_type), list(FAMILIES))}"
    )


def _look_up(values: Settings, key: str) -> Any:
    if key not in values:
        raise ValueError(f"config.json of a {values['model_type']} needs the key {key!r}.")
    if values[key] is None and key not in MAY_BE_NULL:
        raise ValueError(f"{key} is null; a {values['model_type']} needs a value.")
    return as_tuple(values[key])


def _check_dense(config: Mapping[str, Any]) -> None:
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act={activation!r}: dense layers here are SwiGLU, which is 'silu'.")


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
