"""Text for a haystack: files of a folder one after another, none twice and none that was trained on.

The files stand in a cycle, in the order of a hash of their paths, and the seed says where to begin: one after
another, seeds begin far apart, so that their haystacks share as few files as possible. Files are read only
until there is enough text; whether a file is a copy of another, or of a training file, is decided by content.
"""

import hashlib
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe.train.corpus import NotUTF8Error, digest_file, list_files
from moe.train.settings import DataConfig

_GOLDEN_64 = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: its multiples are spread evenly


@dataclass(frozen=True, slots=True, eq=False)
class HaystackText:
    """text (n) uint8, its SHA-256, and the files from `root` that it is made of.

    `repeated`: there was not enough, so the text begins again after the last file.
    """

    text: NDArray[np.uint8]
    digest: str
    files: int
    root: Path
    repeated: bool


def find_text(
    folder: Path | None,
    *,
    bytes_needed: int,
    seed: int,
    exclude_digests: Collection[str] = frozenset(),
    repeat: bool = False,
) -> HaystackText:
    """`bytes_needed` bytes of the text files (UTF-8, not hidden) of a folder.

    Without a folder: of the Python source of the installed packages. `exclude_digests` are SHA-256 of files
    that were trained on. `repeat` allows to repeat the text where there is not enough.

    Raises:
        FileNotFoundError: no such folder.
        NotADirectoryError: the folder is a file.
        PermissionError: a folder or file cannot be read.
        ValueError: not enough text, or none.
    """
    root = _root(folder)
    suffixes = (".py",) if folder is None else ()
    excluded = set(exclude_digests)
    parts: list[bytes] = []
    missing = bytes_needed
    for path in _cycle(list_files(root, DataConfig(folder=str(root), suffixes=suffixes)), root, seed):
        if missing <= 0:
            break
        if part := _read(path, missing, excluded):
            parts.append(part)
            missing -= len(part)
    text = np.frombuffer(b"".join(parts), np.uint8)
    if missing > 0:
        _refuse_too_little(root, len(text), bytes_needed, repeat)
        text = np.resize(text, bytes_needed)
    digest = hashlib.sha256(text.data).hexdigest()
    return HaystackText(text, digest, len(parts), root, repeated=missing > 0)


def _root(folder: Path | None) -> Path:
    root = Path(sysconfig.get_path("purelib")) if folder is None else folder.expanduser()
    if not root.exists():
        raise FileNotFoundError(
            f"the haystack folder {str(root)!r} does not exist. Give a folder of text files."
        )
    if not root.is_dir():
        raise NotADirectoryError(
            f"the haystack folder {str(root)!r} is a file. Give the folder that holds it."
        )
    return root


def _cycle(files: list[Path], root: Path, seed: int) -> Iterator[Path]:
    """All files once, in the order of a hash of their paths in `root`, from a place that the seed chooses."""
    cycle = sorted(
        files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    )
    start = (seed * _GOLDEN_64 % 2**64) * len(cycle) >> 64
    yield from cycle[start:]
    yield from cycle[:start]


def _read(path: Path, most: int, excluded: set[str]) -> bytes:
    """The first `most` bytes of a file that is text and not excluded, which excludes it from now on."""
    try:
        digest, _ = digest_file(path, check_utf8=True)
    except NotUTF8Error:
        return b""  # an image, an archive
    if digest in excluded:
        return b""
    excluded.add(digest)
    with path.open("rb") as file:
        return file.read(most)


def _refuse_too_little(root: Path, there: int, needed: int, repeat: bool) -> None:
    if not there:
        raise ValueError(
            f"the haystack folder {str(root)!r} holds no text that was not trained on. "
            f"Give another folder of text files."
        )
    if not repeat:
        raise ValueError(
            f"the haystack folder {str(root)!r} holds {there} bytes of text that was not trained on, "
            f"and {needed} are needed. Give a larger folder or a shorter length, or repeat the text with "
            f"repeat=True: the result is then marked as repeated."
        )
