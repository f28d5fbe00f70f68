"""What the operations refuse at the door."""

import math

from torch import Tensor, bfloat16, float16, float32, int32, int64

from .activation import check_activation
from .settings import Settings

DTYPES = (bfloat16, float16, float32)
INTEGERS = (int64, int32)
MOST_CHANNELS = 256  # of a head: more would not fit into the registers of an attention kernel
MOST_PLACES = 2**30  # keys of a head, or query rows: attention counts both with 32 bits


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


def check_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
    """Raise ValueError unless the arguments of `attention_over_cache` fit together."""
    require_rank("queries", queries, "b n s c")
    require_rank("keys", keys, "b g l c")
    (b, n, s, c), (_, g, l, _) = queries.shape, keys.shape
    shared = keys.shape[0] == 1
    require_shape("keys", keys, (1 if shared else b, g, l, c))
    require_shape("values", values, tuple(keys.shape))
    if n % max(1, g) or (g == 0 and n):
        raise ValueError(f"{n} query heads cannot share {g} key heads evenly: n must be a multiple of g.")
    if not (16 <= c <= MOST_CHANNELS and c % 16 == 0):
        raise ValueError(
            f"c={c} channels a head: attention_over_cache takes multiples of 16 up to {MOST_CHANNELS}. Keep "
            f"queries, keys and values with channels of zeros up to one; they change no result."
        )
    if max(l, l + s, b * n * s) >= MOST_PLACES:
        raise ValueError(
            f"{l} keys and {b} x {n} x {s} query rows: fewer than 2^30 of each are taken. Cut them into "
            f"parts; those of the keys are merged by their lse."
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} must be a positive number; flip the sign of the queries instead.")
    require_dtype("keys", keys)
    require_same(keys=keys, values=values)
    require_device(keys, "keys", queries=queries)
    if queries.dtype not in (keys.dtype, float32):
        raise ValueError(
            f"queries is {queries.dtype}, but keys is {keys.dtype}: queries of the cache's dtype or float32 "
            f"are taken. Cast the queries."
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
