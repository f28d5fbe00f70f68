"""Figures that others published, to stand beside ours: none of them was measured here.

Only what ran on an H100 in bfloat16 is listed. A figure is marked "published" wherever it is printed.
"""

SONIC_SOURCE = "SonicMoE, 2512.14080, figure 14, H100"
# TFLOP/s of the forward and of the backward pass alone.
SONIC: dict[str, tuple[float, float]] = {
    "sonic_1.4b_h256": (340, 368),
    "sonic_1.4b_h512": (400, 400),
    "sonic_1.4b_h1024": (406, 436),
    "sonic_7b_h256": (365, 406),
    "sonic_7b_h512": (436, 440),
    "sonic_7b_h1024": (468, 468),
    "sonic_30b_h256": (429, 461),
    "sonic_30b_h512": (504, 513),
    "sonic_30b_h1024": (554, 556),
    "sonic_120b_h512": (519, 528),
    "sonic_120b_h1024": (560, 569),
    "sonic_120b_h2048": (597, 588),
}

LIGER_SOURCE = "Liger-Kernel 0.8.5, benchmark/data/all_benchmark_data.csv, H100"
# (shape, tokens) -> milliseconds of the forward, and of forward + backward.
LIGER: dict[tuple[str, int], tuple[float, float]] = {
    ("qwen3_30b", 128): (0.589, 3.87),
    ("qwen3_30b", 1024): (0.671, 4.40),
    ("qwen3_30b", 4096): (1.25, 6.48),
    ("qwen3_30b", 8192): (2.096, 9.55),
    ("qwen3_30b", 16384): (3.89, 15.7),
    ("qwen3_30b", 32768): (7.34, 28.2),
}


def sonic_both(name: str) -> float:
    """TFLOP/s of SonicMoE's forward + backward: a third of the work at one rate, two thirds at the other."""
    forward, backward = SONIC[name]
    return 3 / (1 / forward + 2 / backward)
