"""Text of several domains as labelled sequences: a domain is a folder, a block is a file.

A file gives one sequence, and a second one only when every file has given one: the more files, the more there
is to permute.
"""

import hashlib
import random
import sysconfig
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moe.probes.specialisation.measure import LabelledBatch
from moe.train.corpus import NotUTF8Error, digest_file, list_files
from moe.train.settings import DataConfig
from moe.train.tokenizer import Tokenizer

MOST_BYTES = 2**18  # of a file
PASS_TOKENS = 2**14  # of a forward pass


@dataclass(frozen=True, slots=True)
class Source:
    """Where the text of a domain is: files of a folder whose names end in `suffixes` (none: all of them).

    has_header: the text begins after the first empty line, as in an e-mail.
    """

    folder: Path
    suffixes: tuple[str, ...] = ()
    has_header: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class DomainText:
    """Sequences of one domain, the number of each one's file, counts of tokens and files, and the SHA-256."""

    sequences: tuple[NDArray[np.integer], ...]
    file_of: tuple[int, ...]
    tokens: int
    files: int
    digest: str
    folder: str  # its name


def default_sources() -> dict[str, Source]:
    """Three domains that every machine with torch has.

    python  source of the installed packages
    c++     the headers that torch ships
    prose   the descriptions that packages give of themselves: English, in Markdown mostly
    """
    packages = Path(sysconfig.get_path("purelib"))
    headers = Path(torch.__file__).parent / "include"
    return {
        "python": Source(packages, (".py",)),
        "c++": Source(headers, (".h", ".hpp", ".cuh")),
        "prose": Source(packages, ("METADATA",), has_header=True),
    }


def read_domain(
    source: Source,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    sequence_length: int,
    seed: int = 0,
    exclude_digests: Collection[str] = frozenset(),
) -> DomainText:
    """At least `tokens` tokens, at most a sequence more, in sequences from random places of random files.

    Files that are no UTF-8, copies of one another, or in `exclude_digests` (SHA-256) are left out. A file
    shorter than a sequence gives a short one.

    Raises:
        FileNotFoundError: no such folder.
        NotADirectoryError: the folder is a file.
        PermissionError: a folder or file cannot be read.
        ValueError: too little text.
    """
    rng = random.Random(f"{seed} {source.suffixes}")
    files = _files(source)
    rng.shuffle(files)
    texts = _texts(files, source, set(exclude_digests))
    cut = (_cut(tokenizer.encode(text), sequence_length, rng) for text in texts)
    chosen: list[tuple[int, NDArray[np.integer]]] = []
    count = 0
    for file, sequence in _rounds(cut):
        chosen.append((file, sequence))
        count += len(sequence)
        if count >= tokens:
            break
    if count < tokens:
        raise ValueError(
            f"{str(source.folder)!r} holds {count} tokens of text that was not trained on, and {tokens} are "
            f"needed. Ask for fewer tokens or give a larger folder."
        )
    sequences = tuple(sequence for _, sequence in chosen)
    digest = hashlib.sha256(b"".join(sequence.astype(np.int64).tobytes() for sequence in sequences))
    file_of = tuple(file for file, _ in chosen)
    return DomainText(
        sequences, file_of, count, len(set(file_of)), digest.hexdigest(), source.folder.resolve().name
    )


def domain_batches(domains: Sequence[DomainText], device: torch.device) -> Iterator[LabelledBatch]:
    """Label i for the i-th domain; a file is a block. A batch has sequences of one length, and no padding."""
    files = 0
    for label, domain in enumerate(domains):
        order = sorted(range(len(domain.sequences)), key=lambda row: len(domain.sequences[row]))
        for length, alike in groupby(order, key=lambda row: len(domain.sequences[row])):
            rows, size = list(alike), max(1, PASS_TOKENS // length)
            for chosen in (rows[start : start + size] for start in range(0, len(rows), size)):
                ids = np.stack([domain.sequences[row] for row in chosen]).astype(np.int64)
                documents = torch.tensor([files + domain.file_of[row] for row in chosen])
                labels = torch.full((len(chosen),), label)
                yield LabelledBatch(torch.from_numpy(ids).to(device), labels, documents=documents)
        files += max(domain.file_of) + 1


def read_domains(
    sources: Mapping[str, Source], read: Callable[[Source], DomainText]
) -> dict[str, DomainText]:
    """All domains, with the name of the one that cannot be read in the error.

    Raises:
        ValueError: fewer than two domains, or as `read_domain`.
        OSError: as `read_domain`.
    """
    if len(sources) < 2:
        raise ValueError(f"domains={list(sources)}: there is nothing to tell apart. Give at least two.")
    texts: dict[str, DomainText] = {}
    for name, source in sources.items():
        try:
            texts[name] = read(source)
        except OSError as error:
            raise type(error)(f"domain {name!r}: {error}") from error
        except ValueError as error:
            raise ValueError(f"domain {name!r}: {error}") from error
    return texts


def _files(source: Source) -> list[Path]:
    root = source.folder.expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{str(root)!r} does not exist. Give a folder of text files.")
    if not root.is_dir():
        raise NotADirectoryError(f"{str(root)!r} is a file. Give the folder that holds it.")
    return list_files(root, DataConfig(folder=str(root), suffixes=source.suffixes))


def _texts(files: Sequence[Path], source: Source, excluded: set[str]) -> Iterator[bytes]:
    for path in files:
        try:
            digest, _ = digest_file(path, check_utf8=True)
        except NotUTF8Error:
            continue  # an image, an archive
        if digest in excluded:
            continue
        excluded.add(digest)
        with path.open("rb") as file:
            text = file.read(MOST_BYTES).replace(b"\r\n", b"\n")
        if source.has_header:
            text = text.partition(b"\n\n")[2]
        whole = text.decode("utf-8", "ignore")  # the last character may have been cut
        if whole.strip():
            yield whole.encode("utf-8")


def _cut(ids: NDArray[np.integer], length: int, rng: random.Random) -> list[NDArray[np.integer]]:
    """The whole sequences in a file, in random order; all of a file that is shorter than one."""
    if len(ids) < length:
        return [ids]
    start = rng.randrange(len(ids) % length + 1)
    sequences = [ids[i : i + length] for i in range(start, len(ids) - length + 1, length)]
    rng.shuffle(sequences)
    return sequences


def _rounds(files: Iterator[list[NDArray[np.integer]]]) -> Iterator[tuple[int, NDArray[np.integer]]]:
    """The first sequence of every file, then the second of every file that has one, and so on."""
    left: list[tuple[int, list[NDArray[np.integer]]]] = []
    for number, sequences in enumerate(files):
        yield number, sequences[0]
        left.append((number, sequences[1:]))
    while left := [(number, sequences) for number, sequences in left if sequences]:
        for number, sequences in left:
            yield number, sequences.pop(0)
