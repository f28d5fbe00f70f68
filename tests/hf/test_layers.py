"""A layer imported from a Hugging Face block routes to the last bit as the block does, and computes as it."""

import pytest
import torch
from helpers import assert_as_accurate
from layer_cases import CASES, block_of, build, routing_of, what_the_router_says
from torch import nn

import moe
from moe.hf.import_block import tensors_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(dtype=torch.float32, width=36):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 50, width, generator=generator).to(dtype)


def spread(weights, experts, num_experts):
    """Weights of all experts (t e), 0 where not chosen, as Llama 4's router gives them."""
    return torch.zeros(len(weights), num_experts, dtype=weights.dtype).scatter(1, experts, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_router_chooses_and_weighs_to_the_last_bit_as_theirs(case, dtype):
    block, config = block_of(case, DTYPES[dtype])
    x = inputs(DTYPES[dtype])
    routing = moe.MoE.from_hf(block, config=config).router(x.flatten(0, 1))
    if case.startswith("llama4"):
        said = what_the_router_says(block, x)
        ours = spread(routing.weights, routing.experts, 8)
        assert ours.dtype == said[0].dtype and torch.equal(ours, said[0])
        assert torch.equal(routing.logits, said[1])
        return
    logits, weights, experts = routing_of(block, x)
    assert torch.equal(routing.experts, experts)
    assert routing.weights.dtype == weights.dtype
    assert torch.equal(routing.weights, weights)
    assert torch.equal(routing.logits.to(logits.dtype), logits)
    assert len(torch.unique(experts)) == 8, "a case in which some expert is never chosen shows too little"


@pytest.mark.parametrize("dtype", DTYPES)
def test_laguna_scales_what_its_experts_give_and_we_scale_their_weights(dtype):
    block, config = block_of("laguna", DTYPES[dtype], moe_routed_scaling_factor=2.0)
    x = inputs(DTYPES[dtype])
    _, weights, experts = routing_of(block, x)
    layer = moe.MoE.from_hf(block, config=config)
    routing = layer.router(x.flatten(0, 1))
    assert torch.equal(routing.experts, experts)
    assert torch.equal(routing.weights, 2 * weights)


@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_are_theirs(case):
    block, config = block_of(case)
    layer = moe.MoE.from_hf(block, config=config)
    x, upstream = inputs(), torch.randn(3, 50, 36, generator=torch.Generator().manual_seed(1))
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    results = {}
    for side, run in {"ours": lambda x: layer(x).y, "theirs": lambda x: first(block(x))}.items():
        leaf = x.clone().requires_grad_()
        y = run(leaf).view(x.shape)
        wanted = [leaf, *parameters.values()]
        results[side] = (y, torch.autograd.grad(y, wanted, upstream))
    (ours, our_grads), (theirs, their_grads) = results["ours"], results["theirs"]
    assert (ours - theirs).abs().max() <= 1e-6
    for name, our_grad, their_grad in zip(["x", *parameters], our_grads, their_grads, strict=True):
        scale = their_grad.abs().max().clamp(min=1)  # sums over 150 tokens reach 50
        assert their_grad.abs().max() > 0, name
        assert (our_grad - their_grad).abs().max() <= 1e-5 * scale, name


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("case", CASES)
def test_in_bfloat16_the_output_is_as_accurate_as_theirs(case):
    block, config = block_of(case, torch.bfloat16)
    x = inputs(torch.bfloat16)
    ours = moe.MoE.from_hf(block, config=config)(x).y
    theirs = first(block(x)).view(x.shape)
    layer = moe.MoE.from_hf(block, config=config)
    routing = layer.router(x.flatten(0, 1))
    exact = exact_output(layer, routing, x)
    assert_as_accurate(ours, theirs, exact, ulps=2)


def exact_output(layer, routing, x):
    """What the layer means in float64, for the choices and weights that were made in bfloat16."""
    wide = moe.MoE(layer.config, backend="reference").double()
    wide.load_state_dict({name: tensor.double() for name, tensor in tensors_of(layer).items()})
    tokens = x.flatten(0, 1).double()
    plan = moe.RoutingPlan.from_experts(routing.experts, layer.config.num_experts)
    y = wide.experts(tokens, routing.weights.double(), plan)
    if wide.shared_expert is not None:
        y = y + wide.shared_expert(tokens)
        y = y / 2 if layer.config.shared_expert_combination == "average" else y
    return y.view(x.shape)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_copied(case):
    block, config = block_of(case)
    layer = moe.MoE.from_hf(block, config=config)
    theirs = {id(tensor): name for name, tensor in block.named_parameters()}
    for name, parameter in layer.named_parameters():
        assert id(parameter) in theirs, name
    memory = {tensor.data_ptr() for tensor in tensors_of(block).values()}
    assert {tensor.data_ptr() for tensor in tensors_of(layer).values()} == memory


@pytest.mark.parametrize("case", ["mixtral", "minimax", "minimax_m2"])
def test_jitter_reaches_the_experts_as_in_their_block(case):
    block, config = block_of(case, router_jitter_noise=0.1)
    layer = moe.MoE.from_hf(block.train(), config=config)
    assert layer.training
    x = inputs()
    torch.manual_seed(5)
    said = what_the_router_says(block, x.clone())  # it changes its input in place
    torch.manual_seed(5)
    theirs = block(x.clone())
    torch.manual_seed(5)
    ours = layer(x)
    assert torch.equal(ours.routing.experts, said[2])
    assert torch.equal(ours.routing.weights, said[1])
    assert (ours.y - theirs).abs().max() <= 1e-6
    assert (ours.y - layer.eval()(x).y).abs().max() > 1e-3


def test_a_router_kept_in_float32_stays_there(tmp_path):
    model = build("deepseek_v3")
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.set_experts_implementation("eager")
    block = model.model.layers[-1].mlp
    block.gate.weight.data = block.gate.weight.data.float()  # from_pretrained does this after 5.17
    assert block.experts.down_proj.dtype == torch.bfloat16
    layer = moe.MoE.from_hf(block)
    x = inputs(torch.bfloat16)
    _, weights, experts = routing_of(block, x)
    out = layer(x)
    assert torch.equal(out.routing.experts, experts) and torch.equal(out.routing.weights, weights)
    assert out.y.dtype == torch.bfloat16
    bias = layer.router.e_score_correction_bias
    assert bias.data_ptr() == block.gate.e_score_correction_bias.data_ptr()


def test_a_selection_bias_in_16_bits_becomes_float32_of_the_same_value():
    block, config = block_of("minimax_m2", torch.bfloat16)
    bias = moe.MoE.from_hf(block, config=config).router.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, block.e_score_correction_bias.float())


