"""What is kept of a haystack that was asked about, and the row that several of them make."""

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import torch

from moe.parameters import count_parameters
from moe.probes.needle.ask import Asked, Asking
from moe.probes.needle.haystack import Haystack
from moe.probes.needle.haystack_text import HaystackText
from moe.probes.needle.record import NeedleRow, TextFacts
from moe.train.runs import Run

Row = TypeVar("Row", bound=NeedleRow)
_DIGITS = 16  # of the digest of each text that stand in a row


class Answer(NamedTuple):
    """Whether the answer to a question was right."""

    template: str
    depth: float
    is_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is kept of one haystack, which itself is not."""

    answers: tuple[Answer, ...]
    needles: int
    text: TextFacts
    path: str
    prefill_seconds: float
    answer_seconds: float
    cache_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, haystack: Asking, text: TextFacts, asked: Asked) -> Self:
        """The result of questions just asked."""
        return cls(
            answers=tuple(
                Answer(question.template, question.depth, answer == question.answer)
                for question, answer in zip(haystack.questions, asked.answers, strict=True)
            ),
            needles=len(haystack.needles),
            text=text,
            path=asked.path,
            prefill_seconds=asked.prefill.seconds,
            answer_seconds=asked.answer_seconds,
            cache_bytes=asked.prefill.cache.nbytes,
            peak_bytes=asked.peak_bytes,
        )

    def __str__(self) -> str:
        right = sum(answer.is_right for answer in self.answers)
        return (
            f"{right}/{len(self.answers)} right, read in {self.prefill_seconds:.1f} s, "
            f"answered in {self.answer_seconds:.1f} s"
        )


def facts_of_text(text: HaystackText) -> TextFacts:
    """Where the text of a haystack comes from."""
    return {"root": text.root.name, "digest": text.digest, "files": text.files, "repeated": text.repeated}


def facts_of_package(package: Path, haystack: Haystack) -> TextFacts:
    """The same of a package that is the haystack; files without a function to ask for do not count."""
    files = len({needle.fact.value for needle in haystack.needles})
    digest = hashlib.sha256(haystack.ids.data).hexdigest()
    return {"root": package.name, "digest": digest, "files": files, "repeated": False}


def make_row(
    run: Run,
    results: Sequence[Result],
    *,
    length: int,
    template: str,
    dtype: torch.dtype,
    variant: str = "",
    name: str | None = None,
    kind: Callable[..., Row] = NeedleRow,
) -> Row:
    """One row of a record: the answers to one template in all haystacks of a length.

    kind: makes the row of its fields.

    Raises:
        ValueError: nothing was asked, or as `NeedleRow`.
    """
    count = count_parameters(run.config.model)
    mine = [answer for result in results for answer in result.answers if answer.template == template]
    asked = sum(len(result.answers) for result in results)
    return kind(
        run=run.name if name is None else name,
        step=run.step,
        total=count.total,
        active=count.active,
        variant=variant,
        length=length,
        template=template,
        haystacks=len(results),
        needles=results[0].needles,
        depths=tuple(answer.depth for answer in mine),
        correct=tuple(answer.is_right for answer in mine),
        prefill_seconds=statistics.fmean(result.prefill_seconds for result in results),
        answer_seconds=sum(result.answer_seconds for result in results) * len(mine) / max(asked, 1),
        cache_bytes=max(result.cache_bytes for result in results),
        peak_bytes=max(result.peak_bytes for result in results),
        path=results[0].path,
        trained_length=run.config.data.sequence_length,
        dtype=name_of_dtype(dtype),
        text=_pool([result.text for result in results]),
    )


def name_of_dtype(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def _pool(texts: Sequence[TextFacts]) -> TextFacts:
    return {
        "root": texts[0]["root"],
        "digest": " ".join(text["digest"][:_DIGITS] for text in texts),
        "files": sum(text["files"] for text in texts),
        "repeated": any(text["repeated"] for text in texts),
    }
