"""A folder of text files as a corpus: listed, hashed, de-duplicated, split by file, read in pieces.

The split depends on the content of the files alone: a file stays on its side when others come or go, or
when it is renamed, and no file is on both sides. A corpus of one file is cut at a line instead.
"""

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from moe.train.settings import DataConfig

PIECE_BYTES = 1 << 20  # of a file held in memory at once
TEST_FOLDERS = ("test", "tests", "idle_test")
PACKAGE_FOLDERS = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True, slots=True)
class Document:
    """The bytes `start` to `stop` - 1 of a file.

    `digest` (SHA-256) and `file_size` are those of the whole file when it was listed.
    """

    path: Path
    digest: str
    start: int
    stop: int
    file_size: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of the two splits, in the order of their digests: the first n are a fair sample.

    `root` is where they were found, `duplicates` and `skipped` count the files left out.
    """

    root: Path
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    duplicates: int = 0
    skipped: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of which bytes are in which split; names and places do not count."""
        total = hashlib.sha256()
        for split in (self.train, self.validation):
            for document in split:
                total.update(f"{document.digest} {document.start} {document.stop}\n".encode())
            total.update(b"\n")
        return total.hexdigest()


def find_corpus(config: DataConfig) -> Corpus:
    """List, hash, de-duplicate and split the files that `config` names.

    Raises:
        FileNotFoundError: no such folder.
        NotADirectoryError: the folder is a file.
        PermissionError: a folder or file cannot be read.
        ValueError: no text in the folder, or a file that is not UTF-8 in text mode.
    """
    root = _root(config)
    by_digest: dict[str, Document] = {}
    found = skipped = 0
    for path in list_files(root, config):
        try:
            digest, size = digest_file(path, check_utf8=config.encoding == "utf-8")
        except NotUTF8Error:
            if config.folder is not None:
                raise
            skipped += 1  # the standard library tests its decoder with files that are not UTF-8
            continue
        if size:
            found += 1
            by_digest.setdefault(digest, Document(path, digest, 0, size, size))
    if not by_digest:
        wanted = f" whose name ends in {' or '.join(config.suffixes)}" if config.suffixes else ""
        raise ValueError(
            f"data.folder={str(root)!r} holds no text: there is no non-empty file{wanted} in it."
        )
    documents = [by_digest[digest] for digest in sorted(by_digest)]
    train, validation = split(documents, config.validation_fraction)
    return Corpus(root, tuple(train), tuple(validation), found - len(documents), skipped)


def list_files(root: Path, config: DataConfig) -> list[Path]:
    """All files under `root` that `config` wants, sorted by their path in it; hidden ones are left out."""
    standard_library = config.folder is None
    suffixes = (".py",) if standard_library else config.suffixes
    unwanted = PACKAGE_FOLDERS if standard_library else ()
    if standard_library and not config.include_tests:
        unwanted += TEST_FOLDERS
    files = []
    for folder, subfolders, names in os.walk(root, onerror=_raise_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in unwanted]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        files += [path for path in paths if path.name.endswith(suffixes or "") and path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Train and validation documents: by the digest of the file; one single file is cut in two."""
    if len(documents) == 1:
        return _cut(documents[0], fraction)
    by_place = sorted(documents, key=lambda document: _place(document.digest))
    count = sum(_place(document.digest) < fraction for document in documents)
    count = min(max(count, 1), len(documents) - 1)  # both splits have a file, however few there are
    chosen = {document.digest for document in by_place[:count]}
    train = [document for document in documents if document.digest not in chosen]
    return train, [document for document in documents if document.digest in chosen]


def read_pieces(document: Document, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """The bytes of a document in order, in pieces that end after a line, or between two characters."""
    with document.path.open("rb") as file:
        file.seek(document.start)
        kept, left = b"", document.size
        while left:
            block = file.read(min(piece_bytes, left))
            if not block:
                raise ValueError(f"{document.path} became shorter while it was read. Start again.")
            left -= len(block)
            piece = kept + block
            end = len(piece) if not left else _boundary(piece)
            yield piece[:end]
            kept = piece[end:]


class NotUTF8Error(ValueError):
    """A file that is not UTF-8 where text was expected."""


def _root(config: DataConfig) -> Path:
    root = Path(config.folder if config.folder is not None else sysconfig.get_path("stdlib")).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"data.folder={str(root)!r} does not exist. Give a folder of text files.")
    if not root.is_dir():
        raise NotADirectoryError(f"data.folder={str(root)!r} is a file. Give the folder that holds it.")
    return root


def _raise_unreadable(error: OSError) -> None:
    raise PermissionError(
        f"folder {error.filename} cannot be read ({error.strerror}). Change its permissions."
    )


def digest_file(path: Path, *, check_utf8: bool = False) -> tuple[str, int]:
    """SHA-256 and size of a file, reading it once.

    Raises:
        PermissionError: it cannot be read.
        NotUTF8Error: with `check_utf8`; names the byte.
    """
    total, size = hashlib.sha256(), 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as file:
        while block := file.read(PIECE_BYTES):
            if check_utf8:
                _check_utf8(decoder, block, size, path)
            total.update(block)
            size += len(block)
    if check_utf8:
        _check_utf8(decoder, b"", size, path)
    return total.hexdigest(), size


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except PermissionError:
        raise PermissionError(
            f"file {path} cannot be read. Change its permissions or move it away."
        ) from None


def _check_utf8(decoder: codecs.IncrementalDecoder, block: bytes, offset: int, path: Path) -> None:
    pending = len(decoder.getstate()[0])  # bytes of a character that the last block began
    try:
        decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise NotUTF8Error(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} "
            f"at offset {offset - pending + error.start}. "
            f'Convert it, choose files with data.suffixes, or train on raw bytes with data.encoding="bytes".'
        ) from None


def _place(digest: str) -> float:
    """A number in [0, 1) that is the digest's own."""
    return int(digest[:13], 16) / 16**13


def _cut(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    """The last part of a single file is held out; the cut comes after a line where there is one near."""
    middle = max(1, int(document.size * (1 - fraction)))
    with document.path.open("rb") as file:
        file.seek(middle)
        rest = file.read(PIECE_BYTES)
    line = rest.find(b"\n")
    cut = middle + line + 1 if 0 <= line < len(rest) - 1 else middle + _character(rest)
    parts = [(0, cut), (cut, document.size)]
    train, validation = (
        [replace(document, start=start, stop=stop)] if start < stop else [] for start, stop in parts
    )
    return train, validation


def _character(text: bytes) -> int:
    """Where the first whole character starts."""
    return next((i for i, byte in enumerate(text[:4]) if byte & 0xC0 != 0x80), 0)


def _boundary(piece: bytes) -> int:
    """Where to end a piece: after its last line, else before a character that may be incomplete."""
    if line := piece.rfind(b"\n") + 1:
        return line
    return next(
        (i for i in range(len(piece) - 1, max(len(piece) - 4, 0), -1) if piece[i] & 0xC0 != 0x80), len(piece)
    )
