"""Tiny random Hugging Face models, one for each family that has a GGUF export."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe.hf.gguf import export_gguf

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "intermediate_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOP_2 = {"num_experts_per_tok": 2}
NARROW = {"moe_intermediate_size": 32, **TOP_2}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
SHARED = {"n_shared_experts": 2, "first_k_dense_replace": 1, **NARROW}
LATENT = {
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
MULTIPLIERS = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.75,
    "logits_scaling": 3,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 16},
    "qwen3": {},
    "granite": MULTIPLIERS,
    "mixtral": {"num_local_experts": 5, **TOP_2},
    "olmoe": {"num_experts": 5, "num_key_value_heads": 4, "head_dim": 16, **TOP_2},
    "qwen2_moe": {"num_experts": 5, "shared_expert_intermediate_size": 48, "head_dim": 16, **NARROW},
    "qwen3_moe": {"num_experts": 5, "norm_topk_prob": True, **NARROW},
    "granitemoe": {"num_local_experts": 5, **MULTIPLIERS, **TOP_2},
    "granitemoeshared": {"num_local_experts": 5, "shared_intermediate_size": 40, **MULTIPLIERS, **TOP_2},
    "gpt_oss": {"num_local_experts": 5, "sliding_window": 8, **TOP_2, **PLAIN},
    "deepseek_v2": {"n_routed_experts": 4, "topk_method": "greedy", **SHARED, **LATENT},
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, **SHARED, **LATENT},
    "glm4_moe": {"n_routed_experts": 4, "use_qk_norm": True, "attention_bias": True, **SHARED},
    "dots1": {"n_routed_experts": 4, "num_key_value_heads": 4, "norm_topk_prob": True, **SHARED},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
    },
    "minimax_m2": {"num_local_experts": 5, **TOP_2, **PLAIN},
}


def tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    """A model of the family with every parameter drawn anew, selection biases and norms included."""
    config = AutoConfig.for_model(name, **{**SIZES, **MODELS[name], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.15)
    return model


def save_tiny(folder: Path, name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model that was also saved, in hub layout."""
    model = tiny_model(name, **changes)
    model.save_pretrained(folder)
    return model


def export_tiny(folder: Path, name: str, *, dtype: torch.dtype | None = None, **changes: Any):
    """Export a tiny model to model.gguf: the model, what the export says, metadata and tensors read back."""
    model = save_tiny(folder / "model", name, **changes)
    result = export_gguf(folder / "model", folder / "model.gguf", dtype=dtype)
    return model, result, *read(folder / "model.gguf")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file, by the gguf package; numbers as float32."""
    reader = gguf.GGUFReader(file)
    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(np.array(t.data), t.tensor_type).copy())
        for t in reader.tensors
    }
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


# What a tensor of the file is, told from the parameters of the model that transformers runs.

PLAIN_NAMES = {
    "token_embd.weight": r"model\.embed_tokens\.weight",
    "output_norm.weight": r"model\.norm\.weight",
    "output.weight": r"lm_head\.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": r"input_layernorm\.weight",
    "ffn_norm.weight": r"post_attention_layernorm\.weight",
    "post_attention_norm.weight": r"post_attention_layernorm\.weight",
    "attn_(q|k|v)_norm.weight": r"self_attn\.\1_norm\.weight",
    "attn_(q|k|v).(weight|bias)": r"self_attn\.\1_proj\.\2",
    "attn_output.(weight|bias)": r"self_attn\.o_proj\.\1",
    "attn_sinks.weight": r"self_attn\.sinks",
    "attn_q_(a|b).weight": r"self_attn\.q_\1_proj\.weight",
    "attn_q_a_norm.weight": r"self_attn\.q_a_layernorm\.weight",
    "attn_kv_a_mqa.weight": r"self_attn\.kv_a_proj_with_mqa\.weight",
    "attn_kv_a_norm.weight": r"self_attn\.kv_a_layernorm\.weight",
    "attn_(k|v)_b.weight": r"self_attn\.kv_b_proj\.weight",
    "ffn_(gate|up|down).weight": r"mlp\.\1_proj\.weight",
    "ffn_gate_inp.weight": r"(?:mlp|block_sparse_moe)\.(?:gate|router)\.weight",
    "ffn_gate_inp.bias": r"mlp\.router\.bias",
    "exp_probs_b.bias": r".*e_score_correction_bias",
    "ffn_gate_inp_shexp.weight": r"mlp\.shared_expert_gate\.weight",
    "ffn_(?:gate|up)_exps.weight": r".*experts\.gate_up_proj",
    "ffn_(?:gate|up)_exps.bias": r".*experts\.gate_up_proj_bias",
    "ffn_down_exps.weight": r".*experts\.down_proj",
    "ffn_down_exps.bias": r".*experts\.down_proj_bias",
    "ffn_(gate|up|down)_shexp.weight": r"mlp\.shared_experts?\.\1_proj\.weight",
}


def parameter(name: str, state: dict[str, Tensor]) -> str:
    """The key in a model's state of what became the tensor `name`."""
    for known, pattern in PLAIN_NAMES.items():
        if name == known:
            return one_of(re.compile(pattern), state)
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    assert block, name
    for known, pattern in LAYER_NAMES.items():
        if found := re.fullmatch(known.replace(".", r"\.").replace(r"(?\:", "(?:"), block[2]):
            if "_shexp" in known and any("shared_mlp" in key for key in state):
                pattern = rf"shared_mlp\.{'out' if 'down' in name else 'in'}put_linear\.weight"
            words = [word.replace(".", r"\.") for word in found.groups()]
            for number, word in enumerate(words, 1):
                pattern = pattern.replace(f"\\{number}", word)
            return one_of(re.compile(rf"model\.layers\.{block[1]}\.{pattern}"), state)
    raise AssertionError(f"no parameter is known for {name}")


def one_of(pattern: re.Pattern[str], state: dict[str, Tensor]) -> str:
    (key,) = [key for key in state if pattern.fullmatch(key)]
    return key
