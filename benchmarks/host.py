"""What a call of the kernels costs the host, on any machine: nothing is compiled and nothing is launched.

    python -m benchmarks.host

A GPU and a compiler that do nothing take the place of Triton's, so that what remains of a call is the Python
between it and the driver. tests/test_replay.py looks at what would have been launched.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction
from triton.runtime.driver import driver

import moe_triton
from benchmarks.launches import TARGETS
from moe_triton import launch, replay

DEVICE = 97  # that no kernel has been compiled for


@dataclass(frozen=True, slots=True)
class Launched:
    """What reached the driver. types: of the arguments; code: all that the compiler has been told."""

    kernel: str
    types: tuple[str, ...]
    code: str
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class Driver:
    """A GPU and its compiler: they take notes at most."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.is_noting = False
        self.stream = 7

    def get_current_target(self) -> GPUTarget:
        """That of an H100."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """A number that no GPU has."""
        return DEVICE

    def get_current_stream(self, _device: int) -> int:
        """The stream that a test has set."""
        return self.stream

    def compile(self, src: Any, target: Any, options: dict[str, Any], **_: Any) -> CompiledKernel:
        """A compiled kernel that notes its launches."""
        code = repr((src.signature, sorted(src.constants.items()), sorted(src.attrs.items()), options))
        types = tuple(src.signature.values())
        kernel = CompiledKernel.__new__(CompiledKernel)

        def run(x, y, z, stream, _function, _packed, _metadata, enter, leave, *arguments) -> None:
            for hook in (enter, leave):
                if hook is not None:
                    hook(None)
            if self.is_noting:
                self.launched.append(Launched(src.fn.__name__, types, code, (x, y, z), stream, arguments))

        facts = {"module": None, "function": 0, "packed_metadata": (), "src": src, "name": src.fn.__name__}
        vars(kernel).update(facts, _run=run, _init_handles=lambda: None)
        return kernel


@contextmanager
def dummy_gpu() -> Iterator[Driver]:
    """Tensors of the CPU pass for those of an H100; the driver can note what is launched."""
    before, dummy = driver._active, Driver()
    driver.set_active(dummy)  # pyright: ignore[reportArgumentType]
    replay.forget()
    try:
        with (
            mock.patch.object(triton.compiler, "compile", dummy.compile),
            mock.patch.object(launch, "on_device", lambda _: nullcontext()),
            launch.pretend(TARGETS["sm_90"]),
        ):
            yield dummy
    finally:
        replay.forget()
        driver._active = before
        for kernel in kernels():
            kernel.device_caches.pop(DEVICE, None)
            kernel.compile = triton.compiler.compile


def kernels() -> Iterator[Any]:
    """All Triton kernels of the package."""
    for name, module in list(sys.modules.items()):
        if name.startswith("moe_triton."):
            yield from (value for value in vars(module).values() if isinstance(value, JITFunction))


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats + 10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[10:])


def calls(tokens: int, e: int, k: int, d: int = 256, h: int = 128) -> dict[str, Callable[[], object]]:
    """Routing and experts of a layer. The widths are small: the host's time does not depend on them."""
    shapes = {"x": (tokens, d), "weights": (tokens, k), "up": (e, 2 * h, d), "down": (e, d, h)}
    x, weights, up, down = (torch.zeros(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes.values())
    experts, grad = torch.zeros(tokens, k, dtype=torch.int64), torch.zeros(tokens, d, dtype=torch.bfloat16)
    plan = moe_triton.sort_by_expert(experts, e)

    def forward() -> Tensor:
        return moe_triton.experts_ffn(x, weights, *plan, up, down)

    return {
        "sort_by_expert": lambda: moe_triton.sort_by_expert(experts, e),
        "experts_ffn": torch.no_grad()(forward),
        "experts_ffn, forward + backward": lambda: torch.autograd.grad(
            forward(), (x, weights, up, down), grad
        ),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1,1024", help="comma-separated (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=500, help="of each call (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| call | tokens | us | launches | us without replay |\n|---|---:|---:|---:|---:|")
    with dummy_gpu() as gpu, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tokens in map(int, options.tokens.split(",")):
            for name, call in calls(tokens, e=64, k=8).items():
                replayed = microseconds(call, options.repeats)
                gpu.is_noting = True
                call()
                gpu.is_noting, launches = False, len(gpu.launched)
                gpu.launched.clear()
                with mock.patch.object(replay, "_is_replayable", lambda _: False):
                    plain = microseconds(call, options.repeats)
                print(f"| {name} | {tokens:,} | {replayed:.0f} | {launches} | {plain:.0f} |")


if __name__ == "__main__":
    main()
