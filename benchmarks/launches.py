"""What real use of the kernels would launch, recorded without a device.

The launchers of moe_triton run on `meta` tensors, which have shapes and no memory, as if they were on some
GPU, and `moe_triton.launch` notes their launches. A launch is reduced to what the compiler sees of it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_triton import launch
from moe_triton.config import FOLDER
from moe_triton.launch import Target

# One device of each architecture: A100, H100, B200, MI300X, and their numbers of multiprocessors.
TARGETS = {
    "sm_80": Target("cuda", 80, 108),
    "sm_90": Target("cuda", 90, 132),
    "sm_100": Target("cuda", 100, 148),
    "gfx942": Target("hip", "gfx942", 304),
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
DIVISIBLE = ("tt.divisibility", 16)
WITHIN_2_GB = ("tt.pointer_range", 32)  # AMD's buffer instructions

Attribute = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as the compiler is asked for it.

    what        the call that needs it
    signature   (parameter, type) in order; "constexpr" for those of `constants`
    attributes  (index of a parameter, what is known of it)
    """

    what: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[int, tuple[Attribute, ...]], ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that become the same code."""
        constants = repr(self.constants)  # 1 and True are equal, and differ to the compiler
        return (
            self.module,
            self.kernel,
            self.signature,
            constants,
            self.attributes,
            self.num_warps,
            self.num_stages,
            self.maxnreg,
        )


def describe(what: str, kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, int]) -> Launch:
    """The launch of a kernel with these arguments, specialised as Triton does it."""
    signature, constants, attributes = [], [], []
    is_amd = launch.target_of(torch.device("meta")).kind == "hip"
    for parameter in kernel.params:
        value = arguments[parameter.name]
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        else:
            signature.append((parameter.name, type_name(value)))
            if not plain and (known := tuple(_known(value, is_amd))):
                attributes.append((parameter.num, known))
    return Launch(
        what,
        kernel.__module__,
        kernel.__name__,
        tuple(signature),
        tuple(constants),
        tuple(attributes),
        **options,
    )


def type_name(value: Any) -> str:
    """How a signature spells the type of an argument, such as *bf16, i32 or tensordesc<bf16[1, 128, 64]>."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}[{', '.join(map(str, value.block_shape))}]>"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _known(value: Any, is_amd: bool) -> Iterator[Attribute]:
    """Torch allocates at multiples of 16 bytes; a view starts where its offset says."""
    if isinstance(value, Tensor):
        if value.storage_offset() * value.element_size() % 16 == 0:
            yield DIVISIBLE
        if is_amd and value.untyped_storage().nbytes() < 2**31:
            yield WITHIN_2_GB
    elif type(value) is int and value % 16 == 0:
        yield DIVISIBLE


@contextmanager
def recorded(what: str, target: Target) -> Iterator[list[Launch]]:
    """The launches made inside the block, none of which runs; schedules are those of the package's tables."""
    found: list[Launch] = []
    own_tables = mock.patch.dict(os.environ, {FOLDER: os.devnull})
    with own_tables, launch.pretend(target), launch.recorded() as launches:
        yield found
        found += [describe(what, one.kernel, one.arguments, one.options) for one in launches]
