"""What `moe_settings` reads from a Hugging Face config, and what it refuses."""

import subprocess
import sys

import pytest

import moe
from moe.config import MoEConfig
from moe.hf import moe_settings
from moe.hf.router_table import ALIASES, FAMILIES, UNSUPPORTED, Key

# Keys that stand in config.json but not in transformers' class, which has the value in its code
ONLY_ON_DISK = {"scoring_func", "topk_method"}
GIVEN = {"dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}}
GIVEN |= {key: {"num_experts_per_tok": 2} for key in ("deepseek_v2", "deepseek_ocr2_text")}


def config(model_type, **changes):
    return {"model_type": model_type} | GIVEN.get(model_type, {}) | changes


def config_class(model_type):
    """The class in transformers; Kimi-K2 has none of its own, its checkpoints are DeepSeek-V3's."""
    mapping = pytest.importorskip("transformers").models.auto.configuration_auto.CONFIG_MAPPING
    name = "deepseek_v3" if model_type == "kimi_k2" else model_type
    if name not in mapping:
        pytest.skip(f"this transformers has no {name}")
    return mapping[name]


def read_by(family):
    """The keys that a row looks up, with their defaults."""
    settings = [
        family.settings,
        *(words for choices in family.choices.values() for words in choices.values()),
    ]
    looked_up = {value for some in settings for value in some.values() if isinstance(value, Key)}
    return {key: family.defaults[key] for key in looked_up | family.choices.keys()}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_missing_key_has_the_default_of_the_class_in_transformers(model_type):
    theirs = config_class(model_type)()
    for key, default in read_by(FAMILIES[model_type]).items():
        names = [name for name in ALIASES.get(key, (key,)) if hasattr(theirs, name)]
        assert names or key in ONLY_ON_DISK or model_type == "gpt_oss", key  # 5.17 has no swiglu_limit there
        if names:
            assert getattr(theirs, names[0]) == default, key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_written_in_full_means_the_same_as_one_that_leaves_out_the_defaults(model_type):
    given = {key: value for key, value in config(model_type).items() if key != "model_type"}
    full = config_class(model_type)(**given).to_dict()
    assert moe_settings(full) == moe_settings(config(model_type))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_settings_make_a_config_that_survives_json(model_type):
    settings = moe_settings(config(model_type))
    assert MoEConfig.from_dict(MoEConfig(**settings).to_dict()) == MoEConfig(**settings)


def test_numbers_come_from_the_config_whatever_the_name_they_go_by():
    for name in ("num_experts", "num_local_experts"):
        assert moe_settings(config("qwen3_moe", **{name: 6}))["num_experts"] == 6
    kimi = config("kimi_linear", moe_renormalize=False, num_expert_group=2, num_experts_per_token=3)
    settings = moe_settings(kimi)
    assert (settings["norm_topk_prob"], settings["n_group"], settings["num_experts_per_tok"]) == (False, 2, 3)
    assert moe_settings(config("ernie4_5_moe", moe_k=3, num_experts=9))["num_experts_per_tok"] == 3
    assert moe_settings(config("hunyuan_v1_moe", moe_topk=[2, 2], num_experts=4))["num_experts_per_tok"] == 2


def test_a_config_inside_a_config_is_read():
    inner = config("llama4_text", num_local_experts=6)
    assert moe_settings({"model_type": "llama4", "text_config": inner}) == moe_settings(inner)


def test_kimi_k2_reads_its_config_as_deepseek_v3_does():
    changes = {"n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}
    assert moe_settings(config("kimi_k2", **changes)) == moe_settings(config("deepseek_v3", **changes))


def test_deepseek_v2_has_groups_only_when_its_method_says_so():
    groups = {"n_group": 8, "topk_group": 3}
    assert "n_group" not in moe_settings(config("deepseek_v2", **groups))
    settings = moe_settings(config("deepseek_v2", topk_method="group_limited_greedy", **groups))
    assert (settings["n_group"], settings["topk_group"], settings["group_score"]) == (8, 3, "max")


def test_deepseek_v2_ignores_norm_topk_prob_as_transformers_does():
    for value in (True, False):
        assert moe_settings(config("deepseek_v2", norm_topk_prob=value))["norm_topk_prob"] is False


def test_nothing_here_needs_transformers():
    code = "import sys; sys.modules['transformers'] = None; import moe.hf; moe.hf.moe_settings"
    subprocess.run([sys.executable, "-c", code], check=True)


REFUSED = {
    "an unknown family": ({"model_type": "mixtrall"}, r"model_type='mixtrall' .*mean 'mixtral'"),
    "no family": ({}, r"model_type='None' .*mixtral"),
    "an activation we have not": (
        config("qwen3_moe", hidden_act="gelu_new"),
        r"hidden_act='gelu_new' of qwen3_moe.*'silu'",
    ),
    "a router we have not": (config("deepseek_v3", topk_method="greedy"), r"topk_method='greedy'.*noaux_tc"),
    "a method we have not": (
        config("deepseek_v2", topk_method="noaux_tc"),
        r"topk_method='noaux_tc'.*greedy",
    ),
    "groups that are not given": (
        config("deepseek_v2", topk_method="group_limited_greedy"),
        r"n_group=None: .*must give n_group",
    ),
    "biases of shared experts": (config("deepseek_v2", mlp_bias=True), r"mlp_bias=True.*False"),
    "biases everywhere": (config("ernie4_5_moe", use_bias=True), r"use_bias=True"),
    "a latent projection": (config("nemotron_h", moe_latent_size=8), r"moe_latent_size=8"),
    "no number of choices": ({"model_type": "deepseek_v2"}, r"num_experts_per_tok=None"),
    "another number for each layer": (
        config("hunyuan_v1_moe", moe_topk=[1, 2]),
        r"\[1, 2\].*num_experts_per_tok",
    ),
    "two numbers for one thing": (
        config("mixtral", num_experts=4, num_local_experts=8),
        r"'num_experts': 4, 'num_local_experts': 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_have_no_mathematics_for_is_refused_by_name(case):
    data, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        moe_settings(data)


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_a_family_that_is_left_out_says_why(model_type):
    with pytest.raises(ValueError, match=rf"{model_type}.*not supported: .*\w+"):
        moe_settings({"model_type": model_type})


def test_a_config_of_an_older_version_still_loads_with_the_same_numbers():
    new = {"norm_topk_min", "topk_sorted", "jitter_experts", "router_logits_dtype"}
    new |= {"shared_expert_activation", "shared_expert_combination"}
    config = MoEConfig(hidden_size=4, moe_intermediate_size=4, num_experts=4, num_experts_per_tok=2)
    old = {key: value for key, value in config.to_dict().items() if key not in new}
    assert moe.MoEConfig.from_dict(old) == config
