"""A code-base question: where is a function defined? The context is a whole package, file after file."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np

from moe.probes.needle.definitions import annotate, defined_names, path_value
from moe.probes.needle.haystack import Haystack, Question, choose_balanced
from moe.probes.needle.needles import DEFINITION, Fact
from moe.probes.needle.placement import Needle
from moe.train.corpus import digest_file, list_files
from moe.train.settings import DataConfig


def build_codebase(
    package: Path, *, queries: int, seed: int, exclude_digests: Collection[str] = frozenset()
) -> Haystack:
    """All Python files of a package in the order of their paths, as `definitions.annotate` lays them out.

    The questions ask for names that the package defines exactly once, as many in each fifth of the depth as
    there are; the answer is the path from the package's own folder on, closed by an end of line. Functions
    of files with a digest in `exclude_digests`, which were trained on, are not asked for. `needles` are all
    definitions of such names.

    Raises:
        FileNotFoundError: no such folder.
        NotADirectoryError: the package is a single file.
        PermissionError: a folder or file cannot be read.
        ValueError: no question, or more than there are such names.
    """
    sources = _read(package)
    counts = Counter(name for source in sources.values() for name in defined_names(source))
    seen = {path for path in sources if exclude_digests and digest_file(path)[0] in exclude_digests}
    pieces: list[bytes] = []
    needles: list[Needle] = []
    length = 0
    for path, source in sources.items():
        name = path.relative_to(package.parent).as_posix()
        piece = annotate(source, name)
        if path not in seen:
            needles += _needles(piece, name, length, counts)
        pieces.append(piece)
        length += len(piece)
    rng = np.random.default_rng([seed, length])
    ids = np.frombuffer(bytearray().join(pieces), np.uint8)
    return Haystack(ids, _ask(rng, needles, length, queries, package), tuple(needles))


def _read(package: Path) -> dict[Path, bytes]:
    """The Python files and their bytes; an end of line is added to a last line that has none."""
    if not package.exists():
        raise FileNotFoundError(f"the package {str(package)!r} does not exist. Give its folder.")
    if not package.is_dir():
        raise NotADirectoryError(f"the package {str(package)!r} is a file. Give a package that is a folder.")
    files = list_files(package, DataConfig(folder=str(package), suffixes=(".py",)))
    sources = {path: path.read_bytes() for path in files}
    return {
        path: source if source.endswith(b"\n") else source + b"\n"
        for path, source in sources.items()
        if source
    }


def _needles(piece: bytes, path: str, start: int, counts: Counter[bytes]) -> list[Needle]:
    """The definitions in an annotated file of names that the package defines once."""
    needles = []
    for name in defined_names(piece):
        fact = Fact(name, path_value(path))
        place = piece.find(DEFINITION.write(fact))
        if counts[name] == 1 and place >= 0:
            needles.append(Needle(fact, DEFINITION.name, start + place))
    return needles


def _ask(
    rng: np.random.Generator, needles: list[Needle], length: int, queries: int, package: Path
) -> tuple[Question, ...]:
    if queries < 1:
        raise ValueError(f"queries={queries} must be at least 1: recall is measured by asking.")
    if queries > len(needles):
        raise ValueError(
            f"queries={queries}, but {str(package)!r} defines only {len(needles)} names exactly once. "
            f"Ask fewer or give a larger package."
        )
    questions = [
        Question(
            DEFINITION.ask(needle.fact.key),
            needle.fact.value,
            needle.place / length,
            needle.template,
            needle.place,
        )
        for needle in needles
    ]
    chosen = choose_balanced(rng, questions, queries)
    return tuple(chosen[i] for i in rng.permutation(len(chosen)).tolist())
