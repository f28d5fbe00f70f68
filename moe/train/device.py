"""What a run computes on: device, precision, peak speed, memory in use."""

import platform
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from moe.ops.choose import choose_ops
from moe.train.memory import host_memory_available
from moe.train.settings import TrainConfig

# Dense bf16 tensor-core peak in TFLOP/s, from the makers' data sheets (never the sparse figure)
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "B200": 2250.0,
}


def choose_device(request: str) -> torch.device:
    """The device of a run: "auto" is a CUDA GPU when there is one, else the CPU.

    Raises:
        ValueError: not a device, or one that this machine lacks.
    """
    if request == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(request)
    except RuntimeError:
        raise ValueError(
            f'train.device={request!r} is no device. Use "auto", "cpu", "cuda" or "cuda:1".'
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"train.device={request!r}: torch sees {torch.cuda.device_count()} CUDA devices. "
            f'Use "auto" or "cpu".'
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f'train.device={request!r}: torch sees no Apple GPU. Use "auto" or "cpu".')
    return device


def check_backend(config: TrainConfig, device: torch.device) -> None:
    """Refuse a backend that cannot run on the device, before anything is written.

    Raises:
        ValueError: says what is missing.
    """
    try:
        choose_ops(device, config.backend)
    except RuntimeError as error:
        raise ValueError(f"train.{error}") from None


def choose_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bfloat16 on a GPU, float32 elsewhere, unless set."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `dtype`; parameters, router and losses stay float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def device_name(device: torch.device) -> str:
    """Words for a person: the GPU's name, or the kind of CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the maker states for bf16, or None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for word, tera in PEAK_TFLOPS.items() if word in name), None)


def memory_in_use(device: torch.device) -> int:
    """Peak bytes so far: of the GPU's allocator, or resident memory of this process; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_available(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where that is unknown.

    On a GPU, what torch's allocator holds without using it counts as free.
    """
    if device.type == "cuda":
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + spare
    return host_memory_available() if device.type == "cpu" else None
