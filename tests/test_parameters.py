"""Parameters and FLOPs counted from the config, against the built model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.parameters import count_parameters, flops_per_token

SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
MOE = {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2}
CONFIGS = {
    "dense": {"intermediate_size": 20},
    "dense untied": {"intermediate_size": 20, "tie_word_embeddings": False},
    "all MoE": MOE,
    "first dense, untied, q/k norm": MOE
    | {
        "first_k_dense_replace": 1,
        "intermediate_size": 20,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
    },
    "every second, grouped heads": MOE
    | {"decoder_sparse_step": 2, "intermediate_size": 20, "num_key_value_heads": 2, "head_dim": 6},
    "shared and gated": MOE
    | {"n_shared_experts": 2, "shared_expert_intermediate_size": 5, "shared_expert_gate": True},
    "gpt-oss": MOE
    | {
        "activation": "clamped_swiglu",
        "expert_bias": True,
        "router_bias": True,
        "is_transposed": True,
        "is_concatenated": False,
    },
    "no gate, with bias": MOE | {"activation": "relu2", "expert_bias": True, "use_selection_bias": True},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request) -> DecoderConfig:
    return DecoderConfig(**(SIZES | request.param))


def test_counted_total_is_that_of_the_model(config):
    decoder = Decoder(config)
    count = count_parameters(config)
    named = dict(decoder.named_parameters())
    assert count.total == sum(p.numel() for p in named.values())
    assert count.embedding == sum(p.numel() for n, p in named.items() if "embed" in n or "lm_head" in n)
    assert count.router == sum(p.numel() for n, p in named.items() if ".router." in n)
    idle = sum(
        p.numel() * (config.num_experts - config.num_experts_per_tok) // config.num_experts
        for n, p in named.items()
        if ".experts." in n
    )
    assert count.active == count.total - idle
    assert count.non_embedding_total == count.total - count.embedding
    assert count.non_embedding_active == count.active - count.embedding


def test_total_grows_with_experts_while_active_grows_by_router_rows_alone():
    few, many = (DecoderConfig(**(SIZES | MOE | {"num_experts": e})) for e in (4, 64))
    rows = 60 * 16 * 3
    assert count_parameters(many).active - count_parameters(few).active == rows
    assert count_parameters(many).total - count_parameters(few).total == 60 * 3 * 3 * 16 * 12 + rows
    assert flops_per_token(many, 8) - flops_per_token(few, 8) == 2 * rows


def test_flops_of_dense_matrices_are_those_that_torch_counts():
    config = DecoderConfig(**(SIZES | {"intermediate_size": 20}))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Decoder(config)(ids)
    attention = flops_per_token(config, 1) - counter.get_total_flops()
    assert attention in (0, 3 * 4 * 16)  # torch counts a fused attention kernel or does not


def test_flops_of_attention_grow_by_half_of_a_full_square():
    config = DecoderConfig(**(SIZES | MOE))
    assert flops_per_token(config, 101) - flops_per_token(config, 1) == 3 * 4 * 16 * 50


def test_an_empty_sequence_has_no_flops_per_token():
    with pytest.raises(ValueError, match="sequence=0"):
        flops_per_token(DecoderConfig(**(SIZES | MOE)), 0)
