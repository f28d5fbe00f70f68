"""What is asked of a run, and the haystacks that it is asked about: real text that the run never read."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from moe.json_files import read_json
from moe.probes.needle.ask import BATCH
from moe.probes.needle.haystack import Haystack, build_haystack, default_needles
from moe.probes.needle.haystack_text import HaystackText, find_text
from moe.probes.needle.needles import RANDOM_TEMPLATES
from moe.train.corpus import find_corpus
from moe.train.run_folder import RunFolder
from moe.train.runs import Run
from moe.train.settings import DataConfig

SHUFFLED = "shuffled values"


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What is asked, of haystacks of every length.

    queries     answers for each template and length, in all haystacks together
    haystacks   at least so many; more where one has too few needles for its share
    folder      text of the haystacks; None: source of the installed packages. No file that was trained on
    repeat      repeat the text where there is too little; results say so
    shuffled    the control: every needle has the value of another one, so that recall must be at chance

    Raises:
        ValueError: no query, no haystack, no needle, fewer queries than haystacks, a negative seed.
    """

    queries: int = 300
    haystacks: int = 3
    templates: tuple[str, ...] = tuple(RANDOM_TEMPLATES)
    folder: Path | None = None
    repeat: bool = False
    shuffled: bool = False
    needles: int | None = None  # in each haystack; None: one for 256 bytes, up to 2000 and 5000
    seed: int = 0
    dtype: torch.dtype = torch.float32  # of the cache
    batch: int = BATCH  # questions that share a read of it

    def __post_init__(self) -> None:
        for name in ("queries", "haystacks", "batch", "needles"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1: recall is measured by asking.")
        if self.queries < self.haystacks:
            raise ValueError(
                f"queries={self.queries} must be at least haystacks={self.haystacks}: each is asked about. "
                f"Ask more, or build fewer haystacks."
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0.")

    @property
    def variant(self) -> str:
        """What rows say of how this was asked: nothing, or that it is the control."""
        return SHUFFLED if self.shuffled else ""

    def shares(self, length: int) -> list[int]:
        """How many questions of each template each haystack of this length is asked.

        Raises:
            ValueError: fewer needles than templates.
        """
        needles = default_needles(length) if self.needles is None else self.needles
        most = needles // len(self.templates)
        if not most:
            raise ValueError(
                f"a haystack of {length} bytes has {needles} needles for {len(self.templates)} templates. "
                f"Give a longer one, or more needles."
            )
        count = max(self.haystacks, -(-self.queries // most))
        return [self.queries // count + (i < self.queries % count) for i in range(count)]

    def seeds(self, count: int) -> range:
        """One for each of `count` haystacks; with another `seed`, others."""
        return range(self.seed * count, (self.seed + 1) * count)

    def text(self, run: Run, length: int, seed: int) -> HaystackText:
        """`length` bytes of files that the run did not read; seeds one after another begin far apart.

        Raises:
            ValueError, OSError: as `find_text` and `trained_digests`.
        """
        return find_text(
            self.folder,
            bytes_needed=length,
            seed=seed,
            exclude_digests=trained_digests(run),
            repeat=self.repeat,
        )


def make_haystacks(run: Run, questions: Questions, length: int) -> Iterator[tuple[Haystack, HaystackText]]:
    """The haystacks of one length, each of other text, none of it from files that the run read.

    Raises:
        ValueError: as `Questions` and `build_haystack`.
    """
    shares = questions.shares(length)
    for seed, share in zip(questions.seeds(len(shares)), shares, strict=True):
        text = questions.text(run, length, seed)
        haystack = build_haystack(
            text.text,
            length=length,
            queries=share,
            seed=seed,
            needles=questions.needles,
            templates=questions.templates,
            shuffle_values=questions.shuffled,
        )
        yield haystack, text


def trained_digests(run: Run) -> frozenset[str]:
    """SHA-256 of the files that the run read, to train or to validate.

    Raises:
        ValueError, OSError: these files changed or are gone, so that what was trained on is not known.
    """
    digest, files = _corpus_now(run.config.data)
    known = RunFolder(run.folder).corpus_file
    if known.is_file() and read_json(known).get("digest") != digest:
        raise ValueError(
            f"the text that {run.folder} was trained on changed since (see {known}), so a haystack cannot be "
            f"kept apart from it. Restore that text (data.folder; by default the standard library of the "
            f"Python that trained), or train again."
        )
    return files


@cache
def _corpus_now(data: DataConfig) -> tuple[str, frozenset[str]]:
    corpus = find_corpus(data)
    return corpus.digest, frozenset(document.digest for document in (*corpus.train, *corpus.validation))
