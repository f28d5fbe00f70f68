"""Tiny decoders with every kind of attention, and a whole decoder in loops that shares no code with ours."""

from dataclasses import replace

import torch
from torch import Tensor

from moe import Decoder, DecoderConfig
from moe.rotary import RopeScaling

BASE = DecoderConfig(
    vocab_size=23,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=20,
    head_dim=8,
    initializer_range=0.3,
)
LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
LONG = {
    "layer_types": "LLG",
    "sliding_window": 3,
    "no_rope_layers": (1, 1, 0),
    "use_ssmax": True,
    "use_qk_norm": True,
    "canon_set": ("AC", "AC", "AB"),
    "attention_init": "induction",
}
EXPERTS = {
    "moe_intermediate_size": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "use_selection_bias": True,
    "mlp_only_layers": (0,),
}
VARIANTS = {
    "window": {"sliding_window": 4},
    "window in some layers": {
        "sliding_window": 3,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    },
    "sinks": {"attention_sinks": True},
    "sinks and windows": {"attention_sinks": True, "sliding_window": 3},
    "norm over all heads": {"use_qk_norm": True, "qk_norm": "full", "clip_qkv": 0.7},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "a quarter of the channels turns": {"partial_rotary_factor": 0.25},
    "neighbours turn": {"rope_interleave": True},
    "multipliers": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "latents": LATENT | {"rope_interleave": True},
    "latents of queries": LATENT | {"q_lora_rank": 7, "attention_bias": True, "attention_output_bias": True},
    "no positions in one layer": {"no_rope_layers": (1, 0, 1)},
    "logits grow with the keys": {"use_ssmax": True, "use_qk_norm": True},
    "convolutions": {"canon_set": ("ABC", "", "KC"), "canon_kernel": 3},
    "convolutions longer than the pieces": {"canon_set": ("A", "B", "C"), "canon_kernel": 6},
    "long context": LONG,
    "long context of one key head": LONG | {"num_key_value_heads": 1, "attention_sinks": True},
    "long context of experts": LONG | EXPERTS,
    "long context, full in the middle": LONG
    | {"num_hidden_layers": 4, "layer_types": "LLGL", "no_rope_layers": (1, 1, 0, 1)}
    | {"canon_set": ("AC", "", "ABC", "KC"), "attention_sinks": True},
    "latents and convolutions": LATENT | {"canon_set": ("AC", "C", "A"), "sliding_window": 3},
    "yarn": {"rope_scaling": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)},
}


def drawn(name: str) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(replace(BASE, **VARIANTS[name])).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:  # norms, biases and sinks, which start at 1 and 0
                parameter.add_(torch.randn_like(parameter) / 3)
    return decoder


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(1))
