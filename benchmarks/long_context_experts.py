"""Four times the experts at the same active ones: what a token costs, and what is found.

The preset `needle` with 8 and with 32 experts a layer, two of them for each token; and, since attention and
embedding do not grow, with as many as make four times all parameters. A training step is whole: its batch,
the losses, the gradients, the optimizer, the balance. Two trained runs are read with instead, and asked.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.long_context_model import chunk_of, make_decoder, settings_of
from benchmarks.long_context_reading import Bench
from benchmarks.measure import Budget, Prepare, Timing, time_in_turns
from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.parameters import count_parameters
from moe.prefill import prefill
from moe.probes.needle.evaluate import evaluate_needles
from moe.probes.needle.questions import Questions
from moe.train.data import Windows
from moe.train.overrides import change
from moe.train.runs import open_run
from moe.train.settings import RunConfig
from moe.train.trainer import Trainer

MORE = 4  # times the experts
RECALL_LENGTH = 1 << 18
NEVER_ENDING = 1_000_000  # steps, so that the learning rate stays in its warm-up


def settings_by_experts(folders: list[Path]) -> list[RunConfig]:
    """Few experts first: two runs; or one, or the preset, with four times the experts and the parameters.

    Raises:
        ValueError: two runs that differ in more than their experts.
    """
    if len(folders) < 2:
        few = settings_of(folders[0] if folders else None)
        more = [MORE * few.model.num_experts, experts_for(few.model, MORE)]
        return [few, *(change(few, None, [f"model.num_experts={number}"]) for number in more)]
    few, many = sorted(map(settings_of, folders), key=lambda settings: settings.model.num_experts)
    if replace(many.model, num_experts=few.model.num_experts) != few.model:
        raise ValueError(
            f"{folders[0]} and {folders[1]} are to be compared, but their models differ in more than "
            f"num_experts. Give two runs of which one has other experts and nothing else."
        )
    return [few, many]


def experts_for(config: DecoderConfig, times: float) -> int:
    """The least multiple of its experts with so many times the parameters in all."""
    wanted, number = times * count_parameters(config).total, config.num_experts
    while count_parameters(replace(config, num_experts=number)).total < wanted:
        number += config.num_experts
    return number


def in_order(folders: list[Path]) -> list[Path | None]:
    """Two runs, the one with fewer experts first; without two, random weights (None) of three sizes."""
    if len(folders) < 2:
        return [None, None, None]
    return sorted(folders, key=lambda folder: settings_of(folder).model.num_experts)


def measure_experts(bench: Bench, folders: list[Path], length: int) -> dict[str, Any]:
    """Time per token of a prefill and of a training step, all models in turns; their sizes."""
    sizes = settings_by_experts(folders)
    names = [name_of(settings.model) for settings in sizes]
    decoders = [
        make_decoder(settings.model, bench.device, folder)
        for settings, folder in zip(sizes, in_order(folders), strict=True)
    ]
    bench.log(f"{', '.join(names)}: prefill of {length} tokens")
    reading = time_in_turns(
        {name: _reading(bench, decoder, length) for name, decoder in zip(names, decoders, strict=True)},
        bench.device,
        Budget(bench.seconds, warmups=1, min_rounds=5, max_rounds=20),
    )
    bench.log(f"{', '.join(names)}: training steps")
    training = time_training(bench, dict(zip(names, sizes, strict=True)))
    settings = sizes[0]
    return {
        "names": names,
        "models": [asdict(count_parameters(settings.model)) for settings in sizes],
        "prefill_tokens": length,
        "training_tokens": settings.train.batch_size * settings.data.sequence_length,
        "prefill": {name: asdict(timing) for name, timing in reading.items()},
        "training": {name: asdict(timing) for name, timing in training.items()},
    }


def name_of(config: DecoderConfig) -> str:
    """Such as "8 experts"."""
    return f"{config.num_experts} experts"


def time_training(bench: Bench, settings: dict[str, RunConfig]) -> dict[str, Timing]:
    """Training steps of all models, in turns, on the same batches."""
    text = bench.text[0].numpy()
    works: dict[str, Prepare] = {}
    for name, config in settings.items():
        trainer = Trainer(_endless(config, bench.device), Windows(text, config.data.sequence_length))
        works[name] = lambda number, trainer=trainer: trainer.step
    budget = Budget(bench.seconds, warmups=3, min_rounds=10, max_rounds=100)
    return time_in_turns(works, bench.device, budget)


def measure_recall(
    bench: Bench, folders: list[Path], queries: int, length: int = RECALL_LENGTH, text: Path | None = None
) -> list[dict[str, Any]]:
    """What two trained runs find, asked the same questions about the same haystacks; few experts first."""
    asked = Questions(queries=queries, haystacks=min(3, queries), folder=text, repeat=text is not None)
    found = []
    for folder in in_order(folders):
        assert folder is not None, "recall is measured of trained runs alone"
        run = open_run(folder, device=str(bench.device))
        name = name_of(run.config.model)
        bench.log(f"{name}: {queries} questions of each template about {length} tokens")
        for row in evaluate_needles(run, asked, length, name=name):
            found.append(
                {
                    "name": name,
                    "run": folder.name,
                    "step": run.step,
                    "template": row.template,
                    "length": length,
                    "haystacks": row.haystacks,
                    "right": row.right,
                    "asked": row.asked,
                    "lower_bound": row.lower_bound,
                }
            )
    return found


def _reading(bench: Bench, decoder: Decoder, length: int) -> Prepare:
    return lambda number: partial(prefill, decoder, bench.ids(length), chunk=chunk_of(bench.device))


def _endless(config: RunConfig, device: torch.device) -> RunConfig:
    """The same run without its short first sequences, in float32, on this device."""
    assert config.needle is not None, "settings of a run that finds needles"
    train = replace(config.train, steps=NEVER_ENDING, device=str(device), precision="float32")
    return replace(config, train=train, needle=replace(config.needle, short_fraction=0.0))
