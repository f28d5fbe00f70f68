"""Recall of a trained run over haystacks of several lengths, and the controls beside it."""

import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from moe.parameters import count_parameters
from moe.prefill import Progress, cache_bytes
from moe.probes.needle.ask import BATCH, Asked, ask
from moe.probes.needle.haystack import Haystack, build_haystack, default_needles
from moe.probes.needle.haystack_text import HaystackText, find_text
from moe.probes.needle.record import NeedleRow, TextFacts
from moe.train.corpus import find_corpus
from moe.train.device import memory_available
from moe.train.runs import Run
from moe.train.settings import DataConfig

Log = Callable[[str], None]
SHUFFLED = "shuffled values"
BESIDE_CACHE = 600_000_000  # bytes: Python and torch, activations of a chunk and scores of a batch
PER_TOKEN = 3  # bytes: the text, the haystack, and one of them in the making


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What is asked, of haystacks of every length.

    queries     answers for each template and length, in all haystacks together
    haystacks   at least so many; more where one has too few needles for its share
    folder      text of the haystacks; None: source of the installed packages. No file that was trained on
    repeat      repeat the text where there is too little; rows say so
    shuffled    the control: every needle has the value of another one, so that recall must be at chance

    Raises:
        ValueError: no query, no haystack.
    """

    queries: int = 300
    haystacks: int = 3
    templates: tuple[str, ...] = ("key_value", "sentence")
    folder: Path | None = None
    repeat: bool = False
    shuffled: bool = False
    needles: int | None = None  # in each haystack; None: one for 256 bytes, up to 2000 and 5000
    seed: int = 0
    dtype: torch.dtype = torch.float32  # of the cache
    batch: int = BATCH

    def __post_init__(self) -> None:
        for name in ("queries", "haystacks", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1: recall is measured by asking."
                )

    def shares(self, length: int) -> list[int]:
        """How many questions of each template each haystack of this length is asked."""
        needles = default_needles(length) if self.needles is None else self.needles
        most = needles // len(self.templates)
        if not most:
            raise ValueError(
                f"a haystack of {length} bytes has {needles} needles for {len(self.templates)} templates. "
                f"Give a longer one, or more needles."
            )
        count = max(self.haystacks, -(-self.queries // most))
        return [self.queries // count + (i < self.queries % count) for i in range(count)]


def check_run(run: Run, questions: Questions, lengths: Sequence[int]) -> None:
    """Refuse what cannot be measured, before anything is read.

    Raises:
        ValueError: a model of other tokens than bytes, a length beyond memory (says what fits), a dtype that
            the device lacks.
    """
    if run.config.data.tokenizer != "bytes":
        raise ValueError(
            f"{run.folder} was trained with data.tokenizer={run.config.data.tokenizer!r}; needles are bytes. "
            f'Train with data.tokenizer="bytes", such as the preset needle.'
        )
    device = run.model.head_weight.device
    check_dtype(questions.dtype, device)
    free, host = memory_available(device), memory_available(torch.device("cpu"))
    per_token = cache_bytes(run.config.model, 1, questions.dtype)
    for length in lengths:
        on_host = PER_TOKEN * length + (per_token * length if device.type == "cpu" else 0)
        needed = {"memory": (on_host + BESIDE_CACHE, host)}
        if device.type != "cpu":
            needed[f"memory of {device}"] = (per_token * length + BESIDE_CACHE, free)
        for what, (bytes_needed, there) in needed.items():
            if there and bytes_needed > there:
                fits = int((there - BESIDE_CACHE) / (bytes_needed - BESIDE_CACHE) * length)
                raise ValueError(
                    f"length={length} needs {bytes_needed / 1e9:.1f} GB of {what}, and {there / 1e9:.1f} GB "
                    f"are free: {max(fits, 0)} would fit. Shorten it, or keep the cache in bfloat16."
                )


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a dtype that a device cannot store and convert."""
    try:
        torch.ones(2, dtype=dtype, device=device).float().sum().item()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device} has no {dtype} ({error}). Keep the cache in float32.") from None


def evaluate_needles(
    run: Run,
    questions: Questions,
    length: int,
    *,
    name: str | None = None,
    progress: Progress = lambda done, total, seconds: None,
    log: Log = lambda line: None,
) -> list[NeedleRow]:
    """One row a template: recall over haystacks of `length` bytes, every question asked alone.

    Raises:
        ValueError: as `check_run`, `find_text` and `build_haystack`.
    """
    check_run(run, questions, [length])
    results: list[Result] = []
    for number, (haystack, text) in enumerate(make_haystacks(run, questions, length), start=1):
        asked = ask(run.model, haystack, dtype=questions.dtype, batch=questions.batch, progress=progress)
        results.append(Result.of(haystack, text, asked))
        log(f"haystack {number}: {results[-1]}")
        del haystack, text, asked  # ten million tokens are not kept twice
    return [make_row(run, questions, length, template, results, name) for template in questions.templates]


