"""MoE families of Hugging Face transformers as rows of data; nothing here imports transformers.

Read in the `configuration_*.py` and `modeling_*.py` of transformers 5.24. `moe.hf.routers` reads the rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Settings = dict[str, Any]  # shared between rows: build new ones with |, change none


class Key(str):
    """In the place of a value: the value stands in their config, under this key."""

    __slots__ = ()


@dataclass(frozen=True)
class Family:
    """One row.

    settings  our setting -> the value that their code hard-wires, or the `Key` of their config
    defaults  their key -> what their config class assumes when the key is missing
    choices   their key -> each value we have mathematics for -> our settings; any other value is refused
    """

    settings: Settings
    defaults: Settings
    choices: Mapping[str, Mapping[Any, Settings]] = field(default_factory=dict)


# Names under which configs keep the same number: `attribute_map` in transformers lets either be written.
ALIASES = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"),
    "n_shared_experts": ("n_shared_experts", "num_shared_experts"),
    "norm_topk_prob": ("norm_topk_prob", "moe_renormalize"),
    "n_group": ("n_group", "num_expert_group"),
}


def keys(*names: str, **others: str) -> Settings:
    """Settings to be read under their own name, or (ours=theirs) under another."""
    return {name: Key(name) for name in names} | {ours: Key(theirs) for ours, theirs in others.items()}


# What several rows share: keys ...

SIZES = keys("hidden_size", "num_experts", "num_experts_per_tok", "initializer_range")
MOE_WIDTH = SIZES | keys("moe_intermediate_size")
ONE_WIDTH = SIZES | keys(moe_intermediate_size="intermediate_size")
GROUPS = keys("n_group", "topk_group")
NORM, SCALE = keys("norm_topk_prob"), keys("routed_scaling_factor")
JITTER = keys("router_jitter_noise") | {"jitter_experts": True}
GATED_SHARED = keys("shared_expert_intermediate_size") | {"n_shared_experts": 1, "shared_expert_gate": True}

# ... mathematics. "model": the product runs in the model's dtype, the scores in float32

MODEL_LOGITS = {"router_logits_dtype": "model"}
SOFTMAX_CAST = MODEL_LOGITS | {"routing_weights_dtype": "logits"}
TOPK_FIRST = MODEL_LOGITS | {"topk_before_score": True, "routing_weights_dtype": "model"}
SIGMOID_BIAS = {"scoring_func": "sigmoid", "use_selection_bias": True}
NOAUX_TC = SIGMOID_BIAS | {"norm_topk_eps": 1e-20, "group_score": "top2", "topk_sorted": False}

# ... and words

SILU, GELU = {"activation": "swiglu"}, {"activation": "geglu", "shared_expert_activation": "geglu"}
GATED = {"hidden_act": {"silu": SILU, "swish": SILU, "gelu": GELU}}
NO_MLP_BIAS = {"mlp_bias": {False: {}, None: {}}}
RELU2 = {"activation": "relu2", "shared_expert_activation": "relu2"}


def _sizes(
    hidden_size: int, width: int, num_experts: int | None, top_k: int | None, **others: Any
) -> Settings:
    return {
        "hidden_size": hidden_size,
        "moe_intermediate_size": width,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        **others,
    }  # fmt: skip


def _one_width(hidden_size: int, width: int, num_experts: int, top_k: int, **others: Any) -> Settings:
    """As `_sizes`, where the only width of the config is that of an expert."""
    sizes = _sizes(hidden_size, width, num_experts, top_k, **others)
    return {"intermediate_size": sizes.pop("moe_intermediate_size"), **sizes}


def _deepseek_v3(
    sizes: Settings,
    scale: float = 1.0,
    *,
    groups: tuple[int, int] = (1, 1),
    n_shared: int | None = 1,
    norm: bool = True,
) -> Family:
    """Sigmoid scores, a selection bias, the best groups, shared experts."""
    words = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}  # keys of config.json alone
    defaults = {"n_group": groups[0], "topk_group": groups[1], "norm_topk_prob": norm}
    return Family(
        MOE_WIDTH | NORM | SCALE | GROUPS | keys("n_shared_experts") | NOAUX_TC,
        sizes | defaults | words | {"routed_scaling_factor": scale, "n_shared_experts": n_shared},
        GATED | {key: {word: {}} for key, word in words.items()},
    )


MIXTRAL = Family(
    ONE_WIDTH | JITTER | MODEL_LOGITS, _one_width(4096, 14336, 8, 2, router_jitter_noise=0.0), GATED
)
GRANITE = Family(ONE_WIDTH | TOPK_FIRST, _one_width(4096, 11008, 8, 2), GATED)
DEEPSEEK_V2 = Family(  # transformers never reads its norm_topk_prob
    MOE_WIDTH
    | SCALE
    | keys("n_shared_experts")
    | {"norm_topk_prob": False, "group_score": "max", "topk_sorted": False},
    _sizes(4096, 1407, 64, None, n_group=None, topk_group=None, topk_method="greedy")
    | {"n_shared_experts": 2, "routed_scaling_factor": 1.0, "mlp_bias": False},
    GATED | NO_MLP_BIAS | {"topk_method": {"greedy": {}, "group_limited_greedy": GROUPS}},
)
DEEPSEEK_V3 = _deepseek_v3(_sizes(7168, 2048, 256, 8), 2.5, groups=(8, 4))

FAMILIES: dict[str, Family] = {
    # Softmax over all experts
    "mixtral": MIXTRAL,
    "minimax": MIXTRAL,
    "olmoe": Family(
        ONE_WIDTH | NORM | SOFTMAX_CAST, _one_width(2048, 2048, 64, 8, norm_topk_prob=False), GATED
    ),
    "flex_olmo": Family(
        ONE_WIDTH | NORM | SOFTMAX_CAST, _one_width(4096, 11008, 7, 5, norm_topk_prob=False), GATED
    ),
    "qwen2_moe": Family(
        MOE_WIDTH | NORM | SOFTMAX_CAST | GATED_SHARED,
        _sizes(2048, 1408, 60, 4, norm_topk_prob=False, shared_expert_intermediate_size=5632),
        GATED,
    ),
    "qwen3_moe": Family(
        MOE_WIDTH | NORM | SOFTMAX_CAST, _sizes(2048, 768, 128, 8, norm_topk_prob=False), GATED
    ),
    "qwen3_next": Family(
        MOE_WIDTH | NORM | SOFTMAX_CAST | GATED_SHARED,
        _sizes(2048, 512, 512, 10, norm_topk_prob=True, shared_expert_intermediate_size=512),
        GATED,
    ),
    "qwen3_5_moe_text": Family(
        MOE_WIDTH | SOFTMAX_CAST | GATED_SHARED,
        _sizes(2048, 512, 256, 8, shared_expert_intermediate_size=512),
        GATED,
    ),
    "qwen3_vl_moe_text": Family(MOE_WIDTH | SOFTMAX_CAST, _sizes(2048, 1408, 60, 4), GATED),
    "qwen3_omni_moe_text": Family(
        MOE_WIDTH | NORM | SOFTMAX_CAST, _sizes(2048, 768, 128, 8, norm_topk_prob=True), GATED
    ),
    "mellum": Family(MOE_WIDTH | NORM | SOFTMAX_CAST, _sizes(2304, 896, 64, 8, norm_topk_prob=True), GATED),
    "jamba": Family(
        ONE_WIDTH | MODEL_LOGITS | {"norm_topk_prob": False, "routing_weights_dtype": "model"},
        _one_width(4096, 14336, 16, 2),
        GATED,
    ),
    "hunyuan_v1_moe": Family(
        ONE_WIDTH | SOFTMAX_CAST | {"n_shared_experts": 1}, _one_width(4096, 11008, 1, 1), GATED
    ),
    "ernie4_5_moe": Family(
        MOE_WIDTH
        | keys(norm_topk_min="moe_norm_min", n_shared_experts="moe_num_shared_experts")
        | {"use_selection_bias": True, "routing_weights_dtype": "model"},
        _sizes(2560, 1536, 64, 6, moe_norm_min=1e-12, moe_num_shared_experts=2, use_bias=False),
        GATED | {"use_bias": {False: {}, None: {}}},
    ),
    # Softmax in groups
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_ocr2_text": DEEPSEEK_V2,
    "unlimited_ocr_text": replace(
        DEEPSEEK_V2,
        defaults=DEEPSEEK_V2.defaults | _sizes(1280, 896, 64, 6, n_group=1, topk_group=1),
    ),
    "mistral4": Family(
        MOE_WIDTH
        | NORM
        | SCALE
        | GROUPS
        | keys("n_shared_experts")
        | {"router_dtype": "model", "norm_topk_eps": 1e-20, "group_score": "top2", "topk_sorted": False},
        _sizes(4096, 2048, 128, 4, n_group=1, topk_group=1, norm_topk_prob=True)
        | {"n_shared_experts": 1, "routed_scaling_factor": 1.0},
        GATED,
    ),
    # The best logits first, then the score over them
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,  # here the shared expert lies beside the block, in the decoder layer
    "granitemoehybrid": GRANITE,
    "granitemoe_swa": GRANITE,
    "gpt_oss": Family(
        ONE_WIDTH
        | keys("swiglu_limit", "swiglu_alpha")
        | {"router_dtype": "model", "topk_before_score": True, "router_bias": True}
        | {"activation": "clamped_swiglu", "expert_bias": True}
        | {"is_transposed": True, "is_concatenated": False},
        _one_width(2880, 2880, 128, 4, swiglu_limit=7.0, swiglu_alpha=1.702),
    ),
    "cohere2_moe": Family(
        ONE_WIDTH | NORM | keys("n_shared_experts") | TOPK_FIRST,
        _one_width(8192, 22528, 8, 2, norm_topk_prob=True, n_shared_experts=0)
        | {"expert_selection_fn": "softmax", "shared_expert_combination_strategy": "average"},
        GATED
        | {
            "expert_selection_fn": {
                "softmax": {},
                "sigmoid": {"scoring_func": "sigmoid", "router_dtype": "model"},
            },
            "shared_expert_combination_strategy": {
                word: {"shared_expert_combination": word} for word in ("sum", "average")
            },
        },
    ),
    "llama4_text": Family(
        ONE_WIDTH
        | TOPK_FIRST
        | {"scoring_func": "sigmoid", "norm_topk_prob": False, "n_shared_experts": 1}
        | {"apply_router_weight_on_input": True, "is_transposed": True},
        _one_width(5120, 8192, 16, 1),
        GATED,
    ),
    # Sigmoid with a selection bias
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "glm4_moe": _deepseek_v3(_sizes(4096, 1408, 128, 8)),
    "glm4_moe_lite": _deepseek_v3(_sizes(2048, 1536, 64, 4), 1.8),
    "dots1": _deepseek_v3(_sizes(4608, 1408, None, None), n_shared=None, norm=False),
    "solar_open": _deepseek_v3(_sizes(4096, 1280, 128, 8)),
    "exaone_moe": _deepseek_v3(_sizes(4096, 1024, 64, 8), 2.5),
    "deepseek_v32": DEEPSEEK_V3,
    "glm_moe_dsa": _deepseek_v3(_sizes(6144, 2048, 256, 8), 2.5),
    "glm4v_moe_text": _deepseek_v3(_sizes(4096, 1408, 128, 8)),
    "bailing_hybrid": _deepseek_v3(_sizes(2560, 768, 512, 8), 2.5, groups=(8, 4)),
    "kimi_linear": _deepseek_v3(_sizes(2304, 1024, 256, 8), 2.446),
    "nemotron_h": Family(  # whatever n_shared_experts says, its block has one
        MOE_WIDTH
        | NORM
        | SCALE
        | GROUPS
        | keys(shared_expert_intermediate_size="moe_shared_expert_intermediate_size")
        | NOAUX_TC
        | {"n_shared_experts": 1},
        _sizes(4096, 7688, 8, 2, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0)
        | {"moe_shared_expert_intermediate_size": 7688, "moe_latent_size": None}
        | {"mlp_hidden_act": "relu2", "mlp_bias": False},
        NO_MLP_BIAS | {"mlp_hidden_act": {"relu2": RELU2}, "moe_latent_size": {None: {}}},
    ),
    "minimax_m2": Family(
        ONE_WIDTH | JITTER | MODEL_LOGITS | SIGMOID_BIAS | {"topk_sorted": False},
        _one_width(3072, 1536, 256, 8, router_jitter_noise=0.0),
        GATED,
    ),
    "hy_v3": Family(
        MOE_WIDTH
        | keys("n_shared_experts", routed_scaling_factor="router_scaling_factor")
        | SIGMOID_BIAS
        | {"norm_topk_eps": 1e-20, "topk_sorted": False},
        _sizes(4096, 1536, 192, 8, router_scaling_factor=2.826, n_shared_experts=1, mlp_bias=False)
        | {"initializer_range": 0.006},
        GATED | NO_MLP_BIAS,
    ),
    "afmoe": Family(
        MOE_WIDTH
        | keys("n_shared_experts", routed_scaling_factor="route_scale")
        | MODEL_LOGITS
        | SIGMOID_BIAS
        | {"norm_topk_eps": 1e-20},
        _sizes(2048, 1408, 64, 6, route_scale=1.0, n_shared_experts=2),
        GATED,
    ),
    "laguna": Family(  # it scales what the experts give; we scale their weights
        MOE_WIDTH
        | keys("shared_expert_intermediate_size")
        | keys(routed_scaling_factor="moe_routed_scaling_factor")
        | keys(router_logit_softcap="moe_router_logit_softcapping")
        | MODEL_LOGITS
        | SIGMOID_BIAS
        | {"routing_weights_dtype": "model", "n_shared_experts": 1},
        _sizes(2048, 512, 256, 8, moe_routed_scaling_factor=1.0, moe_router_logit_softcapping=0.0)
        | {"shared_expert_intermediate_size": 512, "moe_apply_router_weight_on_input": False},
        GATED | {"moe_apply_router_weight_on_input": {False: {}}},
    ),
    "lfm2_moe": Family(
        MOE_WIDTH
        | NORM
        | SCALE
        | {"scoring_func": "sigmoid", "router_dtype": "model", "norm_topk_eps": 1e-6},
        _sizes(2048, 1792, 32, 4, norm_topk_prob=True, routed_scaling_factor=1.0, use_expert_bias=True),
        {"use_expert_bias": {True: {"use_selection_bias": True}, False: {}}},
    ),
}

# Families that have experts and no mathematics of ours: why
UNSUPPORTED = {
    "deepseek_v4": "its experts clamp gate and up before SiLU, and its first layers route by token id",
    "phimoe": "its router is sparsemixer, which masks the logits around the best one",
    "dbrx": "its weights are divided by a p-norm of the chosen ones",
    "longcat_flash": "some of its experts compute nothing",
    "gemma4": "its router normalises and scales its own input",
    "switch_transformers": "it drops tokens over capacity within each sequence",
    "nllb-moe": "it drops tokens over capacity and chooses a second expert by a policy",
}
