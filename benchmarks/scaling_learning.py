"""What more experts learn at equal active parameters, data and order: arms, their runs, and what they prove.

An arm is a decoder; a run is an arm and a seed. All runs of a seed see the same bytes in the same order and
start from the same attention, norms and embedding. Finished runs are kept: an interrupted benchmark goes on.
"""

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import moe
from benchmarks.record import commit
from benchmarks.scaling_store import Run, append_store, default_store, read_store
from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.parameters import count_parameters, flops_per_token
from moe.train.data import Windows
from moe.train.evaluate import evaluate
from moe.train.settings import DataConfig, OptimConfig, RunConfig, TrainConfig
from moe.train.tokens import load_tokens
from moe.train.trainer import Trainer

DENSE = "dense"
LAST = 0.1  # the part of a run, at its end, over which load and training loss are measured


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningSetting:
    """What all arms share. `width` is that of the dense feed-forward, `experts` the sparse arms.

    Weights of the k chosen experts sum to k: k narrow experts then give the variance of one wide
    feed-forward, and no arm starts with a smaller output (`routed_scaling_factor`).
    """

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    width: int = 128
    top_k: int = 2
    experts: tuple[int, ...] = (4, 16, 64)
    sequence: int = 128
    batch: int = 16
    steps: int = 1600
    lr: float = 1e-2
    warmup: int = 50
    selection_bias_rate: float = 3e-3
    initializer_range: float = 0.1
    validation_tokens: int = 262_144
    seeds: int = 5
    seeds_of_extra_arms: int = 2  # E = k, which must equal dense
    folder: str | None = None  # None: the standard library of the running interpreter
    threads: int = 1

    def model(self, experts: int, width: int | None = None) -> DecoderConfig:
        """A dense decoder (0 experts), or a sparse one with its active parameters, router included."""
        return DecoderConfig(
            vocab_size=256,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=None if experts else width or self.width,
            moe_intermediate_size=self.expert_width(experts) if experts else 0,
            num_experts=experts,
            num_experts_per_tok=self.top_k if experts else 0,
            scoring_func="sigmoid",
            use_selection_bias=experts > 0,
            routed_scaling_factor=float(self.top_k) if experts else 1.0,
            use_qk_norm=True,
            initializer_range=self.initializer_range,
            max_position_embeddings=self.sequence,
        )

    def expert_width(self, experts: int) -> int:
        """The even h with k h 3 d + e d near 3 d width: narrower experts pay for the router's weights."""
        return round((self.width - experts / 3) / self.top_k / 2) * 2

    def arms(self) -> dict[str, DecoderConfig]:
        """The decoders by name, the dense yardstick first."""
        more = count_parameters(self.model(self.experts[0])).total - count_parameters(self.model(0)).total
        wide = self.width + 4 * round(more / (3 * self.hidden_size * self.layers) / 4)
        return {
            DENSE: self.model(0),
            **{f"e={e}": self.model(e) for e in self.experts},
            f"dense, total of e={self.experts[0]}": self.model(0, wide),
            f"e={self.top_k} (= k)": self.model(self.top_k),
        }

    def run_config(self, arm: str, seed: int) -> RunConfig:
        """Settings of one run; nothing but the model differs between the arms of a seed."""
        return RunConfig(
            model=self.arms()[arm],
            data=DataConfig(folder=self.folder, sequence_length=self.sequence),
            optim=OptimConfig(
                lr=self.lr,
                warmup_steps=self.warmup,
                final_fraction=0.02,
                selection_bias_rate=self.selection_bias_rate,
            ),
            train=TrainConfig(
                steps=self.steps, batch_size=self.batch, seed=seed, device="cpu", tensorboard=False
            ),
        )

    def runs(self) -> list[tuple[str, int]]:
        """Every (arm, seed), seed by seed, so that an interrupted benchmark has whole pairs."""
        return [
            (arm, seed)
            for seed in range(self.seeds)
            for arm in self.arms()
            if not arm.endswith("(= k)") or seed < self.seeds_of_extra_arms
        ]


