"""A config cannot describe nonsense; every refusal names the value, the rule and the way out."""

import dataclasses
import json

import pytest
from helpers import tiny_config

from moe import DecoderConfig, MoEConfig

DECODER = {
    "hidden_size": 16,
    "vocab_size": 50,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 32,
}

# The fields that are wrong, and what the message must say about them
NONSENSE = {
    "more choices than experts": (
        {"num_experts_per_tok": 9},
        r"num_experts_per_tok=9 .*num_experts=8.*(Lower|add)",
    ),
    "groups of unequal size": ({"n_group": 3}, r"num_experts=8 .*divisible.*n_group=3"),
    "more groups kept than there are": ({"n_group": 2, "topk_group": 3}, r"topk_group=3 .*n_group=2"),
    "more choices than the kept groups hold": (
        {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
        r"num_experts_per_tok=3 .*2 .*topk_group=1",
    ),
    "two best of groups of one": ({"n_group": 8, "topk_group": 4}, r'group_score="top2" .*group_score="max"'),
    "groups of logits": ({"topk_before_score": True, "n_group": 2}, r"topk_before_score=True .*n_group=1"),
    "no width": ({"hidden_size": 0}, r"hidden_size=0 must be at least 1"),
    "no expert width": ({"moe_intermediate_size": 0}, r"moe_intermediate_size=0 must be at least 1"),
    "no choices": ({"num_experts_per_tok": 0}, r"num_experts_per_tok=0 must be at least 1"),
    "negative width": ({"hidden_size": -4}, r"hidden_size=-4 must not be negative"),
    "negative scale": ({"routed_scaling_factor": -1.0}, r"routed_scaling_factor=-1.0 must not be negative"),
    "no capacity": ({"capacity_factor": 0.0}, r"capacity_factor=0.0 must be positive.*None"),
    "jitter of everything": ({"router_jitter_noise": 1.0}, r"router_jitter_noise=1.0 .*\[0, 1\)"),
    "no soft cap": ({"router_logit_softcap": 0.0}, r"router_logit_softcap=0.0 .*None"),
    "interleaving without a gate": (
        {"activation": "relu2", "is_concatenated": False},
        r"relu2.*is_concatenated=True",
    ),
    "a gate of no shared expert": (
        {"shared_expert_gate": True},
        r"shared_expert_gate=True .*n_shared_experts",
    ),
    "a clamp of shared experts": (
        {"shared_expert_activation": "clamped_swiglu"},
        r'shared_expert_activation="clamped_swiglu".*"swiglu"',
    ),
    "unknown way to combine": (
        {"shared_expert_combination": "mean"},
        r"shared_expert_combination='mean' .*'sum'.*'average'",
    ),
    "unknown logits dtype": ({"router_logits_dtype": "logits"}, r"router_logits_dtype='logits' .*'model'"),
    "no router dtype": ({"router_dtype": None}, r"router_dtype=None must be one of"),
    "negative floor": ({"norm_topk_min": -1.0}, r"norm_topk_min=-1.0 must not be negative"),
    "unknown activation": ({"activation": "swish"}, r"activation='swish' .*'swiglu'.*'gelu'"),
    "unknown score": (
        {"scoring_func": "relu"},
        r"scoring_func='relu' .*'softmax'.*'sigmoid'.*'sqrtsoftplus'",
    ),
    "unknown group score": ({"group_score": "sum"}, r"group_score='sum' .*'max'.*'top2'"),
    "unknown policy": ({"capacity_policy": "random"}, r"capacity_policy='random' .*'score'.*'position'"),
    "unknown router dtype": ({"router_dtype": "fp32"}, r"router_dtype='fp32' .*'float32'"),
    "unknown weights dtype": (
        {"routing_weights_dtype": "int8"},
        r"routing_weights_dtype='int8' .*'bfloat16'",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
@pytest.mark.parametrize("decoder", [False, True], ids=["layer", "decoder"])
def test_nonsense_is_refused_when_the_object_is_made(case, decoder):
    changes, message = NONSENSE[case]
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        DecoderConfig(**(DECODER | changes)) if decoder else tiny_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"num_experts_per_tok": 8},
        {"n_group": 8, "topk_group": 8, "group_score": "max", "num_experts_per_tok": 8},
        {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2},
        {"capacity_factor": 1e-3},
        {"activation": "relu2"},
        {"n_shared_experts": 1, "shared_expert_gate": True},
    ],
    ids=str,
)
def test_the_edge_of_sense_is_accepted(changes):
    tiny_config(**changes)


