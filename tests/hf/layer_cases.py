"""Tiny models whose MoE blocks `moe.hf` imports, by what is special about their routing.

`build("mixtral")` is a model of width 36 with 8 experts of which 3 run; "mixtral, gelu" is the same with
other settings. Blocks run in plain Python loops ("eager") there, which is the definition.
"""

import importlib
from importlib.util import find_spec

import pytest
import tiny
import torch
from torch import nn

from moe.hf.blocks import BLOCKS
from moe.hf.import_block import row_of

SIZES = {
    "hidden_size": 36,
    "head_dim": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 3),
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}

MIXED = ["linear_attention", "full_attention", "linear_attention"]

# Another name of the folder's case, and the settings that differ
CASES: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, gelu": ("mixtral", {"hidden_act": "gelu"}),
    "minimax": ("minimax", {}),
    "olmoe": ("olmoe", {}),
    "olmoe, normalised": ("olmoe", {"norm_topk_prob": True}),
    "flex_olmo": ("flex_olmo", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, normalised, gelu": ("qwen2_moe", {"norm_topk_prob": True, "hidden_act": "gelu"}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, normalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_next": ("qwen3_next", {"layer_types": MIXED}),
    "qwen3_5_moe": ("qwen3_5_moe", {"layer_types": MIXED}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {}),
    "mellum": ("mellum", {}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "ernie4_5_moe, a high floor": ("ernie4_5_moe", {"moe_norm_min": 0.5}),
    "ernie4_5_moe, nothing shared": ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    "deepseek_v2": ("deepseek_v2", {"topk_method": "group_limited_greedy"}),
    "deepseek_v2, no groups": ("deepseek_v2", {"topk_method": "greedy", "n_group": None}),
    "mistral4": ("mistral4", {}),
    "granitemoe": ("granitemoe", {}),
    "granitemoeshared": ("granitemoeshared", {"shared_intermediate_size": 20}),
    "gpt_oss": ("gpt_oss", {}),
    "cohere2_moe": ("cohere2_moe", {}),
    "cohere2_moe, sigmoid": (
        "cohere2_moe",
        {"expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "sum"},
    ),
    "cohere2_moe, sigmoid, nothing shared": (
        "cohere2_moe",
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False, "num_shared_experts": 0},
    ),
    "llama4": ("llama4", {"num_experts_per_tok": 1}),
    "llama4, three choices": ("llama4", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3, not normalised": ("deepseek_v3", {"norm_topk_prob": False}),
    "deepseek_v32": ("deepseek_v32", {}),
    "glm_moe_dsa": ("glm_moe_dsa", {}),
    "glm4v_moe": ("glm4v_moe", {}),
    "bailing_hybrid": ("bailing_hybrid", {"layer_types": MIXED}),
    "kimi_linear": ("kimi_linear", {"layer_types": MIXED}),
    "deepseek_ocr2": ("deepseek_ocr2", {"topk_method": "group_limited_greedy"}),
    "unlimited_ocr": ("unlimited_ocr", {"topk_method": "group_limited_greedy"}),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "granitemoe_swa": ("granitemoe_swa", {}),
    "qwen3_omni_moe": ("qwen3_omni_moe", {}),
    "glm4_moe": ("glm4_moe", {"n_group": 1, "topk_group": 1}),
    "glm4_moe_lite": ("glm4_moe_lite", {}),
    "dots1": ("dots1", {"n_shared_experts": 2}),
    "solar_open": ("solar_open", {}),
    "exaone_moe": ("exaone_moe", {}),
    "nemotron_h": ("nemotron_h", {}),
    "minimax_m2": ("minimax_m2", {}),
    "hy_v3": ("hy_v3", {}),
    "afmoe": ("afmoe", {"route_scale": 1.5}),
    "laguna": ("laguna", {"moe_router_logit_softcapping": 2.0}),
    "lfm2_moe": ("lfm2_moe", {}),
    "lfm2_moe, no bias": ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False}),
}  # fmt: skip

FAMILIES = [name for name in CASES if ", " not in name]

# One of each way to keep tensors, to return, and to tell transformers the router logits
LAYOUTS = [
    "mixtral",
    "minimax",
    "qwen2_moe",
    "jamba",
    "hunyuan_v1_moe",
    "ernie4_5_moe",
    "deepseek_v3",
    "gpt_oss",
]
LAYOUTS += ["llama4", "granitemoe", "nemotron_h", "minimax_m2", "afmoe", "laguna", "lfm2_moe"]


def build(case: str, **changes) -> nn.Module:
    """The tiny model of a case, in eval mode, its experts in eager mode."""
    folder, special = CASES[case]
    if find_spec(f"transformers.models.{folder}") is None:
        pytest.skip(f"this transformers has no {folder}")
    settings = SIZES | special | changes
    model = _llama4(settings) if folder == "llama4" else tiny.build(folder, **settings)
    if hasattr(model, "set_experts_implementation") and folder != "llama4":
        model.set_experts_implementation("eager")
    return model


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The MoE blocks of a model, by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ in BLOCKS}


def block_of(case: str, dtype: torch.dtype = torch.float32, **changes) -> tuple[nn.Module, dict]:
    """One block of the case's model in a dtype, and its config."""
    model = build(case, **changes)
    config = getattr(model.config, "text_config", model.config)
    block = list(blocks(model).values())[-1].to(dtype)
    if getattr(block, "use_expert_bias", False):  # LFM2 adds it as it is; from_pretrained keeps it float32
        block.expert_bias = block.expert_bias.float()
    return block, config.to_dict()


def what_the_router_says(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the block's own router returns while the block runs x (b s d)."""
    said = []
    router = block.get_submodule(row_of(block).router)
    handle = router.register_forward_hook(lambda module, inputs, output: said.append(output))
    block(x)
    handle.remove()
    return said[0] if isinstance(said[0], tuple) else (said[0],)


def routing_of(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, weights and experts of the block's own router; transformers 5.17 returns some differently."""
    said = what_the_router_says(block, x)
    if len(said) == 1:  # Jamba's router was a linear layer
        experts, weights = block.route_tokens_to_experts(x.flatten(0, 1), said[0])
        return said[0], weights, experts
    return said if said[0].is_floating_point() else said[::-1]  # Granite's experts came first


def _llama4(settings: dict) -> nn.Module:
    """Its experts are not in the registry, by which `tiny.build` knows a model with experts."""
    model_class = importlib.import_module("transformers.models.llama4.modeling_llama4").Llama4ForCausalLM
    config = tiny.tiny_config(model_class.config_class, **settings)
    torch.manual_seed(0)
    return tiny.redraw(model_class(config)).eval()
