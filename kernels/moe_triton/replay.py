"""Calls that come again are worked out once; afterwards their kernels are only launched.

A function that allocates, takes views and launches kernels, and looks into no tensor, does the same for all
tensors of the same shapes, strides and dtypes. `replayed` runs it once on tensors without memory, notes what it
allocates and launches, and from then on does just that. Choosing schedules, naming arguments and Triton's own
look at each of them take longer than a GPU needs for a few tokens.

What is unlike other calls in a way that is not noted here runs the function itself: the first call of a kind,
memory off a multiple of 16 bytes, hooks before a launch, AMD's pointer ranges, the interpreter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .config import what_schedules_depend_on
from .launch import INTERPRETED, Launch, on_device, pretend, recorded, target_of
from .tiles import precision

MOST_KINDS = 4096  # of calls to one function that are remembered, before all of them are forgotten
ALLOCATIONS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)


class NotReplayableError(Exception):
    """The function does something that is neither an allocation nor a view nor a launch."""


@dataclass(frozen=True, slots=True)
class View:
    """Memory of tensor number `of`, counted over the inputs and then over what a call allocates."""

    of: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int  # in numbers from the tensor's own start

    def within(self, tensors: Sequence[Any]) -> Tensor:
        """The view, as a tensor."""
        tensor = tensors[self.of]
        if self.start == 0 and tensor.shape == self.shape and tensor.stride() == self.strides:
            return tensor
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.start)


@dataclass(slots=True)
class Step:
    """One launch, its tensors as views, and what is allocated before it (number, shape, dtype) or freed after."""

    launch: Launch
    allocated: list[tuple[int, torch.Size, torch.dtype]]
    views: dict[str, View] = field(default_factory=dict)
    freed: list[int] = field(default_factory=list)
    # Once the kernel is compiled: its arguments in order, the places of pointers (place, number, bytes from the
    # tensor's start) and of descriptors among them.
    compiled: CompiledKernel | None = None
    grid: tuple[int, ...] = ()
    values: list[Any] = field(default_factory=list)
    pointers: list[tuple[int, int, int]] = field(default_factory=list)
    descriptors: list[tuple[int, View, dict[str, Any]]] = field(default_factory=list)

    def run(self, tensors: list[Any]) -> None:
        """Launch by way of Triton, which compiles what it has not met, and keep the compiled kernel."""
        arguments = dict(self.launch.arguments)
        for name, view in self.views.items():
            tensor = view.within(tensors)
            described = arguments[name]
            if isinstance(described, TensorDescriptor):
                tensor = TensorDescriptor(tensor, described.shape, described.strides, described.block_shape)
            arguments[name] = tensor
        kernel = self.launch.kernel
        compiled = launch.run(kernel, self.launch.grid, arguments, **self.launch.options)
        if type(compiled) is CompiledKernel and not kernel.pre_run_hooks:
            self._keep(arguments)
            self.grid = (*self.launch.grid, 1, 1)[:3]
            self.compiled = compiled

    def _keep(self, arguments: dict[str, Any]) -> None:
        names = self.launch.kernel.arg_names
        self.values, self.pointers, self.descriptors = [arguments[name] for name in names], [], []
        for place, name in enumerate(names):
            if (view := self.views.get(name)) is None:
                continue
            value, self.values[place] = self.values[place], None
            if isinstance(value, TensorDescriptor):
                self.descriptors.append((place, view, vars(value) | {"base": None}))
            else:
                self.pointers.append((place, view.of, view.start * value.element_size()))


@dataclass(slots=True)
class Tape:
    """All launches of a call, what is allocated after the last one, and what is returned."""

    steps: list[Step]
    last: list[tuple[int, torch.Size, torch.dtype]]
    made: int
    returned: Any  # a view, None, or a tuple of these

    def play(self, inputs: list[Tensor], addresses: list[int]) -> Any:
        """Do with these inputs what was done when the tape was made."""
        tensors: list[Any] = [*inputs, *(None,) * self.made]
        addresses = addresses + [0] * self.made
        like, off = inputs[0], 0
        stream = driver.active.get_current_stream(like.get_device())
        for step in self.steps:
            for number, shape, dtype in step.allocated:
                tensors[number] = tensor = _empty(like, shape, dtype)
                addresses[number] = address = tensor.data_ptr()
                off |= address
            if step.compiled is None or off % 16 or step.launch.kernel.pre_run_hooks:
                step.run(tensors)
            else:
                values = step.values.copy()
                for place, number, start in step.pointers:
                    values[place] = addresses[number] + start
                for place, view, described in step.descriptors:
                    values[place] = _describe(view.within(tensors), described)
                step.compiled[step.grid](*values, stream=stream)
            for number in step.freed:
                tensors[number] = None
        for number, shape, dtype in self.last:
            tensors[number] = _empty(like, shape, dtype)
        if type(self.returned) is tuple:
            return tuple([None if view is None else view.within(tensors) for view in self.returned])
        return None if self.returned is None else self.returned.within(tensors)


def _empty(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape) if dtype == like.dtype else like.new_empty(shape, dtype=dtype)


def _describe(tensor: Tensor, described: dict[str, Any]) -> TensorDescriptor:
    """A descriptor of what has been checked before: the usual way checks it again."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.__dict__.update(described)
    descriptor.base = tensor
    return descriptor


