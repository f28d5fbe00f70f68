"""Tiny random Hugging Face models of any family, built from what its configuration class says about itself.

`build("olmoe")` is a model with hidden width 48, 3 layers and 6 experts of which 2 run, in eval mode. Its
matrices are drawn anew with std 0.15, for with the usual 0.02 the logits are too small to show a wrong
expert, and its selection biases differ from 0. Transformers is imported when a model is built, not before.

    registry_families()       the folders of transformers.models whose experts use the registry
    build(family, **changes)  the model; `changes` go to every configuration in it that has such a key
    tokens(model)             ids (b t) that the model accepts
    experts_modules(model)    its expert modules that go through the registry, by name
"""

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is not a folder is an error, not a download

STD = 0.15
FAILURES = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, ImportError, ArithmeticError)
VOCABULARY = 131
LARGEST = 4_000_000  # parameters; more means that a size has a name unknown here

# A value for every size, by each name that some family has for it. Widths are odd multiples of what must
# divide them.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 44,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "shared_experts_intermediate_size": 28,
    "moe_shared_expert_intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_heads": 3,
    "linear_head_dim": 8,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 3,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "mamba_n_heads": 6,
    "mamba_d_state": 16,
    "index_n_heads": 3,
    "index_head_dim": 16,
    "moe_hidden_size": 40,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _rope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}


# What a family needs besides.
CHANGES: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "cohere2_moe": {"logit_scale": 1.0},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note": {"layer_types": ["indexed_attention"] * 3},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [20, 12], "rope_parameters": _rope(1, 1, 2)},
    "gemma4": {"enable_moe_block": True, "hidden_size_per_layer_input": 8},
    "glm4v_moe": {"rope_parameters": _rope(1, 1, 0)},
    "glm5_next": {"qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hy_v4_vl": {"rope_parameters": _rope(2, 1, 1)},
    "inkling": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mimo_v2_flash": {"num_key_value_heads": 3},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention"]},
    "qwen3_5_moe": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}


def build(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model of a folder of transformers.models, its weights drawn from `seed`.

    The first class of the folder that can be built, holds experts and runs on ids alone: a causal language
    model, else the text half of a model of several modalities, else whatever else there is.

    Raises:
        RuntimeError: no class could be built; the message holds the reason of each.
    """
    reasons = []
    for model_class in model_classes(family):
        try:
            return _build_class(model_class, family, seed, changes)
        except FAILURES as error:  # whatever it is, it is a reason for the caller to print
            reasons.append(f"{model_class.__name__}: {type(error).__name__}: {str(error).strip()[:160]}")
    raise RuntimeError(
        f"{family}: no class with experts can be built. " + " | ".join(reasons or ["none found"])
    )


def tokens(model: nn.Module, batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    """Random ids (b t), without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 8, (batch, length), generator=generator)


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of ids (b t), or the last hidden state where the model has no head."""
    output = model(input_ids=ids, use_cache=False) if _accepts(model, "use_cache") else model(input_ids=ids)
    return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that transformers' decorator has made, by name."""
    return {
        n: m for n, m in model.named_modules() if hasattr(m, "has_gate") and hasattr(m, "is_concatenated")
    }


@cache
def registry_families() -> tuple[str, ...]:
    """The folders of the installed transformers whose experts use the registry, in alphabetical order."""
    return tuple(sorted(f for f in _all_families() if "@use_experts_implementation" in _source(f)))


def other_moe_families() -> tuple[str, ...]:
    """The folders with experts that the registry does not reach."""
    has_experts = re.compile(r"class \w*Experts?\b|class \w*(MoE|Moe)\w*\(")
    return tuple(
        f for f in sorted(_all_families()) if has_experts.search(_source(f)) and f not in registry_families()
    )


def redraw(model: nn.Module, seed: int = 0, std: float = STD) -> nn.Module:
    """Draw matrices and biases from N(0, std²), selection biases too; norms stay as they are made."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "tid2eid":  # DeepSeek-V4: the experts of a token id
                tensor.copy_(
                    torch.stack([torch.randperm(6, generator=generator)[: tensor.shape[1]] for _ in tensor])
                )
            elif "inv_freq" in leaf or not tensor.is_floating_point():
                continue
            elif re.search(r"(correction_bias|expert_bias|balancing_bias\w*)$", leaf):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif isinstance(tensor, nn.Parameter) and (tensor.dim() > 1 or leaf.endswith("bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    return model


def tiny_config(config_class: type, **changes: Any) -> Any:
    """A small configuration of this class and of those within it; `changes` count at every depth."""
    names = {f.name for f in fields(config_class)} | set(inspect.signature(config_class.__init__).parameters)
    values = {name: value for name, value in (SIZES | changes).items() if name in names}
    if "kv_lora_rank" in names:  # latent attention has no groups of heads
        values.setdefault("num_attention_heads", 6)
        values["num_key_value_heads"] = values["num_attention_heads"]
    inner = getattr(config_class, "sub_configs", {})
    for name, inner_class in inner.items():
        if inner_class.__name__ != "AutoConfig" and "__dataclass_fields__" in vars(inner_class):
            values[name] = tiny_config(inner_class, **changes)
    return config_class(**values)


def _build_class(model_class: type, family: str, seed: int, changes: dict[str, Any]) -> nn.Module:
    config = tiny_config(model_class.config_class, **CHANGES.get(family, {}) | changes)
    with torch.device("meta"):
        skeleton = model_class(config)
    if not experts_modules(skeleton):
        raise LookupError("no experts that use the registry")
    if (size := sum(p.numel() for p in skeleton.parameters())) > LARGEST:
        raise OverflowError(f"{size} parameters, more than {LARGEST}")
    torch.manual_seed(seed)
    model = redraw(model_class(config).float(), seed).eval()
    with torch.no_grad():
        run(model, tokens(model))
    return model


def model_classes(family: str) -> Iterator[type]:
    """The models of a family, those first that take ids and give logits."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    pretrained = importlib.import_module("transformers").PreTrainedModel
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, pretrained) and c.__module__ == module.__name__
        and getattr(c, "config_class", None) is not None and not c.__name__.endswith("PreTrainedModel")
    ]  # fmt: skip
    order = ("ForCausalLM", "TextModel", "ForConditionalGeneration", "ForTokenClassification", "Model")
    for ending in order:
        yield from (c for c in found if c.__name__.endswith(ending))


def _accepts(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@cache
def _all_families() -> dict[str, Path]:
    folder = Path(importlib.import_module("transformers").__file__).parent / "models"
    paths = {f.name: f / f"modeling_{f.name}.py" for f in folder.iterdir()}
    return {name: path for name, path in paths.items() if path.is_file()}


@cache
def _source(family: str) -> str:
    return _all_families()[family].read_text(encoding="utf-8")
