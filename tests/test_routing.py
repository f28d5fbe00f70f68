"""The router follows the formula of every family, written out below in float64; padding is honoured.

z = x W^T (+ b) are the logits, "select" is what the top-k looks at, w are the weights of the chosen experts.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, fill, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from moe.losses import load_balancing_loss, router_z_loss
from moe.routing import Router

TOKENS = 40


def make_router(seed: int = 0, **changes) -> Router:
    """A router with float64 arithmetic unless told otherwise, and a selection bias that is not zero."""
    config = tiny_config(**({"router_dtype": "float64"} | changes))
    router = fill(Router(config), seed)
    if config.use_selection_bias:
        generator = torch.Generator().manual_seed(seed + 1)
        router.e_score_correction_bias.copy_(torch.randn(config.num_experts, generator=generator) / 3)
    return router


def inputs(tokens: int = TOKENS, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def by_id(experts, weights):
    """The choices of each token in the order of their ids: their order is no part of the mathematics."""
    experts, order = experts.sort(dim=-1)
    return experts, weights.gather(-1, order)


def take(scores, select, top_k):
    experts = select.topk(top_k, dim=-1).indices
    return experts, scores.gather(-1, experts)


def normalised(weights, eps=0.0):
    return weights / (weights.sum(-1, keepdim=True) + eps)


def masked_by_group(select, num_groups, keep, group_score):
    """-inf in every group but the best `keep`, each group being e/num_groups neighbours."""
    select = select.detach().clone()
    for token in range(len(select)):
        groups = select[token].view(num_groups, -1)
        worth = groups.max(-1).values if group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
        for group in set(range(num_groups)) - set(worth.topk(keep).indices.tolist()):
            groups[group] = -torch.inf
    return select


# Each family: its rule as a function of z (t e) and the selection bias b (e) -> experts, weights


def mixtral(z, b):
    experts, w = take(z.softmax(-1), z, 2)
    return experts, normalised(w)


def olmoe(z, b):
    return take(z.softmax(-1), z, 2)


def jamba_with_scale(z, b):
    experts, w = take(z.softmax(-1), z, 2)
    return experts, w * 3.5


def deepseek_v3(z, b):
    s = z.sigmoid()
    experts, w = take(s, masked_by_group(s + b, 4, 2, "top2"), 3)
    return experts, normalised(w, 1e-20) * 2.5


def deepseek_v2(z, b):
    p = z.softmax(-1)
    experts, w = take(p, masked_by_group(p, 4, 2, "max"), 3)
    return experts, w * 16.0


def gpt_oss(z, b):
    top = z.topk(3, dim=-1)
    return top.indices, top.values.softmax(-1)


def minimax_m2(z, b):
    s = z.sigmoid()
    experts, w = take(s, s + b, 2)
    return experts, normalised(w)


def lfm2(z, b):
    s = z.sigmoid()
    experts, w = take(s, s + b, 2)
    return experts, normalised(w, 1e-6) * 1.5


def deepseek_v4(z, b):
    s = F.softplus(z).sqrt()
    experts, w = take(s, s + b, 2)
    return experts, normalised(w, 1e-20) * 1.5


def laguna(z, b):
    s = (0.7 * torch.tanh(z / 0.7)).sigmoid()
    experts, w = take(s, s + b, 2)
    return experts, normalised(w)


def ernie(z, b):
    p = z.softmax(-1)
    experts, w = take(p, p + b, 2)
    return experts, normalised(w)


def mistral4(z, b):
    p = z.softmax(-1)
    experts, w = take(p, masked_by_group(p, 2, 1, "top2"), 2)
    return experts, normalised(w, 1e-20) * 2.0


FAMILIES = {
    "R1 Mixtral": (mixtral, {}),
    "R2 OLMoE, weights not renormalised": (olmoe, {"norm_topk_prob": False}),
    "R8 Jamba, and a scale": (jamba_with_scale, {"norm_topk_prob": False, "routed_scaling_factor": 3.5}),
    "R3 DeepSeek-V3": (
        deepseek_v3,
        {
            "scoring_func": "sigmoid",
            "use_selection_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "norm_topk_eps": 1e-20,
            "routed_scaling_factor": 2.5,
        },
    ),
    "R4 DeepSeek-V2": (
        deepseek_v2,
        {
            "n_group": 4,
            "topk_group": 2,
            "group_score": "max",
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
        },
    ),
    "R5 gpt-oss": (
        gpt_oss,
        {"topk_before_score": True, "router_bias": True, "num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
    "R10 MiniMax-M2": (minimax_m2, {"scoring_func": "sigmoid", "use_selection_bias": True}),
    "R12 Ernie": (ernie, {"use_selection_bias": True}),
    "R15 LFM2": (
        lfm2,
        {
            "scoring_func": "sigmoid",
            "use_selection_bias": True,
            "norm_topk_eps": 1e-6,
            "routed_scaling_factor": 1.5,
        },
    ),
    "R17 DeepSeek-V4": (
        deepseek_v4,
        {
            "scoring_func": "sqrtsoftplus",
            "use_selection_bias": True,
            "norm_topk_eps": 1e-20,
            "routed_scaling_factor": 1.5,
        },
    ),
    "R19 Mistral4": (
        mistral4,
        {"n_group": 2, "topk_group": 1, "norm_topk_eps": 1e-20, "routed_scaling_factor": 2.0},
    ),
    "R23 Laguna": (
        laguna,
        {"scoring_func": "sigmoid", "use_selection_bias": True, "router_logit_softcap": 0.7},
    ),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@EVERY_FAMILY
def test_the_router_follows_the_formula_of_its_family(family):
    rule, changes = FAMILIES[family]
    router, x = make_router(**changes), inputs()
    z = x.double() @ router.weight.detach().double().T
    if changes.get("router_bias"):
        z = z + router.bias.detach().double()
    b = router.e_score_correction_bias.double() if changes.get("use_selection_bias") else None
    routing = router(x)
    experts, weights = by_id(*rule(z, b))
    our_experts, our_weights = by_id(routing.experts, routing.weights)
    assert routing.experts.dtype == torch.int64
    assert torch.equal(our_experts, experts)
    assert_same(our_weights, weights)


@EVERY_FAMILY
def test_the_gradient_of_the_weights_is_that_of_the_formula(family):
    rule, changes = FAMILIES[family]
    router = make_router(**changes).double()
    x = inputs().double().requires_grad_()
    leaves = [x, router.weight] + ([router.bias] if changes.get("router_bias") else [])
    z = F.linear(x, router.weight, router.bias if changes.get("router_bias") else None)
    b = router.e_score_correction_bias.double() if changes.get("use_selection_bias") else None
    upstream = torch.randn(TOKENS, router(x).experts.shape[1], dtype=torch.float64)
    theirs = torch.autograd.grad(by_id(*rule(z, b))[1], leaves, upstream)
    routing = router(x)
    ours = torch.autograd.grad(by_id(routing.experts, routing.weights)[1], leaves, upstream)
    for our, their in zip(ours, theirs, strict=True):
        assert_same(our, their)


@pytest.mark.parametrize(
    ("score", "formula"),
    [
        ("softmax", lambda z: z.softmax(-1)),
        ("sigmoid", torch.sigmoid),
        ("sqrtsoftplus", lambda z: F.softplus(z).sqrt()),
    ],
    ids=["softmax", "sigmoid", "sqrtsoftplus"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["no selection bias", "selection bias"])
def test_scores_are_those_of_every_expert_before_the_selection_bias(score, formula, bias):
    router, x = make_router(scoring_func=score, use_selection_bias=bias), inputs()
    routing = router(x)
    z = x.double() @ router.weight.double().T
    assert_same(routing.logits, z)
    assert_same(routing.scores, formula(z))
    assert routing.scores.requires_grad and routing.logits.requires_grad and routing.weights.requires_grad
    assert (routing.num_experts, routing.top_k) == (8, 2)


def test_choosing_before_a_softmax_equals_renormalising_after_it():
    """softmax over the k chosen logits = softmax over all, divided by its sum over the chosen."""
    x = inputs()
    before, after = make_router(topk_before_score=True)(x), make_router(norm_topk_prob=True)(x)
    for one, other in zip(
        by_id(before.experts, before.weights), by_id(after.experts, after.weights), strict=True
    ):
        assert_same(one, other)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_the_epsilon_is_added_to_the_sum(eps):
    router, x = make_router(scoring_func="sigmoid", norm_topk_eps=eps), inputs()
    routing = router(x)
    total = routing.scores.gather(1, routing.experts).sum(-1)
    assert_same(routing.weights.sum(-1), total / (total + eps), tolerance=1e-14)


def test_vanishing_sigmoid_scores_are_not_divided_by_zero():
    router = make_router(scoring_func="sigmoid", norm_topk_eps=1e-20, router_dtype="float32")
    with torch.no_grad():
        router.weight.fill_(-1e4)
    routing = router(torch.ones(3, 12))
    assert torch.equal(routing.weights, torch.zeros(3, 2))


# The selection bias


def test_masked_groups_lose_even_when_the_selection_bias_is_negative():
    """With 0.0 instead of -inf in masked groups, a bias of -10 would choose experts out of them."""
    router = make_router(
        scoring_func="sigmoid", use_selection_bias=True, n_group=4, topk_group=2, num_experts_per_tok=4
    )
    router.e_score_correction_bias.fill_(-10.0)
    routing = router(inputs())
    for chosen in routing.experts.tolist():
        assert len({expert // 2 for expert in chosen}) == 2
    best = routing.scores.view(-1, 4, 2).sum(-1).topk(2, dim=-1).indices.sort(-1).values
    assert torch.equal(routing.experts.sort(-1).values[:, ::2] // 2, best)


@given(
    shift=st.floats(-50, 50),
    n_group=st.sampled_from([1, 2, 4]),
    score=st.sampled_from(["sigmoid", "softmax"]),
)
def test_shifting_the_selection_bias_by_a_constant_never_changes_the_choice(shift, n_group, score):
    router = make_router(
        scoring_func=score, use_selection_bias=True, n_group=n_group, topk_group=max(1, n_group // 2)
    )
    before = router(inputs())
    router.e_score_correction_bias.add_(shift)
    after = router(inputs())
    assert torch.equal(by_id(before.experts, before.weights)[0], by_id(after.experts, after.weights)[0])


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_the_selection_bias_chooses_and_never_weighs(score):
    router = make_router(scoring_func=score, use_selection_bias=True, norm_topk_prob=False)
    router.e_score_correction_bias.zero_()[5] = 100.0
    routing = router(inputs())
    assert (routing.experts == 5).any(dim=1).all()
    assert torch.equal(routing.weights, routing.scores.gather(1, routing.experts))
    assert not router.e_score_correction_bias.requires_grad


@pytest.mark.parametrize("cast", ["to(bfloat16)", "bfloat16", "half", "double"])
def test_the_selection_bias_keeps_its_float32_bits_through_casts(cast):
    router = make_router(use_selection_bias=True)
    exact = router.e_score_correction_bias.copy_(torch.linspace(-1, 1, 8) / 3 + 1e-5).clone()
    router = router.to(torch.bfloat16) if cast.startswith("to") else getattr(router, cast)()
    assert router.weight.dtype != torch.float32
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, exact)
    assert torch.equal(router.state_dict()["e_score_correction_bias"], exact)


def test_there_is_no_selection_bias_unless_asked_for():
    assert set(make_router().state_dict()) == {"weight"}
    assert set(make_router(router_bias=True, use_selection_bias=True).state_dict()) == {
        "weight",
        "bias",
        "e_score_correction_bias",
    }


@pytest.mark.parametrize("training", [True, False])
def test_routing_never_changes_the_router(training):
    router = make_router(use_selection_bias=True, scoring_func="sigmoid", router_jitter_noise=0.1).train(
        training
    )
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    router(inputs()).weights.sum().backward()
    for name, tensor in router.state_dict().items():
        assert torch.equal(tensor, before[name])


# Precision


def test_logits_are_computed_in_float32_above_a_bfloat16_model():
    router, x = make_router(router_dtype="float32").bfloat16(), inputs().bfloat16()
    routing = router(x)
    truth = x.double() @ router.weight.double().T
    assert {routing.logits.dtype, routing.scores.dtype, routing.weights.dtype} == {torch.float32}
    torch.testing.assert_close(routing.logits.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("score_first", [True, False])
def test_weights_come_in_the_dtype_that_the_config_names(dtype, score_first):
    router = make_router(
        router_dtype="float32", routing_weights_dtype=dtype, topk_before_score=not score_first
    )
    plain = make_router(router_dtype="float32", topk_before_score=not score_first)
    routing = router(inputs())
    assert routing.weights.dtype == getattr(torch, dtype)
    assert routing.logits.dtype == torch.float32
    assert torch.equal(routing.weights, plain(inputs()).weights.to(routing.weights.dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_weights_follow_the_router_dtype_unless_told_otherwise(dtype):
    routing = make_router(router_dtype=dtype).bfloat16()(inputs().bfloat16())
    assert routing.logits.dtype == routing.weights.dtype == getattr(torch, dtype)


def test_a_model_wider_than_its_router_dtype_is_not_rounded():
    router, x = make_router(router_dtype="float32").double(), inputs().double()
    assert_same(router(x).logits, x @ router.weight.T, tolerance=1e-14)


def test_autocast_leaves_the_router_in_its_own_dtype():
    router, x = make_router(router_dtype="float32"), inputs()
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert cast.logits.dtype == cast.weights.dtype == torch.float32
    assert torch.equal(cast.logits, plain.logits)
    assert torch.equal(cast.experts, plain.experts)


@pytest.mark.parametrize("scores", ["float32", "model"])
def test_the_product_alone_can_run_in_the_dtype_of_the_model(scores):
    router = make_router(router_dtype=scores, router_logits_dtype="model").bfloat16()
    x = inputs().bfloat16()
    routing = router(x)
    z = F.linear(x, router.weight)
    p = z.softmax(-1) if scores == "model" else z.float().softmax(-1)
    assert routing.logits.dtype == torch.bfloat16
    assert (
        routing.scores.dtype
        == routing.weights.dtype
        == (torch.bfloat16 if scores == "model" else torch.float32)
    )
    assert torch.equal(routing.logits, z) and torch.equal(routing.scores, p)
    experts, w = take(p, p, 2)
    assert torch.equal(routing.experts, experts) and torch.equal(routing.weights, normalised(w))


def test_the_dtype_of_the_model_is_the_wider_of_input_and_weight_or_that_of_autocast():
    router = make_router(router_dtype="model")
    assert router(inputs().bfloat16()).logits.dtype == torch.float32
    assert router.bfloat16()(inputs()).logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert router.float()(inputs()).scores.dtype == torch.bfloat16


def test_weights_come_in_the_dtype_of_the_input_or_of_the_logits():
    x = inputs().bfloat16()
    wide = {"router_dtype": "float64", "router_logits_dtype": "float32"}
    for name, dtype in {"model": torch.bfloat16, "logits": torch.float32, None: torch.float64}.items():
        weights = make_router(routing_weights_dtype=name, **wide)(x).weights
        assert weights.dtype == dtype
        assert torch.equal(weights, make_router(**wide)(x).weights.to(dtype))


def test_the_sum_that_renormalises_is_raised_to_the_floor():
    x = inputs()
    plain, floored = make_router(norm_topk_prob=False)(x), make_router(norm_topk_min=0.9)(x)
    total = plain.weights.sum(-1, keepdim=True)
    assert (total < 0.9).any() and (total > 0.9).any()
    assert_same(floored.weights, plain.weights / total.clamp(min=0.9))


def test_unsorted_choices_are_the_same_choices():
    x = inputs(500)
    ours, theirs = (
        make_router(num_experts_per_tok=5, topk_sorted=False)(x),
        make_router(num_experts_per_tok=5)(x),
    )
    assert torch.equal(ours.experts, ours.scores.topk(5, sorted=False).indices)
    for one, other in zip(
        by_id(ours.experts, ours.weights), by_id(theirs.experts, theirs.weights), strict=True
    ):
        assert_same(one, other)


# Jitter


def test_jitter_scales_each_input_by_at_most_epsilon_and_only_in_training():
    router, x = make_router(num_experts=12, router_jitter_noise=0.1), inputs()
    with torch.no_grad():
        router.weight.copy_(torch.eye(12))  # logits are the inputs that the router saw
    assert_same(router.eval()(x).logits, x)
    ratio = router.train()(x).logits.detach() / x
    assert 0.9 - 1e-6 <= ratio.min() < 0.92 and 1.08 < ratio.max() <= 1.1 + 1e-6
    assert len(ratio.unique()) > 0.9 * ratio.numel()
    assert abs(ratio.mean() - 1) < 0.02
    assert torch.equal(x, inputs()), "the caller's tensor was changed"


def test_jitter_of_the_experts_is_left_to_the_layer():
    router = make_router(router_jitter_noise=0.1, jitter_experts=True)
    assert torch.equal(router.train()(inputs()).logits, router.eval()(inputs()).logits)


def test_without_jitter_training_and_evaluation_route_alike():
    router = make_router()
    assert torch.equal(router.train()(inputs()).logits, router.eval()(inputs()).logits)


# Padding


MASK = (torch.arange(TOKENS) % 3 != 1) & (torch.arange(TOKENS) < 35)


@EVERY_FAMILY
def test_a_padding_token_chooses_nobody_and_changes_nothing_for_the_others(family):
    router = make_router(**FAMILIES[family][1])
    alone, padded = router(inputs()[MASK]), router(inputs(), MASK)
    assert (padded.experts[~MASK] == 8).all()
    assert (padded.weights[~MASK] == 0).all()
    assert torch.equal(padded.experts[MASK], alone.experts)
    assert_same(padded.weights[MASK], alone.weights)
    assert torch.equal(padded.mask, MASK)
    assert torch.equal(padded.tokens_per_expert(), torch.bincount(alone.experts.flatten(), minlength=8))


@EVERY_FAMILY
def test_nan_in_padding_reaches_no_weight_no_loss_and_no_gradient(family):
    router, x = make_router(**FAMILIES[family][1]), inputs()
    x[~MASK] = float("nan")
    x.requires_grad_()
    alone = router(inputs()[MASK])
    routing = router(x, MASK)
    assert_same(routing.weights[MASK], alone.weights)
    assert (routing.weights[~MASK] == 0).all()

    def objective(routing):
        mixed = (routing.weights * torch.tensor([1.0, 2.0, 3.0])[: routing.top_k]).sum()
        return mixed + load_balancing_loss([routing]) + router_z_loss(routing)

    ours = torch.autograd.grad(objective(routing), [x, *router.parameters()])
    theirs = torch.autograd.grad(objective(alone), list(router.parameters()))
    assert (ours[0][~MASK] == 0).all() and ours[0].isfinite().all()
    for our, their in zip(ours[1:], theirs, strict=True):
        assert_same(our, their, tolerance=1e-6)  # parameters are float32


def test_tokens_per_expert_counts_every_kept_pair():
    routing = make_router()(inputs())
    assert routing.mask is None
    assert routing.tokens_per_expert().dtype == torch.int64
    assert torch.equal(routing.tokens_per_expert(), torch.bincount(routing.experts.flatten(), minlength=8))
    assert routing.tokens_per_expert().sum() == TOKENS * 2


@pytest.mark.parametrize("mask", [None, torch.ones(0, dtype=torch.bool)], ids=["no mask", "empty mask"])
@EVERY_FAMILY
def test_no_tokens_route_nowhere(family, mask):
    router = make_router(**FAMILIES[family][1])
    routing = router(inputs(0), mask)
    assert routing.experts.shape == routing.weights.shape == (0, router(inputs()).top_k)
    assert routing.logits.shape == (0, 8)
    assert routing.tokens_per_expert().tolist() == [0] * 8


def test_all_padding_routes_nowhere():
    routing = make_router()(inputs(), torch.zeros(TOKENS, dtype=torch.bool))
    assert (routing.experts == 8).all() and (routing.weights == 0).all()


@pytest.mark.parametrize("top_k", [1, 8])
def test_each_token_chooses_distinct_experts_even_among_equals(top_k):
    router = make_router(num_experts_per_tok=top_k)
    with torch.no_grad():
        router.weight.zero_()
    routing = router(inputs())
    assert all(len(set(chosen)) == top_k for chosen in routing.experts.tolist())
    assert_same(routing.weights, torch.full((TOKENS, top_k), 1 / top_k))


# Hugging Face's own modules, where transformers is installed


def hugging_face(name: str, class_name: str):
    pytest.importorskip("transformers")
    from importlib import import_module

    return getattr(import_module(f"transformers.models.{name}.modeling_{name}"), class_name)


SIZES = {
    "hidden_size": 12,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "router_jitter_noise": 0.0,
}
GROUPS = {"n_group": 4, "topk_group": 2}
PEERS = {
    "Mixtral": ("mixtral", "MixtralTopKRouter", {}, {}),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": True}, {"norm_topk_prob": True}),
    "OLMoE": ("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": False}, {"norm_topk_prob": False}),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {}, {"topk_before_score": True, "router_bias": True}),
    "DeepSeek-V2": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"routed_scaling_factor": 4.0, "topk_method": "group_limited_greedy"},
        dict(group_score="max", norm_topk_prob=False, routed_scaling_factor=4.0, **GROUPS),
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {"routed_scaling_factor": 2.5, "norm_topk_prob": True},
        dict(
            scoring_func="sigmoid",
            use_selection_bias=True,
            norm_topk_eps=1e-20,
            routed_scaling_factor=2.5,
            **GROUPS,
        ),
    ),
    "DeepSeek-V4": (
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
        {
            "scoring_func": "sqrtsoftplus",
            "use_selection_bias": True,
            "norm_topk_eps": 1e-20,
            "routed_scaling_factor": 1.5,
        },
    ),
}


@pytest.mark.parametrize("peer", PEERS)
def test_the_router_chooses_and_weighs_as_transformers_does(peer):
    module, class_name, their_options, our_options = PEERS[peer]
    theirs = hugging_face(module, class_name)(SimpleNamespace(**SIZES, **their_options))
    ours = make_router(router_dtype="float32", num_experts_per_tok=3, **our_options)
    theirs.load_state_dict(ours.state_dict())
    x = inputs(200)
    their_logits, their_weights, their_experts = theirs(x)
    routing = ours(x)
    if peer.startswith("DeepSeek"):  # their top-k is not sorted
        (experts, weights), (their_experts, their_weights) = (
            by_id(routing.experts, routing.weights),
            by_id(their_experts, their_weights),
        )
    else:
        experts, weights = routing.experts, routing.weights
    assert torch.equal(experts, their_experts)
    torch.testing.assert_close(routing.logits, their_logits)
    torch.testing.assert_close(weights, their_weights)


def test_a_selection_bias_stored_in_16_bits_is_float32_again():
    router = make_router(scoring_func="sigmoid", use_selection_bias=True)
    stored = {key: value.bfloat16() for key, value in router.state_dict().items()}
    for assign in (False, True):
        router.load_state_dict(stored, assign=assign)
        assert router.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_extreme_logits_give_finite_weights_and_gradients(score):
    router = make_router(scoring_func=score)
    x = inputs().requires_grad_()
    with torch.no_grad():
        router.weight.fill_(-1e4)
    routing = router(x.abs())
    routing.weights.sum().backward()
    assert routing.weights.isfinite().all()
    assert x.grad.isfinite().all()
