"""How llama.cpp knows a family of Hugging Face models: data, read by the other files of the GGUF export.

The names are those of the `gguf` package: an architecture of `gguf.MODEL_ARCH`, and keys of `gguf.Keys`
("LLM.EXPERT_COUNT" is `gguf.Keys.LLM.EXPERT_COUNT`), so that a table needs no import of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]  # a config.json
Value = Callable[[Config], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model_type.

    arch       the architecture of llama.cpp that computes the same
    permuted   llama.cpp turns the neighbours (0, 1), ... of a head, where Hugging Face turns
               (i, i + half): the rows of the query and key projections change places
    grouped    whether llama.cpp lets several heads of queries share one of keys
    settings   metadata beyond what every family has: the key, and the value or where config.json has it
    fixed      what llama.cpp does whatever the file says: keys of config.json, the values that mean just that
    """

    arch: str
    permuted: bool = False
    grouped: bool = True
    settings: Mapping[str, str | Value] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def find(config: Config, names: str) -> Any:
    """The first of "a | b | c" that config.json has, or None."""
    return next((config[name] for name in names.split(" | ") if config.get(name) is not None), None)


def always(value: Any) -> Value:
    """The same value whatever the config says."""
    return lambda config: value


NUM_EXPERTS = "num_local_experts | num_experts | n_routed_experts | moe_num_experts"
TOP_K = "num_experts_per_tok | moe_k"
SOFTMAX, SIGMOID = 1, 2  # gguf.ExpertGatingFuncType

DENSE: dict[str, str | Value] = {
    "LLM.BLOCK_COUNT": "num_hidden_layers",
    "LLM.EMBEDDING_LENGTH": "hidden_size",
    "LLM.FEED_FORWARD_LENGTH": "intermediate_size",
    "LLM.VOCAB_SIZE": "vocab_size",
    "Attention.HEAD_COUNT": "num_attention_heads",
    "Attention.HEAD_COUNT_KV": "num_key_value_heads | num_attention_heads",
    "Attention.LAYERNORM_RMS_EPS": "rms_norm_eps",
}
EXPERTS: dict[str, str | Value] = {"LLM.EXPERT_COUNT": NUM_EXPERTS, "LLM.EXPERT_USED_COUNT": TOP_K}
NARROW_EXPERTS = EXPERTS | {"LLM.EXPERT_FEED_FORWARD_LENGTH": "moe_intermediate_size"}
WIDE_EXPERTS = EXPERTS | {"LLM.EXPERT_FEED_FORWARD_LENGTH": "intermediate_size"}


def _shared_width(count: str) -> Value:
    return lambda config: config["moe_intermediate_size"] * (find(config, count) or 0)


def _score(config: Config) -> int:
    return SOFTMAX if config.get("scoring_func") == "softmax" else SIGMOID


