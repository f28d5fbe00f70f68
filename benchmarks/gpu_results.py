"""Reading the record of a run on a GPU: a cell's times, rates, and shares of what is possible."""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_cell import BOTH, FORWARD, TRAINING
from benchmarks.gpu_cells import NAMED, Cell
from benchmarks.roofline import layer_floor_s, moved_bytes
from benchmarks.shapes import experts_flops

ITEMS = {"bfloat16": 2, "float16": 2, "float32": 4}

Record = dict[str, Any]
Result = dict[str, Any]


def cell_of(result: Result) -> Cell:
    """The cell of a result."""
    return Cell(**result["cell"])


def layers(record: Record) -> Iterator[tuple[Cell, Result]]:
    """The cells in which candidates were timed."""
    for result in record["results"]:
        if "timings" in result:
            yield cell_of(result), result


def find(record: Record, shape: str, tokens: int) -> Result | None:
    """The balanced cell of this size."""
    wanted = Cell(shape, tokens)
    return next((result for cell, result in layers(record) if cell == wanted), None)


def ms(result: Result | None, mode: str, name: str, *, graph: bool = False) -> float | None:
    """The median of one candidate, or None."""
    if result is None:
        return None
    return result["graphs" if graph else "timings"].get(mode, {}).get(name, {}).get("ms")


def ratio(result: Result | None, mode: str, of: str, to: str) -> float | None:
    """The time of one candidate as a multiple of another's, or None without both."""
    numerator, denominator = ms(result, mode, of), ms(result, mode, to)
    return numerator / denominator if numerator and denominator else None


def flops(result: Result, mode: str) -> float:
    """Operations of the matrix products of a cell."""
    cell = cell_of(result)
    shape = NAMED[cell.shape]
    return experts_flops(cell.tokens * shape.k, shape.d, shape.h, backward=mode == BOTH)


def tflops(result: Result | None, mode: str, name: str) -> float | None:
    """The rate of one candidate in TFLOP/s, or None."""
    time = ms(result, mode, name)
    return flops(result, mode) / time / 1e9 if result and time else None


def floor_ms(record: Record, result: Result, mode: str, *, datasheet: bool = False) -> float | None:
    """The roofline's floor at this run's measured rates, or at the datasheet's; None without a datasheet."""
    rates = record["datasheet"] if datasheet else record["rates"]
    if rates is None or mode == TRAINING:
        return None
    cell = cell_of(result)
    seconds = layer_floor_s(
        NAMED[cell.shape], cell.tokens, rates["flops_per_second"], rates["bytes_per_second"],
        backward=mode == BOTH, item=ITEMS[record["dtype"]], active=result["active"],
    )  # fmt: skip
    return 1e3 * seconds


def bandwidth_share(record: Record, result: Result, name: str) -> float | None:
    """What part of the datasheet's bandwidth the forward in a CUDA graph moves its bytes at, or None."""
    time, sheet, cell = ms(result, FORWARD, name, graph=True), record["datasheet"], cell_of(result)
    if not time or sheet is None:
        return None
    moved = moved_bytes(NAMED[cell.shape], cell.tokens, item=ITEMS[record["dtype"]], active=result["active"])
    return moved / (time / 1e3) / sheet["bytes_per_second"]


def kept_formula(record: Record, result: Result) -> float:
    """x and the pre-activation: td + 2 ph numbers, which is all that our layer keeps for its backward."""
    cell = cell_of(result)
    shape = NAMED[cell.shape]
    return ITEMS[record["dtype"]] * cell.tokens * (shape.d + 2 * shape.k * shape.h)