def train_run(setting: LearningSetting, arm: str, seed: int) -> Run:
    """Train one arm from one seed and measure it on the held-out files."""
    loaded = _loaded_commit()
    torch.set_num_threads(setting.threads)
    config = setting.run_config(arm, seed)
    corpus = load_tokens(config)
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer = Trainer(config, Windows(corpus.train, setting.sequence))
    share_initial_weights(trainer.model, setting.model(0), seed)
    for step in range(setting.steps):
        if step == setting.steps - max(1, round(LAST * setting.steps)):
            trainer.meter.reset()
        trainer.step()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    last = trainer.meter.read()
    validation = evaluate(
        trainer.model,
        Windows(corpus.validation, setting.sequence),
        corpus.tokenizer,
        max_tokens=setting.validation_tokens,
    )
    return Run(
        arm=arm,
        seed=seed,
        validation_loss=validation.loss,
        training_loss=last["cross_entropy"],
        validation_tokens=validation.tokens,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        tokens=setting.steps * setting.batch * setting.sequence,
        max_violation=last["max_violation"],
        dead_experts=last["dead"],
        commit=loaded,
    )


@functools.cache
def _loaded_commit() -> str:
    """The commit when this process began its first run: later changes of the files are not in its memory."""
    return commit()


@torch.no_grad()
def share_initial_weights(model: Decoder, dense: DecoderConfig, seed: int) -> None:
    """Give everything but the feed-forwards the weights that the dense decoder of this seed starts from."""
    torch.manual_seed(seed)
    shared = Decoder(dense).state_dict()
    for name, tensor in model.state_dict().items():
        if ".mlp." not in name:
            tensor.copy_(shared[name])


def learn(
    setting: LearningSetting, jobs: int, store: Path | None, log: Callable[[str], None]
) -> dict[str, Any]:
    """All runs that are not in the store yet, `jobs` at a time, each in a process of its own.

    A store that is named is accepted as it is; the tables say of which commits its runs are.
    """
    corpus = load_tokens(setting.run_config(DENSE, 0), log=log)
    shared = asdict(replace(setting, seeds=0, seeds_of_extra_arms=0))
    path = store or default_store(shared, corpus.manifest["digest"], sources())
    done = read_store(path)
    todo = [run for run in setting.runs() if run not in done]
    log(f"learning: {len(setting.runs())} runs, {len(setting.runs()) - len(todo)} of them kept in {path}")
    started = time.perf_counter()
    for number, run in enumerate(_train_all(setting, todo, jobs), 1):
        done[run.arm, run.seed] = run
        append_store(path, run)
        left = (time.perf_counter() - started) / number * (len(todo) - number)
        log(
            f"{run.arm}, seed {run.seed}: {run.validation_loss:.4f} nats in {run.seconds:.0f} s; "
            f"{left / 60:.0f} min left"
        )
    runs = [done[key] for key in setting.runs()]
    return {
        "setting": asdict(setting),
        "corpus": corpus.manifest,
        "epochs": setting.steps * setting.batch * setting.sequence / len(corpus.train),
        "jobs": jobs,
        "arms": {name: _arm_facts(config, setting) for name, config in setting.arms().items()},
        "runs": [asdict(run) for run in runs],
    }


def sources() -> list[Path]:
    """What decides the outcome of a run: the library, and the arms and their initialisation in this file."""
    return [*sorted(Path(moe.__file__).parent.rglob("*.py")), Path(__file__)]


def _train_all(setting: LearningSetting, todo: list[tuple[str, int]], jobs: int) -> Iterable[Run]:
    """In this process when one job is asked for.

    When a run fails, no other is begun and those under way are finished and kept; then its error is raised.
    """
    if jobs == 1:
        yield from (train_run(setting, *run) for run in todo)
        return
    os.environ["OMP_NUM_THREADS"] = str(setting.threads)  # read when a child loads torch
    context = multiprocessing.get_context("spawn")
    pool, failed = ProcessPoolExecutor(jobs, mp_context=context), None
    try:
        pending = {pool.submit(train_run, setting, *run) for run in todo}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done if future.exception() is None)
            failed = failed or next((error for future in done if (error := future.exception())), None)
            if failed:
                pending = {future for future in pending if not future.cancel()}
    finally:  # also after Ctrl-C
        pool.shutdown(wait=False, cancel_futures=True)
    if failed:
        raise failed


def _arm_facts(config: DecoderConfig, setting: LearningSetting) -> dict[str, Any]:
    flops = flops_per_token(config, setting.sequence)
    return asdict(count_parameters(config)) | {
        "experts": config.num_experts,
        "forward_flops_per_token": flops,
    }
