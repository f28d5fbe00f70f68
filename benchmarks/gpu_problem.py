"""One call of the experts as every candidate gets it, and the float64 truth on a sample of its tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResultError
from benchmarks.shapes import Shape
from moe.config import Activation
from moe.ops.reference import activate
from moe.plan import RoutingPlan

SAMPLE = 32  # tokens that are checked
EXPERTS = 12  # experts whose weight gradients are checked, spread over those that the sample hits
FACTOR = 2.0  # the error of the definition in the candidate's dtype, times this, ...
ULPS = {2: 1.0, 4: 8.0}  # ... plus so many units in the last place, by bytes of the dtype: another order


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Tokens, what the router chose for them, weights, and the gradient of the output.

    x (t d), experts (t k) int64, weights (t k), up_proj (e 2h d), down_proj (e d h), up_bias (e 2h),
    down_bias (e d), upstream (t d). For gpt-oss the projections are transposed views of how they are stored.
    """

    shape: Shape
    x: Tensor
    experts: Tensor
    weights: Tensor
    up_proj: Tensor
    down_proj: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    upstream: Tensor
    plan: RoutingPlan

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What is differentiated, by name."""
        named = {
            "x": self.x,
            "weights": self.weights,
            "up_proj": self.up_proj,
            "down_proj": self.down_proj,
            "up_bias": self.up_bias,
            "down_bias": self.down_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def activation(self) -> Activation:
        """The non-linearity of the experts."""
        return "clamped_swiglu" if self.shape.gpt_oss else "swiglu"

    @property
    def active(self) -> int:
        """Experts that have a row."""
        return int((self.plan.tokens_per_expert > 0).sum())

    @property
    def max_violation(self) -> float:
        """How far the most loaded expert is over the mean load."""
        load = self.plan.tokens_per_expert.double()
        return float(load.max() / load.mean() - 1)


def make_problem(
    shape: Shape, tokens: int, *, zipf: bool, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Problem:
    """Random tokens and weights. Every expert is equally likely, or the likelihoods are Zipf's.

    Zipf: k draws without replacement with probabilities proportional to 1 / rank (Gumbel top-k, 1903.06059),
    ranks in random order.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype).mul_(std)

    d, h, e, k = shape.d, shape.h, shape.e, shape.k
    gumbel = -torch.rand(tokens, e, generator=generator, device=device).log_().neg_().log_()
    ranks = 1.0 + torch.randperm(e, generator=generator, device=device)
    chosen = (gumbel - ranks.log() if zipf else gumbel).topk(k, dim=-1)
    sizes = [(e, d, 2 * h), (e, h, d)] if shape.gpt_oss else [(e, 2 * h, d), (e, d, h)]
    up_proj, down_proj = (normal(*size, std=std) for size, std in zip(sizes, (d**-0.5, h**-0.5), strict=True))
    problem = Problem(
        shape=shape,
        x=normal(tokens, d),
        experts=chosen.indices,
        weights=chosen.values.softmax(dim=-1).to(dtype),
        up_proj=up_proj.mT if shape.gpt_oss else up_proj,
        down_proj=down_proj.mT if shape.gpt_oss else down_proj,
        up_bias=normal(e, 2 * h, std=0.1) if shape.gpt_oss else None,
        down_bias=normal(e, d, std=0.1) if shape.gpt_oss else None,
        upstream=normal(tokens, d),
        plan=RoutingPlan.from_experts(chosen.indices, e),
    )
    for leaf in problem.leaves.values():
        leaf.requires_grad_()
    return problem


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Gradients of one expert's weights as the two factors of a product over its n sampled rows."""

    of_pre: Tensor  # (n 2h)
    x: Tensor  # (n d)
    of_out: Tensor  # (n d)
    hidden: Tensor  # (n h)

    def gradient(self, name: str) -> Tensor:
        """The gradient of up_proj (2h d), down_proj (d h), up_bias (2h) or down_bias (d)."""
        if name.endswith("bias"):
            return (self.of_pre if name == "up_bias" else self.of_out).sum(0)
        return self.of_pre.T @ self.x if name == "up_proj" else self.of_out.T @ self.hidden


@dataclass(frozen=True, slots=True, eq=False)
class Definition:
    """Values on the sampled tokens: y (n d), gradients of x (n d) and of weights (n k), factors by expert."""

    y: Tensor
    of_x: Tensor
    of_weights: Tensor
    factors: dict[int, Factors]


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """The definition on sampled tokens `rows` (n), in float64 and in the problem's dtype."""

    problem: Problem
    rows: Tensor
    upstream: Tensor
    truth: Definition
    same_dtype: Definition


