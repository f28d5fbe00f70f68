"""The decoder as a whole: cache, padding, chunked loss, recomputation, initialisation, refusals."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.cross_entropy import linear_cross_entropy, loss_and_gradients
from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.kv_cache import KVCache
from moe.losses import load_balancing_loss, router_z_loss

SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 24,
    "initializer_range": 0.3,  # large enough that every term matters
}


def decoder(dtype: torch.dtype = torch.float64, **changes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**(SIZES | {"router_dtype": "float64"} | changes))).to(dtype)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: Decoder, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=False))


def assert_same(ours: list[Tensor], theirs: list[Tensor], **tolerance) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# Cache and padding


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 5], [1, 11], [7, 4, 1]], ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(chunks):
    model, ids = decoder(use_qk_norm=True).eval(), tokens(2, 12)
    cache = KVCache(capacity=3)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), whole.logits)


@pytest.mark.parametrize("side", ["left", "right", "within"])
def test_padding_changes_nothing_at_real_tokens(side):
    model, ids = decoder().eval(), tokens(1, 6)
    places = {"left": range(4, 10), "right": range(6), "within": [0, 1, 4, 5, 8, 9]}[side]
    places = torch.tensor(list(places))
    padded, mask = tokens(2, 10, seed=1), torch.zeros(2, 10, dtype=torch.bool)
    padded[0, places], mask[0, places], mask[1] = ids[0], True, True
    alone, batch = model(ids), model(padded, mask=mask)
    torch.testing.assert_close(batch.logits[0, places], alone.logits[0])
    torch.testing.assert_close(batch.logits[1], model(padded[1:]).logits[0])
    assert batch.logits.isfinite().all()


def test_padding_changes_neither_losses_nor_gradients():
    model = decoder(router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    ids = tokens(1, 7)
    padded, mask = tokens(1, 11, seed=1), torch.zeros(1, 11, dtype=torch.bool)
    padded[:, 4:], mask[:, 4:] = ids, True
    alone = model.loss(ids[:, :-1], ids[:, 1:])
    batch = model.loss(padded[:, :-1], padded[:, 1:], mask=mask[:, :-1])
    assert_same([batch.total, batch.balance, batch.z], [alone.total, alone.balance, alone.z])
    assert_same(gradients(model, batch.total), gradients(model, alone.total))


def test_a_row_of_padding_alone_gives_finite_gradients():
    model, ids = decoder(router_aux_loss_coef=0.1, router_z_loss_coef=0.1), tokens(2, 5)
    mask = torch.tensor([[True] * 5, [False] * 5])
    loss = model.loss(ids, ids, mask=mask)
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss.total))
    torch.testing.assert_close(loss.cross_entropy, model.loss(ids[:1], ids[:1]).cross_entropy)


def test_a_padded_prompt_continues_in_the_cache_as_if_it_were_alone():
    model, ids = decoder().eval(), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    cache = KVCache()
    with torch.no_grad():
        model(ids[:, :5], mask=mask[:, :5], cache=cache)
        parts = [model(ids[:, at : at + 1], cache=cache).logits for at in (5, 6)]
        parts.append(model(ids[:, 7:], mask=mask[:, 7:], cache=cache).logits)
        alone = model(ids[:1, 3:]).logits
    torch.testing.assert_close(torch.cat(parts, dim=1)[:1], alone[:, 2:])


# Cross-entropy


@st.composite
def heads(draw):
    t, d, v = draw(st.integers(1, 20)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    hidden, weight = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (t, v))
    targets = torch.tensor(draw(st.lists(st.sampled_from([-100, *range(v)]), min_size=t, max_size=t)))
    return hidden.requires_grad_(), weight.requires_grad_(), targets, draw(st.integers(1, 25))


@settings(max_examples=60, deadline=None)
@given(heads())
def test_chunked_cross_entropy_equals_torchs_in_value_and_gradients(case):
    hidden, weight, targets, chunk = case
    ours = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
    truth = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    truth = truth / max(1, int((targets != -100).sum()))
    torch.testing.assert_close(ours, truth)
    leaves = [hidden, weight]
    assert_same(torch.autograd.grad(ours * 3, leaves), torch.autograd.grad(truth * 3, leaves))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk), ours)


def test_all_targets_ignored_gives_zero_loss_and_zero_gradients():
    model, ids = decoder(), tokens(2, 5)
    loss = model.loss(ids, torch.full_like(ids, -100))
    assert loss.total == 0
    assert all((gradient == 0).all() for gradient in gradients(model, loss.total))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("chunk", [1, 4, 1000, None])
def test_loss_equals_cross_entropy_of_the_logits_for_any_chunk(tied, chunk):
    model, ids = decoder(tie_word_embeddings=tied), tokens(2, 8)
    targets = tokens(2, 8, seed=1)
    targets[0, 2:5] = -100
    loss = model.loss(ids, targets, chunk_tokens=chunk).total
    truth = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, truth)
    assert_same(gradients(model, loss), gradients(model, truth))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_are_never_held_whole_in_forward_or_backward():
    t, d, v, chunk = 256, 4, 128, 16
    hidden = torch.randn(t, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    targets = torch.zeros(t, dtype=torch.int64)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
    assert sum(saved) == (t + v) * d + 1  # and the number of tokens
    with Largest() as backward:
        loss.backward()
    assert backward.elements == t * d
    with Largest() as forward, torch.no_grad():
        loss_and_gradients._init_fn(hidden, weight, targets, chunk, torch.float32)
    assert forward.elements == chunk * v
    with Largest() as evaluation, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
    assert evaluation.elements == chunk * v


def test_the_loss_operator_keeps_torchs_rules():
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 1, 2, 3, 4])
    torch.library.opcheck(loss_and_gradients, (hidden, weight, targets, 3, torch.float32))


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_bfloat16_loss_is_as_accurate_as_torchs(autocast):
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 32), torch.randn(50, 32)
    targets = torch.randint(0, 50, (300,))
    if not autocast:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()

    def run(loss, *leaves: Tensor) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            value = loss(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    ours = run(lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens=37), hidden, weight)
    theirs = run(lambda h, w: F.cross_entropy((h @ w.T).float(), targets), hidden, weight)
    with torch.autocast("cpu", enabled=False):
        exact = [leaf.double().requires_grad_() for leaf in (hidden, weight)]
        truth = F.cross_entropy(exact[0] @ exact[1].T, targets)
        truth = [truth, *torch.autograd.grad(truth, exact)]
    assert [x.dtype for x in ours] == [torch.float32, hidden.dtype, weight.dtype]
    for one, other, true in zip(ours, theirs, truth, strict=True):
        allowed = 2 * (other.double() - true).abs().max() + torch.finfo(one.dtype).eps * true.abs().max()
        assert (one.double() - true).abs().max() <= allowed


def test_total_is_the_weighted_sum_of_its_parts():
    model = decoder(router_aux_loss_coef=0.3, router_aux_loss_convention="olmo", router_z_loss_coef=0.2)
    ids = tokens(2, 8)
    loss = model.loss(ids, ids)
    assert model.moe_layers == (1, 2) and len(loss.routings) == len(loss.plans) == 2
    torch.testing.assert_close(loss.balance, load_balancing_loss(loss.routings, convention="olmo"))
    torch.testing.assert_close(loss.z, sum(map(router_z_loss, loss.routings)) / 2)
    torch.testing.assert_close(loss.total, loss.cross_entropy + 0.3 * loss.balance + 0.2 * loss.z)
    dense = decoder(num_experts=0, router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    assert dense.moe_layers == () and dense.loss(ids, ids).balance == 0 == dense.loss(ids, ids).z


# Recomputation and compilation


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_recomputed_blocks_route_alike_and_give_the_same_gradients(jitter):
    model = decoder(router_jitter_noise=jitter, router_aux_loss_coef=0.1)
    ids = tokens(2, 9)
    routed: list[list[Tensor]] = []
    for block in model.model.layers[1:]:
        block.mlp.router.register_forward_hook(lambda _, __, routing: routed[-1].append(routing.experts))

    def run(recompute: bool) -> list[Tensor]:
        model.checkpoint_blocks = recompute
        routed.append([])
        torch.manual_seed(1)
        loss = model.loss(ids, ids).total
        return [loss, *gradients(model, loss)]

    plain, again = run(False), run(True)
    assert all(map(torch.equal, plain, again))
    assert len(routed[0]) == 2 and len(routed[1]) == 4
    assert torch.equal(routed[1][0], routed[1][3]) and torch.equal(routed[1][1], routed[1][2])


def test_recomputation_saves_less():
    def saved(recompute: bool) -> int:
        model, sizes = decoder(), []
        model.checkpoint_blocks = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.hidden(tokens(4, 32))
        return sum(sizes)

    assert saved(True) < saved(False) / 4


@pytest.mark.parametrize("recompute", [False, True], ids=["any length", "masked and recomputed"])
def test_loss_compiles_as_one_graph(recompute):
    model = decoder(torch.float32, router_dtype="float32", num_hidden_layers=2, router_aux_loss_coef=0.1)
    model.checkpoint_blocks = recompute
    ids = tokens(2, 9)
    mask = torch.ones_like(ids, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
    mask = mask if recompute else None
    plain = model.loss(ids, ids, mask=mask, chunk_tokens=5).total
    compiled = torch.compile(model.loss, fullgraph=True, backend="eager", dynamic=not recompute)
    ours = compiled(ids, ids, mask=mask, chunk_tokens=5).total
    torch.testing.assert_close(ours, plain)
    assert_same(gradients(model, ours), gradients(model, plain))


def test_autocast_trains_float32_weights():
    model, ids = decoder(torch.float32, router_dtype="float32", router_aux_loss_coef=0.1), tokens(2, 9)
    truth = model.loss(ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model.loss(ids, ids)
    assert ours.total.dtype == torch.float32
    torch.testing.assert_close(ours.total, truth.total, rtol=0.02, atol=0.02)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model, ours.total))


# Initialisation


def test_parameters_are_drawn_as_the_docstring_says():
    config = DecoderConfig(
        **SIZES
        | {"hidden_size": 64, "moe_intermediate_size": 64, "initializer_range": 0.02}
        | {"n_shared_experts": 1, "tie_word_embeddings": False, "expert_bias": True, "router_bias": True}
    )
    torch.manual_seed(0)
    for name, parameter in Decoder(config).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            residual = "o_proj" in name or "down_proj" in name
            std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
            noise = 4 / math.sqrt(2 * parameter.numel())  # four standard errors of a standard deviation
            assert abs(parameter.std().item() / std - 1) < noise, name


# Refusals


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.tensor([[1, 23]]), None, "id 23 is outside the vocabulary"),
        (torch.tensor([[-1, 2]]), None, "id -1 is outside"),
        (torch.tensor([1, 2]), None, r"int64 tensor \(b s\), got \(2\)"),
        (torch.tensor([[1.0]]), None, "float32"),
        (torch.tensor([[1, 2]]), torch.ones(1, 3, dtype=torch.bool), r"got \(1 3\)"),
        (torch.tensor([[1, 2]]), torch.ones(1, 2), "of torch.float32"),
    ],
    ids=["too large", "negative", "one axis", "float", "mask shape", "mask dtype"],
)
def test_forward_refuses_nonsense(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        decoder()(ids, mask=mask)


@pytest.mark.parametrize(
    ("targets", "chunk", "message"),
    [
        (torch.tensor([[1, 23]]), None, "target 23"),
        (torch.tensor([[1, -1]]), None, "target -1"),
        (torch.tensor([[1]]), None, r"targets \(1 1\)"),
        (torch.tensor([[1, 2]]), 0, "chunk_tokens=0"),
    ],
    ids=["too large", "negative", "shape", "chunk"],
)
def test_loss_refuses_nonsense(targets, chunk, message):
    with pytest.raises(ValueError, match=message):
        decoder().loss(torch.tensor([[1, 2]]), targets, chunk_tokens=chunk)


def test_a_cache_cannot_be_filled_while_gradients_are_on():
    with pytest.raises(ValueError, match="no_grad"):
        decoder()(tokens(1, 3), cache=KVCache())


def test_a_second_derivative_of_the_loss_is_refused():
    weight = torch.randn(5, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(x.tanh(), weight, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_fp16_gradients_survive_a_loss_scale():
    torch.manual_seed(0)
    t, d, v, scale = 4096, 8, 512, 2.0**16
    hidden, weight = torch.randn(t, d), torch.randn(v, d) / 10
    targets = torch.randint(v, (t,))
    found = [hidden.half().requires_grad_(), weight.half().requires_grad_()]
    (linear_cross_entropy(*found, targets) * scale).backward()
    truth = [tensor.detach().double().requires_grad_() for tensor in found]
    F.cross_entropy(truth[0] @ truth[1].T, targets).backward()
    for ours, exact in zip(found, truth, strict=True):
        assert ((ours.grad.double() / scale - exact.grad).norm() / exact.grad.norm()) < 2e-3


def test_the_sequence_wise_loss_of_a_decoder_is_that_of_its_routings():
    model = decoder(router_aux_loss_coef=0.1, router_aux_loss_granularity="sequence")
    ids = tokens(3, 6)
    loss = model.loss(ids, ids)
    expected = load_balancing_loss(loss.routings, granularity="sequence", sequences=3)
    assert torch.equal(loss.balance, expected)
    assert loss.balance != load_balancing_loss(loss.routings)


def test_a_mask_that_is_not_bool_is_refused_by_the_loss_too():
    with pytest.raises(ValueError, match="mask must be bool"):
        decoder().loss(tokens(1, 4), tokens(1, 4), mask=torch.ones(1, 4, dtype=torch.int64))
