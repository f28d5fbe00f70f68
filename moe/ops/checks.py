"""What every backend refuses at the door, with the same words."""

from typing import get_args

from torch import Tensor

from moe.config import GATED_ACTIVATIONS, Activation


def check_experts_ffn(
    x: Tensor,
    weights: Tensor,
    pair_of_row: Tensor,
    row_of_pair: Tensor,
    offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
) -> None:
    """Raise ValueError unless the arguments of `experts_ffn` fit together."""
    pairs = (weights.numel(),)
    check_weights(x, weights, up_proj, down_proj, up_bias, down_bias, activation)
    _require_shape("pair_of_row", pair_of_row, pairs)
    _require_shape("row_of_pair", row_of_pair, pairs)
    _require_shape("offsets", offsets, (down_proj.shape[0] + 1,))
    for name, tensor in (("pair_of_row", pair_of_row), ("offsets", offsets)):
        _require_device(name, tensor, x)


def check_weights(
    x: Tensor,
    weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
) -> None:
    """Raise ValueError unless x (t d) and weights (t k) fit experts of this shape."""
    check_activation(activation)
    num_experts, d, h = down_proj.shape
    width = 2 * h if activation in GATED_ACTIVATIONS else h
    _require_shape("x", x, (weights.shape[0], d))
    _require_shape("up_proj", up_proj, (num_experts, width, d))
    if up_bias is not None:
        _require_shape("up_bias", up_bias, (num_experts, width))
    if down_bias is not None:
        _require_shape("down_bias", down_bias, (num_experts, d))
    require_same(x=x, up_proj=up_proj, down_proj=down_proj, up_bias=up_bias, down_bias=down_bias)
    _require_device("weights", weights, x)


def refuse_batch_invariant(batch_invariant: bool) -> None:
    """Raise RuntimeError when it is asked for: only the Triton kernels choose their order of sums."""
    if batch_invariant:
        raise RuntimeError(
            "batch_invariant=True needs the triton backend: matrix products in torch choose their order of "
            'summation by the number of rows. Use backend="triton" on a GPU, or batch_invariant=False.'
        )


def check_activation(activation: str) -> None:
    """Raise ValueError unless this is the name of an activation."""
    if activation not in get_args(Activation):
        raise ValueError(f"activation={activation!r} must be one of {list(get_args(Activation))}.")


def check_grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the arguments of `grouped_linear` fit together."""
    num_experts, outputs, inputs = weight.shape
    _require_shape("rows", rows, (rows.shape[0], inputs))
    _require_shape("offsets", offsets, (num_experts + 1,))
    if bias is not None:
        _require_shape("bias", bias, (num_experts, outputs))
    require_same(rows=rows, weight=weight, bias=bias)


def require_same(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors share the first one's dtype and device."""
    (first_name, first), *others = ((name, t) for name, t in tensors.items() if t is not None)
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, but {first_name} is {first.dtype}: one dtype for both. "
                f"Cast one of them, or run under torch.autocast."
            )
        _require_device(name, tensor, first, first_name)


def _require_device(name: str, tensor: Tensor, other: Tensor, other_name: str = "x") -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but {other_name} is on {other.device}; move one of them."
        )


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}.")
