"""What the operations refuse at the door."""

from torch import Tensor, bfloat16, float16, float32, int32, int64

from .activation import check_activation
from .settings import Settings

DTYPES = (bfloat16, float16, float32)
INTEGERS = (int64, int32)


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
    settings: Settings,
) -> None:
    """Raise ValueError unless the arguments of `experts_ffn` fit together."""
    check_activation(settings.activation)
    require_rank("down_proj", down_proj, "e d h")
    require_rank("weights", weights, "t k")
    num_experts, d, h = down_proj.shape
    tokens, top_k = weights.shape
    width = h if settings.gate == "none" else 2 * h
    require_shape("x", x, (tokens, d))
    require_shape("up_proj", up_proj, (num_experts, width, d))
    require_shape("pair_of_row", pair_of_row, (tokens * top_k,))
    require_shape("row_of_pair", row_of_pair, (tokens * top_k,))
    require_shape("offsets", offsets, (num_experts + 1,))
    if up_bias is not None:
        require_shape("up_bias", up_bias, (num_experts, width))
    if down_bias is not None:
        require_shape("down_bias", down_bias, (num_experts, d))
    require_dtype("x", x)
    require_same(x=x, up_proj=up_proj, down_proj=down_proj, up_bias=up_bias, down_bias=down_bias)
    require_device(x, weights=weights)
    require_integers(x, pair_of_row=pair_of_row, row_of_pair=row_of_pair, offsets=offsets)


def check_grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> None:
    """Raise ValueError unless the arguments of `grouped_linear` fit together."""
    require_rank("rows", rows, "p i")
    require_rank("weight", weight, "e o i")
    num_experts, outputs, inputs = weight.shape
    require_shape("rows", rows, (rows.shape[0], inputs))
    require_shape("offsets", offsets, (num_experts + 1,))
    if bias is not None:
        require_shape("bias", bias, (num_experts, outputs))
    require_dtype("rows", rows)
    require_same(rows=rows, weight=weight, bias=bias)
    require_integers(rows, "rows", offsets=offsets)


def check_grad_weight(grad: Tensor, rows: Tensor, offsets: Tensor, out: Tensor | None) -> None:
    """Raise ValueError unless the arguments of `grouped_linear_grad_weight` fit together."""
    require_rank("grad", grad, "p o")
    require_rank("rows", rows, "p i")
    require_rank("offsets", offsets, "e+1")
    require_shape("rows", rows, (grad.shape[0], rows.shape[1]))
    require_dtype("grad", grad)
    require_same(grad=grad, rows=rows)
    require_integers(grad, "grad", offsets=offsets)
    if out is None:
        return
    require_shape("out", out, (offsets.shape[0] - 1, grad.shape[1], rows.shape[1]))
    require_device(grad, "grad", out=out)
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"out has strides {out.stride()}: it is expanded, and several numbers of the sum would share "
            f"one place. Give it memory of its own: out.contiguous()."
        )


def require_dtype(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a dtype that the kernels do not have."""
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {tensor.dtype}; the Triton kernels take {', '.join(map(str, DTYPES))}. "
            f'Cast it, or use backend="torch", which takes every dtype.'
        )


def require_same(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors share the first one's dtype and device."""
    (first_name, first), *others = ((name, t) for name, t in tensors.items() if t is not None)
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, but {first_name} is {first.dtype}: one dtype for both. "
                f"Cast one of them, or run under torch.autocast."
            )
        require_device(first, first_name, **{name: tensor})


def require_device(first: Tensor, first_name: str = "x", **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but {first_name} is on {first.device}; move one of them."
            )


def require_integers(first: Tensor, first_name: str = "x", **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors hold integers, on the device of the first."""
    for name, tensor in tensors.items():
        if tensor.dtype not in INTEGERS:
            raise ValueError(
                f"{name} is {tensor.dtype}; it must hold integers, as sort_by_expert gives them."
            )
    require_device(first, first_name, **tensors)


def require_rank(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless the tensor has these axes."""
    if tensor.dim() != len(axes.split()):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({axes}).")


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}.")
