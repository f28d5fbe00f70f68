"""Every kernel under every schedule of the tables compiles for every target, into what the schedule counts on.

No GPU is needed, and the interpreter must be off: it takes the place of what is compiled here.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheels for this system")

from moe_triton.config import PASSES, TABLES, Config, choose_config, override, read_table
from moe_triton.experts_ffn import forward
from moe_triton.settings import Settings

from benchmarks import sass
from benchmarks.compiled import GEMMS, TARGETS, Case, Compiled, collect, compile_launch, recording, render
from benchmarks.shapes import SHAPES, Shape

KERNELS = {
    "up": "up_kernel",
    "down": "linear_kernel",
    "grad_pre": "grad_pre_kernel",
    "grad_rows": "linear_kernel",
    "grad_down": "grad_weight_kernel",
    "grad_up": "grad_weight_kernel",
}
SMALL, LARGE = SHAPES["qwen3_30b"], SHAPES["gpt_oss_20b"]
CASES = {f"small, {tokens} tokens": Case(SMALL, tokens) for tokens in (8192, 1024, 512, 256)} | {
    f"large, {tokens} tokens": Case(
        LARGE, tokens, activation="clamped_swiglu", interleaved=True, transposed=True, bias=True
    )
    for tokens in (8192, 512)
}
TINY = Shape(d=256, h=128, e=8, k=2)
VARIATIONS = {
    "float16": Case(SMALL, 8192, torch.float16),
    "float32": Case(SMALL, 8192, torch.float32),
    "geglu": Case(SMALL, 8192, activation="geglu"),
    "relu2": Case(SMALL, 8192, activation="relu2", bias=True),
    "gelu": Case(SMALL, 8192, activation="gelu"),
    "weights on the input": Case(SMALL, 8192, weights_on_input=True),
    "one token": Case(SMALL, 1),
    "sizes that nothing divides": Case(Shape(d=250, h=90, e=7, k=3), 4000, bias=True),
    "many experts": Case(replace(TINY, e=512), 64),
}

needs_tools = pytest.mark.skipif(sass.tool("cuobjdump") is None, reason="Triton's package has no cuobjdump")


def compiled(case: Case, target: str) -> list[Compiled]:
    return [compile_launch((one, target)) for one in collect(case, TARGETS[target])]


def assert_well(results: list[Compiled]) -> None:
    bad = [result for result in results if result.problems()]
    assert not bad, "\n" + render(bad)


@needs_tools
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_keep_their_registers_and_use_the_matrix_units(target, name):
    results = compiled(CASES[name], target)
    assert {result.launch.kernel for result in results} >= set(GEMMS)
    print("\n" + render(results))
    assert_well(results)
    if TARGETS[target].kind == "cuda":
        for result in results:
            if (counted_on := programs_counted_on(target).get(key(result.launch))) is not None:
                assert result.programs >= counted_on, render([result])


@needs_tools
@pytest.mark.parametrize("name", VARIATIONS)
def test_every_activation_dtype_and_size_compiles_well_for_hopper(name):
    assert_well(compiled(VARIATIONS[name], "sm_90"))


def key(launch) -> tuple:
    options = dict(launch.options)
    tile = [launch.constant(axis) for axis in ("ROWS", "OUTS", "INS")]
    return launch.kernel, *tile, options["num_warps"], options["num_stages"]


def programs_counted_on(target: str) -> dict[tuple, int]:
    counted: dict[tuple, int] = {}
    for row in read_table(TABLES / f"{target}.json"):
        c = Config(**row["config"])
        at = (KERNELS[row["pass"]], c.rows, c.outs, c.ins, c.num_warps, c.num_stages)
        counted[at] = max(counted.get(at, 0), c.programs)
    return counted


@pytest.mark.parametrize("target", TARGETS)
def test_the_cases_reach_every_row_of_the_table(target):
    reached = {
        choose_config(what, TARGETS[target], torch.bfloat16, case.tokens * case.shape.k, case.shape.e, *sizes)
        for case in CASES.values()
        for what in PASSES
        for sizes in [(case.shape.d, case.shape.h)]
    }
    missed = [row for row in read_table(TABLES / f"{target}.json") if Config(**row["config"]) not in reached]
    assert not missed


@needs_tools
@pytest.mark.parametrize("what", ["down", "grad_rows"])
def test_a_persistent_schedule_compiles_well_for_hopper(what):
    persistent = Config(128, 256, 64, 8, 3, persistent=True)
    with override(what, persistent):
        results = [r for r in compiled(Case(SMALL, 8192), "sm_90") if r.launch.constant("PERSISTENT")]
    assert len(results) == 1
    assert_well(results)


# The judge itself


@needs_tools
def test_a_spill_is_seen():
    with override("grad_pre", Config(128, 256, 64, 4, 3)):
        (result,) = (r for r in compiled(Case(SMALL, 8192), "sm_90") if r.launch.kernel == "grad_pre_kernel")
    assert any("spilled" in problem for problem in result.problems())


@needs_tools
def test_a_lost_wgmma_is_seen():
    with override("up", Config(16, 64, 64, 4, 3, swap=False)):
        results = [r for r in compiled(Case(SMALL, 16), "sm_90") if r.launch.kernel == "up_kernel"]
    for result in results:
        assert result.problems() == ["no wgmma.mma_async", "mma.sync beside it"]
        assert "no wgmma" in render([result])


@needs_tools
def test_too_much_shared_memory_is_seen():
    with override("up", Config(128, 128, 64, 8, 4)):
        (result, *_) = (r for r in compiled(Case(SMALL, 8192), "sm_90") if r.launch.kernel == "up_kernel")
    assert result.shared > 163 * 1024
    assert any("shared memory" in problem for problem in replace(result, target="sm_80").problems())


def test_the_main_loop_is_the_innermost_with_matrix_instructions():
    text = """
.L_x_0:
        /*0000*/                   LDGSTS.E.128 [R1], desc[UR4] ;
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R88, gdesc[UR32], R88 ;
        /*0020*/                   IADD3 R1, R1, 1, RZ ;
        /*0030*/                   STS [R1], R2 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""
    loop = sass.find_main_loop(text)
    assert loop is not None
    assert (loop.instructions, loop.classes["matrix"], loop.classes["shared"], loop.classes["other"]) == (
        4,
        1,
        1,
        2,
    )
    assert sass.find_main_loop(text.replace("HGMMA", "FFMA")) is None


def test_recording_launches_nothing():
    with recording(TARGETS["sm_90"]) as launches:
        x, weights = torch.empty(4, 256, device="meta"), torch.empty(4, 2, device="meta")
        ids, offsets = (
            torch.empty(8, dtype=torch.int64, device="meta"),
            torch.empty(9, dtype=torch.int64, device="meta"),
        )
        up, down = torch.empty(8, 256, 256, device="meta"), torch.empty(8, 256, 128, device="meta")
        y, _ = forward(
            x, weights, ids, ids, offsets, up, down, None, None, Settings("swiglu"), keep_pre=False
        )
    assert y.shape == x.shape
    assert [launch.kernel for launch in launches] == ["up_kernel", "linear_kernel", "sum_kernel"]
