"""Asking a decoder what stands in a haystack: read once, then every question alone, many at a time.

Each question continues the whole haystack and knows nothing of the others. Questions of one length share one
read of the haystack's keys and values: `KVCache.fork`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe.autocast import autocast_dtype
from moe.decoder import Decoder
from moe.kv_cache import KVCache
from moe.modality_sequence import Interleaved
from moe.prefill import Prefill, Progress, prefill
from moe.probes.needle.haystack import Question
from moe.train.device import memory_in_use

BATCH = 64  # questions that share a read: beyond it nothing is gained


class Asking(Protocol):
    """A haystack and what is asked after it."""

    @property
    def prompt(self) -> Tensor | Interleaved:
        """The haystack: ids (1 s), or a sequence of several senses."""
        ...

    @property
    def questions(self) -> Sequence[Question]:
        """Each asked alone."""
        ...

    @property
    def needles(self) -> Sequence[object]:
        """All that are hidden."""
        ...


def unwatched(done: int, total: int, seconds: float) -> None:
    """A `Progress` that nobody looks at."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """The answers to the questions of a haystack, in their order, and what they cost.

    peak_bytes: of the process so far, not of this haystack alone.
    """

    answers: tuple[bytes, ...]
    prefill: Prefill
    path: str  # how the haystack was read, and the precision of products where it is not float32
    answer_seconds: float
    peak_bytes: int


def ask(
    decoder: Decoder,
    haystack: Asking,
    *,
    dtype: torch.dtype | None = None,
    batch: int = BATCH,
    progress: Progress = unwatched,
    answered: Progress = unwatched,
) -> Asked:
    """Read a haystack and answer its questions greedily.

    dtype: of the cache. `progress` follows the reading, in tokens, and `answered` the questions.
    """
    device = decoder.head_weight.device
    read = prefill(decoder, haystack.prompt, dtype=dtype, progress=progress)
    started = time.perf_counter()
    answers = answer(decoder, read.cache, haystack.questions, batch=batch, answered=answered)
    seconds = time.perf_counter() - started
    narrow = autocast_dtype(device)
    path = read.path if narrow is None else f"{read.path}; products in {str(narrow).removeprefix('torch.')}"
    return Asked(answers, read, path, seconds, memory_in_use(device))


def answer(
    decoder: Decoder,
    cache: KVCache,
    questions: Sequence[Question],
    *,
    batch: int = BATCH,
    answered: Progress = unwatched,
) -> tuple[bytes, ...]:
    """What the decoder writes after each query, as many bytes as its answer has: the likeliest each time.

    Raises:
        FloatingPointError: the decoder computes NaN.
    """
    device = decoder.head_weight.device
    started = time.perf_counter()
    given: dict[int, bytes] = {}
    for group in groups(questions, batch):
        ids = torch.tensor([list(questions[i].query) for i in group], device=device)
        new = max(len(questions[i].answer) for i in group)
        out = decoder.generate(ids, max_new_tokens=new, temperature=0.0, cache=cache.fork(len(group)))
        written = out[:, ids.shape[1] :].tolist()
        given |= {i: bytes(row[: len(questions[i].answer)]) for i, row in zip(group, written, strict=True)}
        answered(len(given), len(questions), time.perf_counter() - started)
    return tuple(given[i] for i in range(len(questions)))


def groups(questions: Sequence[Question], batch: int) -> list[list[int]]:
    """Numbers of questions whose queries have one length, at most `batch` together, like answers together."""
    by_length: dict[int, list[int]] = {}
    for number in sorted(range(len(questions)), key=lambda i: len(questions[i].answer)):
        by_length.setdefault(len(questions[number].query), []).append(number)
    return [group[i : i + batch] for group in by_length.values() for i in range(0, len(group), batch)]