def expected_of(problem: Problem) -> Expected:
    """What the experts mean on a sample of the tokens.

    With an incoming gradient that is zero elsewhere the gradients of the weights depend on the sample alone.
    """
    t = len(problem.x)
    rows = torch.linspace(0, t - 1, min(SAMPLE, t), device=problem.x.device).round().long().unique()
    upstream = torch.zeros_like(problem.upstream).index_copy_(0, rows, problem.upstream[rows])
    truth, same_dtype = (_define(problem, rows, dtype) for dtype in (torch.float64, problem.x.dtype))
    return Expected(problem, rows, upstream, truth, same_dtype)


def check_forward(expected: Expected, y: Tensor, name: str) -> None:
    """Compare an output (t d).

    Raises:
        WrongResultError: it errs by more than is allowed, or is not finite somewhere.
    """
    _require_finite(name, "y", y)
    _compare(name, "y", y.detach()[expected.rows], expected.same_dtype.y, expected.truth.y)


def check_gradients(expected: Expected, gradients: dict[str, Tensor], name: str) -> None:
    """Compare the gradients of the problem's leaves, for the upstream gradient of `expected`.

    Raises:
        WrongResultError: one of them errs by more than is allowed, or is not finite somewhere.
    """
    for leaf, gradient in gradients.items():
        what = f"gradient of {leaf}"
        _require_finite(name, what, gradient)
        for ours, same_dtype, truth in _pieces(expected, leaf, gradient):
            _compare(name, what, ours, same_dtype, truth)


def _pieces(expected: Expected, leaf: str, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A gradient with its definition in both dtypes: the sampled rows, or one expert after the other."""
    truth, same_dtype = expected.truth, expected.same_dtype
    if leaf == "x":
        yield gradient[expected.rows], same_dtype.of_x, truth.of_x
    elif leaf == "weights":
        yield gradient[expected.rows], same_dtype.of_weights, truth.of_weights
    else:
        hit = sorted(truth.factors)
        for i in hit[:: max(1, len(hit) // EXPERTS)]:
            yield gradient[i], same_dtype.factors[i].gradient(leaf), truth.factors[i].gradient(leaf)
        for i in [i for i in range(expected.problem.shape.e) if i not in truth.factors][:1]:
            yield gradient[i], torch.zeros_like(gradient[i]), torch.zeros_like(gradient[i])


def _compare(name: str, what: str, ours: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    complaint = complain(ours, same_dtype, truth)
    if complaint:
        raise WrongResultError(f"{name}: {what}: {complaint}")


def complain(ours: Tensor, same_dtype: Tensor, truth: Tensor) -> str | None:
    """Why `ours` is wrong, or None: by its root mean square error and by its worst element. NaN is wrong."""
    truth = truth.double()
    ulps = ULPS[ours.element_size()] * torch.finfo(ours.dtype).eps
    off, own = ours.double() - truth, same_dtype.double() - truth
    for norm in ("mean square", "maximum"):
        size = (lambda t: t.square().mean().sqrt()) if norm == "mean square" else (lambda t: t.abs().max())
        error, allowed = size(off).item(), (FACTOR * size(own) + ulps * size(truth)).item()
        if not error <= allowed:
            rule = f"{norm}; {FACTOR:g} x the definition's own, plus ulps"
            return f"error {error:.2e} is over {allowed:.2e} ({rule})"
    return None


def _require_finite(name: str, what: str, tensor: Tensor) -> None:
    """A sum is NaN or infinite if one of its numbers is; it needs no memory of the tensor's size."""
    if not bool(tensor.detach().sum(dtype=torch.float32).isfinite()):
        raise WrongResultError(f"{name}: {what} is not finite everywhere")


@torch.no_grad()
def _define(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Definition:
    """One expert after the other, so that only one is held in float64."""
    x, upstream, scale = (t[rows].to(dtype) for t in (problem.x, problem.upstream, problem.weights))
    experts = problem.experts[rows]
    outs, of_xs = x.new_zeros(*experts.shape, x.shape[1]), x.new_zeros(*experts.shape, x.shape[1])
    factors = {}
    for i in experts.unique().tolist():
        token, slot = torch.where(experts == i)
        up, down = problem.up_proj[i].to(dtype), problem.down_proj[i].to(dtype)
        pre = x[token] @ up.T
        pre = pre if problem.up_bias is None else pre + problem.up_bias[i].to(dtype)
        of_out = scale[token, slot, None] * upstream[token]
        with torch.enable_grad():
            leaf = pre.requires_grad_()
            hidden = activate(leaf, problem.activation, interleaved=problem.shape.gpt_oss)
        (of_pre,) = torch.autograd.grad(hidden, leaf, of_out @ down)
        out = hidden.detach() @ down.T
        outs[token, slot] = out if problem.down_bias is None else out + problem.down_bias[i].to(dtype)
        of_xs[token, slot] = of_pre @ up
        factors[i] = Factors(of_pre, x[token], of_out, hidden.detach())
    y = (outs * scale[..., None]).sum(1)
    return Definition(y, of_xs.sum(1), (outs * upstream[:, None]).sum(-1), factors)
