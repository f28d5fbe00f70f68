"""Which parameters decay, which rate they get, and that state survives a round trip exactly."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.decoder import Decoder
from moe.train.muon import Muon, orthogonalised
from moe.train.optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from moe.train.presets import needle, tiny
from moe.train.settings import OptimConfig, OptimizerKind


def model() -> Decoder:
    config = tiny().model
    kind = type(config)
    return Decoder(
        kind.from_dict(config.to_dict() | {"expert_bias": True, "router_bias": True, "use_qk_norm": True})
    )


def groups_by_name(decoder: Decoder, config: OptimConfig) -> dict[str, dict]:
    optimizer = make_optimizer(decoder, config)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: group_of[id(p)] for name, p in decoder.named_parameters()}


def test_weight_decay_is_for_matrices_only():
    groups = groups_by_name(model(), OptimConfig(weight_decay=0.3))
    decayed = {
        name.split(".")[-1 if "experts" in name else -2] for name, g in groups.items() if g["weight_decay"]
    }
    assert decayed == {"q_proj", "k_proj", "v_proj", "o_proj", "router", "gate_up_proj", "down_proj"}
    assert {g["weight_decay"] for g in groups.values()} == {0.0, 0.3}


def test_taps_of_convolutions_and_scales_of_logits_go_without_decay():
    config = replace(needle().model, hidden_size=16, head_dim=8)
    groups = groups_by_name(Decoder(config), OptimConfig(weight_decay=0.3))
    new = {name: group["weight_decay"] for name, group in groups.items() if "conv" in name or "ssmax" in name}
    assert len(new) == 9 and set(new.values()) == {0.0}  # 3 before attention, 2 after it, q, k, v; the scales


def test_embeddings_decay_when_asked():
    groups = groups_by_name(model(), OptimConfig(decay_embeddings=True))
    assert groups["model.embed_tokens.weight"]["weight_decay"] > 0


def test_routers_have_their_own_rate():
    groups = groups_by_name(model(), OptimConfig(router_lr_scale=0.1))
    assert {name for name, g in groups.items() if g["lr_scale"] != 1} == {
        n for n in groups if ".router." in n
    }
    optimizer = make_optimizer(model(), OptimConfig(router_lr_scale=0.1))
    set_learning_rate(optimizer, 2.0)
    assert {group["lr"] for group in optimizer.param_groups} == {2.0, 0.2}


def test_every_parameter_is_in_one_group():
    decoder = model()
    optimizer = make_optimizer(decoder, OptimConfig())
    counted = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(counted) == sorted(map(id, decoder.parameters()))


def test_the_cosine_schedule_warms_up_and_ends_at_its_fraction():
    config = OptimConfig(lr=1.0, warmup_steps=10, final_fraction=0.1)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # half way down
    assert rates[100] == pytest.approx(0.1)


def test_wsd_is_flat_and_then_a_straight_line():
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="wsd", final_fraction=0.0, decay_fraction=0.2)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])


@given(
    st.sampled_from(["cosine", "wsd", "constant"]), st.integers(1, 60), st.integers(0, 80), st.floats(0, 1)
)
def test_a_rate_is_positive_bounded_and_never_rises_after_warm_up(schedule, steps, warmup, final):
    config = OptimConfig(lr=1.0, warmup_steps=warmup, schedule=schedule, final_fraction=final)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    after = rates[min(warmup, steps - 1) :]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
    assert warmup >= steps or schedule == "constant" or steps == 1 or rates[-1] >= final - 1e-12


def trained(steps: int, kind: OptimizerKind = "adamw") -> tuple[Decoder, torch.optim.Optimizer]:
    torch.manual_seed(0)
    decoder = model()
    optimizer = make_optimizer(decoder, OptimConfig(optimizer=kind))
    for step in range(steps):
        one_step(decoder, optimizer, step)
    return decoder, optimizer


def one_step(decoder, optimizer, step):
    ids = torch.arange(64).reshape(2, 32) + step
    decoder.loss(ids, ids + 1).total.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_state_round_trips_to_the_same_next_step(kind):
    straight, optimizer = trained(3, kind)
    copied, new_optimizer = trained(0, kind)
    copied.load_state_dict(straight.state_dict())
    load_optimizer_tensors(copied, new_optimizer, optimizer_tensors(straight, optimizer))
    one_step(straight, optimizer, 3)
    one_step(copied, new_optimizer, 3)
    for ours, theirs in zip(straight.parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("model.norm.weight.exp_avg"), "missing: .*norm.weight.exp_avg"),
        (lambda state: state.update({"model.other.exp_avg": torch.zeros(3)}), "unexpected: .*model.other"),
        (lambda state: state.update({"model.norm.weight.exp_avg": torch.zeros(3)}), "has shape"),
    ],
    ids=["missing", "unexpected", "wrong shape"],
)
def test_damaged_optimizer_state_is_refused(damage, message):
    decoder, optimizer = trained(1)
    tensors = optimizer_tensors(decoder, optimizer)
    damage(tensors)
    fresh, new_optimizer = trained(0)
    with pytest.raises(ValueError, match=message):
        load_optimizer_tensors(fresh, new_optimizer, tensors)


def test_state_of_another_optimizer_is_refused():
    decoder, optimizer = trained(1, "muon")
    with pytest.raises(ValueError, match=r"missing: .*q_proj\.weight\.exp_avg"):
        load_optimizer_tensors(*trained(0), optimizer_tensors(decoder, optimizer))


def test_muon_takes_the_matrices_of_layers_but_not_the_routers():
    config = replace(needle().model, hidden_size=16, head_dim=8)
    groups = groups_by_name(Decoder(config), OptimConfig(optimizer="muon", momentum=0.8))
    taken = {name for name, group in groups.items() if group["use_muon"]}
    assert {name.split("layers.0.")[1] for name in taken if "layers.0." in name} == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert all("layers" in name for name in taken) and {g["momentum"] for g in groups.values()} == {0.8}
    assert not any(group["use_muon"] for group in groups_by_name(model(), OptimConfig()).values())


def iterated(x: torch.Tensor) -> torch.Tensor:
    """Muon's polynomial, five times, on the singular values themselves."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 99))
