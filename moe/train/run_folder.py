"""The folder that a run leaves: complete at every moment, whenever the process is killed.

    run_config.json   the settings, written before anything else
    env.json          versions and device when it began
    .lock             held by the process that trains
    corpus.json       which text, as digests
    tokenizer.json    BPE only
    metrics.jsonl     one JSON object a line; on resume cut back to the checkpoint's step
    checkpoints/step_00000400/{config.json, model.safetensors, optimizer.safetensors, state.json}
    eval.json, samples.txt, figure.png   written at the end

A checkpoint appears whole or not at all (`moe.atomic`), and an older one goes only after that.
"""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.atomic import atomic_folder
from moe.checkpoint import load_tensors, read_json, save_tensors
from moe.decoder import Decoder
from moe.train.files import full_disk_error, write_bytes, write_json
from moe.train.metrics import Progress
from moe.train.settings import CHANGEABLE_ON_RESUME, RunConfig, differences

_CHECKPOINT = re.compile(r"step_(\d{8})")


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "run_config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.corpus_file = path / "corpus.json"
        self.checkpoints_folder = path / "checkpoints"

    def check_free(self) -> None:
        """Make sure that a new run may have the folder; changes nothing.

        Raises:
            FileExistsError: it holds another run, or other files.
            NotADirectoryError: it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file. Give the name of a folder.")
        if self.config_file.exists():
            raise FileExistsError(
                f"{self.path} already holds a run. Continue it with --resume, "
                f"or give another folder with --out."
            )
        if self.path.exists() and any(not item.name.startswith(".") for item in self.path.iterdir()):
            raise FileExistsError(f"{self.path} holds other files. Give a new or an empty folder with --out.")

    def start(self, config: RunConfig) -> None:
        """Claim the folder for a new run; raises as `check_free`."""
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config_file, config.to_dict())

    def check_resume(self, config: RunConfig) -> None:
        """Make sure that the run can go on with these settings; changes nothing.

        Raises:
            FileNotFoundError: the folder holds no run.
            ValueError: the settings differ in a key that decides what is computed, or have fewer steps than
                are done.
        """
        changed = differences(self.read_config(), config)
        refused = [f"{k}: {a!r} -> {b!r}" for k, (a, b) in changed.items() if k not in CHANGEABLE_ON_RESUME]
        if refused:
            raise ValueError(
                f"{self.path} holds a run with other settings ({'; '.join(refused)}). "
                f"Resume it with its own, or start a new run with --out. "
                f"These may change: {', '.join(CHANGEABLE_ON_RESUME)}."
            )
        latest = self.latest_checkpoint()
        if latest is not None and config.train.steps < step_of(latest):
            raise ValueError(
                f"train.steps={config.train.steps} is below the {step_of(latest)} steps that the run in "
                f"{self.path} has done. Give at least as many, or start a new run with --out."
            )

    def resume(self, config: RunConfig) -> None:
        """Go on after the newest checkpoint: drop what was logged later, keep the settings."""
        for leftover in self.checkpoints_folder.glob(".step_*"):  # of a writer that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        latest = self.latest_checkpoint()
        self.cut_metrics(0 if latest is None else step_of(latest))
        write_json(self.config_file, config.to_dict())

    def read_config(self) -> RunConfig:
        """The settings of the run.

        Raises:
            FileNotFoundError: the folder holds no run.
            ValueError: the file is damaged.
        """
        if not self.config_file.exists():
            raise FileNotFoundError(f"{self.path} holds no run: there is no {self.config_file.name} in it.")
        return RunConfig.from_dict(read_json(self.config_file))

    def claim_corpus(self, manifest: dict[str, Any]) -> None:
        """Write down which text the run reads, or check that it is still the same.

        Raises:
            ValueError: the text or its tokens changed since the run began.
        """
        if not self.corpus_file.exists():
            write_json(self.corpus_file, manifest)
        elif read_json(self.corpus_file) != manifest:
            raise ValueError(
                f"the text of this run changed since it began (see {self.corpus_file}). "
                f"It needs the same files: restore them, or start a new run with --out."
            )

    def checkpoints(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        if not self.checkpoints_folder.is_dir():
            return []
        return sorted(path for path in self.checkpoints_folder.iterdir() if _CHECKPOINT.fullmatch(path.name))

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        return next(reversed(self.checkpoints()), None)

    def save_checkpoint(
        self, model: Decoder, tensors: dict[str, Tensor], progress: Progress, keep: int
    ) -> Path:
        """Write a checkpoint, then remove all but the newest `keep`.

        tensors: the optimizer's state and the states of the random generators.

        Raises:
            OSError: no space left on disk; the checkpoints from before are intact.
        """
        folder = self.checkpoints_folder / f"step_{progress.step:08d}"
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            save_tensors(temporary, tensors, name="optimizer")
            write_json(temporary / "state.json", asdict(progress))
        for old in self.checkpoints()[:-keep]:
            doomed = old.rename(
                old.with_name(f".{old.name}.removed")
            )  # a kill in between leaves no half checkpoint
            shutil.rmtree(doomed, ignore_errors=True)
        return folder

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl.

        Raises:
            OSError: no space left on disk.
            ValueError: a number that is NaN or infinite: JSON has none.
        """
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise full_disk_error(error, self.metrics_file) from error

    def read_metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a line that was cut off by a kill is left out."""
        if not self.metrics_file.exists():
            return []
        records = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [record for record in records if kind in (None, record["kind"])]

    def cut_metrics(self, step: int) -> None:
        """Drop what was logged after `step`: the resumed run logs it again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_bytes(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept).encode("utf-8"))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is no checkpoint: its name must look like step_00000400.")
    return int(match[1])


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Progress]:
    """Model tensors, optimizer and generator tensors, and progress of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    state = read_json(folder / "state.json")
    return load_tensors(folder), load_tensors(folder, name="optimizer"), Progress(**state)


def generator_tensors(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's random generators as tensors."""
    states = {"rng.cpu": torch.get_rng_state()}
    return states | ({"rng.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_generators(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Take the "rng." tensors out of `tensors` and set the generators to them."""
    torch.set_rng_state(tensors.pop("rng.cpu").clone())
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda.clone(), device)
