"""Every kernel under every schedule of the tables compiles for every target, into what the schedule needs.

No GPU is needed, and the interpreter must be off: it takes the place of what is compiled here.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import compiled, sass
from benchmarks.compiled_report import complaints, examine, has_tools, resident
from benchmarks.launch_cases import (
    ATTENTION_CHANNELS,
    SMALL,
    calls,
    collect,
    covers,
    layer,
    layers,
    level_one,
    meta,
    sizes,
)
from benchmarks.launches import TARGETS, describe, recorded
from benchmarks.shapes import SHAPES
from moe_triton import grouped_linear
from moe_triton.attention import in_parts
from moe_triton.attention_schedule import tiles_of
from moe_triton.config import PASSES, RELATIVES, TABLES, Config, choose_config, override, read_table
from moe_triton.launch import INTERPRETED, Target, pretend
from moe_triton.routing import sort_pairs

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: interpreted kernels do not compile")
needs_tools = pytest.mark.skipif(not has_tools(), reason="this Triton has no ptxas, cuobjdump and nvdisasm")

HOPPER = TARGETS["sm_90"]
ATTENTION = [f"attention, {channels} channels" for channels in (64, 96, 128, 256)]
GEMMS = {"up", "linear", "grad_pre", "grad_weight"}


@cache
def collected(target):
    return collect(TARGETS[target])


def cells():
    """(target, call), each skipping on its own."""
    for name, target in TARGETS.items():
        for call in calls(target):
            marks = [needs_tools] if target.kind == "cuda" else []
            yield pytest.param(name, call, id=f"{name}, {call}", marks=marks)


@pytest.mark.parametrize(("name", "call"), list(cells()))
def test_kernels_keep_their_registers_and_use_the_matrix_units(name, call):
    target = TARGETS[name]
    reports = [examine(one, target, with_loop=name == "sm_90") for one in collected(name)[call]]
    bad = [
        (report.kernel, report.configuration, found)
        for report in reports
        if (found := complaints(report, target))
    ]
    assert not bad, "\n" + "\n".join(map(str, bad))
    is_aligned = call in layers(sizes(target)) or call in ATTENTION
    if name in ("sm_90", "sm_100") and is_aligned:
        assert all("TMA" in report.loads for report in reports if report.half)


@pytest.mark.parametrize("name", TARGETS)
def test_the_calls_reach_every_kernel_and_every_row_of_the_table(name):
    kernels = {one.kernel.removesuffix("_kernel") for found in collected(name).values() for one in found}
    assert kernels >= GEMMS | {"sum", "weight_grads", "tile_map", "sort_few", "count", "place"}
    assert kernels >= {"attend", "merge"}
    assert [row for row in read_table(TABLES / f"{name}.json") if not covers(row, TARGETS[name])] == []


RELATED = {
    "sm_103": (Target("cuda", 103, 148), 2048),
    "gfx90a": (Target("hip", "gfx90a", 104), 128),
    "gfx950": (Target("hip", "gfx950", 256), 128),
}


@pytest.mark.parametrize("name", RELATED)
def test_the_table_of_a_relative_serves_architectures_that_have_none(name):
    target, tokens = RELATED[name]
    if target.kind == "cuda" and not has_tools():
        pytest.skip("this Triton has no ptxas")
    relative = TARGETS[RELATIVES[name]]
    for what in PASSES:
        sizes = (torch.bfloat16, 40_000, 128, 2048, 768)
        assert choose_config(what, target, *sizes) == choose_config(what, relative, *sizes)
    with recorded(name, target) as launches:
        layer(SHAPES[SMALL], tokens)
    reports = [examine(one, target, with_loop=False) for one in {one.key: one for one in launches}.values()]
    assert [found for report in reports if (found := complaints(report, target))] == []


def test_no_launch_is_compiled_twice():
    keys = [one.key for found in collected("sm_90").values() for one in found]
    assert len(keys) == len(set(keys)) > 100


def test_recording_sees_the_schedule_that_would_run():
    chosen = Config(64, 128, 64, 4, 2)
    with override("up", chosen), recorded("", HOPPER) as launches:
        layer(SHAPES[SMALL], 512, train=False)
    assert [one.kernel for one in launches] == [
        "tile_map_kernel",
        "up_kernel",
        "tile_map_kernel",
        "linear_kernel",
        "sum_kernel",
    ]
    up = launches[1]
    assert (up.num_warps, up.num_stages, dict(up.constants)["ROWS"]) == (4, 2, 64)
    assert dict(up.signature)["w"] == "tensordesc<bf16[1, 2, 128, 64]>"


COUNTS = {"decoding": range(1, 33), "training": (2048, 2049, 2050, 2052, 2056, 2064, 2080)}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_the_number_of_tokens_alone_compiles_no_kernel_anew(name, counts):
    """A count that is a multiple of 16 is no other kernel, as long as the schedule is the same."""
    first: dict[object, set[object]] = {}
    for tokens in COUNTS[counts]:
        kinds = {
            "layer": lambda tokens=tokens: layer(SHAPES[SMALL], tokens, bias=True),
            "level 1": lambda tokens=tokens: level_one(SHAPES[SMALL], tokens),
            "routing": lambda tokens=tokens: sort_pairs(meta(tokens, 8, dtype=torch.int64), 128),
        }
        now: dict[object, set[object]] = {}
        for what, call in kinds.items():
            with recorded(what, TARGETS[name]) as launches:
                call()
            for one in launches:
                tensors = tuple(kind for _, kind in one.signature if "bf16" in kind or "fp32" in kind)
                schedule = (what, one.kernel, repr(one.constants), tensors, one.num_warps, one.num_stages)
                now.setdefault(schedule, set()).add(one.key)
        for schedule, keys in now.items():
            assert keys <= first.setdefault(schedule, keys), f"{tokens} tokens: {schedule[:2]}"


@pytest.mark.parametrize("name", TARGETS)
def test_every_tile_of_attention_is_compiled(name):
    """Those of float32, and of caches that the accelerator cannot address, on sm_90 alone."""
    target = TARGETS[name]
    launches = [one for found in collected(name).values() for one in found if one.kernel == "attend_kernel"]
    seen = {(*map(dict(one.constants).get, ("CHANNELS", "ROWS", "KEYS")), one.num_warps) for one in launches}
    kinds = [(torch.bfloat16, True)]
    kinds += [(torch.float32, True), (torch.bfloat16, False)] if name == "sm_90" else []
    for channels, (dtype, aligned) in product(ATTENTION_CHANNELS, kinds):
        for tile in tiles_of(target, dtype, channels, aligned=aligned):
            assert (channels, tile.rows, tile.keys, tile.num_warps) in seen


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_a_longer_cache_or_another_number_of_queries_compiles_no_kernel_anew(name):
    first: dict[object, set[object]] = {}
    buffer = meta(1, 2, 5000, 64)
    for length, queries, causal in product((999, 1000, 1008, 1024), (1, 2, 16, 17), (False, True)):
        cache = buffer[:, :, :length]
        with recorded("attention", TARGETS[name]) as launches:
            in_parts(meta(2, 4, queries, 64), cache, cache, 1.0, length - queries - 1 if causal else None)
        for one in launches:
            first.setdefault((one.kernel, repr(one.constants), one.num_warps), set()).add(one.key)
    assert all(len(keys) == 1 for keys in first.values())


def test_a_user_without_a_gpu_is_told_the_ways_out():
    rows, offsets = torch.ones(2, 16), torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match=r"(?s)cpu.*TRITON_INTERPRET=1"):
        grouped_linear(rows, torch.ones(1, 16, 16), offsets)


@pytest.mark.parametrize("word", ["1", "true", "on"])
def test_the_package_is_interpreted_whenever_triton_is(word):
    """Triton takes several words for yes; for each of them bfloat16 must be widened before a product."""
    code = "from moe_triton.launch import INTERPRETED; raise SystemExit(0 if INTERPRETED else 3)"
    environment = os.environ | {"TRITON_INTERPRET": word}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# The judge itself


@triton.jit
def product_kernel(
    a_ptr, b, c_ptr, N, K, TMA: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr
):  # fmt: skip
    """c = a @ b^T, of one tile."""
    rows, outs = tl.arange(0, ROWS), tl.arange(0, OUTS)
    acc = tl.zeros((ROWS, OUTS), tl.float32)
    for start in range(0, K, INS):
        ins = start + tl.arange(0, INS)
        if TMA:
            tile = b.load([0, 0, start]).reshape(OUTS, INS)
        else:
            tile = tl.load(b + outs[:, None] * K + ins[None, :])
        acc = tl.dot(tl.load(a_ptr + rows[:, None] * K + ins[None, :]), tile.T, acc)
    tl.store(c_ptr + rows[:, None] * N + outs[None, :], acc.to(tl.bfloat16))


@triton.jit
def double_kernel(x_ptr, N, step, BLOCK: tl.constexpr):
    at = x_ptr + (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * step
    tl.store(at, 2 * tl.load(at))


def product_launch(rows, outs, *, tma=False, num_warps=4, num_stages=3, target=HOPPER):
    matrix = meta(8, 256, 512)
    arguments = {
        "a_ptr": meta(128, 512),
        "b": TensorDescriptor(matrix, [8, 256, 512], [256 * 512, 512, 1], [1, outs, 64]) if tma else matrix,
        "c_ptr": meta(128, 256),
        "N": 256,
        "K": 512,
        "TMA": tma,
        "ROWS": rows,
        "OUTS": outs,
        "INS": 64,
    }  # fmt: skip
    with pretend(target):
        return describe("", product_kernel, arguments, {"num_warps": num_warps, "num_stages": num_stages})


def double_launch(**arguments):
    sizes = {"x_ptr": meta(100), "N": 100, "step": 1, "BLOCK": 128} | arguments
    with pretend(HOPPER):
        return describe("", double_kernel, sizes, {"num_warps": 4, "num_stages": 3})


@needs_tools
@pytest.mark.parametrize("tma", [False, True])
def test_a_good_kernel_has_no_complaints(tma):
    report = examine(product_launch(64, 128, tma=tma), HOPPER)
    assert complaints(report, HOPPER) == []
    assert (report.matrix, "TMA" in report.loads, "cp.async" in report.loads) == (("wgmma",), tma, True)
    assert report.loop is not None
    assert report.loop.counts["matrix"] == 4  # a step of 64 inputs is four instructions
    assert report.loop.counts.get("TMA", 0) == tma


@needs_tools
def test_a_spill_is_seen():
    report = examine(product_launch(128, 256), HOPPER)  # 256 sums a thread, of 255 registers
    assert report.resources.stack > 0
    found = complaints(report, HOPPER)
    assert any("spills" in complaint for complaint in found)


@needs_tools
def test_a_lost_wgmma_is_seen():
    report = examine(product_launch(16, 64), HOPPER)
    assert complaints(report, HOPPER) == ["multiplies by mma.sync, not by wgmma"]
    assert complaints(examine(product_launch(16, 64), TARGETS["sm_80"]), TARGETS["sm_80"]) == []


@needs_tools
def test_too_much_shared_memory_is_seen():
    report = examine(product_launch(128, 256, num_warps=8, num_stages=6), HOPPER, with_loop=False)
    (found,) = complaints(report, HOPPER)
    assert "does not fit" in found


@needs_tools
def test_a_kernel_without_a_product_needs_no_matrix_unit():
    report = examine(double_launch(), HOPPER)
    assert complaints(report, HOPPER) == []
    assert (report.matrix, report.loop) == ((), None)


def test_amd_is_read_as_well():
    target = TARGETS["gfx942"]
    report = examine(product_launch(64, 64, target=target), target)
    assert complaints(report, target) == []
    assert (report.matrix, report.loads) == (("mfma",), ("buffer",))
    spilled = "    .private_segment_fixed_size: 8\n    .vgpr_count:     512\n    .vgpr_spill_count: 2\n"
    assert sass.amd_resources(spilled) == sass.Resources(512, local=8, spills=2)


def test_launches_are_specialised_as_triton_does_it():
    one = double_launch(N=48)
    assert dict(one.signature) == {"x_ptr": "*bf16", "N": "i32", "step": "constexpr", "BLOCK": "constexpr"}
    assert dict(one.constants) == {"step": 1, "BLOCK": 128}
    assert [index for index, _ in one.attributes] == [0, 1]
    other = double_launch(x_ptr=meta(100)[1:], N=2**31, step=-3)
    assert [kind for _, kind in other.signature] == ["*bf16", "i64", "i32", "constexpr"]
    assert [index for index, _ in other.attributes] == [1]


def test_the_main_loop_is_the_one_that_multiplies_most():
    text = """