def test_orthogonalising_maps_singular_values_and_keeps_the_vectors(rows, columns, experts, seed):
    x = torch.randn(experts, rows, columns, generator=torch.manual_seed(seed), dtype=torch.float64)
    got = orthogonalised(x)
    for ours, matrix in zip(got, x, strict=True):
        torch.testing.assert_close(ours, iterated(matrix))
    torch.testing.assert_close(orthogonalised(x.mT.contiguous().mT), got)


def test_a_large_matrix_becomes_nearly_orthogonal_and_zeros_stay():
    x = torch.randn(64, 48, generator=torch.manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(x))
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def with_gradients(parameters: list[torch.Tensor], seed: int) -> None:
    generator = torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)


def test_muon_agrees_with_torchs_own_on_matrices():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    options = {"lr": 0.02, "weight_decay": 0.3}
    shapes = [(24, 16), (16, 40), (8, 8)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    muon = Muon([{"params": ours, "use_muon": True}], **options)
    other = torch.optim.Muon(theirs, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(4):
        for parameters, optimizer in ((ours, muon), (theirs, other)):
            with_gradients(parameters, step)
            optimizer.step()
    for one, another in zip(ours, theirs, strict=True):
        assert (one - another).norm() < 0.02 * (one - 1).norm()  # theirs iterates in bfloat16


def test_muon_treats_each_expert_by_itself_and_leaves_the_others_to_adamw():
    stack, vector = torch.nn.Parameter(torch.ones(3, 6, 4)), torch.nn.Parameter(torch.ones(5))
    single = [torch.nn.Parameter(torch.ones(6, 4)) for _ in range(3)]
    alone = torch.nn.Parameter(torch.ones(5))
    groups = [{"params": [stack], "use_muon": True}, {"params": [vector]}]
    both = Muon(groups, lr=0.1, weight_decay=0.1)
    others = [Muon([{"params": single, "use_muon": True}], lr=0.1, weight_decay=0.1)]
    others.append(torch.optim.AdamW([alone], lr=0.1, weight_decay=0.1))
    for step in range(3):
        with_gradients([stack, vector], step)
        alone.grad = vector.grad.clone()
        stack.grad[2] = 0
        for parameter, grad, size in zip(single, stack.grad, (1.0, 1e3, 1.0), strict=True):
            parameter.grad = grad * size
        both.step()
        for optimizer in others:
            optimizer.step()
    torch.testing.assert_close(stack, torch.stack(single))  # the size of a gradient does not count
    assert torch.equal(vector, alone)
    torch.testing.assert_close(stack[2], torch.full((6, 4), 0.99**3))  # no gradient: decay alone


def test_muon_skips_what_has_no_gradient_and_returns_the_loss_of_a_closure():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    muon = Muon([{"params": [parameter], "use_muon": True}], lr=0.1)
    assert muon.step(lambda: 3.0) == 3.0 and torch.equal(parameter, torch.ones(2, 2))
    assert not muon.state


def test_muon_refuses_a_vector():
    with pytest.raises(ValueError, match=r"takes matrices, got a parameter of shape \(3,\)"):
        Muon([{"params": [torch.nn.Parameter(torch.ones(3))], "use_muon": True}])


@pytest.mark.gpu
def test_on_a_gpu_muon_takes_the_same_steps_up_to_bfloat16():
    both = []
    for device in ("cpu", "cuda"):
        stack, vector = torch.nn.Parameter(torch.ones(3, 96, 64)), torch.nn.Parameter(torch.ones(5))
        parameters = [stack, vector]
        for parameter in parameters:
            parameter.data = parameter.data.to(device)
        groups = [{"params": [stack], "use_muon": True}, {"params": [vector]}]
        optimizer = Muon(groups, lr=0.02, weight_decay=0.1, fused=True)
        for step in range(3):
            with_gradients(parameters, step)
            optimizer.step()
        both.append([(parameter.detach().cpu() - 1) for parameter in parameters])
    for ours, theirs in zip(*both, strict=True):
        assert (ours - theirs).norm() < 0.02 * ours.norm()
