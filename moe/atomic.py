"""A folder or a file that is either the old one or the new one, whenever the process is killed.

One writer at a time for one target. How `atomic_folder` replaces NAME:
    1. everything is written into a new sibling, `.NAME.tmp-XXXXXXXX`; files and folder reach the disk (fsync)
    2. the old folder, if there is one, is renamed to `.NAME.previous`
    3. the new folder is renamed to NAME, and the old one is removed
A rename is atomic, so whoever is killed leaves the old folder (before 2), a complete `.NAME.previous`
(between 2 and 3) or the new folder. `readable_folder` finds whichever it is; the next writer puts a stranded
old folder back and removes what dead writers left.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write into; takes its place on success, vanishes on any error.

    An existing folder is replaced as a whole: files that the block does not write are gone afterwards.
    Parents are made as needed. A symbolic link is followed, and the folder it names is replaced.

    Raises:
        NotADirectoryError: `path` is a file.
        ValueError: `path` is a mount point, or the current folder or one above it.
        OSError: no space left on disk (the old folder is intact, the temporary one removed), or another
            failure of the file system.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give the name of a folder.")
    if Path.cwd().is_relative_to(target) or target.is_mount():
        raise ValueError(
            f"{target} cannot be replaced as a whole: it is a mount point, or holds the current folder. "
            f"Save into a folder inside it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _tidy(target)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _commit(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_disk_full(error):
            raise _disk_full_error(target) from error
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of the file `path` to write; takes its place on success, vanishes on any error.

    Parents are made as needed. A symbolic link is followed, and the file it names is replaced.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: no space left on disk (the old file is intact, the temporary one removed), or another
            failure of the file system.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{_escape(target.name)}.tmp-*"):
        leftover.unlink()
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _is_disk_full(error):
            raise _disk_full_error(target) from error
        raise


def write_atomically(folder: str | Path, writer: Callable[[Path], object]) -> None:
    """Replace `folder` by what `writer` writes into the folder it is given; see `atomic_folder`."""
    with atomic_folder(folder) as temporary:
        writer(temporary)


def readable_folder(path: str | Path) -> Path:
    """`path`, or the complete old folder that a writer killed while replacing `path` left beside it."""
    target = Path(path).resolve()
    is_empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    return _previous(target) if is_empty and _previous(target).exists() else target


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")


def _tidy(target: Path) -> None:
    """Undo what a killed writer left: put the old folder back, remove temporary ones."""
    previous = _previous(target)
    if previous.exists() and target.is_dir() and not any(target.iterdir()):
        target.rmdir()  # made by somebody who missed it; the old folder is still the only one
    if previous.exists() and target.exists():
        _discard(previous, target)
    elif previous.exists():
        previous.rename(target)
    for leftover in target.parent.glob(f".{_escape(target.name)}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _commit(temporary: Path, target: Path) -> None:
    previous = _previous(target)
    replaces = target.exists()
    if replaces:
        target.rename(previous)
    try:
        temporary.rename(target)
    except OSError:
        if replaces:
            previous.rename(target)
        raise
    _sync(target.parent)
    if replaces:
        _discard(previous, target)


def _discard(previous: Path, target: Path) -> None:
    """Remove, under a temporary name first: what is called `.NAME.previous` is always complete."""
    doomed = previous.rename(_temporary(target))
    shutil.rmtree(doomed, ignore_errors=True)


def _escape(name: str) -> str:
    """`name` with the characters that mean something to glob taken literally."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_full_error(target: Path) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"no space left on disk while saving {target}. What was there before is intact; "
        f"free some space or save to another disk",
    )


def _is_disk_full(error: BaseException) -> bool:
    """safetensors writes in Rust and passes the operating system's error on as text."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    found = (
        re.search(r"(?:code: |os error )(\d+)", str(error)) if isinstance(error, SafetensorError) else None
    )
    return found is not None and int(found[1]) in _DISK_FULL