P, R = ParamSpec("P"), TypeVar("R")
RUN = launch.run
_kinds: list[dict[Any, "Tape | None"]] = []  # of each function, those of its calls that have been met


def replayed(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function of tensors, None and hashable settings that only allocates, takes views and launches."""
    kinds: dict[Any, Tape | None] = {}
    _kinds.append(kinds)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        tensors = [a for a in args if isinstance(a, Tensor)]
        addresses = [tensor.data_ptr() for tensor in tensors]
        device = tensors[0].device
        if not _is_replayable(device) or any([address % 16 for address in addresses]):
            return function(*args, **options)
        shapes = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]
        kind = (device, *shapes, *options.values(), _surroundings(device))
        if kind not in kinds:  # it may never come again
            if len(kinds) >= MOST_KINDS:
                kinds.clear()
            kinds[kind] = None
            return function(*args, **options)
        tape = kinds[kind]
        if tape is None:
            try:
                tape = kinds[kind] = _rehearse(function, args, options)
            except NotReplayableError:
                return function(*args, **options)
        with on_device(device):
            return tape.play(tensors, addresses)

    return call


def forget() -> None:
    """Work every call out anew: what it depends on has been replaced."""
    for kinds in _kinds:
        kinds.clear()


def _is_replayable(device: torch.device) -> bool:
    return (
        not INTERPRETED
        and target_of(device).kind == "cuda"
        and launch.run is RUN
        and knobs.runtime.add_stages_inspection_hook is None
    )


def _surroundings(device: torch.device) -> tuple[Any, ...]:
    """What launches depend on besides the arguments of a call."""
    compilation = knobs.compilation
    return (
        target_of(device),
        precision(),
        what_schedules_depend_on(),
        knobs.runtime.debug,
        compilation.instrumentation_mode,
        getattr(compilation, "fpsan_homomorphic_casts", None),
    )


def _rehearse(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Tape:
    """The tape of a call, made with tensors of the same kind without memory."""
    twins = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a
        for a in args
    ]
    inputs = [twin for twin in twins if isinstance(twin, Tensor)]
    device = next(a.device for a in args if isinstance(a, Tensor))
    with pretend(target_of(device)), recorded() as launches, _Watch(inputs, launches) as watch:
        result = function(*twins, **options)
    steps, allocated = [], watch.allocated
    for at, one in enumerate(launches):
        before = [new for when, *new in allocated if when == at]
        views = {}
        for name, value in one.arguments.items():
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, Tensor):
                views[name] = watch.view(tensor)
        steps.append(Step(one, before, views))
    last = [new for when, *new in allocated if when == len(launches)]
    returned = tuple(map(watch.view, result)) if type(result) is tuple else watch.view(result)
    _free(steps, returned if type(returned) is tuple else (returned,), len(inputs))
    return Tape(steps, last, len(allocated), returned)


def _free(steps: list[Step], returned: tuple[View | None, ...], inputs: int) -> None:
    """Let go of what is allocated after the last launch that needs it."""
    seen = {view.of for view in returned if view is not None}
    for step in reversed(steps):
        used = {view.of for view in step.views.values()} - seen
        step.freed = [number for number in used if number >= inputs]
        seen |= used


class _Watch(TorchDispatchMode):
    """Numbers the tensors of a rehearsal: its inputs, then what it allocates."""

    def __init__(self, inputs: list[Tensor], launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches
        self.allocated: list[tuple[int, int, torch.Size, torch.dtype]] = []  # launches before it, number, ...
        self.tensors = list(inputs)  # kept, so that no memory takes another's place
        self.numbers = {_storage(tensor): number for number, tensor in enumerate(inputs)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS and result.is_contiguous():
            number = len(self.tensors)
            self.tensors.append(result)
            self.numbers[_storage(result)] = number
            self.allocated.append((len(self.launches), number, result.shape, result.dtype))
        elif not func.is_view:
            raise NotReplayableError(str(func))
        return result

    def view(self, tensor: Tensor | None) -> View | None:
        """Where a tensor lies; None for none."""
        if tensor is None:
            return None
        if (number := self.numbers.get(_storage(tensor))) is None:
            raise NotReplayableError("a tensor from elsewhere")
        return View(number, tensor.shape, tensor.stride(), tensor.storage_offset())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
