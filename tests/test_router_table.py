"""The table of routers in the README is true: each row, as written there, routes as transformers does."""

import ast
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| (the defaults|`\w+=[^|]*) \|$", README, re.MULTILINE)
SETTINGS = {
    family: {key: ast.literal_eval(value) for key, value in re.findall(r"`(\w+)=([^`]*)`", settings)}
    for families, settings in ROWS
    for family in families.split(", ")
}
SIZES = {"hidden_size": 12, "moe_intermediate_size": 4, "num_experts": 8, "num_experts_per_tok": 3}

# Where each router is in transformers, and the options of its own that our settings have no word for.
PEERS = {
    "Mixtral": ("mixtral", "MixtralTopKRouter", {}),
    "MiniMax": ("minimax", "MiniMaxTopKRouter", {}),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3MoeTopKRouter", {}),
    "OLMoE": ("olmoe", "OlmoeTopKRouter", {}),
    "Jamba": ("jamba", "JambaTopKRouter", {}),
    "Qwen2-MoE": ("qwen2_moe", "Qwen2MoeTopKRouter", {}),
    "Granite-MoE": ("granitemoe", "GraniteMoeTopKRouter", {}),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {}),
    "DeepSeek-V2": ("deepseek_v2", "DeepseekV2TopkRouter", {"topk_method": "group_limited_greedy"}),
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3TopkRouter", {}),
    "GLM-4-MoE": ("glm4_moe", "Glm4MoeTopkRouter", {}),
    "MiniMax-M2": ("minimax_m2", "MiniMaxM2TopKRouter", {}),
    "ERNIE 4.5": ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", {"moe_norm_min": 1e-12}),
    "DeepSeek-V4": ("deepseek_v4", "DeepseekV4TopKRouter", {}),
    "Nemotron-H": ("nemotron_h", "NemotronHTopkRouter", {}),
}


def test_every_family_of_the_table_has_a_peer():
    assert SETTINGS.keys() == PEERS.keys()


@pytest.mark.parametrize("family", SETTINGS)
def test_a_layer_of_the_table_can_be_built(family):
    out = moe.MoE(moe.MoEConfig.from_dict({**SIZES, **SETTINGS[family]}))(torch.randn(5, 12))
    assert out.y.isfinite().all()
    assert out.routing.tokens_per_expert().sum() == 15


@pytest.mark.parametrize("family", SETTINGS)
def test_a_row_of_the_table_routes_as_transformers_does(family):
    pytest.importorskip("transformers")
    config = moe.MoEConfig.from_dict({**SIZES, **SETTINGS[family]})
    ours = moe.Router(config)
    for tensor in ours.state_dict().values():
        nn.init.normal_(tensor, std=0.5)
    x = torch.randn(300, 12)
    their_weights, their_experts = their_choice(family, config, ours.state_dict(), x)
    routing = ours(x)
    order, their_order = routing.experts.argsort(1), their_experts.argsort(1)  # their top-k may be unsorted
    assert torch.equal(routing.experts.gather(1, order), their_experts.gather(1, their_order))
    torch.testing.assert_close(routing.weights.gather(1, order), their_weights.gather(1, their_order))


def their_choice(family, config, state, x):
    """Weights and experts (t k) of transformers' router, given our settings and our tensors."""
    name, router, options = PEERS[family]
    their_class = getattr(import_module(f"transformers.models.{name}.modeling_{name}"), router)
    theirs = their_class(
        SimpleNamespace(**config.to_dict(), num_local_experts=8, n_routed_experts=8, **options)
    )
    bias, arguments = "e_score_correction_bias", ()
    if family == "ERNIE 4.5":
        state[f"moe_statics.{bias}"] = state.pop(bias)[None]
    if family == "MiniMax-M2":
        arguments = (state.pop(bias),)
    theirs.load_state_dict(state)
    _, weights, experts = theirs(x, *arguments)
    return weights, experts
