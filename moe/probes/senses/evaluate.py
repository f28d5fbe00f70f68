"""Recall of a trained run in every sense, over haystacks of several lengths; and one found needle of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.modality_config import Modality
from moe.prefill import Progress
from moe.probes.needle.ask import ask, unwatched
from moe.probes.needle.evaluate import PER_TOKEN, Log, check_memory, check_model
from moe.probes.needle.pooling import Result, facts_of_text, make_row
from moe.probes.senses.bank import Bank
from moe.probes.senses.config import NAMES, VALUE_DIGITS
from moe.probes.senses.filler import SHARES
from moe.probes.senses.haystack import SensesQuestion
from moe.probes.senses.near import answer_near
from moe.probes.senses.questions import SensesQuestions, check_senses_run, make_senses_haystacks
from moe.probes.senses.record import SensesRow
from moe.train.runs import Run


@dataclass(frozen=True, slots=True, eq=False)
class FoundNeedle:
    """A question about a haystack, its needle and what was answered.

    source  what its modality shows
    value   (k f) float32: the frames that show the value; (0 f) for text
    """

    modality: Modality
    source: str
    query: bytes
    answer: bytes
    written: bytes
    value: NDArray[np.float32]
    place: int
    length: int


class SensesResult(NamedTuple):
    """Rows of a record, one a modality, and a needle of each as an example: one that was found, if any."""

    rows: list[SensesRow]
    examples: list[FoundNeedle]


class _Reading(NamedTuple):
    modality: str
    right: int
    near: int | None


def evaluate_senses(
    run: Run,
    questions: SensesQuestions,
    length: int,
    *,
    name: str | None = None,
    progress: Progress = unwatched,
    answered: Progress = unwatched,
    log: Log = lambda line: None,
) -> SensesResult:
    """Recall over haystacks of `length` tokens, every question asked alone, and again of its needle nearby.

    name: of the run in the rows; None: that of its folder. `progress` follows the reading of each haystack,
    in tokens, `answered` its questions.

    Raises:
        ValueError: as `check_senses`, `make_senses_haystacks`.
    """
    check_senses_model(run, questions, [length])
    bank = questions.bank(run)
    results: list[Result] = []
    readings: list[_Reading] = []
    examples: dict[str, FoundNeedle] = {}
    for number, (haystack, text) in enumerate(make_senses_haystacks(run, questions, length), start=1):
        asked = haystack.questions
        with run.autocast():
            far = ask(
                run.model,
                haystack,
                dtype=questions.dtype,
                batch=questions.batch,
                progress=progress,
                answered=answered,
            )
            near = None
            if not questions.shuffled:  # whose needles have the wrong values nearby, too
                near = answer_near(
                    run.model, bank, text.text, asked, seed=questions.seed, batch=questions.batch
                )
        readings += _readings(asked, far.answers, near)
        results.append(Result.of(haystack, facts_of_text(text), far))
        for question, written in zip(asked, far.answers, strict=True):
            _keep(examples, _example(bank, question, written, length))
        log(f"haystack {number}: {results[-1]}")
        del haystack, text, far, asked
    rows = [_row(run, questions, results, readings, bank, length, one, name) for one in questions.templates]
    return SensesResult(rows, [examples[one] for one in questions.templates])


def check_senses(run: Run, questions: SensesQuestions, lengths: Sequence[int]) -> None:
    """Refuse what cannot be measured, before anything is read: builds the shortest and the longest haystack.

    Raises:
        ImportError: scikit-learn, or PyAV for a video, is missing.
        ValueError: no length; as `check_senses_model`; too little text; needles that do not fit, or too few.
    """
    if not lengths:
        raise ValueError("there is no length to measure at. Give at least one, such as 65536.")
    check_senses_model(run, questions, lengths)
    for length in {min(lengths), max(lengths)}:
        next(make_senses_haystacks(run, questions, length))


def check_senses_model(run: Run, questions: SensesQuestions, lengths: Sequence[int]) -> None:
    """Refuse a run that knows no senses, and lengths that do not fit into memory.

    Raises:
        ValueError: it is one, or one does not.
    """
    _, modalities = check_senses_run(run)
    check_model(run, questions.dtype)
    of_features = 4 * modalities.feature_size * (1 - SHARES[Modality.TEXT])
    per_token = PER_TOKEN + round(1.2 * of_features) + 40  # features, and the integers they are made from
    check_memory(run, questions.dtype, lengths, per_token=per_token)


def source_of(bank: Bank, modality: Modality) -> str:
    """What a modality shows."""
    return "bytes" if modality is Modality.TEXT else bank.sources[modality]


def count_right(written: bytes, answer: bytes) -> int:
    """How many digits of an answer are right, each in its place."""
    return sum(one == other for one, other in zip(written, answer, strict=True))


def _readings(
    asked: Sequence[SensesQuestion], far: Sequence[bytes], near: Sequence[bytes] | None
) -> list[_Reading]:
    nearby = near or [None] * len(asked)
    return [
        _Reading(
            question.template,
            count_right(one, question.answer),
            None if other is None else count_right(other, question.answer),
        )
        for question, one, other in zip(asked, far, nearby, strict=True)
    ]


def _row(
    run: Run,
    questions: SensesQuestions,
    results: Sequence[Result],
    readings: Sequence[_Reading],
    bank: Bank,
    length: int,
    name_of_modality: str,
    name: str | None,
) -> SensesRow:
    mine = [reading for reading in readings if reading.modality == name_of_modality]
    modality = NAMES[name_of_modality]
    return make_row(
        run,
        results,
        length=length,
        template=name_of_modality,
        dtype=questions.dtype,
        variant=questions.variant,
        name=name,
        kind=partial(
            SensesRow,
            digits=VALUE_DIGITS,
            digits_right=tuple(reading.right for reading in mine),
            near_digits_right=tuple(reading.near for reading in mine if reading.near is not None),
            frames=1 if modality is Modality.TEXT else bank.digits[modality].frames,
            source=source_of(bank, modality),
        ),
    )


def _example(bank: Bank, question: SensesQuestion, written: bytes, length: int) -> FoundNeedle:
    rows = question.needle.tokens.rows
    return FoundNeedle(
        question.needle.modality,
        source_of(bank, question.needle.modality),
        question.query,
        question.answer,
        written,
        bank.features[rows[rows >= 0]],
        question.place,
        length,
    )


def _keep(examples: dict[str, FoundNeedle], one: FoundNeedle) -> None:
    """The first example of a modality, unless it was not found and this one was."""
    name = one.modality.name.lower()
    kept = examples.get(name)
    if kept is None or (kept.written != kept.answer and one.written == one.answer):
        examples[name] = one