@cache
def _digests(data: DataConfig) -> frozenset[str]:
    corpus = find_corpus(data)
    return frozenset(document.digest for document in (*corpus.train, *corpus.validation))


def trained_digests(run: Run) -> frozenset[str]:
    """SHA-256 of the files that the run read, to train or to validate."""
    return _digests(run.config.data)


def make_haystacks(run: Run, questions: Questions, length: int) -> Iterator[tuple[Haystack, HaystackText]]:
    """The haystacks of one length, each of other text, none of it from files that the run read."""
    trained_on = trained_digests(run)
    for number, share in enumerate(questions.shares(length)):
        seed = questions.seed + number
        text = find_text(
            questions.folder,
            bytes_needed=length,
            seed=seed,
            exclude_digests=trained_on,
            repeat=questions.repeat,
        )
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is kept of one haystack: for each question template, depth and whether the answer was right."""

    answers: tuple[tuple[str, float, bool], ...]
    needles: int
    text: TextFacts
    path: str
    prefill_seconds: float
    answer_seconds: float
    cache_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, haystack: Haystack, text: HaystackText, asked: Asked) -> "Result":
        """The result of questions just asked."""
        facts: TextFacts = {
            "root": text.root.name,
            "digest": text.digest,
            "files": text.files,
            "repeated": text.repeated,
        }
        return cls._of(haystack, facts, asked)

    @classmethod
    def of_package(cls, haystack: Haystack, package: Path, asked: Asked) -> "Result":
        """The result of questions about a package, whose files are the haystack."""
        files = len({needle.fact.value for needle in haystack.needles})
        digest = hashlib.sha256(haystack.ids.data).hexdigest()
        facts: TextFacts = {"root": package.name, "digest": digest, "files": files, "repeated": False}
        return cls._of(haystack, facts, asked)

    @classmethod
    def _of(cls, haystack: Haystack, text: TextFacts, asked: Asked) -> "Result":
        return cls(
            answers=tuple(
                (question.template, question.depth, answer == question.answer)
                for question, answer in zip(haystack.questions, asked.answers, strict=True)
            ),
            needles=len(haystack.needles),
            text=text,
            path=asked.prefill.path,
            prefill_seconds=asked.prefill.seconds,
            answer_seconds=asked.answer_seconds,
            cache_bytes=asked.prefill.cache.nbytes,
            peak_bytes=asked.peak_bytes,
        )

    def __str__(self) -> str:
        right = sum(is_right for _, _, is_right in self.answers)
        return (
            f"{right}/{len(self.answers)} right, read in {self.prefill_seconds:.1f} s, "
            f"answered in {self.answer_seconds:.1f} s"
        )


def make_row(
    run: Run, questions: Questions, length: int, template: str, results: list[Result], name: str | None
) -> NeedleRow:
    """One row of a record, of the results of one template in all haystacks of a length."""
    count = count_parameters(run.config.model)
    mine = [(depth, right) for r in results for kind, depth, right in r.answers if kind == template]
    asked = sum(len(result.answers) for result in results)
    return NeedleRow(
        run=run.folder.name if name is None else name,
        step=run.step,
        total=count.total,
        active=count.active,
        variant=SHUFFLED if questions.shuffled else "",
        length=length,
        template=template,
        haystacks=len(results),
        needles=results[0].needles,
        depths=tuple(depth for depth, _ in mine),
        correct=tuple(right for _, right in mine),
        prefill_seconds=statistics.fmean(result.prefill_seconds for result in results),
        answer_seconds=sum(result.answer_seconds for result in results) * len(mine) / max(asked, 1),
        cache_bytes=max(result.cache_bytes for result in results),
        peak_bytes=max(result.peak_bytes for result in results),
        path=results[0].path,
        trained_length=run.config.data.sequence_length,
        dtype=str(questions.dtype).removeprefix("torch."),
        text={
            "root": results[0].text["root"],
            "digest": " ".join(result.text["digest"][:16] for result in results),
            "files": sum(result.text["files"] for result in results),
            "repeated": any(result.text["repeated"] for result in results),
        },
    )
