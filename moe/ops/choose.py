"""The only place that chooses a backend: from a device and a request, every time, with no state."""

from importlib.util import find_spec
from types import ModuleType
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from moe.config import Activation
from moe.ops import pytorch, reference

Backend = Literal["auto", "reference", "torch", "triton"]
OPERATIONS = ("dispatch", "grouped_linear", "activate", "combine", "experts_ffn")


class Ops(Protocol):
    """The operations of a MoE layer; `moe.ops.reference` says what each one means."""

    def dispatch(self, x: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, top_k: int) -> Tensor:
        """Copy tokens (t d) into the rows of their pairs (p d)."""
        ...

    def grouped_linear(
        self, rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Each row (p i) meets the expert (e o i) that owns it -> (p o)."""
        ...

    def activate(
        self,
        pre: Tensor,
        activation: Activation,
        *,
        interleaved: bool = False,
        limit: float = 7.0,
        alpha: float = 1.702,
    ) -> Tensor:
        """The experts' non-linearity."""
        ...

    def combine(self, rows: Tensor, weights: Tensor, row_of_pair: Tensor, offsets: Tensor) -> Tensor:
        """Weighted sum of the rows (p d) of each token -> (t d)."""
        ...

    def experts_ffn(
        self,
        x: Tensor,
        weights: Tensor,
        pair_of_row: Tensor,
        row_of_pair: Tensor,
        offsets: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        *,
        activation: Activation = "swiglu",
        interleaved: bool = False,
        limit: float = 7.0,
        alpha: float = 1.702,
    ) -> Tensor:
        """The routed experts of a layer (t d) -> (t d)."""
        ...


def choose_ops(device: torch.device | str, request: Backend = "auto") -> Ops:
    """The operations to run on this device. "auto" means Triton where it works, else the torch backend.

    Raises:
        ValueError: an unknown request.
        RuntimeError: a request that cannot be met here; the message says what is missing.
    """
    check_backend(request)
    if request == "reference":
        return _as_ops(reference)
    if request == "torch":
        return _as_ops(pytorch)
    obstacle = triton_obstacle(torch.device(device))
    if obstacle is None:
        import moe_triton  # pyright: ignore[reportMissingTypeStubs]

        return _as_ops(moe_triton)
    if request == "triton":
        raise RuntimeError(f'backend="triton" cannot run on {device}: {obstacle} Or use backend="auto".')
    return _as_ops(pytorch)


def check_backend(request: str) -> None:
    """Raise ValueError unless this is the name of a backend, or "auto"."""
    if request not in get_args(Backend):
        raise ValueError(f"backend={request!r} must be one of {list(get_args(Backend))}.")


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this device, and the way out; None when they can."""
    import moe_triton  # pyright: ignore[reportMissingTypeStubs]

    if device.type != "cuda":
        return "Triton needs a GPU (a cuda device)."
    if not hasattr(moe_triton, "experts_ffn"):
        return "this version of sparse-moe has no Triton kernels yet."
    if find_spec("triton") is None:
        return "the triton package is missing. Install it with: pip install triton."
    return None


def describe(device: torch.device | str) -> list[tuple[str, str, str]]:
    """For each operation: its name, the backend that "auto" takes on this device, why not a faster one."""
    obstacle = triton_obstacle(torch.device(device))
    if obstacle is None:
        return [(name, "triton", "the fastest here") for name in OPERATIONS]
    return [(name, "torch", f"not triton: {obstacle}") for name in OPERATIONS]


def _as_ops(module: ModuleType) -> Ops:
    return cast(Ops, module)
