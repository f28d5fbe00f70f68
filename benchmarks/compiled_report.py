"""One launch, compiled for one target without its device, and what the result is held to."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from benchmarks.launches import Launch
from benchmarks.sass import Loop, Resources
from moe_triton.attention_schedule import tiles_of
from moe_triton.config import Config, read_table, shipped_table
from moe_triton.launch import Target

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# CUDA C++ programming guide, limits by compute capability: KiB of shared memory of a multiprocessor, of which
# a block takes one more than it asked for; its registers, warps and blocks; columns of tensor memory.
SHARED_KIB = {80: 164, 90: 228, 100: 228, 103: 228}
REGISTERS, WARPS, BLOCKS, TENSOR_COLUMNS = 65536, 64, 32, 512
# CDNA3 instruction set guide: vector registers of a SIMD's lane, SIMDs, waves of each, KiB of shared memory.
AMD_REGISTERS, AMD_SIMDS, AMD_WAVES, AMD_SHARED_KIB = 512, 4, 8, 64
# Bytes of a thread that may be put aside after the main loop. On an H100 a tile of grad_pre twice as wide,
# with 248 of them, was 1.6 times as fast as the one without.
SPARE_STACK = 64
SIXTEEN_BITS = re.compile(r"tt\.dot\b.*: tensor<[\dx]+x(bf16|f16)>")
# Which constants a configuration names.
TILE = ("ROWS", "OUTS", "INS")
SIZES = (
    *("ROWS", "KEYS", "CHANNELS", "SOME"),
    *("COLUMNS", "CHUNK", "QUERIES", "PAIRS", "BINS", "EXPERTS", "BLOCK", "SPLITS"),
)
FLAGS = {
    "SWAP": "swapped",
    "PERSISTENT": "persistent",
    "IN_FIRST": "transposed",
    "INTERLEAVED": "interleaved",
    "BACKWARD": "backward",
    "KEEP_PRE": "pre",
    "EXPERTS": "searched",
    "CAUSAL": "causal",
    "ADD": "adding",
}
KERNELS = {
    "up": "up_kernel",
    "down": "linear_kernel",
    "grad_pre": "grad_pre_kernel",
    "grad_rows": "linear_kernel",
    "grad_down": "grad_weight_kernel",
    "grad_up": "grad_weight_kernel",
}


@dataclass(frozen=True, slots=True)
class Report:
    """A compiled kernel.

    shared      bytes of shared memory
    resident    programs that a multiprocessor holds at a time
    counted_on  how many of them the schedule counts on
    half        whether it multiplies matrices of 16 bits
    """

    what: str
    kernel: str
    configuration: str
    num_warps: int
    resources: Resources
    shared: int
    resident: int
    counted_on: int
    matrix: tuple[str, ...]
    loads: tuple[str, ...]
    half: bool
    loop: Loop | None


def compile_launch(launch: Launch, target: Target) -> Any:
    """Triton's compiled kernel; none of it runs."""
    kernel = getattr(import_module(launch.module), launch.kernel)
    attributes = {(index,): [list(pair) for pair in known] for index, known in launch.attributes}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    if launch.maxnreg is not None:
        options["maxnreg"] = launch.maxnreg
    return triton.compile(source, target=gpu_target(target), options=options)


def gpu_target(target: Target) -> GPUTarget:
    """A target as Triton's compiler names it."""
    return GPUTarget(target.kind, target.arch, 64 if target.kind == "hip" else 32)


def examine(launch: Launch, target: Target, *, with_loop: bool = True) -> Report:
    """Compile a launch and read the result; finding the main loop takes half a second."""
    compiled = compile_launch(launch, target)
    half = bool(SIXTEEN_BITS.search(compiled.asm["ttir"]))
    loop = None
    if target.kind == "hip":
        text = compiled.asm["amdgcn"]
        resources = sass.amd_resources(text)
    else:
        text = compiled.asm["ptx"]
        resources = sass.nvidia_resources(
            _tool("cuobjdump", "--dump-resource-usage", cubin=compiled.asm["cubin"])
        )
        if with_loop and half:
            loop = sass.main_loop(_tool("nvdisasm", "-c", cubin=compiled.asm["cubin"]))
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    return Report(
        what=launch.what,
        kernel=launch.kernel.removesuffix("_kernel"),
        configuration=configuration(launch),
        num_warps=launch.num_warps,
        resources=resources,
        shared=shared,
        resident=resident(target, resources.registers, launch.num_warps, shared, columns),
        counted_on=counted_on(launch, target),
        matrix=sass.kinds(text, sass.MATRIX),
        loads=sass.kinds(text, sass.LOADS),
        half=half,
        loop=loop,
    )


def _tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [TOOLS / name, *options, path], check=True, capture_output=True, text=True
        ).stdout


