"""No speed for a wrong result: every candidate's output and gradients are held against float64 first.

What is run is the very size that is timed. A token's output and input gradient depend on that token alone,
and with an incoming gradient that is zero elsewhere the gradients of the weights depend on the sampled tokens
alone: so `moe.ops.reference.moe_definition`, which runs every expert on every token, is computed for the
sample only.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.candidates import Candidate
from moe.layer import MoE
from moe.ops.reference import moe_definition

SAMPLE = 32  # tokens in a check ...
RUNS = 8  # ... and runs of a candidate, when a run has fewer tokens than that
FACTOR = 2.0  # the error of the definition in the candidate's own dtype, times this ...
ULPS = 8.0  # ... plus this many units in the last place of the largest value: sums in another order


class WrongResultError(Exception):
    """A candidate does not compute what it claims to compute."""


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """Values on the sampled tokens of some inputs (t d): the truth, and the definition in the inputs' dtype.

    `rows` and `upstream` (n d) have one entry an input. `truth` and `same_dtype` hold y, then the gradients
    of x and of the router's and experts' parameters, over the sampled rows of all inputs together.
    """

    inputs: list[Tensor]
    rows: list[Tensor]
    upstream: list[Tensor]
    truth: list[Tensor]
    same_dtype: list[Tensor]


def expected_of(layer: MoE, inputs: list[Tensor]) -> Expected:
    """What the layer means on a sample of the tokens of some inputs (t d).

    As many inputs as give SAMPLE tokens, at most RUNS. The sample is spread over an input. Tokens whose
    choice of experts is a matter of rounding - it differs between float64 and the router's own dtype - are
    left out.
    """
    inputs = inputs[: min(RUNS, -(-SAMPLE // len(inputs[0])))]
    rows = [_sample(layer, x) for x in inputs]
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(len(kept), layer.config.hidden_size, generator=generator).to(inputs[0]) for kept in rows
    ]
    tokens, grads = torch.cat([x[kept] for x, kept in zip(inputs, rows, strict=True)]), torch.cat(upstream)
    truth, same_dtype = (_definition(layer, tokens, grads, dtype) for dtype in (torch.float64, tokens.dtype))
    return Expected(inputs, rows, upstream, truth, same_dtype)


def check(candidate: Candidate, expected: Expected, *, backward: bool) -> None:
    """Run the candidate on whole inputs and compare. The dense yardstick, torch's modules, must be finite.

    Raises:
        WrongResultError: y or, with `backward`, a gradient is NaN or errs by more than is allowed.
    """
    for parameter in candidate.parameters:
        parameter.grad = None
    runs = zip(expected.inputs, expected.rows, expected.upstream, strict=True)
    outputs, grads = zip(*(_run(candidate, *run, backward=backward) for run in runs), strict=True)
    values = {"y": torch.cat(outputs)}
    if candidate.layer is None:
        if not bool(values["y"].isfinite().all()):
            raise WrongResultError(f"{candidate.name}: y is not finite")
        return
    if backward:
        values["gradient of x"] = torch.cat(grads)
        values |= {f"gradient of {name}": _gradient(p) for name, p in _parameters(candidate.layer)}
    for (name, ours), truth, same_dtype in zip(
        values.items(), expected.truth, expected.same_dtype, strict=False
    ):
        complaint = complain(ours, same_dtype, truth)
        if complaint:
            raise WrongResultError(f"{candidate.name}, t={len(expected.inputs[0])}: {name}: {complaint}")


def complain(ours: Tensor, same_dtype: Tensor, truth: Tensor) -> str | None:
    """Why `ours` is wrong, or None. NaN is wrong."""
    if not truth.numel():
        return None
    error = (ours.double() - truth).abs().max().item()
    floor = ULPS * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    allowed = FACTOR * (same_dtype.double() - truth).abs().max().item() + floor
    if error <= allowed:
        return None
    rule = f"{FACTOR:g} x the definition's own in {ours.dtype}, plus {ULPS:g} ulp"
    return f"error {error:.2e} is over {allowed:.2e} ({rule})"


def _sample(layer: MoE, x: Tensor) -> Tensor:
    rows = torch.linspace(0, len(x) - 1, min(SAMPLE, len(x)), device=x.device).round().long().unique()
    with torch.no_grad():
        chosen, exact = (
            layer.router(x[rows]).experts,
            copy.deepcopy(layer.router).double()(x[rows].double()).experts,
        )
    return rows[(chosen == exact).all(-1)]


def _run(
    candidate: Candidate, x: Tensor, rows: Tensor, upstream: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """One run on x (t d): y and the gradient of x at the sampled rows; parameters' gradients add up."""
    x = x.detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        y = candidate.run(x)
    if backward:
        y.backward(torch.zeros_like(y).index_copy(0, rows, upstream.to(y)))
    return y.detach()[rows], _gradient(x)[rows]


def _definition(layer: MoE, x: Tensor, upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    router = copy.deepcopy(layer.router)
    router = router.double() if dtype == torch.float64 else router
    x = x.detach().to(dtype).requires_grad_()
    up_proj, down_proj = (
        weight.detach().to(dtype).requires_grad_()
        for weight in (layer.experts.get_parameter("gate_up_proj"), layer.experts.down_proj)
    )
    routing = router(x)
    y = moe_definition(x, routing.experts, routing.weights.to(dtype), up_proj, down_proj)
    leaves = [x, *router.parameters(), up_proj, down_proj]
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(dtype))]


def _parameters(layer: MoE) -> list[tuple[str, nn.Parameter]]:
    """In the order of `_definition`: the router's, then the experts'."""
    experts = layer.experts
    stacked = [("gate_up_proj", experts.get_parameter("gate_up_proj")), ("down_proj", experts.down_proj)]
    return [*((f"router.{name}", p) for name, p in layer.router.named_parameters()), *stacked]


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
