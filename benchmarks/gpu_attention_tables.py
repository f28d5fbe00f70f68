"""The table of benchmarks.gpu_attention, from its record alone."""

from collections.abc import Iterator
from typing import Any

from benchmarks.measure import Timing, digits
from benchmarks.record import headline, table

OURS = "ours"
HEAD = ("size", "candidate", "ms (p20-p80)", "TFLOP/s", "GB/s", "% of roof", "x ours", "error %")
NOTE = (
    "TFLOP/s: two products for each row and key that it sees. GB/s: keys and values read once. Roof: what "
    "the larger of both would take at the rates of a large matrix product and of a copy, measured here. x "
    "ours: how many times as long. Error: the largest over the largest number of the truth, on some rows."
)


def render(record: dict[str, Any]) -> str:
    """Markdown: the machine, every candidate at every size, who is missing and why, and who is fastest."""
    rates = record["rates"]
    parts = [
        f"{headline(record['environment'])}; {record['dtype']}; a large matrix product "
        f"{rates['flops_per_second'] / 1e12:.0f} TFLOP/s, a copy {rates['bytes_per_second'] / 1e9:.0f} GB/s",
        table(HEAD, _rows(record)),
        NOTE,
    ]
    missing = [
        f"- {result['size']}: {name}: {why}"
        for result in record["results"]
        for name, why in result["skipped"].items()
    ]
    missing += [f"- {size}: left out: {why}" for size, why in record["left_out"].items()]
    parts += ["No speed:\n\n" + "\n".join(missing)] if missing else []
    times = [result["timings"] for result in record["results"] if result["timings"]]
    won = sum(min(taken, key=lambda name: taken[name]["ms"]).startswith(OURS) for taken in times)
    return "\n\n".join([*parts, f"Ours is the fastest at {won} of {len(record['results'])} sizes."])


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    rates = record["rates"]
    for result in record["results"]:
        flops, moved, times = result["flops"], result["bytes"], result["timings"]
        floor_s = max(flops / rates["flops_per_second"], moved / rates["bytes_per_second"])
        for name, taken in times.items():
            timing = Timing(**taken)
            seconds = timing.ms / 1e3
            yield (
                result["size"],
                name,
                str(timing),
                digits(flops / seconds / 1e12),
                digits(moved / seconds / 1e9),
                f"{floor_s / seconds:.0%}",
                f"{timing.ms / times[OURS]['ms']:.2f}" if OURS in times else "-",
                f"{100 * result['errors'][name]:.3f}",
            )
