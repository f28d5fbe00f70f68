"""What is kept of a call that can be replayed: its launches, what it allocates between them and returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .launch import Launch

# How a compiled kernel's `run` is called is known for these versions; others are launched by `kernel[grid]`.
CALLED_AS_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


class NotReplayableError(Exception):
    """Something else happens than allocations of aligned memory, views and launches."""


@dataclass(frozen=True, slots=True)
class View:
    """Memory of tensor number `of`, counted over the inputs and then over what a call allocates.

    start  in numbers from that tensor's own start
    whole  it is that tensor, in shape and strides
    """

    of: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    whole: bool

    def within(self, tensors: Sequence[Any]) -> Tensor:
        """The view, as a tensor."""
        tensor = tensors[self.of]
        if self.whole:
            return tensor
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.start)


@dataclass(slots=True)
class Allocation:
    """A contiguous tensor: its number, and the launches before it. dtype: None for the first input's."""

    number: int
    after: int
    shape: torch.Size
    dtype: torch.dtype | None

    def into(self, tensors: list[Any]) -> Tensor:
        """Allocate it, like the first input."""
        if self.dtype is None:
            tensor = tensors[0].new_empty(self.shape)
        else:
            tensor = tensors[0].new_empty(self.shape, dtype=self.dtype)
        tensors[self.number] = tensor
        return tensor


@dataclass(frozen=True, slots=True)
class Ready:
    """A compiled kernel and its arguments in order.

    pointers     (place among the arguments, tensor, bytes from the tensor's start)
    descriptors  (place, what is described, everything else of the descriptor)
    """

    compiled: CompiledKernel
    grid: tuple[int, int, int]
    values: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: list[tuple[int, View, dict[str, Any]]]

    def launch(self, tensors: list[Any], addresses: list[int], stream: int) -> None:
        """Launch it with these tensors."""
        values = self.values.copy()
        for place, number, start in self.pointers:
            values[place] = addresses[number] + start
        for place, view, described in self.descriptors:
            values[place] = _describe(view.within(tensors) if view.start else tensors[view.of], described)
        compiled: Any = self.compiled
        if not CALLED_AS_KNOWN or _has_hooks():
            compiled[self.grid](*values, stream=stream)
        else:  # what that does, less the hooks, which cost as much as the rest where there are none
            compiled.run(
                *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values
            )


@dataclass(slots=True)
class Step:
    """One launch, its tensors as views, what is allocated before it, and the numbers freed after it."""

    launch: Launch
    views: dict[str, View]
    allocated: list[Allocation]
    freed: list[int] = field(default_factory=list)
    ready: Ready | None = None

    def play(self, tensors: list[Any], addresses: list[int], stream: int) -> None:
        """Launch the compiled kernel, or let Triton compile it."""
        if self.ready is None or self.launch.kernel.pre_run_hooks:
            self._compile(tensors)
        else:
            self.ready.launch(tensors, addresses, stream)

    def _compile(self, tensors: list[Any]) -> None:
        kernel, arguments = self.launch.kernel, dict(self.launch.arguments)
        for name, view in self.views.items():
            value, tensor = arguments[name], view.within(tensors)
            is_described = isinstance(value, TensorDescriptor)
            arguments[name] = replace(value, base=tensor) if is_described else tensor
        compiled = launch.run(kernel, self.launch.grid, arguments, **self.launch.options)
        if type(compiled) is not CompiledKernel:  # a hook of Triton, or one that is still being compiled
            return
        values, pointers, descriptors = [arguments[name] for name in kernel.arg_names], [], []
        for place, name in enumerate(kernel.arg_names):
            if (view := self.views.get(name)) is None:
                continue
            value, values[place] = values[place], None
            if isinstance(value, TensorDescriptor):
                descriptors.append((place, view, vars(value) | {"base": None}))
            else:
                pointers.append((place, view.of, view.start * value.element_size()))
        x, y, z = (*self.launch.grid, 1, 1)[:3]
        self.ready = Ready(compiled, (x, y, z), values, pointers, descriptors)


@dataclass(slots=True)
class Tape:
    """All launches of a call, what is allocated after the last one, and what is returned."""

    steps: list[Step]
    last: list[Allocation]
    made: int
    returned: tuple[View | None, ...]
    is_tuple: bool

    def play(self, inputs: list[Tensor], addresses: list[int]) -> Any:
        """Do with these inputs what was done when the tape was made.

        Raises:
            NotReplayableError: memory that was allocated is off a multiple of 16 bytes.
        """
        tensors: list[Any] = inputs + [None] * self.made
        addresses = addresses + [0] * self.made
        stream, off = driver.active.get_current_stream(inputs[0].get_device()), 0  # pyright: ignore[reportAttributeAccessIssue]
        for step in self.steps:
            for allocation in step.allocated:
                addresses[allocation.number] = address = allocation.into(tensors).data_ptr()
                off |= address
            if off % 16:
                raise NotReplayableError("an allocator with another alignment")
            step.play(tensors, addresses, stream)
            for number in step.freed:
                tensors[number] = None
        for allocation in self.last:
            allocation.into(tensors)
        results = tuple([None if view is None else view.within(tensors) for view in self.returned])
        return results if self.is_tuple else results[0]


def _has_hooks() -> bool:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _describe(tensor: Tensor, described: dict[str, Any]) -> TensorDescriptor:
    """A descriptor like one that has been checked: the usual way checks it again."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.__dict__.update(described)
    descriptor.base = tensor
    return descriptor
