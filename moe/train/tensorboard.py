"""The numbers of a run for TensorBoard, when it is installed; nothing otherwise."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

from moe.train.settings import TrainConfig


class Board(Protocol):
    """Takes records of metrics.jsonl; closes itself as a context."""

    def add(self, record: dict[str, Any]) -> None: ...  # noqa: D102
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


class NoBoard:
    """Where TensorBoard is not wanted or not installed."""

    def add(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class TensorBoard:
    """Every scalar of a record, under its kind, against the step."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, record: dict[str, Any]) -> None:
        """Write the scalars of one record."""
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "eta_seconds"):
                self.writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()


def open_tensorboard(settings: TrainConfig, folder: Path, step: int) -> Board:
    """A writer into `folder`/tensorboard that hides what came after `step`, or one that does nothing."""
    if settings.tensorboard and find_spec("tensorboard") is not None:
        return TensorBoard(folder / "tensorboard", step)
    return NoBoard()
