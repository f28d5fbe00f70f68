"""Calls that come again are worked out once; afterwards their kernels are only launched.

A function that allocates, takes views and launches kernels, and looks into no tensor, does the same for all
tensors of the same shapes, strides and dtypes. `replayed` runs it once on tensors without memory, notes what
it allocates and launches, and from then on does just that. Choosing schedules, naming arguments and Triton's
own look at each of them take longer than a GPU needs for a few tokens.

The function itself still runs for the first call of a kind, which may never come again, and for what the
notes do not tell apart: memory off a multiple of 16 bytes, AMD's pointer ranges, hooks of Triton, the
interpreter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .config import what_schedules_depend_on
from .launch import INTERPRETED, Launch, pretend, recorded, target_of
from .tiles import precision

MOST_KINDS = 1024  # of calls to one function that are remembered, before all of them are forgotten
# How a compiled kernel's `run` is called is known for these versions; others are launched by `kernel[grid]`.
CALLED_AS_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
ALLOCATIONS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)


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


P = ParamSpec("P")
R = TypeVar("R")
RUN = launch.run
Kinds = dict[
    Any, "Tape | bool"
]  # those of a function's calls that have been met; False: without a tape for ever
_kinds: list[Kinds] = []


def replayed(
    check: Callable[..., None] = lambda *_: None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Wrap a function of tensors, None and hashable settings that only allocates, takes views and launches.

    It writes into nothing but what it allocates.

    check: called with the arguments by position, unless tensors of these kinds have passed it before.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        kinds: Kinds = {}
        _kinds.append(kinds)

        @wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            tensors, addresses, off = [], [], 0
            kind: list[Any] = [*options.items()]
            for arg in args:
                if isinstance(arg, Tensor):
                    tensors.append(arg)
                    addresses.append(address := arg.data_ptr())
                    off |= address
                    kind += (arg.shape, arg.stride(), arg.dtype, arg.device)
                else:
                    kind.append(arg)
            device = tensors[0].device
            if off % 16 or not _is_replayable(device):
                check(*args)
                return function(*args, **options)
            key = (*kind, *_surroundings(device, tensors[0].dtype))
            if (tape := kinds.get(key)) is True:
                tape = kinds[key] = _rehearse(function, args, options)
            if not isinstance(tape, Tape):
                check(*args)
                if tape is None:  # it may never come again
                    if len(kinds) >= MOST_KINDS:
                        kinds.clear()
                    kinds[key] = True
                return function(*args, **options)
            try:
                with launch.on_device(device):
                    return tape.play(tensors, addresses)
            except NotReplayableError:
                kinds[key] = False
                return function(*args, **options)

        return call

    return wrap


def forget() -> None:
    """Work every call out anew: what it depends on has been replaced."""
    for kinds in _kinds:
        kinds.clear()


def _is_replayable(device: torch.device) -> bool:
    return (
        not INTERPRETED
        and device.type != "meta"
        and target_of(device).kind == "cuda"
        and launch.run is RUN
        and knobs.runtime.add_stages_inspection_hook is None
    )


def _surroundings(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """What launches depend on besides the arguments of a call."""
    compilation = knobs.compilation
    return (
        target_of(device),
        precision() if dtype == torch.float32 else None,  # 16 bits have but one
        what_schedules_depend_on(),
        knobs.runtime.debug,
        compilation.instrumentation_mode,
        getattr(compilation, "fpsan_homomorphic_casts", None),
    )


def _rehearse(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Tape | bool:
    """The tape of a call, made with tensors of the same kind without memory; False where there is none."""
    twins = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a
        for a in args
    ]
    inputs = [twin for twin in twins if isinstance(twin, Tensor)]
    device = next(a.device for a in args if isinstance(a, Tensor))
    try:
        with pretend(target_of(device)), recorded() as launches, _Watch(inputs, launches) as watch:
            result = function(*twins, **options)
        return _write_tape(watch, launches, result, len(inputs))
    except NotReplayableError:
        return False


def _write_tape(watch: "_Watch", launches: list[Launch], result: Any, inputs: int) -> Tape:
    steps = []
    for at, one in enumerate(launches):
        views = {}
        for name, value in one.arguments.items():
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, Tensor):
                views[name] = watch.view(tensor)
        steps.append(Step(one, views, [new for new in watch.allocated if new.after == at]))
    last = [new for new in watch.allocated if new.after == len(launches)]
    results = result if type(result) is tuple else (result,)
    returned = tuple(map(watch.view, results))
    _free(steps, returned, inputs)
    return Tape(steps, last, len(watch.allocated), returned, is_tuple=type(result) is tuple)


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
        self.allocated: list[Allocation] = []
        self.tensors = list(inputs)  # kept, so that no memory takes another's place
        self.numbers = {_storage(tensor): number for number, tensor in enumerate(inputs)}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is traced in here, and torch would load its compiler for a second to make sure

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS and result.is_contiguous():
            number = len(self.tensors)
            self.tensors.append(result)
            self.numbers[_storage(result)] = number
            dtype = None if result.dtype == self.tensors[0].dtype else result.dtype
            self.allocated.append(Allocation(number, len(self.launches), result.shape, dtype))
        elif not func.is_view:
            raise NotReplayableError(str(func))
        return result

    def view(self, tensor: Tensor | None) -> View | None:
        """Where a tensor lies; None for none."""
        if tensor is None:
            return None
        if (number := self.numbers.get(_storage(tensor))) is None:
            raise NotReplayableError("a tensor from elsewhere")
        whole = self.tensors[number]
        start = int(tensor.storage_offset())
        is_whole = start == 0 and tensor.shape == whole.shape and tensor.stride() == whole.stride()
        return View(number, tensor.shape, tensor.stride(), start, whole=is_whole)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
