"""Several needles at once: RULER's tasks (2404.06654), each answered in one suffix, answer after answer."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe.decoder import Decoder
from moe.doctor import table
from moe.kv_cache import KVCache
from moe.prefill import Progress, prefill
from moe.probes.needle.ask import unwatched
from moe.probes.needle.evaluate import check_run
from moe.probes.needle.haystack import Haystack, build_haystack, default_needles
from moe.probes.needle.pooling import name_of_dtype
from moe.probes.needle.questions import Questions
from moe.probes.needle.record import Tally
from moe.probes.needle.several import SeveralQuestion, ask_several, build_multi_value
from moe.probes.needle.table import format_length, format_percent
from moe.train.runs import Run

KEYS = VALUES = 4  # of a multi-query and a multi-value question, as in RULER
HUNDRED = 100
TASKS = ("multi-query", "multi-value", "hundred")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralResult:
    """How many of the values asked for came back, over all haystacks of a task.

    `lower_bound` takes answers for independent, which those of one suffix are not quite.
    """

    run: str
    step: int  # of its training
    task: str
    length: int
    haystacks: int
    needles: int  # in each haystack
    right: int
    asked: int
    dtype: str  # of the cache
    repeated: bool  # whether the text around the needles had to be

    @property
    def recall(self) -> float:
        """right / asked."""
        return Tally(self.right, self.asked).recall

    @property
    def lower_bound(self) -> float:
        """The exact one-sided 95 % bound of the recall."""
        return Tally(self.right, self.asked).lower_bound


def several_table(results: Sequence[SeveralResult]) -> list[str]:
    """Lines of Markdown."""
    head = ("run", "task", "length", "haystacks x needles", "right", "recall %", ">= %", "text")
    return table(
        head,
        [
            (
                result.run,
                result.task,
                format_length(result.length),
                f"{result.haystacks} x {result.needles}",
                f"{result.right}/{result.asked}",
                format_percent(result.recall),
                format_percent(result.lower_bound),
                "REPEATED text" if result.repeated else "",
            )
            for result in results
        ],
    )


@torch.no_grad()
def evaluate_several(
    run: Run,
    questions: Questions,
    length: int,
    *,
    progress: Progress = unwatched,
    answered: Progress = unwatched,
    log: Callable[[str], None] = lambda line: None,
) -> list[SeveralResult]:
    """One result for each of TASKS, over `questions.haystacks` haystacks of `length` bytes.

    multi-query  4 keys one after another, of either template
    multi-value  the 4 values of one key, in any order
    hundred      all 100 needles of a haystack that has no others
    A decoder is trained on none of them, but on single questions. `questions.queries` are the answers of the
    first two tasks, in all haystacks together (rounded up to whole questions).

    Raises:
        ValueError: as `check_several`.
    """
    check_several(run, questions, length)
    found: dict[str, list[_Found]] = {task: [] for task in TASKS}
    for number, seed in enumerate(questions.seeds(questions.haystacks), start=1):
        text = questions.text(run, length, seed)
        for asking in _askings(questions, text.text, length, seed):
            with run.autocast():
                ids = torch.from_numpy(asking.haystack.ids)[None]
                cache = prefill(run.model, ids, dtype=questions.dtype, progress=progress).cache
                tally = _ask(run.model, cache, asking.questions, answered)
            found[asking.task].append(_Found(tally, len(asking.haystack.needles), text.repeated))
            log(f"haystack {number}, {asking.task}: {tally.right}/{tally.asked} right")
    return [
        SeveralResult(
            run=run.name,
            step=run.step,
            task=task,
            length=length,
            haystacks=len(parts),
            needles=parts[0].needles,
            right=sum(part.tally.right for part in parts),
            asked=sum(part.tally.asked for part in parts),
            dtype=name_of_dtype(questions.dtype),
            repeated=any(part.repeated for part in parts),
        )
        for task, parts in found.items()
    ]


def check_several(run: Run, questions: Questions, length: int) -> None:
    """Refuse what cannot be measured, before anything is read: builds the first haystacks.

    Raises:
        ValueError: as `check_run`; or fewer needles than all questions of a haystack ask for.
    """
    check_run(run, questions, [length])
    seed = questions.seeds(questions.haystacks)[0]
    for _ in _askings(questions, questions.text(run, length, seed).text, length, seed):
        pass


def answer_steps(decoder: Decoder, cache: KVCache, question: SeveralQuestion) -> list[bytes]:
    """The answers of one suffix, each after the query of its step and all answers before it."""
    device = decoder.head_weight.device
    suffix, answers, unread = cache.fork(1), list[bytes](), b""
    for step in question.steps:
        ids = torch.tensor([list(unread + step.query)], device=device)
        count = len(step.accepted[0])
        out = decoder.generate(ids, max_new_tokens=count, temperature=0.0, cache=suffix)
        answers.append(bytes(out[0, ids.shape[1] :].tolist()))
        unread = answers[-1][-1:]  # the last byte written has not been read yet
    return answers


class _Found(NamedTuple):
    tally: Tally
    needles: int
    repeated: bool


class _Asking(NamedTuple):
    task: str
    haystack: Haystack
    questions: tuple[SeveralQuestion, ...]


def _askings(questions: Questions, text: NDArray[np.uint8], length: int, seed: int) -> Iterator[_Asking]:
    """What is asked of one text, task by task."""
    templates = questions.templates
    each = -(-questions.queries // (KEYS * questions.haystacks))
    needles = default_needles(length) if questions.needles is None else questions.needles
    plain = build_haystack(text, length=length, queries=1, seed=seed, templates=templates, needles=needles)
    yield _Asking("multi-query", plain, ask_several(plain, keys=KEYS, questions=each, seed=seed))
    values, about_values = build_multi_value(
        text,
        length=length,
        keys=each,
        values=VALUES,
        seed=seed,
        needles=needles,
        template=templates[seed % len(templates)],
    )
    yield _Asking("multi-value", values, about_values)
    few = build_haystack(text, length=length, queries=1, seed=seed, templates=templates, needles=HUNDRED)
    yield _Asking("hundred", few, ask_several(few, keys=HUNDRED, questions=1, seed=seed))


def _ask(decoder: Decoder, cache: KVCache, questions: Sequence[SeveralQuestion], answered: Progress) -> Tally:
    started = time.perf_counter()
    right = asked = 0
    for number, question in enumerate(questions, start=1):
        right += question.count_correct(answer_steps(decoder, cache, question))
        asked += len(question.steps)
        answered(number, len(questions), time.perf_counter() - started)
    return Tally(right, asked)
