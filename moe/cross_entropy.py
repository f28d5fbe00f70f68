"""Cross-entropy of a linear head, a chunk of tokens at a time.

    logits = hidden @ weight^T,   loss = mean over counted tokens of logsumexp(logits) - logits[target]
    d loss / d logits = (softmax(logits) - onehot(target)) / counted tokens

The gradient of the logits is known as soon as the logits are, so both products with it are taken in the
forward pass and the chunk is forgotten: logits (t v) of a long batch are never held whole, and backward
recomputes nothing. The idea is Liger Kernel's (2410.10989); checkpointing each chunk instead would
compute the logits a second time.

Axes: t tokens, d model width, v vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from moe.attention import at_least_fp32
from moe.autocast import autocast_dtype

IGNORED = -100

_CHUNK_LOGITS = 2**24  # logits of one chunk when chunk_tokens is None: 64 MiB in fp32


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """hidden (t d), weight (v d), targets (t) int64 -> mean nats of the tokens whose target is not -100.

    0 with zero gradients when every target is ignored. Products are taken in autocast's dtype where it is on,
    softmax and sums in fp32 or wider. Differentiable once.

    Raises:
        ValueError: `chunk_tokens` below 1.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"chunk_tokens={chunk_tokens} must be at least 1, or None to let the vocabulary choose."
        )
    chunk = chunk_tokens or max(1, _CHUNK_LOGITS // weight.shape[0])
    dtype = _product_dtype(hidden)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return loss_and_gradients(hidden, weight, targets, chunk, dtype)[0]
    counted, known, mean = _targets(targets, at_least_fp32(dtype))
    losses = [
        _chunk(hidden[rows], weight.to(dtype), known[rows], counted[rows])[0]
        for rows in _slices(hidden.shape[0], chunk)
    ]
    return sum(losses, mean.new_zeros(())) * mean


@torch.library.custom_op("moe::linear_cross_entropy", mutates_args=())
def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss, the gradients of the summed loss in hidden (t d) and weight (v d), 1 / counted tokens.

    An operator of its own, so that a compiler neither unrolls the loop nor keeps the chunks. The gradients
    are those of the sum, because a mean's would underflow in fp16 before a loss scale could save them.
    """
    counted, known, mean = _targets(targets, at_least_fp32(dtype))
    head = weight.to(dtype)
    loss = mean.new_zeros(())
    grad_hidden = torch.zeros_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=mean.dtype)
    for rows in _slices(hidden.shape[0], chunk):
        part, logits, normaliser = _chunk(hidden[rows], head, known[rows], counted[rows])
        loss = loss + part
        slope = logits.sub_(normaliser).exp_()
        slope = slope.scatter_add_(1, known[rows], -torch.ones_like(normaliser))
        slope = slope.mul_(counted[rows]).to(dtype)
        grad_hidden[rows] = (slope @ head).to(hidden.dtype)
        grad_weight += slope.T @ hidden[rows].to(dtype)
    return loss * mean, grad_hidden, grad_weight, mean


@loss_and_gradients.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    wide = at_least_fp32(dtype)
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden),
        torch.empty_like(weight, dtype=wide),
        hidden.new_empty((), dtype=wide),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True; the saved gradients would pass for constants
        raise RuntimeError(
            "linear_cross_entropy can be differentiated once. For a second derivative, use "
            "torch.nn.functional.cross_entropy on the logits."
        )
    *sums, mean = ctx.saved_tensors
    grads = ((total * (grad * mean)).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True))
    return *grads, None, None, None


loss_and_gradients.register_autograd(_backward, setup_context=_keep_gradients)


def _chunk(hidden: Tensor, head: Tensor, known: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's part of the sum, its logits (t v) and their normaliser (t 1)."""
    logits = (hidden.to(head.dtype) @ head.T).to(counted.dtype)
    normaliser = logits.logsumexp(-1, keepdim=True)
    return ((normaliser - logits.gather(1, known)) * counted).sum(), logits, normaliser


def _targets(targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens count (t 1), 0 or 1; each one's target (t 1), 0 for ignored ones; 1 / counted tokens."""
    counted = (targets != IGNORED)[:, None]
    mean = 1 / counted.sum().clamp(min=1).to(dtype)
    return counted.to(dtype), targets[:, None].where(counted, 0), mean


def _slices(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, tokens, chunk)]


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of `hidden` runs; autocast, where it is on, leaves fp64 alone."""
    dtype = autocast_dtype(hidden.device)
    return hidden.dtype if dtype is None or hidden.dtype == torch.float64 else dtype
