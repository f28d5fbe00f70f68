"""The training loop: steps, and after some of them a line, a validation, a checkpoint."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe.decoder import Decoder
from moe.parameters import flops_per_token
from moe.train.claim import check_outside_corpus, locked, record_environment
from moe.train.data import Windows
from moe.train.device import check_backend, choose_device, memory_in_use, peak_flops
from moe.train.evaluate import Evaluation, evaluate
from moe.train.header import header
from moe.train.memory import keep_freed_memory
from moe.train.metrics import NonFiniteError, eval_line, train_line
from moe.train.run_folder import RunFolder
from moe.train.settings import RunConfig
from moe.train.task import make_task
from moe.train.tensorboard import open_tensorboard
from moe.train.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, save_tokenizer
from moe.train.tokens import TokenisedCorpus, load_tokens
from moe.train.trainer import Trainer, deterministic

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult:
    """A finished run: its folder, its last checkpoint, the model, the last validation record, its text."""

    folder: Path
    checkpoint: Path
    model: Decoder
    validation: dict[str, Any]
    corpus: TokenisedCorpus


def train(
    config: RunConfig, folder: Path, *, resume: bool = False, log: Log = lambda line: None
) -> TrainResult:
    """Run to the last step, from the beginning or from the newest checkpoint of the folder.

    Each text line of the run goes to `log`. Killed at any moment, the folder holds the last checkpoint.
    A run that is refused leaves its folder as it was. On a CPU the process then keeps memory that it frees
    (`keep_freed_memory`).

    Raises:
        FileExistsError: the folder holds another run.
        BlockingIOError: another process trains in the folder.
        ValueError, OSError: settings, data, checkpoints or disk (see `load_tokens`, `RunFolder`).
        NonFiniteError: the loss, the gradient, a weight or router logits are not finite.
    """
    run = RunFolder(folder)
    device = choose_device(config.train.device)
    check_backend(config.train, device)
    check_outside_corpus(config, folder)
    if resume:
        run.check_resume(config)
    else:
        run.check_free()
    known = known_tokenizer(run, config) if resume else None
    corpus = load_tokens(config, tokenizer=known, log=log)  # refuses bad data before a folder is claimed
    windows = Windows(corpus.train, config.data.sequence_length)
    task = make_task(config, windows)  # as does this, where images or recordings are missing
    if device.type == "cpu":
        keep_freed_memory()
    with locked(folder), deterministic(device):
        if not resume:
            run.start(config)
        run.claim_corpus(corpus.manifest)
        trainer = Trainer(config, windows, task)
        for line in header(config, corpus, trainer.device, trainer.dtype):
            log(line)
        if resume:
            go_on(trainer, run, log)
        save_tokenizer(corpus.tokenizer, folder)
        record_environment(folder, device, log)
        return Loop(trainer, run, corpus, log).run_to_end()


def go_on(trainer: Trainer, run: RunFolder, log: Log) -> None:
    """Restore the newest checkpoint, if there is one; only then is the folder changed."""
    run.check_resume(trainer.config)  # again: now the folder is locked
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        trainer.restore(checkpoint)
        log(f"resuming after step {trainer.progress.step} from {checkpoint}")
    run.resume(trainer.config)


def known_tokenizer(run: RunFolder, config: RunConfig) -> Tokenizer | None:
    """The tokenizer that a run already uses, unless it was killed before it had one."""
    has_one = config.data.tokenizer == "bytes" or (run.path / TOKENIZER_FILE).is_file()
    return load_tokenizer(config, run.path) if has_one else None


class Loop:
    """Steps and what is due after each of them."""

    def __init__(self, trainer: Trainer, run: RunFolder, corpus: TokenisedCorpus, log: Log) -> None:
        self.trainer, self.run, self.corpus, self.log = trainer, run, corpus, log
        self.validation = Windows(corpus.validation, trainer.config.data.sequence_length)
        train = corpus.manifest["train"]
        self.bytes_per_token = train["bytes"] / train["tokens"]  # turns nats into bits per byte
        self.settings = trainer.config.train
        self.flops = 3 * flops_per_token(trainer.config.model, trainer.config.data.sequence_length)
        self.tensorboard = open_tensorboard(self.settings, run.path, trainer.progress.step)
        self.last_validation: dict[str, Any] = {}

    def run_to_end(self) -> TrainResult:
        """All steps that are left; the last one is always logged, validated and saved."""
        settings, progress = self.settings, self.trainer.progress
        steps_in_interval, started = 0, time.perf_counter()
        with self.tensorboard:
            while progress.step < settings.steps:
                lr = self.trainer.learning_rate
                self._step()
                steps_in_interval += 1
                if self._due(settings.log_every):
                    self._close_interval(lr, steps_in_interval, started)
                    if self._due(settings.eval_every):
                        self._validate()
                    if self._due(settings.checkpoint_every):
                        self._save()
                    steps_in_interval, started = 0, time.perf_counter()
        checkpoint = self.run.latest_checkpoint()
        if checkpoint is None:
            raise FileNotFoundError(f"{self.run.path} has no checkpoint, although all steps are done.")
        return TrainResult(self.run.path, checkpoint, self.trainer.model, self.last_validation, self.corpus)

    def _due(self, every: int) -> bool:
        step = self.trainer.progress.step
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def _step(self) -> None:
        with self._explained():
            self.trainer.step()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Add to numbers that are not finite what is safe and what to try."""
        try:
            yield
        except NonFiniteError as error:
            latest = self.run.latest_checkpoint()
            kept = "There is no checkpoint yet" if latest is None else f"The last good checkpoint is {latest}"
            raise NonFiniteError(
                f"{error} {kept}. Lower optim.lr, raise optim.warmup_steps, or set train.precision=float32."
            ) from None

    def _close_interval(self, lr: float, steps: int, started: float) -> None:
        with self._explained():
            self.trainer.meter.check()
        values = self.trainer.meter.read()  # waits for the device, so the clock below is honest
        seconds = time.perf_counter() - started
        progress = self.trainer.progress
        progress.seconds += seconds
        tokens = self.settings.batch_size * self.trainer.config.data.sequence_length
        speed = steps * tokens / seconds
        peak = peak_flops(self.trainer.device)
        record = {
            "kind": "train",
            "step": progress.step,
            "tokens": progress.step * tokens,
            **values,
            "ema": progress.smooth(values["cross_entropy"]),
            "bits_per_byte": values["cross_entropy"] / math.log(2) / self.bytes_per_token,
            "lr": lr,
            "seconds": progress.seconds,
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed * self.flops / peak,
            "memory_bytes": memory_in_use(self.trainer.device),
            "eta_seconds": (self.settings.steps - progress.step) * seconds / steps,
        }
        self._record(record)
        self.log(train_line(record, self.settings.steps, self.trainer.config.model))

    def _save(self) -> None:
        """Write a checkpoint, unless the model's numbers are not finite any more."""
        self._measure(1)
        with self._explained():
            self.trainer.save(self.run)

    def _measure(self, max_tokens: int) -> Evaluation:
        result = evaluate(
            self.trainer.model,
            self.validation,
            self.corpus.tokenizer,
            max_tokens=max_tokens,
            spread_over=self.settings.final_eval_tokens,
            dtype=self.trainer.dtype,
        )
        if not math.isfinite(result.loss):
            with self._explained():
                step = self.trainer.progress.step
                raise NonFiniteError(f"step {step}: the validation loss became NaN or infinite.")
        return result

    def _validate(self) -> None:
        result = self._measure(self.settings.eval_tokens)
        progress = self.trainer.progress
        tokens = progress.step * self.settings.batch_size * self.trainer.config.data.sequence_length
        self.last_validation = {
            "kind": "eval",
            "step": progress.step,
            "tokens_seen": tokens,
            **asdict(result),
        }
        self._record(self.last_validation)
        self.log(eval_line(self.last_validation, self.settings.steps))

    def _record(self, record: dict[str, Any]) -> None:
        self.run.append_metrics(record)
        self.tensorboard.add(record)
