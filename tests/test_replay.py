"""A call that is replayed launches what the function itself would: code, grids, streams and arguments.

A GPU and a compiler that only take notes stand in for Triton's (`benchmarks.host`).
"""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

import moe_triton
from benchmarks.host import Launched, dummy_gpu
from moe_triton import launch, replay, tape
from moe_triton.activation import GATED
from moe_triton.config import FOLDER, Config, as_row, forget_tables, override, user_table
from moe_triton.launch import INTERPRETED
from moe_triton.linear import linear_kernel

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: the interpreter launches nothing")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer, and how it is called."""

    tokens: int = 6
    top_k: int = 2
    experts: int = 4
    d: int = 64
    h: int = 32
    dtype: torch.dtype = torch.bfloat16
    activation: str = "swiglu"
    interleaved: bool = False
    weights_on_input: bool = False
    batch_invariant: bool = False
    bias: bool = False
    transposed: bool = False
    limit: float = 7.0
    train: bool = True
    frozen: tuple[str, ...] = ()
    off: str = ""  # the tensor that starts off a multiple of 16 bytes
    spread: bool = False  # x's rows are part of longer ones
    routing_weights: torch.dtype = torch.float32


def tensor(case: Case, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or case.dtype
    memory = torch.zeros(torch.Size(shape).numel() + 16, dtype=dtype)
    start = 1 if name == case.off else 0
    made = memory[start : start + torch.Size(shape).numel()].view(shape)
    return made.requires_grad_(dtype.is_floating_point and case.train and name not in case.frozen)


def weight(case: Case, name: str, e: int, o: int, i: int) -> Tensor:
    return tensor(case, name, e, i, o).mT if case.transposed else tensor(case, name, e, o, i)


def inputs(case: Case) -> dict[str, Tensor | None]:
    t, k, e, d, h = case.tokens, case.top_k, case.experts, case.d, case.h
    width = 2 * h if case.activation in GATED else h
    long = {"dtype": torch.int64}
    leaves: dict[str, Tensor | None] = {
        "x": tensor(case, "x", t, d),
        "weights": tensor(case, "weights", t, k, dtype=case.routing_weights),
        "pair_of_row": tensor(case, "pair_of_row", t * k, **long),
        "row_of_pair": tensor(case, "row_of_pair", t * k, **long),
        "offsets": tensor(case, "offsets", e + 1, **long),
        "up_proj": weight(case, "up_proj", e, width, d),
        "down_proj": weight(case, "down_proj", e, d, h),
        "up_bias": tensor(case, "up_bias", e, width) if case.bias else None,
        "down_bias": tensor(case, "down_bias", e, d) if case.bias else None,
    }
    if case.spread:
        leaves["x"] = tensor(case, "x", t, 2 * d)[:, :d]
    return leaves


@contextmanager
def noted_memory():
    """All that is allocated inside, kept so that addresses tell tensors apart."""
    made: list[Tensor] = []

    def keeping(allocate):
        def allocate_and_keep(*args, **kwargs):
            made.append(allocate(*args, **kwargs))
            return made[-1]

        return allocate_and_keep

    new_empty, empty_like = keeping(Tensor.new_empty), keeping(torch.empty_like)
    with (
        mock.patch.object(Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty_like", empty_like),
    ):
        yield made


def notes_of(gpu, call: Callable[[], Any], given: dict[str, Tensor | None]) -> list[Any]:
    """What a call launches and returns, with addresses as (whose memory, bytes from its start)."""
    with noted_memory() as made:
        gpu.is_noting = True
        results = call()
        gpu.is_noting, launched = False, gpu.launched.copy()
        gpu.launched.clear()
    storages = {name: t.untyped_storage() for name, t in given.items() if t is not None}
    storages |= {f"made {i}": t.untyped_storage() for i, t in enumerate(made) if not t.is_meta}
    numbers: dict[str, int] = {}  # as they are met: a replay may leave out what nobody uses

    def place(address: int) -> Any:
        for name, storage in storages.items():
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                owner = numbers.setdefault(name, len(numbers)) if name.startswith("made") else name
                return owner, address - storage.data_ptr()
        assert address == 0
        return None

    def read(value: Any, type_name: str) -> Any:
        if isinstance(value, TensorDescriptor):
            return place(value.base.data_ptr()), value.base.dtype, vars(value) | {"base": None}
        if type_name.startswith("*"):
            return place(value.data_ptr() if isinstance(value, Tensor) else value)
        return type(value), value

    notes: list[Any] = []
    for one in launched:
        values = [read(*both) for both in zip(one.arguments, one.types, strict=True)]
        notes.append(replace(one, arguments=tuple(values)))
    for result in results:
        notes.append((place(result.data_ptr()), result.shape, result.stride(), result.dtype))
    return notes


def layer_notes(gpu, case: Case) -> list[Any]:
    """What a layer of this case launches and returns, forward and, to train, backward."""
    given = inputs(case)
    leaves = [t for t in given.values() if t is not None and t.requires_grad]
    given["upstream"] = upstream = torch.zeros(case.tokens, case.d, dtype=case.dtype)
    settings = {
        name: getattr(case, name)
        for name in ("activation", "interleaved", "limit", "weights_on_input", "batch_invariant")
    }

    def call():
        y = moe_triton.experts_ffn(**without(given, "upstream"), **settings)
        return (y, *torch.autograd.grad(y, leaves, upstream)) if leaves else (y,)

    return notes_of(gpu, call, given)


def without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}


def by_triton(gpu, call: Callable[[], list[Any]]) -> list[Any]:
    """The same without a replay."""
    with mock.patch.object(replay, "_is_replayable", lambda _: False):
        return call()


@pytest.fixture
def gpu():
    with dummy_gpu() as dummy:
        yield dummy


@pytest.fixture
def plays(monkeypatch) -> list[replay.Tape]:
    """The tapes that are played."""
    played: list[replay.Tape] = []
    play = replay.Tape.play
    monkeypatch.setattr(replay.Tape, "play", lambda one, *given: (played.append(one), play(one, *given))[1])
    return played


BASE = Case()
CHANGES = {
    "nothing": {},
    "tokens": {"tokens": 7},
    "one token": {"tokens": 1},
    "no token": {"tokens": 0},
    "so many that there is a map": {"tokens": 600},
    "top_k": {"top_k": 1},
    "experts": {"experts": 8},
    "d": {"d": 80},
    "d, unaligned": {"d": 66},
    "h": {"h": 48},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "routing weights": {"routing_weights": torch.bfloat16},
    "activation": {"activation": "geglu"},
    "no gate": {"activation": "relu2"},
    "interleaved": {"interleaved": True},
    "limit": {"limit": 5.0},
    "limit, an integer": {"limit": 5},
    "weights on input": {"weights_on_input": True},
    "batch_invariant": {"batch_invariant": True},
    "bias": {"bias": True},
    "transposed": {"transposed": True},
    "prediction": {"train": False},
    "spread": {"spread": True},
    **{
        f"{name} off": {"off": name}
        for name in ("x", "weights", "pair_of_row", "offsets", "up_proj", "down_proj")
    },
    **{f"{name} frozen": {"frozen": (name,)} for name in ("x", "weights", "up_proj", "down_proj")},
}


def test_an_unknown_triton_is_called_as_it_documents(gpu, monkeypatch):
    monkeypatch.setattr(tape, "CALLED_AS_KNOWN", False)
    expected = by_triton(gpu, lambda: layer_notes(gpu, BASE))
    assert [layer_notes(gpu, BASE) for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_replayed_is_what_triton_would_launch(change, gpu, plays):
    other = replace(BASE, **CHANGES[change])
    expected = {case: by_triton(gpu, lambda case=case: layer_notes(gpu, case)) for case in (BASE, other)}
    for case in (BASE, BASE, BASE, other, BASE, other, other, other, BASE):
        before = len(plays)
        assert layer_notes(gpu, case) == expected[case]
    assert len(plays) - before == 2, "forward and backward"


@contextmanager
def products_in(precision: str):
    """torch's own float32 products."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@contextmanager
def knob(of: str, name: str, value: Any):
    """A knob of Triton, which is an environment variable, too."""
    group = getattr(knobs, of)
    with group.scope():
        setattr(group, name, value)
        yield


SURROUNDINGS = {
    "override": lambda: override("grad_rows", Config(32, 64, 32, 4, 2)),
    "tf32": lambda: products_in("tf32"),
    "debug": lambda: knob("runtime", "debug", True),
    "instrumentation": lambda: knob("compilation", "instrumentation_mode", "consan"),
    "target": lambda: launch.pretend(launch.Target("cuda", 80, 108)),
}


if hasattr(knobs.compilation, "fpsan_homomorphic_casts"):  # Triton 3.9
    SURROUNDINGS["casts"] = lambda: knob("compilation", "fpsan_homomorphic_casts", True)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_surrounds_a_call_is_part_of_its_kind(name, gpu):
    case = replace(BASE, dtype=torch.float32 if name == "tf32" else torch.bfloat16)
    plain = by_triton(gpu, lambda: layer_notes(gpu, case))
    with SURROUNDINGS[name]():
        surrounded = by_triton(gpu, lambda: layer_notes(gpu, case))
    assert surrounded != plain
    for _ in range(4):
        assert layer_notes(gpu, case) == plain
        with SURROUNDINGS[name]():
            assert layer_notes(gpu, case) == surrounded


@pytest.mark.parametrize("tokens", [1, 3000])
def test_routing_is_replayed(tokens, gpu, plays):
    experts = torch.zeros(tokens, 2, dtype=torch.int64)
    expected, *notes = (
        notes_of(gpu, lambda: moe_triton.sort_by_expert(experts, 4), {"experts": experts}) for _ in range(4)
    )
    assert notes == [expected] * 3
    assert len(plays) == 3


def test_rows_of_a_table_that_were_written_meanwhile_are_taken(gpu, tmp_path, monkeypatch):
    case = replace(BASE, train=False)
    expected = [layer_notes(gpu, case) for _ in range(3)]
    row = as_row("up", 3, None, Config(64, 64, 32, 8, 2), None)
    user_table(launch.target_of(torch.device("cpu")), str(tmp_path)).write_text(json.dumps([row]))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    changed = layer_notes(gpu, case)
    assert changed != expected[0]
    user_table(launch.target_of(torch.device("cpu")), str(tmp_path)).write_text("[]")
    assert [layer_notes(gpu, case) for _ in range(2)] == [changed] * 2
    forget_tables()
    assert layer_notes(gpu, case) == expected[2]


def test_a_gradient_that_is_expanded_is_replayed_too(gpu, plays):
    given = inputs(BASE)
    for _ in range(3):
        moe_triton.experts_ffn(**given).sum().backward()
    assert len(plays) == 4, "two forward, two backward"


def test_a_product_of_level_1_is_replayed(gpu, plays):
    given = {
        "rows": torch.zeros(6, 64),
        "weight": torch.zeros(4, 32, 64),
        "offsets": torch.zeros(5, dtype=torch.int64),
    }
    expected, *notes = (notes_of(gpu, lambda: (moe_triton.grouped_linear(**given),), given) for _ in range(4))
    assert notes == [expected] * 3
    assert len(plays) == 3


def test_launches_go_to_the_current_stream(gpu):
    for stream in (7, 7, 7, 8, 9):
        gpu.stream = stream
        assert {one.stream for one in layer_notes(gpu, BASE) if isinstance(one, Launched)} == {stream}


def test_hooks_of_triton_are_called(gpu, monkeypatch):
    called: list[str] = []
    launches = [len(layer_notes(gpu, replace(BASE, train=False))) - 1 for _ in range(3)][-1]
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [lambda _: called.append("enter")])
    monkeypatch.setattr(knobs.runtime.launch_exit_hook, "calls", [lambda _: called.append("exit")])
    monkeypatch.setattr(linear_kernel, "pre_run_hooks", [lambda *_, **__: called.append("before")])
    layer_notes(gpu, replace(BASE, train=False))
    assert sorted(called) == ["before", *["enter"] * launches, *["exit"] * launches]


def test_what_is_not_needed_any_more_is_freed(gpu, plays):
    """As by the function itself: `hidden` does not outlive the down-projection, nor `rows` the sum."""
    for _ in range(3):
        layer_notes(gpu, replace(BASE, train=False))
    assert [len(step.freed) for step in plays[-1].steps] == [0, 1, 1]


def add(x):
    return x + x


def add_in_place(x):
    return x.add_(x)


def fill(x):
    return x.new_empty(x.shape).copy_(x + x)


@pytest.mark.parametrize("function", [add, add_in_place, fill])
def test_a_function_that_does_more_than_launch_is_never_replayed(function, gpu, plays):
    called: list[Tensor] = []
    double = replay.replayed()(lambda x: (called.append(x), function(x))[1])
    for value in (1.0, 2.0, 3.0, 4.0):
        assert double(torch.full((4,), value)).tolist() == [2 * value] * 4
    assert not plays
    assert [x.is_meta for x in called] == [False, True, False, False, False], "rehearsed once"


def test_tensors_on_another_device_are_checked_again(gpu):
    checked: list[torch.device] = []
    call = replay.replayed(lambda a, b: checked.append(b.device))(lambda a, b: a.view(-1))
    for _ in range(4):
        call(torch.zeros(4), torch.zeros(4))
    call(torch.zeros(4), torch.zeros(4, device="meta"))
    assert [device.type for device in checked] == ["cpu", "meta"]


def test_a_replaced_launch_is_met(gpu, plays, monkeypatch):
    launched: list[str] = []
    for _ in range(3):
        layer_notes(gpu, replace(BASE, train=False))
    plays.clear()
    monkeypatch.setattr(launch, "run", lambda kernel, *_, **__: launched.append(kernel.__name__))
    assert len(layer_notes(gpu, replace(BASE, train=False))) == 1
    assert launched == ["up_kernel", "linear_kernel", "sum_kernel"]
    assert not plays


def test_changes_to_the_compiler_are_left_to_triton(gpu, plays, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash"))
    for _ in range(3):
        layer_notes(gpu, BASE)
    assert not plays


def test_memory_off_16_bytes_from_the_allocator_is_seen(gpu, monkeypatch):
    case = replace(BASE, train=False)
    for _ in range(3):
        layer_notes(gpu, case)
    new_empty = Tensor.new_empty

    def off(like, *shape, **options):
        shape = torch.Size(shape[0]) if isinstance(shape[0], tuple) else torch.Size(shape)
        return new_empty(like, shape.numel() + 1, **options)[1:].view(shape)

    monkeypatch.setattr(Tensor, "new_empty", off)
    expected = by_triton(gpu, lambda: layer_notes(gpu, case))
    assert layer_notes(gpu, case) == expected


def test_what_is_refused_is_refused_after_calls_that_were_not(gpu):
    given = inputs(replace(BASE, train=False))
    for _ in range(3):
        moe_triton.experts_ffn(**given)
    changes = {
        "x has shape": {"weights": given["weights"][:-1]},
        "offsets has shape": {"offsets": given["offsets"][:-1]},
        "up_proj is torch[.]float16": {"up_proj": given["up_proj"].half()},
        "offsets is torch[.]float32": {"offsets": given["offsets"].float()},
        "weights is on meta": {"weights": given["weights"].to("meta")},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            moe_triton.experts_ffn(**(given | change))
