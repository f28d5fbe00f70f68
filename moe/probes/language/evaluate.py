"""How well a trained run translates into languages that it meets in its context alone.

A document is read once; every question goes on from it alone. An answer is right when every byte of it, its
end included, is the likeliest one after the right bytes before it: that is the same as greedy decoding giving
exactly the answer, and one pass shows it. A word is right when that holds of its bytes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe.decoder import Decoder
from moe.kv_cache import KVCache
from moe.parameters import count_parameters
from moe.prefill import prefill
from moe.probes.language.document import Answer
from moe.probes.language.exam import Exam, check_asked, write_paper
from moe.probes.language.record import LanguageRow
from moe.probes.needle.evaluate import check_dtype, check_memory
from moe.probes.needle.haystack_text import HaystackText
from moe.probes.needle.pooling import facts_of_text, name_of_dtype
from moe.probes.needle.record import TextFacts
from moe.train.runs import Run

Watcher = Callable[[int, int, float], None]  # languages done, languages in all, seconds so far
PIECES = 10_000  # bytes of the largest book and its examples, more than they ever have


@dataclass(frozen=True, slots=True)
class Marks:
    """What one answer is worth: the whole of it, and how many of its words."""

    is_exact: bool
    words_right: int
    words: int


def evaluate_languages(
    run: Run,
    exam: Exam,
    *,
    condition: str,
    examples: int,
    filler: int = 0,
    text: HaystackText | None = None,
    progress: Watcher = lambda done, total, seconds: None,
) -> LanguageRow:
    """One cell of the table: `exam.queries` questions under one condition.

    text: `exam.filler` of this size or more; None: it is found.

    Raises:
        ValueError: as `check_run`, `write_paper` and `Exam.filler`.
    """
    check_run(run, exam, [condition], [examples], [filler])
    assert run.config.language is not None
    if filler and text is None:
        text = exam.filler(run, filler)
    marks: list[Marks] = []
    shown: list[bool] = []
    given: list[bool] = []
    read_seconds, started, path = 0.0, time.perf_counter(), ""
    for number in range(exam.languages):
        paper = write_paper(
            exam,
            number,
            condition=condition,
            examples=examples,
            letters=run.config.language.letter_range,
            filler=_slice(text, filler, number),
        )
        with run.autocast():
            read = prefill(run.model, torch.from_numpy(paper.ids.copy())[None], dtype=exam.dtype)
            marks += mark(run.model, read.cache, paper.answers)
        shown += paper.shown
        given += paper.given
        read_seconds += read.seconds
        path = read.path
        progress(number + 1, exam.languages, time.perf_counter() - started)
    count = count_parameters(run.config.model)
    return LanguageRow(
        run=run.name,
        step=run.step,
        total=count.total,
        active=count.active,
        condition=condition,
        words=exam.words,
        letters=run.config.language.letters_in_words,
        examples=examples,
        filler=filler,
        languages=exam.languages,
        exact=tuple(one.is_exact for one in marks),
        shown=tuple(shown),
        given=tuple(given),
        words_right=sum(one.words_right for one in marks),
        words_asked=sum(one.words for one in marks),
        read_seconds=read_seconds / exam.languages,
        seconds=time.perf_counter() - started,
        path=path,
        dtype=name_of_dtype(exam.dtype),
        text=_facts(text) if filler else _facts(None),
    )


@torch.no_grad()
def mark(decoder: Decoder, cache: KVCache, answers: Sequence[Answer]) -> list[Marks]:
    """What a decoder would write after each query, alone after what the cache holds, against the answer."""
    device = decoder.head_weight.device
    rows = [one.query + one.answer for one in answers]
    longest = max(map(len, rows))
    ids = torch.tensor([list(row.ljust(longest, b"\n")) for row in rows], device=device)
    states = decoder.hidden(ids, cache=cache.fork(len(rows))).states
    likeliest = decoder.logits(states).argmax(-1)[:, :-1] == ids[:, 1:]
    marked = []
    for one, hits in zip(answers, likeliest.tolist(), strict=True):
        start = len(one.query) - 1
        right = hits[start : start + len(one.answer)]
        ends = np.cumsum([len(part.gloss) + len(part.foreign) + 1 for part in one.parts]).tolist()
        words = [
            all(right[end - len(part.foreign) - 1 : end - 1])
            for part, end in zip(one.parts, ends, strict=True)
        ]
        marked.append(Marks(all(right), sum(words), len(words)))
    return marked


def check_run(
    run: Run, exam: Exam, conditions: list[str], examples: list[int], fillers: Sequence[int]
) -> None:
    """Refuse what cannot be measured, before anything is.

    Raises:
        ValueError: a run that was not trained on languages, a negative filler; as `check_asked`,
            `check_dtype`, `check_memory`.
    """
    if run.config.language is None:
        raise ValueError(
            f"{run.folder} was not trained on languages: its settings have no part language. "
            f"Train one with: sparse-moe icl train"
        )
    check_asked(conditions, examples)
    if min(fillers, default=0) < 0:
        raise ValueError(f"filler={min(fillers)} must be at least 0 bytes.")
    check_dtype(exam.dtype, run.device)
    check_memory(run, exam.dtype, [size + PIECES for size in fillers])


def _slice(text: HaystackText | None, size: int, number: int) -> np.ndarray:
    if not size or text is None:
        return np.empty(0, np.uint8)
    return text.text[number * size : (number + 1) * size]


def _facts(text: HaystackText | None) -> TextFacts:
    if text is None:
        return {"root": "", "digest": "", "files": 0, "repeated": False}
    return facts_of_text(text)