.L_x_0:
        /*0000*/                   LDGSTS.E.128 [R1], desc[UR4] ;
.L_x_1:
        /*0010*/              @!P1 HGMMA.64x128x16.F32.BF16 R88, gdesc[UR32], R88 ;
.L_x_2:
        /*0020*/                   IADD3 R1, R1, 1, RZ ;
        /*0030*/                   STS [R1], R2 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
        /*0080*/                   BRA `(.L_x_2);
"""
    loop = sass.main_loop(text)
    assert loop is not None
    assert loop.counts == {"matrix": 1, "address": 1, "shared": 1, "branch": 1}
    assert (loop.instructions, loop.matrix_share, loop.stores_to_shared) == (4, 0.25, 1)
    assert sass.main_loop(text.replace("HGMMA", "FFMA")) is None


@pytest.mark.parametrize(
    ("name", "registers", "warps", "kib", "programs"),
    [
        ("sm_90", 128, 8, 100, 2),  # 65,536 registers are just enough
        ("sm_90", 129, 8, 100, 1),
        ("sm_90", 40, 4, 72, 3),
        ("sm_90", 40, 4, 227, 1),
        ("sm_90", 40, 4, 228, 0),
        ("sm_90", 255, 16, 0, 0),
        ("sm_80", 40, 4, 72, 2),
        ("gfx942", 128, 8, 16, 2),
        ("gfx942", 40, 4, 65, 0),
    ],
)
def test_a_multiprocessor_holds_as_many_programs_as_fit(name, registers, warps, kib, programs):
    assert resident(TARGETS[name], registers, warps, kib * 1024) == programs


def test_the_command_prints_a_table_and_fails_for_what_is_wrong(monkeypatch, capsys, tmp_path):
    target = TARGETS["gfx942"]
    launches = {"good": [product_launch(64, 64, target=target)]}
    monkeypatch.setattr(compiled, "collect", lambda *_: launches)
    monkeypatch.setattr(compiled, "ProcessPoolExecutor", ThreadPoolExecutor)
    command = ["--target", "gfx942", "--json", str(tmp_path / "found.json")]
    assert compiled.main(command) == 0
    assert "| product | 64x64x64 4w 3s |" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert (found["target"], found["matrix"], found["complaints"]) == ("gfx942", ["mfma"], [])
    launches["too large"] = [product_launch(128, 256, num_warps=8, target=target)]
    assert compiled.main(command) == 1
    assert "does not fit" in capsys.readouterr().out
