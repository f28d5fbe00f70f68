"""Training the preset `needle` on a GPU in a given time.

Changed against the preset, which is made for a CPU: 8 sequences a step instead of one, since a step of so
small a model costs a GPU its launches and hardly its work; and everything in float32, also the products that
a GPU would by default make in bfloat16. The model learns logits of 75 to 90; queries and keys rounded to
bfloat16, by up to 2⁻⁹ of themselves each, could shift such a logit by a third. The time, which is that of
launches, stays.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_needle_parts import synchronize
from benchmarks.long_context_reading import Log
from moe.train.data import Windows
from moe.train.loop import train
from moe.train.overrides import change, find_preset
from moe.train.settings import RunConfig, differences
from moe.train.trainer import Trainer, deterministic

CHANGES = ("train.batch_size=8", "train.precision=float32", "train.tensorboard=false")
ROUND = 50  # steps, a logging interval
WARM_UP, TIMED = 8, 12  # steps: the first ones compile kernels
SHARE = 0.9  # of the time for steps; the rest is for the corpus, checkpoints and luck


def train_needle(
    folder: Path, device: torch.device, seconds: float, overrides: list[str], log: Log
) -> dict[str, Any]:
    """Train in the folder, with as many steps as the seconds allow; returns what was done.

    Raises:
        ValueError: overrides that are no settings.
    """
    began = time.perf_counter()
    config = change(find_preset("needle"), None, [*CHANGES, f'train.device="{device}"', *overrides])
    step_s = seconds_a_step(config, device)
    left = seconds - (time.perf_counter() - began)
    steps = steps_within(left, step_s, config.train.steps)
    log(f"a training step takes {1e3 * step_s:.0f} ms: {steps} steps in the {left:.0f} s that are left")
    config = change(config, None, [f"train.steps={steps}", f"train.checkpoint_every={steps}"])
    train(config, folder, log=log)
    changes = differences(find_preset("needle"), config)
    return {
        "seconds": time.perf_counter() - began,
        "step_ms": 1e3 * step_s,
        "steps": steps,
        "changes": {key: new for key, (_, new) in changes.items() if not key.startswith("data.")},
    }


def steps_within(seconds: float, step_s: float, most: int) -> int:
    """As many whole logging intervals as fit, at least one."""
    fit = int(SHARE * seconds / step_s) // ROUND * ROUND
    return max(ROUND, min(most // ROUND * ROUND, fit))


def seconds_a_step(config: RunConfig, device: torch.device) -> float:
    """The mean of some steps on random bytes, of sequences of the full length."""
    assert config.needle is not None, "the preset finds needles"
    config = replace(config, needle=replace(config.needle, short_fraction=0.0))
    text = np.random.default_rng(0).integers(256, size=4 * config.data.sequence_length, dtype=np.uint8)
    with deterministic(device):
        trainer = Trainer(config, Windows(text, config.data.sequence_length))
        for _ in range(WARM_UP):
            trainer.step()
        synchronize(device)
        began = time.perf_counter()
        for _ in range(TIMED):
            trainer.step()
        synchronize(device)
    return (time.perf_counter() - began) / TIMED
