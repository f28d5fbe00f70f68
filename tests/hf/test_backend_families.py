"""Every family whose experts use transformers' registry gives the same numbers with our experts.

The families are tiny random models; see tiny.py. The truth is transformers' own eager experts.
"""

import copy

import pytest
import torch
from tiny import build, experts_modules, redraw, registry_families, run, tiny_config, tokens

import moe.hf
import moe.hf.experts

LEAST_FAMILIES = 40
LOGITS, GRADIENTS = 1e-6, 1e-5  # of the largest logit or gradient, at least of 1
GENERATING = (
    "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "jamba", "lfm2_moe", "minimax_m2",
    "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The modules that have gone through our function; each call chooses a backend once."""
    seen = []
    original = moe.hf.experts.recognise
    monkeypatch.setattr(moe.hf.experts, "recognise", lambda m: seen.append(m) or original(m))
    return seen


def value_and_gradients(model, ids):
    model.zero_grad()
    y = run(model, ids)
    y.square().mean().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def error(ours, truth):
    """The largest difference, as a part of the largest value where that is over 1."""
    return ((ours - truth).abs().max() / truth.abs().max().clamp(min=1)).item()


def differences(model, ids):
    """Of the logits, of the worst gradient, and of the logits of a few tokens without gradients."""
    few = ids[:1, :4]
    results = {}
    for name in ("eager", "sparse_moe"):
        model.set_experts_implementation(name)
        with torch.no_grad():
            y_few = run(model, few)
        results[name] = (*value_and_gradients(model, ids), y_few)
    (y, grads, y_few), (ours, our_grads, our_few) = results["eager"], results["sparse_moe"]
    assert grads.keys() == our_grads.keys()
    return error(ours, y), max(error(our_grads[n], grads[n]) for n in grads), error(our_few, y_few)


def build_or_skip(family, **changes):
    try:
        return build(family, **changes)
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("family", registry_families())
def test_a_family_gives_the_logits_and_gradients_of_eager(family, calls):
    moe.hf.register()
    model = build_or_skip(family)
    logits, gradients, few = differences(model, tokens(model))
    assert max(logits, few) <= LOGITS and gradients <= GRADIENTS
    experts = list(experts_modules(model).values())
    assert calls and all(any(module is one for one in experts) for module in calls)


def test_most_families_can_be_built_and_so_are_tested():
    missing = []
    for family in registry_families():
        try:
            build(family)
        except RuntimeError as reason:
            missing.append(str(reason))
    assert len(registry_families()) - len(missing) >= LEAST_FAMILIES, "\n".join(missing)


def generate(model, ids):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, min_new_tokens=32
    )


@pytest.mark.parametrize("family", GENERATING)
def test_greedy_generation_with_a_cache_gives_the_same_tokens(family, calls):
    model = build_or_skip(family, eos_token_id=None)
    ids = tokens(model, batch=2, length=6)
    model.set_experts_implementation("eager")
    expected = generate(model, ids)
    moe.hf.use(model)
    assert torch.equal(generate(model, ids), expected)
    assert expected.shape == (2, 38) and len(calls) >= 32


# moe.hf.use


def test_use_says_what_it_replaced():
    model = build("qwen2_moe")
    model.set_experts_implementation("eager")
    replaced = moe.hf.use(model)
    assert replaced.implementation == "sparse_moe"
    assert dict(replaced.previous) == dict.fromkeys(experts_modules(model), "eager")
    assert set(moe.hf.use(model).previous.values()) == {"sparse_moe"}


@pytest.mark.parametrize("family", ["qwen3_omni_moe", "gemma4", "olmoe"])
def test_the_backend_is_part_of_the_name_and_outlives_a_copy(family):
    model = build(family)
    replaced = moe.hf.use(model, backend="reference")
    assert replaced.implementation == "sparse_moe_reference"
    for module in experts_modules(copy.deepcopy(model)).values():
        assert module.config._experts_implementation == "sparse_moe_reference"


def test_use_reaches_models_inside_other_modules(calls):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("olmoe")

    wrapper = Wrapper()
    assert set(moe.hf.use(wrapper).previous) == {f"inner.{n}" for n in experts_modules(wrapper.inner)}
    run(wrapper.inner, tokens(wrapper.inner))
    assert len(calls) == 3


def other_model(name, **changes):
    """A model without experts in the registry."""
    import transformers

    model_class = getattr(transformers, name)
    return model_class(tiny_config(model_class.config_class, **changes))


def test_use_refuses_a_model_without_experts():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        moe.hf.use(other_model("LlamaForCausalLM"))


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "JetMoeForCausalLM"])
def test_use_refuses_a_model_whose_experts_transformers_would_leave_alone(name):
    model = other_model(name)
    model.set_experts_implementation("eager")  # which transformers takes without a word
    with pytest.raises(ValueError, match=rf"{name}: nothing replaced. Its experts \(.*\) do not go through"):
        moe.hf.use(model)


def test_use_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="backend='cuda' must be one of"):
        moe.hf.use(build("olmoe"), backend="cuda")


def test_use_notices_modules_that_transformers_left_alone(monkeypatch):
    model = build("olmoe")
    monkeypatch.setattr(type(model), "_can_set_experts_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="left 3 of 3 modules of experts as they were"):
        moe.hf.use(model)


def test_a_saved_model_is_loaded_with_our_experts(tmp_path, calls):
    model = build("olmoe")
    model.save_pretrained(tmp_path)
    moe.hf.register()
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="sparse_moe_torch")
    model.set_experts_implementation("eager")
    ids = tokens(model)
    assert error(run(loaded, ids), run(model, ids)) <= LOGITS
    assert len(calls) == 3
    assert "sparse_moe" not in (tmp_path / "config.json").read_text()


def test_a_wrong_expert_would_show():
    """The tolerance rejects two experts whose rows were swapped: the models are not too smooth to tell."""
    model = redraw(build("olmoe"))
    ids = tokens(model)
    model.set_experts_implementation("eager")
    right = run(model, ids)
    down = experts_modules(model)["model.layers.1.mlp.experts"].down_proj
    with torch.no_grad():
        down[[0, 1]] = down[[1, 0]]
    assert error(run(model, ids), right) > 1e4 * LOGITS