DEEPSEEK = NARROW_EXPERTS | {
    "LLM.LEADING_DENSE_BLOCK_COUNT": "first_k_dense_replace",
    "LLM.EXPERT_SHARED_COUNT": "n_shared_experts",
    "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": _shared_width("n_shared_experts"),
    "LLM.EXPERT_WEIGHTS_SCALE": "routed_scaling_factor",
    "LLM.EXPERT_WEIGHTS_NORM": "norm_topk_prob",
    "LLM.EXPERT_GATING_FUNC": _score,
    "LLM.EXPERT_GROUP_COUNT": "n_group",
    "LLM.EXPERT_GROUP_USED_COUNT": "topk_group",
}
LATENT_ATTENTION = {  # llama.cpp runs it as one head of keys, which holds latent and rotary parts
    "Attention.HEAD_COUNT_KV": always(1),
    "Attention.Q_LORA_RANK": "q_lora_rank",
    "Attention.KV_LORA_RANK": "kv_lora_rank",
    "Attention.KEY_LENGTH": lambda config: config["kv_lora_rank"] + config["qk_rope_head_dim"],
    "Attention.VALUE_LENGTH": "kv_lora_rank",
    "Attention.KEY_LENGTH_MLA": lambda config: config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
    "Attention.VALUE_LENGTH_MLA": "v_head_dim",
    "Rope.DIMENSION_COUNT": "qk_rope_head_dim",
}
GRANITE: dict[str, str | Value] = {
    "Attention.SCALE": "attention_multiplier",
    "LLM.EMBEDDING_SCALE": "embedding_multiplier",
    "LLM.RESIDUAL_SCALE": "residual_multiplier",
    "LLM.LOGIT_SCALE": "logits_scaling",
}
EVERY_LAYER_SPARSE = {"decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)}

FAMILIES = {
    "llama": Family(arch="LLAMA", permuted=True),
    "mistral": Family(arch="LLAMA", permuted=True),
    "qwen2": Family(arch="QWEN2"),
    "qwen3": Family(arch="QWEN3"),
    "granite": Family(arch="GRANITE", permuted=True, settings=GRANITE),
    "mixtral": Family(arch="LLAMA", permuted=True, settings=EXPERTS),
    "olmoe": Family(
        arch="OLMOE",
        grouped=False,
        settings=WIDE_EXPERTS,
        fixed={"norm_topk_prob": (False, None), "clip_qkv": (None,)},
    ),
    "qwen2_moe": Family(
        arch="QWEN2MOE",
        settings=NARROW_EXPERTS
        | {"LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": "shared_expert_intermediate_size"},
        fixed={"norm_topk_prob": (False, None), **EVERY_LAYER_SPARSE},
    ),
    "qwen3_moe": Family(
        arch="QWEN3MOE",
        settings=NARROW_EXPERTS,
        fixed={"norm_topk_prob": (True,), **EVERY_LAYER_SPARSE},
    ),
    "granitemoe": Family(arch="GRANITE_MOE", permuted=True, settings=GRANITE | WIDE_EXPERTS),
    "granitemoeshared": Family(
        arch="GRANITE_MOE",
        permuted=True,
        settings=GRANITE
        | WIDE_EXPERTS
        | {"LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": "shared_intermediate_size"},
    ),
    "gpt_oss": Family(
        arch="GPT_OSS",
        settings=WIDE_EXPERTS | {"Attention.SLIDING_WINDOW": "sliding_window"},
        fixed={"swiglu_alpha": (1.702, None), "swiglu_limit": (7.0, None)},
    ),
    "deepseek_v2": Family(
        arch="DEEPSEEK2",
        # transformers ignores norm_topk_prob here
        settings=DEEPSEEK
        | LATENT_ATTENTION
        | {"LLM.EXPERT_WEIGHTS_NORM": always(False), "LLM.EXPERT_GATING_FUNC": always(SOFTMAX)},
        fixed={"topk_method": ("greedy", None), "n_group": (1, None)},
    ),
    "deepseek_v3": Family(
        arch="DEEPSEEK2",
        settings=DEEPSEEK | LATENT_ATTENTION,
        fixed={"rope_interleave": (True, None)},
    ),
    "glm4_moe": Family(arch="GLM4_MOE", settings=DEEPSEEK),
    "dots1": Family(arch="DOTS1", grouped=False, settings=DEEPSEEK),
    "ernie4_5_moe": Family(
        arch="ERNIE4_5_MOE",
        settings=NARROW_EXPERTS
        | {
            "LLM.LEADING_DENSE_BLOCK_COUNT": "moe_layer_start_index",
            "LLM.INTERLEAVE_MOE_LAYER_STEP": "moe_layer_interval",
            "LLM.EXPERT_SHARED_COUNT": "moe_num_shared_experts",
            "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH": _shared_width("moe_num_shared_experts"),
        },
    ),
    "minimax_m2": Family(
        arch="MINIMAXM2", settings=WIDE_EXPERTS | {"LLM.EXPERT_GATING_FUNC": always(SIGMOID)}
    ),
}
ALIASES = {"kimi_k2": "deepseek_v3"}
