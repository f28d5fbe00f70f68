"""The whole layer is its definition: route, run every chosen expert, weigh, sum, add the shared experts."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, activate_by_hand, assert_as_accurate, assert_same, fill, tiny_config
from torch.utils.checkpoint import checkpoint

import moe.layer
from moe import MoE, MoEConfig
from moe.ops.choose import choose_ops

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
FEATURES = {
    "plain": {},
    "sigmoid router with a selection bias and groups": {
        "scoring_func": "sigmoid",
        "use_selection_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    "gpt-oss": {
        "activation": "clamped_swiglu",
        "expert_bias": True,
        "is_transposed": True,
        "is_concatenated": False,
        "topk_before_score": True,
        "router_bias": True,
        "swiglu_limit": 0.9,
        "swiglu_alpha": 1.3,
    },
    "transposed": {"is_transposed": True, "expert_bias": True},
    "no gate": {"activation": "relu2", "expert_bias": True},
    "shared experts": {"n_shared_experts": 2, "shared_expert_intermediate_size": 5},
    "gated shared expert": {"n_shared_experts": 1, "shared_expert_gate": True, "activation": "geglu"},
    "shared expert without a gate": {"n_shared_experts": 1, "shared_expert_activation": "relu2"},
    "average with shared experts": {
        "n_shared_experts": 2,
        "shared_expert_combination": "average",
        "shared_expert_activation": "geglu",
    },
    "one expert a token": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "every expert": {"num_experts_per_tok": 8},
    "weights on the input": {"apply_router_weight_on_input": True, "expert_bias": True},
}
EVERY_FEATURE = pytest.mark.parametrize("feature", FEATURES)


def make_layer(backend="auto", seed=0, dtype=torch.float64, **changes) -> MoE:
    config = tiny_config(**({"router_dtype": "float64"} | changes))
    layer = fill(MoE(config, backend=backend).to(dtype), seed)
    if config.use_selection_bias:
        layer.router.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, config.num_experts))
    return layer


def inputs(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*(shape or (20, 12)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_definition(layer, x, routing, experts=None):
    """y (t d) from the routing, with loops and formulas; `experts` replaces the choice, as capacity does."""
    config, parameters = layer.config, dict(layer.named_parameters())
    name = "gate_up_proj" if config.is_gated else "up_proj"
    up, down = parameters[f"experts.{name}"], parameters["experts.down_proj"]
    if config.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    outputs = []
    for token, chosen in enumerate((routing.experts if experts is None else experts).tolist()):
        y = torch.zeros(config.hidden_size, dtype=x.dtype)
        for choice, expert in enumerate(chosen):
            if expert < config.num_experts:
                weight = routing.weights[token, choice]
                before, after = (weight, 1) if config.apply_router_weight_on_input else (1, weight)
                pre = up[expert] @ (before * x[token])
                if config.expert_bias:
                    pre = pre + parameters[f"experts.{name}_bias"][expert]
                hidden = activate_by_hand(
                    pre,
                    config.activation,
                    not config.is_concatenated,
                    config.swiglu_limit,
                    config.swiglu_alpha,
                )
                out = down[expert] @ hidden
                if config.expert_bias:
                    out = out + parameters["experts.down_proj_bias"][expert]
                y = y + after * out
        outputs.append(y)
    y = torch.stack(outputs)
    if config.n_shared_experts:
        shared = {
            name.removeprefix("shared_expert."): p for name, p in parameters.items() if "shared" in name
        }
        pre = x @ shared["up_proj.weight"].T
        if "gate_proj.weight" in shared:
            pre = torch.cat([x @ shared["gate_proj.weight"].T, pre], dim=-1)
        hidden = activate_by_hand(pre, config.shared_expert_activation)
        dense = hidden @ shared["down_proj.weight"].T
        y = y + (torch.sigmoid(x @ shared["gate.weight"].T) * dense if config.shared_expert_gate else dense)
    return y / 2 if config.n_shared_experts and config.shared_expert_combination == "average" else y


def value_and_gradients(layer, x, y, upstream=None):
    upstream = inputs(*y.shape, seed=5).to(y.dtype) if upstream is None else upstream
    leaves = {"x": x} | dict(layer.named_parameters())
    grads = torch.autograd.grad(y, list(leaves.values()), upstream, retain_graph=True)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


@BACKENDS
@EVERY_FEATURE
def test_the_layer_is_its_definition_in_value_and_every_gradient(feature, backend):
    layer, x = make_layer(backend, **FEATURES[feature]), inputs().requires_grad_()
    out = layer(x)
    ours = value_and_gradients(layer, x, out.y)
    theirs = value_and_gradients(layer, x, by_definition(layer, x, layer.router(x)))
    for name in theirs:
        assert_same(ours[name], theirs[name], name)


@BACKENDS
def test_one_expert_is_a_dense_ffn(backend):
    layer, x = make_layer(backend, num_experts=1, num_experts_per_tok=1), inputs()
    gate, up = layer.experts.gate_up_proj[0].chunk(2)
    assert_same(layer(x).y, F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), layer.experts.down_proj[0]))


@BACKENDS
def test_equal_experts_are_a_dense_ffn_whatever_the_router_says(backend):
    layer, x = make_layer(backend, num_experts_per_tok=3), inputs()
    with torch.no_grad():
        for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj):
            parameter.copy_(parameter[:1].expand_as(parameter))
    gate, up = layer.experts.gate_up_proj[0].chunk(2)
    assert_same(layer(x).y, F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), layer.experts.down_proj[0]))


@EVERY_FEATURE
def test_renaming_experts_permutes_weights_only(feature):
    changes = {key: value for key, value in FEATURES[feature].items() if key not in ("n_group", "topk_group")}
    layer, x = make_layer(**changes), inputs().requires_grad_()
    renamed, new = make_layer(**changes), torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    per_expert = [name for name in layer.state_dict() if name.startswith(("router.", "experts."))]
    permuted = {name: t[new] if name in per_expert else t for name, t in layer.state_dict().items()}
    renamed.load_state_dict(permuted)
    ours, theirs = renamed(x), layer(x)
    assert torch.equal(new[ours.routing.experts], theirs.routing.experts)
    ours, theirs = value_and_gradients(renamed, x, ours.y), value_and_gradients(layer, x, theirs.y)
    for name in theirs:
        assert_same(ours[name], theirs[name][new] if name in per_expert else theirs[name], name)


@BACKENDS
def test_an_empty_expert_gets_zero_gradient(backend):
    layer, x = make_layer(backend, expert_bias=True), inputs().abs()
    with torch.no_grad():
        layer.router.weight[3] = -100.0
    out = layer(x)
    assert out.routing.tokens_per_expert()[3] == 0
    out.y.square().sum().backward()
    for name, parameter in layer.experts.named_parameters():
        assert (parameter.grad[3] == 0).all(), name
        assert (parameter.grad[2] != 0).any(), name


# Shapes, masks, capacity


@BACKENDS
@pytest.mark.parametrize("shape", [(20, 12), (4, 5, 12), (2, 2, 5, 12), (12,)], ids=str)
def test_leading_axes_are_only_a_way_to_write_tokens(shape, backend):
    layer = make_layer(backend, n_shared_experts=1)
    x = inputs(*shape)
    out, flat = layer(x), layer(x.reshape(-1, 12))
    assert out.y.shape == shape
    assert torch.equal(out.y.reshape(-1, 12), flat.y)
    assert torch.equal(out.routing.experts, flat.routing.experts)
    assert torch.equal(out.plan.pair_of_row, flat.plan.pair_of_row)


@BACKENDS
def test_input_may_have_any_strides(backend):
    layer, x = make_layer(backend), inputs(5, 4, 12)
    assert_same(layer(x.transpose(0, 1)).y, layer(x).y.transpose(0, 1))
    assert_same(layer(inputs(1, 12).expand(7, 12)).y, layer(inputs(1, 12)).y.expand(7, 12))


@BACKENDS
@EVERY_FEATURE
def test_padding_changes_nothing_for_real_tokens(feature, backend, poisoned_memory):
    layer, x = make_layer(backend, **FEATURES[feature]), inputs(4, 5, 12)
    mask = torch.arange(5) < torch.tensor([[5], [0], [3], [1]])
    has_shared = layer.shared_expert is not None
    padded = torch.where(
        mask[..., None], x, torch.tensor(0.0 if has_shared else float("nan"))
    ).requires_grad_()
    ours, theirs = layer(padded, mask), layer(x[mask])
    assert_same(ours.y[mask], theirs.y)
    if not has_shared:
        assert (ours.y[~mask] == 0).all()
    assert torch.equal(ours.routing.tokens_per_expert(), theirs.routing.tokens_per_expert())
    assert ours.plan.offsets[-1] == mask.sum() * layer.config.num_experts_per_tok
    upstream = inputs(4, 5, 12, seed=4) * mask[..., None]
    parameters = list(layer.parameters())
    ours = torch.autograd.grad(ours.y, [padded, *parameters], upstream)
    theirs = torch.autograd.grad(theirs.y, parameters, upstream[mask])
    assert ours[0].isfinite().all()
    for our, their in zip(ours[1:], theirs, strict=True):
        assert_same(our, their)


@BACKENDS
@pytest.mark.parametrize("policy", ["score", "position"])
def test_pairs_over_capacity_give_nothing_and_the_rest_is_not_renormalised(policy, backend):
    layer, x = (
        make_layer(backend, capacity_factor=0.5, capacity_policy=policy, num_experts_per_tok=3),
        inputs(),
    )
    out = layer(x)
    capacity = 4  # ceil(0.5 * 20 * 3 / 8)
    free = make_layer(backend, num_experts_per_tok=3)(x).routing
    assert torch.equal(out.routing.weights, free.weights)
    assert torch.equal(out.routing.experts, free.experts)
    kept = torch.full_like(free.experts, 8)
    for expert in range(8):
        pairs = (free.experts == expert).nonzero().tolist()
        if policy == "score":
            pairs.sort(key=lambda pair: -free.weights[tuple(pair)].item())
        for token, choice in pairs[:capacity]:
            kept[token, choice] = expert
    assert (kept == 8).any(), "the example drops nothing"
    assert torch.equal(out.plan.offsets.diff(), torch.bincount(kept.flatten(), minlength=9)[:8])
    assert_same(out.y, by_definition(layer, x, free, kept))
    out.y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@BACKENDS
def test_ample_capacity_is_dropless(backend):
    assert torch.equal(make_layer(backend, capacity_factor=8.0)(inputs()).y, make_layer(backend)(inputs()).y)


@BACKENDS
@EVERY_FEATURE
@pytest.mark.parametrize("shape", [(0, 12), (3, 0, 12)], ids=str)
def test_no_tokens_give_no_output_and_zero_gradients(feature, backend, shape):
    layer, x = make_layer(backend, capacity_factor=1.0, **FEATURES[feature]), inputs(*shape).requires_grad_()
    out = layer(x)
    assert out.y.shape == shape
    out.y.sum().backward()
    assert x.grad.shape == shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or (parameter.grad == 0).all(), name


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@EVERY_FEATURE
def test_low_precision_layers_err_no_more_than_the_reference(feature, dtype):
    changes = FEATURES[feature] | {"router_dtype": "float32"}
    layer, x = make_layer("torch", dtype=dtype, **changes), inputs(64, 12, dtype=dtype)
    reference = make_layer("reference", dtype=dtype, **changes)
    wide = make_layer("reference", dtype=torch.float64, **changes)
    wide.load_state_dict(layer.state_dict())
    reference.load_state_dict(layer.state_dict())
    out = layer(x)
    assert out.y.dtype == dtype
    routing = replace(out.routing, weights=out.routing.weights.double())
    truth = by_definition(wide, x.double(), routing)
    assert_as_accurate(out.y, reference(x).y, truth)


@EVERY_FEATURE
def test_autocast_runs_the_experts_in_bfloat16_and_the_router_in_float32(feature):
    changes = FEATURES[feature] | {"router_dtype": "float32"}
    layer, x = make_layer("torch", dtype=torch.float32, **changes), inputs(64, 12, dtype=torch.float32)
    x.requires_grad_()
    reference, plain = make_layer("reference", dtype=torch.float32, **changes), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, baseline = layer(x), reference(x)
    assert cast.y.dtype == torch.bfloat16
    assert cast.routing.logits.dtype == cast.routing.weights.dtype == torch.float32
    assert torch.equal(cast.routing.logits, plain.routing.logits)
    assert torch.equal(cast.routing.experts, plain.routing.experts)
    assert_as_accurate(cast.y, baseline.y, plain.y.double())
    upstream = inputs(64, 12, seed=5, dtype=torch.float32).bfloat16()
    truth = value_and_gradients(layer, x, plain.y, upstream.float())
    theirs = value_and_gradients(reference, x, baseline.y, upstream)
    for name, gradient in value_and_gradients(layer, x, cast.y, upstream).items():
        if name != "y":
            assert gradient.dtype == torch.float32, name
            assert_as_accurate(gradient.bfloat16(), theirs[name], truth[name].double(), name=name)


@BACKENDS
def test_inference_gives_what_training_gives(backend):
    layer, x = make_layer(backend, dtype=torch.float32, router_dtype="float32"), inputs(dtype=torch.float32)
    training = layer(x.requires_grad_()).y
    truth = by_definition(layer.double(), x.double(), layer.router(x.double()))
    layer.float()
    with torch.no_grad():
        assert_as_accurate(layer(x).y, training, truth)
    with torch.inference_mode():
        assert_as_accurate(layer.eval()(x).y, training, truth)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_inputs_give_the_same_bits(backend, dtype):
    layer = make_layer(backend, dtype=dtype, router_dtype="float32", n_shared_experts=1)
    x = inputs(128, 12, dtype=dtype).requires_grad_()
    first, second = (value_and_gradients(layer, x, layer(x).y) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@BACKENDS
@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_activation_checkpointing_recomputes_the_same_routing_and_gradients(backend, jitter):
    layer, x = make_layer(backend, router_jitter_noise=jitter).train(), inputs(64, 12).requires_grad_()
    seen = []
    layer.router.register_forward_hook(lambda module, args, routing: seen.append(routing.experts))
    torch.manual_seed(3)
    plain = value_and_gradients(layer, x, layer(x).y)
    torch.manual_seed(3)
    again = value_and_gradients(layer, x, checkpoint(lambda x: layer(x).y, x, use_reentrant=False))
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


@BACKENDS
def test_gradients_of_a_frozen_layer_reach_the_input_only(backend):
    layer, x = make_layer(backend, n_shared_experts=1).requires_grad_(False), inputs().requires_grad_()
    layer(x).y.sum().backward()
    expected = torch.autograd.grad(by_definition(layer, x, layer.router(x)).sum(), x)[0]
    assert_same(x.grad, expected)
    assert all(parameter.grad is None for parameter in layer.parameters())


@BACKENDS
def test_gradients_accumulate_over_micro_batches(backend):
    layer, x = make_layer(backend), inputs()
    layer(x).y.sum().backward()
    whole = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    for part in x.split(7):
        layer(part).y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert_same(parameter.grad, whole[name], name)


# The module as others see it


STATE = {
    "plain": {"router.weight": (8, 12), "experts.gate_up_proj": (8, 16, 12), "experts.down_proj": (8, 12, 8)},
    "gpt-oss": {
        "router.weight": (8, 12),
        "router.bias": (8,),
        "experts.gate_up_proj": (8, 12, 16),
        "experts.gate_up_proj_bias": (8, 16),
        "experts.down_proj": (8, 8, 12),
        "experts.down_proj_bias": (8, 12),
    },
    "no gate": {
        "router.weight": (8, 12),
        "experts.up_proj": (8, 8, 12),
        "experts.up_proj_bias": (8, 8),
        "experts.down_proj": (8, 12, 8),
        "experts.down_proj_bias": (8, 12),
    },
    "sigmoid router with a selection bias and groups": {
        "router.weight": (8, 12),
        "router.e_score_correction_bias": (8,),
        "experts.gate_up_proj": (8, 16, 12),
        "experts.down_proj": (8, 12, 8),
    },
}


@pytest.mark.parametrize("feature", STATE)
def test_the_state_dict_has_these_keys_and_shapes(feature):
    state = make_layer(**FEATURES[feature]).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == STATE[feature]


def test_jitter_reaches_router_and_experts_alike_and_only_in_training():
    layer = make_layer(router_jitter_noise=0.1, jitter_experts=True)
    x = inputs()
    torch.manual_seed(3)
    noise = torch.empty_like(x).uniform_(0.9, 1.1)
    torch.manual_seed(3)
    ours = layer.train()(x)
    calm = layer.eval()
    assert_same(ours.y, calm(noise * x).y)
    assert_same(ours.routing.logits, calm(noise * x).routing.logits)
    assert (ours.y - calm(x).y).abs().max() > 1e-3
    assert torch.equal(x, inputs()), "the caller's tensor was changed"


def test_shared_experts_are_one_ffn_of_their_joint_width():
    state = make_layer(
        n_shared_experts=3, shared_expert_intermediate_size=5, shared_expert_gate=True
    ).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items() if name.startswith("shared")}
    assert sorted(shapes.values()) == [(1, 12), (12, 15), (15, 12), (15, 12)]
    default = make_layer(n_shared_experts=2).state_dict()
    assert (16, 12) in {tuple(t.shape) for name, t in default.items() if name.startswith("shared")}


@EVERY_FEATURE
def test_a_copy_and_a_reloaded_layer_compute_the_same(feature):
    layer, x = make_layer(**FEATURES[feature]), inputs()
    twin, fresh = copy.deepcopy(layer), make_layer(seed=9, **FEATURES[feature])
    fresh.load_state_dict(layer.state_dict())
    expected = layer(x).y
    assert torch.equal(twin(x).y, expected)
    assert torch.equal(fresh(x).y, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x).y, expected), "the copy shares memory with the layer"


def test_casting_the_layer_keeps_the_selection_bias_in_float32():
    layer = make_layer(use_selection_bias=True, scoring_func="sigmoid", router_dtype="float32")
    exact = layer.router.e_score_correction_bias.clone()
    for cast in (
        layer.to(torch.bfloat16),
        layer.double(),
        layer.half(),
        copy.deepcopy(layer).to("cpu", torch.float16),
    ):
        assert cast.router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(cast.router.e_score_correction_bias, exact)


def test_the_layer_can_be_built_without_memory_and_filled_later():
    with torch.device("meta"):
        empty = MoE(tiny_config(use_selection_bias=True, n_shared_experts=1))
    assert all(parameter.is_meta for parameter in empty.parameters())
    full = MoE(tiny_config(use_selection_bias=True, n_shared_experts=1))
    empty.load_state_dict(full.state_dict(), assign=True)
    x = inputs(dtype=torch.float32)
    assert torch.equal(empty(x).y, full(x).y)


def test_initial_weights_have_the_configured_spread():
    layer = MoE(
        tiny_config(hidden_size=64, moe_intermediate_size=64, initializer_range=0.02, expert_bias=True)
    )
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std() - 0.02) < 0.003, name
            assert abs(parameter.mean()) < 0.003, name


def test_the_same_seed_makes_the_same_layer():
    torch.manual_seed(7)
    first = MoE(tiny_config())
    torch.manual_seed(7)
    second = MoE(tiny_config())
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", "triton"])
def test_the_layer_shows_the_backend_that_was_asked_for(backend):
    assert f"backend='{backend}'" in repr(MoE(tiny_config(), backend=backend)).replace('"', "'")


def test_the_layer_shows_that_it_was_asked_to_be_batch_invariant():
    assert "batch_invariant=True" in repr(MoE(tiny_config(), batch_invariant=True))
    assert "batch_invariant" not in repr(MoE(tiny_config()))


def test_the_output_cannot_be_changed():
    out = make_layer()(inputs())
    with pytest.raises(AttributeError):
        out.y = None
    assert isinstance(out, moe.layer.MoEOutput)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_a_layer_by_gradient_descent_fits_a_function(activation):
    torch.manual_seed(0)
    layer = MoE(tiny_config(activation=activation, initializer_range=0.3, use_selection_bias=True))
    x = inputs(128, 12, dtype=torch.float32)
    target = torch.sin(x.roll(1, dims=-1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x).y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Bad input


def test_a_wrong_last_dimension_is_refused():
    with pytest.raises(ValueError, match=r"11.*hidden_size=12"):
        make_layer()(inputs(4, 11))


@pytest.mark.parametrize("shape", [(4,), (4, 6), (5, 4), (20,), (4, 5, 1)], ids=str)
def test_a_mask_that_is_not_shaped_like_the_tokens_is_refused(shape):
    with pytest.raises(ValueError, match=r"(?s)mask.*\(4, 5\)"):
        make_layer()(inputs(4, 5, 12), torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_that_is_not_boolean_is_refused(dtype):
    with pytest.raises(ValueError, match=r"(?s)mask.*bool"):
        make_layer()(inputs(4, 5, 12), torch.ones(4, 5, dtype=dtype))


def test_mixed_dtypes_are_refused_with_both_names():
    with pytest.raises(ValueError, match=r"(?s)bfloat16.*float64"):
        make_layer()(inputs().bfloat16())


def test_mixed_devices_are_refused_with_both_names():
    with pytest.raises(ValueError, match=r"(?s)meta.*cpu"):
        make_layer()(torch.empty(4, 12, dtype=torch.float64, device="meta"))
    with pytest.raises(ValueError, match=r"(?s)mask.*meta"):
        make_layer()(inputs(4, 12), torch.ones(4, dtype=torch.bool, device="meta"))


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"(?s)cuda.*auto.*reference.*torch.*triton"):
        choose_ops(torch.device("cpu"), "cuda")
    with pytest.raises(ValueError, match="cuda"):
        MoE(tiny_config(), backend="cuda")


def test_triton_on_a_cpu_is_refused_with_what_is_missing():
    layer = MoE(tiny_config(), backend="triton")
    with pytest.raises(RuntimeError, match=r"(?si)triton.*cpu.*cuda.*auto"):
        layer(inputs(dtype=torch.float32))


@BACKENDS
def test_a_batch_invariant_layer_on_a_cpu_is_refused_with_the_way_out(backend):
    layer = MoE(tiny_config(), backend=backend, batch_invariant=True)
    with pytest.raises(
        RuntimeError, match=r"batch_invariant=True needs the triton backend.*batch_invariant=False"
    ):
        layer(inputs(dtype=torch.float32))


def test_auto_takes_the_torch_backend_on_a_cpu():
    assert choose_ops(torch.device("cpu"), "auto") is choose_ops(torch.device("cpu"), "torch")


def test_a_layer_without_experts_is_refused():
    with pytest.raises(ValueError, match="num_experts=0"):
        MoE(MoEConfig(hidden_size=4, moe_intermediate_size=4, num_experts=0, num_experts_per_tok=1))


def test_a_float32_router_in_a_bfloat16_layer_is_welcome():
    layer = make_layer().bfloat16()
    layer.router.float()
    assert layer(inputs().bfloat16()).y.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="bfloat16"):
        layer(inputs(dtype=torch.float32))


def test_the_meta_device_gives_shapes():
    layer = make_layer(n_shared_experts=1).to("meta")
    x = torch.empty(3, 5, 12, dtype=torch.float64, device="meta")
    assert layer(x).y.shape == x.shape


def test_nan_at_padding_reaches_no_gradient():
    layer = make_layer(n_shared_experts=1)
    x, mask = inputs(), torch.ones(len(inputs()), dtype=torch.bool)
    x[-1], mask[-1] = torch.nan, False
    layer(x, mask).y[mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
