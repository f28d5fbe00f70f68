"""Calls that come again are worked out once; afterwards their kernels are only launched.

A function that allocates, takes views and launches kernels, and looks into no tensor, does the same for all
tensors of the same shapes, strides and dtypes. `replayed` runs it once on tensors without memory, notes what
it allocates and launches, and from then on does just that. Choosing schedules, naming arguments and Triton's
own look at each of them take longer than a GPU needs for a few tokens.

The function itself still runs for the first call of a kind, which may never come again, and for what the
notes do not tell apart: memory off a multiple of 16 bytes, AMD's pointer ranges, hooks of Triton, the
interpreter.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .config import what_schedules_depend_on
from .launch import INTERPRETED, Launch, pretend, recorded, target_of
from .tape import Allocation, NotReplayableError, Step, Tape, View
from .tiles import precision

MOST_KINDS = 1024  # of calls to one function that are remembered, before all of them are forgotten
ALLOCATIONS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)
P = ParamSpec("P")
R = TypeVar("R")
RUN = launch.run
# The calls of a function that have been met. True: once; False: they cannot be replayed.
Kinds = dict[Any, Tape | bool]
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