@pytest.mark.parametrize(
    "config", [tiny_config(n_shared_experts=2, router_logit_softcap=30.0), DecoderConfig(**DECODER)]
)
def test_a_config_survives_json(config):
    data = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(data) == config
    assert hash(type(config).from_dict(data)) == hash(config)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("num_expert", "num_experts"),
        ("num_experts_per_token", "num_experts_per_tok"),
        ("scoring_function", "scoring_func"),
        ("hiden_size", "hidden_size"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(word, nearest):
    with pytest.raises(ValueError, match=rf"'{word}'.*Did you mean '{nearest}'"):
        MoEConfig.from_dict(tiny_config().to_dict() | {word: 1})


def test_a_key_like_no_other_is_refused_with_all_known_ones():
    with pytest.raises(ValueError, match=r"'zzz'.*hidden_size.*capacity_factor"):
        MoEConfig.from_dict({"zzz": 1})


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        MoEConfig.from_dict({"hidden_size": 4, "moe_intermediate_size": 4, "num_experts": 4})


@pytest.mark.parametrize("value", ["64", 64.5, None], ids=repr)
def test_a_size_that_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(ValueError, match="hidden_size"):
        MoEConfig.from_dict(tiny_config().to_dict() | {"hidden_size": value})


def test_a_config_cannot_be_changed_and_replacing_a_field_checks_again():
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_experts = 3
    assert dataclasses.replace(config, num_experts=16).num_experts == 16
    with pytest.raises(ValueError, match="num_experts_per_tok=2"):
        dataclasses.replace(config, num_experts=1)


def test_fields_are_given_by_name():
    with pytest.raises(TypeError):
        MoEConfig(12, 8, 8, 2)


def test_the_shared_width_is_the_sum_of_the_shared_experts():
    assert tiny_config().shared_width == 0
    assert tiny_config(n_shared_experts=3).shared_width == 24
    assert tiny_config(n_shared_experts=2, shared_expert_intermediate_size=5).shared_width == 10


# Decoder


DECODER_NONSENSE = {
    "width that heads do not divide": (
        {"num_attention_heads": 3},
        r"hidden_size=16 .*num_attention_heads=3.*head_dim",
    ),
    "odd head": ({"head_dim": 5}, r"head_dim=5 .*even"),
    "key heads that do not divide": (
        {"num_key_value_heads": 3},
        r"num_attention_heads=4 .*num_key_value_heads=3",
    ),
    "no key heads": ({"num_key_value_heads": 0}, r"kv_heads=0|num_key_value_heads=0"),
    "a dense layer without a width": (
        {"intermediate_size": None, "first_k_dense_replace": 1},
        r"intermediate_size",
    ),
    "no layers": ({"num_hidden_layers": 0}, r"num_hidden_layers=0"),
    "no vocabulary": ({"vocab_size": 0}, r"vocab_size=0"),
    "no step": ({"decoder_sparse_step": 0}, r"decoder_sparse_step=0"),
    "unknown convention": ({"router_aux_loss_convention": "hg"}, r"router_aux_loss_convention='hg' .*'hf'"),
}


@pytest.mark.parametrize("case", DECODER_NONSENSE)
def test_a_decoder_that_does_not_fit_together_is_refused(case):
    changes, message = DECODER_NONSENSE[case]
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        DecoderConfig(**(DECODER | changes))


@pytest.mark.parametrize(
    ("first_dense", "step", "expected"),
    [(0, 1, [0, 1, 2, 3]), (1, 1, [1, 2, 3]), (0, 2, [1, 3]), (2, 2, [3]), (4, 1, [])],
)
def test_moe_layers_start_after_the_dense_ones_and_come_every_so_many(first_dense, step, expected):
    config = DecoderConfig(**DECODER, first_k_dense_replace=first_dense, decoder_sparse_step=step)
    assert [layer for layer in range(4) if config.is_moe_layer(layer)] == expected


def test_a_decoder_without_experts_is_dense():
    config = DecoderConfig(
        hidden_size=16, vocab_size=50, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    assert not any(map(config.is_moe_layer, range(2)))
    assert (config.kv_heads, config.head_size) == (4, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_topk_prob", "false"),
        ("norm_topk_eps", "1e-20"),
        ("apply_router_weight_on_input", 1),
        ("initializer_range", float("nan")),
        ("capacity_factor", float("inf")),
        ("shared_expert_intermediate_size", 0),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        tiny_config(**{name: value})
