"""Every kernel of this package is launched here, on a device that is asked for its kind once."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)  # what triton.jit looks at when it is applied


@dataclass(frozen=True, slots=True)
class Target:
    """What kernels are made for: kind, architecture (90 for sm_90, "gfx942"), number of multiprocessors."""

    kind: Literal["cuda", "hip", "cpu"]
    arch: int | str
    units: int

    @property
    def name(self) -> str:
        """Such as sm_90, gfx942 or cpu."""
        return f"sm_{self.arch}" if self.kind == "cuda" else str(self.arch)


_pretended: ContextVar[Target | None] = ContextVar("pretended", default=None)


@contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Choose schedules as if every tensor were on this target: to compile for a device that is not here."""
    token = _pretended.set(target)
    try:
        yield
    finally:
        _pretended.reset(token)


def target_of(device: torch.device) -> Target:
    """The target of a device."""
    if (pretended := _pretended.get()) is not None:
        return pretended
    if device.type != "cuda":
        return Target("cpu", "cpu", 4)
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: int,
) -> None:
    """Run a kernel over a grid with its arguments by name; an empty grid is no launch.

    The launch goes to the device of the first tensor, on torch's current stream.
    """
    if 0 in grid:
        return
    options |= {"num_warps": num_warps, "num_stages": num_stages}
    if (launches := _recorded.get()) is None:
        run(kernel, grid, arguments, **options)
    else:
        launches.append(Launch(kernel, grid, arguments, options))


def run(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], **options: int) -> Any:
    """The launch itself, which gives the compiled kernel; tests replace it to see what would be launched."""
    with on_device(next(a.device for a in arguments.values() if isinstance(a, Tensor))):
        return kernel[grid](
            **arguments, **options, enable_fp_fusion=True
        )  # the default is about to change: triton 3.10


@dataclass(frozen=True, slots=True)
class Launch:
    """What `run` is called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches that this thread asks for inside the block; none of them runs."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches inside the block go to this device.

    Raises:
        RuntimeError: the device is no GPU, and the kernels are not interpreted.
    """
    if device.type != "cuda":
        if not INTERPRETED:
            raise RuntimeError(
                f"the Triton kernels run on a GPU, and a tensor is on {device}. Move it to one, "
                f"or set TRITON_INTERPRET=1 before triton is imported to run them slowly on a CPU."
            )
        return nullcontext()
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def is_plain(*leaves: Tensor | None) -> bool:
    """Whether kernels can be called at once: no gradient asked for, nothing traced, real tensors.

    The dispatcher costs some 20 us, which a token being decoded would feel.

    Raises:
        NotImplementedError: a forward-mode derivative is asked for; it would silently be zero.
    """
    return _is_real(*leaves) and not needs_grad(*leaves)


def is_unwatched(*leaves: Tensor | None) -> bool:
    """Whether autograd alone would see an operator: real tensors, nothing traced, no mode and no torch.func.

    Raises:
        NotImplementedError: as `is_plain`.
    """
    return _is_real(*leaves) and not (
        is_in_torch_dispatch_mode()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def needs_grad(*leaves: Tensor | None) -> bool:
    """Whether a gradient of one of them is asked for."""
    return torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)


def _is_real(*leaves: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    given = [leaf for leaf in leaves if leaf is not None]
    if forward_ad._current_level >= 0 and any(_has_tangent(leaf) for leaf in given):
        raise NotImplementedError(
            'the Triton kernels have no forward-mode derivatives. Use backend="torch", or reverse mode.'
        )
    return all(type(leaf) in (Tensor, torch.nn.Parameter) and not leaf.is_meta for leaf in given)


def _has_tangent(leaf: Tensor) -> bool:
    return forward_ad.unpack_dual(leaf).tangent is not None


def ceil_div(number: int, by: int) -> int:
    """number / by, rounded up. Triton's own costs microseconds outside a kernel."""
    return -(-number // by)


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least this number, and at least 1."""
    return 1 << max(0, number - 1).bit_length()
