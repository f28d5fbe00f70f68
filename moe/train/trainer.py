"""One model, its optimizer and its data: what a step does, and what a checkpoint must bring back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from moe.balance import update_selection_bias
from moe.checkpoint import check_tensors
from moe.decoder import Decoder
from moe.layer import MoE
from moe.train.data import Windows
from moe.train.device import autocast, choose_device, choose_precision
from moe.train.metrics import Meter, NonFiniteError, Progress
from moe.train.optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from moe.train.run_folder import RunFolder, generator_tensors, load_checkpoint, restore_generators
from moe.train.settings import RunConfig
from moe.train.task import Task, make_task


class Trainer:
    """The state of a run in memory; equal configs and windows make equal trainers.

    task: what it trains on, where that is at hand; None: that of the config. Building a trainer seeds
    torch's random generators with `train.seed`.
    """

    def __init__(self, config: RunConfig, windows: Windows, task: Task | None = None) -> None:
        self.config = config
        self.task = make_task(config, windows) if task is None else task
        self.device = choose_device(config.train.device)
        self.dtype = choose_precision(config.train, self.device)
        torch.manual_seed(config.train.seed)
        self.model = Decoder(config.model, backend=config.train.backend).to(self.device)
        self.routers = [module.router for module in self.model.modules() if isinstance(module, MoE)]
        self.optimizer = make_optimizer(self.model, config.optim)
        self.loss = torch.compile(self.task.loss) if config.train.compile else self.task.loss
        self.meter = Meter(config.model, self.device)
        self.progress = Progress()

    def step(self) -> None:
        """One optimizer step on the batch that belongs to it.

        Raises:
            NonFiniteError: on a CPU; on a GPU, where looking would stall it, see `Meter.check`.
        """
        train, step = self.config.train, self.progress.step
        batch = [self._to_device(tensor).chunk(train.accumulation) for tensor in self.task.batch(step)]
        loads = [self._accumulate(parts, step) for parts in zip(*batch, strict=True)]
        if self.device.type == "cpu":
            self.meter.check()
        self.meter.add_step(step, self._clip())
        if self.device.type == "cpu":
            self.meter.check()
        set_learning_rate(self.optimizer, self.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance(torch.stack(loads).sum(0))
        self.progress.step += 1

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next, or of the last one when there is none."""
        step = min(self.progress.step, self.config.train.steps - 1)
        return learning_rate(step, self.config.train.steps, self.config.optim)

    def save(self, run: RunFolder) -> Path:
        """Write a checkpoint of everything that the next step depends on.

        Raises:
            NonFiniteError: a weight or a moment of the optimizer is not finite; nothing is written.
        """
        tensors = optimizer_tensors(self.model, self.optimizer) | generator_tensors(self.device)
        for name, tensor in (self.model.state_dict() | tensors).items():
            if not tensor.isfinite().all():
                raise NonFiniteError(f"step {self.progress.step}: {name} became NaN or infinite.")
        return run.save_checkpoint(self.model, tensors, self.progress, self.config.train.keep_checkpoints)

    def restore(self, checkpoint: Path) -> None:
        """Become the trainer that wrote the checkpoint.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged or does not fit the model.
        """
        weights, others, progress = load_checkpoint(checkpoint)
        check_tensors(weights, self.model.state_dict(), checkpoint)
        self.model.load_state_dict(weights)
        restore_generators(others, self.device)
        if others or progress.step:  # a model that came from elsewhere has not been optimised yet
            load_optimizer_tensors(self.model, self.optimizer, others)
        self.progress = progress

    def _accumulate(self, batch: tuple[Tensor, ...], step: int) -> Tensor:
        share = 1 / self.config.train.accumulation
        with autocast(self.device, self.dtype):
            loss = self.loss(self.model, *batch)
        (loss.total * share).backward()
        return self.meter.add_part(step, loss, share)

    def _clip(self) -> Tensor:
        limit = self.config.optim.clip or float("inf")
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def _balance(self, loads: Tensor) -> None:
        """Move the selection bias once a step, by the loads (l e) of the whole batch."""
        if self.config.model.use_selection_bias:
            for router, load in zip(self.routers, loads, strict=True):
                update_selection_bias(router, load, self.config.optim.selection_bias_rate)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return x.to(self.device)
        return x.pin_memory().to(self.device, non_blocking=True)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, kernels whose result does not depend on timing; a CPU has no others here.

    An operation without such a kernel warns, and then resuming is not exact to the last bit.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
