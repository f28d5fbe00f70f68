"""What a process makes sure of before it writes into a run folder: the place, the lock, the machine."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from moe.checkpoint import read_json
from moe.doctor import environment
from moe.train.files import write_json
from moe.train.settings import RunConfig
from moe.train.tokens import cache_folder

LOCK_NAME = ".lock"
EXACTNESS = ("torch", "threads", "device", "gpus")  # facts of env.json that decide the last bit
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def check_outside_corpus(config: RunConfig, folder: Path) -> None:
    """Refuse to write where text is read: the files of a run would be in the next corpus.

    Raises:
        ValueError: the run folder or the cache is inside data.folder, other than under a hidden folder.
    """
    if config.data.folder is None:
        return
    root = Path(config.data.folder).expanduser().resolve()
    for name, path in (("--out", folder), ("data.cache", cache_folder(config.data.cache))):
        place = path.expanduser().resolve()
        if place.is_relative_to(root) and not _is_hidden(place.relative_to(root)):
            raise ValueError(
                f"{name}={str(path)!r} is inside data.folder={config.data.folder!r}: what is written there "
                f"would become text of the corpus. Give a folder outside it with {name}."
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder, made if needed, for this process; the operating system lets go when it ends.

    A file system without locks is used as it is.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("ab") as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _HELD:
                raise BlockingIOError(
                    f"another process is training in {folder}. Wait until it ends or stop it, "
                    f"or give another folder with --out."
                ) from None
        yield


def record_environment(folder: Path, device: torch.device, log: Callable[[str], None]) -> None:
    """Write env.json when a run begins; later keep it, and log what is different now."""
    file, now = folder / "env.json", environment(device)
    if not file.exists():
        write_json(file, now)
        return
    before = read_json(file)
    changed = [
        f"{key} was {before.get(key)}, is {now[key]}" for key in EXACTNESS if before.get(key) != now[key]
    ]
    if changed:
        log(
            f"changed since the run began: {'; '.join(changed)}. "
            f"Resuming is exact only with the same torch, threads and device."
        )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        file.seek(0, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
