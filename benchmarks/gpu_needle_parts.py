"""The parts of benchmarks.gpu_needle: asking about haystacks, and exact attention of all pairs of places.

A part that would outlast the minutes stops in the middle of a text, or does not begin.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.long_context_model import (
    DTYPES,
    all_pairs_flops,
    chunk_of,
    make_decoder,
    sees_all_pairs,
    settings_of,
    strict_config,
)
from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.prefill import Prefill, prefill
from moe.probes.needle.ask import Asked, answer
from moe.probes.needle.evaluate import check_dtype, check_memory, check_model
from moe.probes.needle.haystack import Haystack
from moe.probes.needle.pooling import Result, facts_of_text
from moe.probes.needle.questions import Questions, make_haystacks
from moe.train.device import memory_in_use
from moe.train.runs import Run

T = TypeVar("T")
WARM_UP = 2  # chunks that are read first, so that no kernel is compiled while the clock runs


class OutOfTimeError(Exception):
    """A part would take longer than the minutes that are left."""


@dataclass(frozen=True, slots=True)
class Clock:
    """When everything has to be over, by time.perf_counter."""

    deadline: float

    @property
    def left_s(self) -> float:
        """Seconds that are left, none below 0."""
        return max(0.0, self.deadline - time.perf_counter())

    def need(self, seconds: float) -> None:
        """Refuse to begin what takes longer.

        Raises:
            OutOfTimeError: it does.
        """
        if seconds > self.left_s:
            raise OutOfTimeError(f"takes about {seconds:.0f} s, {self.left_s:.0f} s were left")

    def guard(self, done: int, total: int, seconds: float) -> None:
        """The progress of a prefill: stops it when the time is over.

        Raises:
            OutOfTimeError: it is.
        """
        if not self.left_s:
            raise OutOfTimeError(f"stopped after {done} of {total} tokens and {seconds:.0f} s: no time left")


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What the parts share: the trained run if there is one, the text around needles, the caches' dtypes."""

    device: torch.device
    run: Run | None
    clock: Clock
    folder: Path | None
    dtype: str
    strict_dtype: str

    @property
    def trained(self) -> Run:
        """The run that is asked.

        Raises:
            ValueError: there is none.
        """
        if self.run is None:
            raise ValueError("there is no trained run: training failed. Give one with --run.")
        return self.run

    @property
    def config(self) -> DecoderConfig:
        """That of the run, or of the preset `needle`."""
        return settings_of(None).model if self.run is None else self.run.config.model


def ask_about(job: Job, tokens: int, queries: int, haystacks: int) -> Iterator[dict[str, Any]]:
    """One result a haystack, `queries` of each template over all of them.

    Raises:
        OutOfTimeError: before a haystack for which there is no time.
        ValueError: too little text or memory, or a run that does not read bytes.
    """
    questions = Questions(queries=queries, haystacks=haystacks, folder=job.folder, dtype=DTYPES[job.dtype])
    check_model(job.trained, questions.dtype)
    check_memory(job.trained, questions.dtype, [tokens])
    began = time.perf_counter()
    for haystack, text in make_haystacks(job.trained, questions, tokens):
        asked = read_and_answer(job, haystack, DTYPES[job.dtype])
        result = Result.of(haystack, facts_of_text(text), asked)
        seconds = time.perf_counter() - began
        yield asdict(result) | {"seconds": seconds}
        job.clock.need(seconds)
        began = time.perf_counter()


def read_and_answer(job: Job, haystack: Haystack, dtype: torch.dtype, *, every_place: bool = False) -> Asked:
    """Read a haystack, many tokens at a time, and ask; the device has finished before a clock stops."""
    decoder = job.trained.model
    reset_peak(job.device)
    ids = torch.from_numpy(haystack.ids)[None]
    read, seconds = timed(
        lambda: prefill(
            decoder,
            ids,
            chunk=chunk_of(job.device),
            dtype=dtype,
            every_place=every_place,
            progress=job.clock.guard,
        ),
        job.device,
    )
    answers, answer_seconds = timed(lambda: answer(decoder, read.cache, haystack.questions), job.device)
    read = replace(read, seconds=seconds)
    return Asked(answers, read, read.path, answer_seconds, memory_in_use(job.device))


def read_strictly(job: Job, tokens: int, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Read random bytes with the full layer in the middle: its attention is that of all pairs of places.

    earlier: the result at another length, by which the time is foretold: it grows with the square.

    Raises:
        OutOfTimeError: there is too little time, or the time ended before the text did.
    """
    if earlier is not None:
        job.clock.need(earlier["seconds"] * (tokens / earlier["length"]) ** 2)
    check_dtype(DTYPES[job.strict_dtype], job.device)
    config = strict_config(job.config)
    decoder = make_decoder(config, job.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, tokens), dtype=torch.uint8, generator=generator)

    def read(length: int) -> Prefill:
        options: dict[str, Any] = {"chunk": chunk_of(job.device), "dtype": DTYPES[job.strict_dtype]}
        return prefill(decoder, ids[:, :length], progress=job.clock.guard, **options)

    read(min(tokens, WARM_UP * chunk_of(job.device)))
    reset_peak(job.device)
    done, seconds = timed(lambda: read(tokens), job.device)
    return _strict_facts(job, decoder, done, tokens, seconds) | {
        "flops": all_pairs_flops(config, tokens),
        "weights": "random",
        "recall": [],
    }


def recall_strictly(job: Job, tokens: int, queries: int) -> dict[str, Any]:
    """The trained run computes every pair of places of one haystack, and is asked about it."""
    run, config = job.trained, job.config
    questions = Questions(queries=queries, haystacks=1, folder=job.folder, dtype=DTYPES[job.strict_dtype])
    check_model(run, questions.dtype)
    check_memory(run, questions.dtype, [tokens])
    haystack, text = next(make_haystacks(run, questions, tokens))
    every_place = not sees_all_pairs(config)
    asked = read_and_answer(job, haystack, questions.dtype, every_place=every_place)
    result = Result.of(haystack, facts_of_text(text), asked)
    facts = _strict_facts(job, run.model, asked.prefill, tokens, asked.prefill.seconds)
    return facts | {
        "flops": all_pairs_flops(config, tokens, every_place=every_place),
        "weights": "trained",
        "recall": tallies(list(result.answers)),
    }


def tallies(answers: list[tuple[str, float, bool]]) -> list[dict[str, Any]]:
    """Right and asked of each template."""
    names = dict.fromkeys(template for template, _, _ in answers)
    found = {name: [right for template, _, right in answers if template == name] for name in names}
    return [{"template": name, "right": sum(right), "asked": len(right)} for name, right in found.items()]


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What the work gives, and its seconds, with everything that was launched finished."""
    synchronize(device)
    began = time.perf_counter()
    found = work()
    synchronize(device)
    return found, time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the memory of what came before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _strict_facts(job: Job, decoder: Decoder, read: Prefill, tokens: int, seconds: float) -> dict[str, Any]:
    config = decoder.config
    letters = ["G" if config.window(layer) is None else "L" for layer in range(config.num_hidden_layers)]
    return {
        "length": tokens,
        "pattern": "".join(letters),
        "path": read.path,
        "dtype": job.strict_dtype,
        "seconds": seconds,
        "cache_bytes": read.cache.nbytes,
        "peak_bytes": memory_in_use(job.device),
    }