def has_tools() -> bool:
    """Whether this Triton brings the programs that compile and read code for NVIDIA's GPUs."""
    return all((TOOLS / name).exists() for name in ("ptxas", "cuobjdump", "nvdisasm"))


def configuration(launch: Launch) -> str:
    """The tile, warps and stages, and what else tells launches of one kernel apart."""
    constants = dict(launch.constants)
    if all(name in constants for name in TILE):
        tile = "x".join(str(constants[name]) for name in TILE)
        gate = {"pairs": " interleaved", "none": " ungated"}.get(constants.get("GATE", ""), "")
        flags = "".join(f" {word}" for name, word in FLAGS.items() if constants.get(name))
        return f"{tile} {launch.num_warps}w {launch.num_stages}s{gate}{flags}"
    words = [str(constants["ACTIVATION"])] if "ACTIVATION" in constants else []
    words += [word for name, word in FLAGS.items() if constants.get(name) and name != "EXPERTS"]
    words += [f"{name.lower()} {constants[name]}" for name in SIZES if constants.get(name, 1) != 1]
    return " ".join([*words, f"{launch.num_warps}w"])


def resident(target: Target, registers: int, num_warps: int, shared: int, columns: int = 0) -> int:
    """Programs that one multiprocessor holds at a time; 0 for one that does not fit."""
    if target.kind == "hip":
        waves = min(AMD_WAVES, AMD_REGISTERS // max(1, _up_to(8, registers))) * AMD_SIMDS
        return min(waves // num_warps, AMD_SHARED_KIB * 1024 // max(1, shared))
    of_registers = REGISTERS // (num_warps * _up_to(256, 32 * registers))
    of_shared = SHARED_KIB[int(target.arch)] * 1024 // (shared + 1024)
    return min(BLOCKS, WARPS // num_warps, of_registers, of_shared, TENSOR_COLUMNS // max(1, columns))


def counted_on(launch: Launch, target: Target) -> int:
    """Programs that a multiprocessor holds by the target's table; 1 for what is in no table."""
    constants = dict(launch.constants)
    if launch.kernel == "attend_kernel":
        return _counted_on_by_attention(launch, target)
    schedule = [*(constants.get(name) for name in TILE), launch.num_warps, launch.num_stages]
    rows = [(row["pass"], Config(**row["config"])) for row in read_table(shipped_table(target))]
    own = [config for what, config in rows if KERNELS[what] == launch.kernel]
    same = [c for c in own if [c.rows, c.outs, c.ins, c.num_warps, c.num_stages] == schedule]
    return max((config.programs for config in same), default=1)


def _counted_on_by_attention(launch: Launch, target: Target) -> int:
    constants, types = dict(launch.constants), dict(launch.signature)
    dtype = torch.float32 if types["q_ptr"] == "*fp32" else torch.bfloat16
    schedule = [constants["ROWS"], constants["KEYS"], launch.num_warps, launch.num_stages]
    tiles = [t for a in (True, False) for t in tiles_of(target, dtype, constants["CHANNELS"], aligned=a)]
    same = [t for t in tiles if [t.rows, t.keys, t.num_warps, t.num_stages] == schedule]
    return max((tile.programs for tile in same), default=1)


def _up_to(unit: int, number: int) -> int:
    return -(-number // unit) * unit


def matrix_unit(target: Target) -> str:
    """How 16-bit matrices are to be multiplied."""
    if target.kind == "hip":
        return "mfma"
    arch = int(target.arch)
    return "mma.sync" if arch < 90 else "wgmma" if arch < 100 else "tcgen05"


def complaints(report: Report, target: Target) -> list[str]:
    """What is wrong with a compiled kernel; nothing where all is as promised."""
    found, used = [], report.resources
    if used.stack > SPARE_STACK or used.local or used.spills:
        found.append(
            f"spills: {used.stack} bytes of stack, {used.local} of local memory, {used.spills} registers"
        )
    if report.half and report.matrix != (unit := matrix_unit(target),):
        found.append(f"multiplies by {' and '.join(report.matrix) or 'no matrix unit'}, not by {unit}")
    if report.resident == 0:
        found.append(f"does not fit: {used.registers} registers, {report.shared} bytes of shared memory")
    elif report.resident < report.counted_on:
        found.append(
            f"{report.resident} programs a multiprocessor; its schedule counts on {report.counted_on}"
        )
    if report.loop and report.loop.counts.get("local"):
        found.append("the main loop reads or writes local memory")
    # A loop over tiles that is flattened into the one over inputs stores results on the same way; and what
    # starts at no multiple of 4 bytes cannot be copied but through registers.
    is_meant = "persistent" in report.configuration or not report.loads
    if report.loop and matrix_unit(target) == "wgmma" and report.loop.stores_to_shared and not is_meant:
        found.append("an operand goes through registers: the main loop stores to shared memory")
    return found
