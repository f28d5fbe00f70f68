"""The only place that chooses a backend: from a device and a request, every time, with no state."""

import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from moe.config import Activation
from moe.ops import pytorch, reference

Backend = Literal["auto", "reference", "torch", "triton"]
OPERATIONS = ("sort_by_expert", "dispatch", "grouped_linear", "activate", "combine", "experts_ffn")
TRITON_WHEELS = ("triton", "triton-windows", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm")


class Ops(Protocol):
    """The operations of a MoE layer; `moe.ops.reference` says what each one means."""

    def sort_by_expert(self, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the pairs of experts (t k): pair_of_row (p), row_of_pair (p), offsets (e+1)."""
        ...

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
        weights_on_input: bool = False,
        batch_invariant: bool = False,
    ) -> Tensor:
        """The routed experts of a layer (t d) -> (t d)."""
        ...


def choose_ops(
    device: torch.device | str, request: Backend = "auto", dtype: torch.dtype | None = None
) -> Ops:
    """The operations to run on this device. "auto" means Triton where it works, else the torch backend.

    dtype, if known, is that of the products: "auto" leaves float64 to the torch backend.

    With TRITON_INTERPRET=1 in the environment, "triton" on a CPU runs the kernels in Triton's interpreter.

    Raises:
        ValueError: an unknown request.
        RuntimeError: a request that cannot be met here; the message says what is missing.
    """
    check_backend(request)
    if request == "reference":
        return _as_ops(reference)
    if request == "torch" or (request == "auto" and dtype == torch.float64):
        return _as_ops(pytorch)
    device = torch.device(device)
    is_interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    obstacle = PACKAGE_OBSTACLE if request == "triton" and is_interpreted else triton_obstacle(device)
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
    if device.type != "cuda":
        return "Triton needs a GPU (a cuda device)."
    return PACKAGE_OBSTACLE or _gpu_obstacle(device)


def package_obstacle() -> str | None:
    """Why the installed triton package cannot run the kernels, and the way out; None when it can."""
    if find_spec("triton") is None:
        return "the triton package is missing. Install it with: pip install triton (Windows: triton-windows)."
    found = _triton_version()
    numbers = re.match(r"(\d+)\.(\d+)", found or "")
    if numbers and (int(numbers[1]), int(numbers[2])) < (3, 6):
        return f"triton {found} is too old. Install a newer one with: pip install 'triton>=3.6'."
    return None


def describe(device: torch.device | str) -> list[tuple[str, str, str]]:
    """For each operation: its name, the backend that "auto" takes on this device, why not a faster one."""
    obstacle = triton_obstacle(torch.device(device))
    if obstacle is None:
        return [(name, "triton", "the fastest here") for name in OPERATIONS]
    return [(name, "torch", f"not triton: {obstacle}") for name in OPERATIONS]


def _gpu_obstacle(device: torch.device) -> str | None:
    """Why this GPU is too old; not asked while compiling, where the question would end the graph."""
    if torch.compiler.is_compiling() or torch.version.hip or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels need sm_80 (Ampere) or newer; this GPU is sm_{major}{minor}."


def _as_ops(module: ModuleType) -> Ops:
    return cast(Ops, module)


def _triton_version() -> str | None:
    for wheel in TRITON_WHEELS:
        try:
            return version(wheel)
        except PackageNotFoundError:
            continue
    return None


# Known once: to look a version up takes longer than a layer takes to decode a token, and a constant is what
# torch.compile can read. Triton itself is not imported.
PACKAGE_OBSTACLE = package_obstacle()