def test_under_autocast_the_product_runs_in_its_dtype_as_theirs_does():
    block, config = block_of("qwen3_moe")
    layer, x = moe.MoE.from_hf(block, config=config), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, experts = what_the_router_says(block, x)
        routing = layer.router(x.flatten(0, 1))
    assert torch.equal(routing.logits, logits) and logits.dtype == torch.bfloat16
    assert torch.equal(routing.experts, experts) and torch.equal(routing.weights, weights)


def test_an_imported_layer_is_a_moe_of_its_own():
    block, config = block_of("qwen2_moe")
    layer = moe.MoE.from_hf(block, config=config, backend="reference")
    copy = moe.MoE(moe.MoEConfig.from_dict(layer.config.to_dict()))
    copy.load_state_dict(layer.state_dict())
    x = inputs()
    torch.testing.assert_close(copy(x).y, layer(x).y)
    assert layer.experts.backend == "reference"


# Bad input


def test_what_is_no_moe_block_is_refused():
    with pytest.raises(ValueError, match="Linear is no MoE block"):
        moe.MoE.from_hf(nn.Linear(4, 4))


def test_an_unsupported_block_is_refused_with_the_nearest_supported_one():
    class MixtralSparseMoeBlok(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 4), nn.ModuleList()

    with pytest.raises(ValueError, match=r"MixtralSparseMoeBlok .*mean 'MixtralSparseMoeBlock'"):
        moe.MoE.from_hf(MixtralSparseMoeBlok())


CONTRADICTIONS = {
    "another number of experts": ({"num_local_experts": 9}, r"gate.weight .*\(8, 36\).*\(9, 36\)"),
    "another width of experts": ({"intermediate_size": 20}, r"gate_up_proj .*\(8, 88, 36\).*\(8, 40, 36\)"),
    "another number of choices": ({"num_experts_per_tok": 2}, r"num_experts_per_tok=2.*top_k.* is 3"),
    "another family": ({"model_type": "olmoe"}, r"MixtralSparseMoeBlock is of 'mixtral'.*'olmoe'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_that_contradicts_the_block_is_refused_with_both_values(case):
    changes, message = CONTRADICTIONS[case]
    block, config = block_of("mixtral")
    with pytest.raises(ValueError, match=message):
        moe.MoE.from_hf(block, config=config | changes)


def test_quantised_weights_are_refused_by_dtype():
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        block, config = block_of("mixtral")
        weight = block.experts.gate_up_proj.detach().to(dtype)
        block.experts.gate_up_proj = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match=rf"gate_up_proj .*{dtype}.*quantised"):
            moe.MoE.from_hf(block, config=config)


def test_weights_without_memory_are_refused():
    block, config = block_of("mixtral")
    with pytest.raises(ValueError, match=r"gate\.weight .*meta device.*without offloading"):
        moe.MoE.from_hf(block.to("meta"), config=config)


def test_a_block_with_more_tensors_than_we_have_places_for_is_refused():
    block, config = block_of("mixtral")
    block.adapter = nn.Linear(36, 36, bias=False)
    with pytest.raises(ValueError, match=r"no place for: \['adapter.weight'\]"):
        moe.MoE.from_hf(block, config=config)


def test_a_block_without_a_tensor_is_refused():
    block, config = block_of("mixtral")
    del block.experts.down_proj
    with pytest.raises(ValueError, match=r"no tensor experts\.down_proj"):
        moe.MoE.from_hf(block, config=config)


def test_a_block_that_holds_no_config_asks_for_one():
    block, config = block_of("mixtral")
    del block.experts.config
    with pytest.raises(ValueError, match=r"MixtralSparseMoeBlock holds no config; give config="):
        moe.MoE.from_hf(block)
    assert moe.MoE.from_hf(block, config=config).config.num_experts == 8
