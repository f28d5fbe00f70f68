"""The loss of held-out text by the length of the context before it: it must not rise as contexts grow."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from moe.decoder import Decoder
from moe.doctor import table
from moe.kv_cache import KVCache
from moe.prefill import Progress, prefill
from moe.probes.needle.ask import unwatched
from moe.probes.needle.evaluate import check_memory, check_model
from moe.probes.needle.pooling import name_of_dtype
from moe.probes.needle.questions import Questions
from moe.probes.needle.table import format_length
from moe.train.runs import Run

CONTEXTS = (0, 512, 4096, 32_768, 262_144, 1_048_576)
TARGETS = 512  # bytes of a spot; the loss of all but the first is measured


class Mean(NamedTuple):
    """A mean over spots, and its standard error; 0 for a single spot."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """The mean of some values."""
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), spread / len(values) ** 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextLoss:
    """The mean loss (nats a byte) of the same bytes with `context` bytes before them.

    `change` is from the next shorter context, paired spot by spot, so that its error is small; None for the
    shortest one.
    """

    context: int
    loss: float
    stderr: float
    change: float | None = None
    change_stderr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionsResult:
    """The losses of one run, in the order of their contexts."""

    run: str
    step: int  # of its training
    spots: int  # places of the text
    bytes_a_spot: int  # whose loss is measured
    dtype: str  # of the cache
    repeated: bool  # whether the text had to be
    losses: tuple[ContextLoss, ...]


def positions_table(results: Sequence[PositionsResult]) -> list[str]:
    """Lines of Markdown."""
    rows = [
        (
            result.run,
            format_length(one.context) if one.context else "0",
            f"{one.loss:.4f} +- {one.stderr:.4f}",
            "" if one.change is None else f"{one.change:+.4f} +- {one.change_stderr:.4f}",
            f"{result.spots} x {result.bytes_a_spot}" + (" REPEATED text" if result.repeated else ""),
        )
        for result in results
        for one in result.losses
    ]
    return table(("run", "bytes before", "nats a byte", "change, paired", "spots x bytes"), rows)


def contexts_up_to(longest: int) -> list[int]:
    """The lengths of context that are measured: those of CONTEXTS, and last the longest one.

    Raises:
        ValueError: no length.
    """
    if longest < 1:
        raise ValueError(f"length={longest} must be at least 1 byte of context.")
    return [*(context for context in CONTEXTS if context < longest), longest]


def check_positions(run: Run, questions: Questions, longest: int, spots: int) -> None:
    """Refuse what cannot be measured, before anything is read.

    Raises:
        ValueError: no spot; as `contexts_up_to`, `check_model`, `check_memory`; too little text.
    """
    if spots < 1:
        raise ValueError(f"spots={spots} must be at least 1: they are the places that are measured.")
    check_model(run, questions.dtype)
    length = contexts_up_to(longest)[-1] + TARGETS
    check_memory(run, questions.dtype, [length])
    questions.text(run, length, questions.seeds(spots)[0])


@torch.no_grad()
def losses_by_context(
    run: Run,
    questions: Questions,
    longest: int,
    *,
    spots: int = 40,
    progress: Progress = unwatched,
    log: Callable[[str], None] = lambda line: None,
) -> PositionsResult:
    """The mean loss of the same held-out bytes after contexts of growing length, up to `longest`.

    Of the questions, `folder`, `repeat`, `seed` and `dtype` count. `progress` follows the spots.

    Raises:
        ValueError: as `check_positions`.
    """
    check_positions(run, questions, longest, spots)
    contexts = contexts_up_to(longest)
    found: list[list[float]] = []  # (spots contexts)
    repeated, started = False, time.perf_counter()
    for spot, seed in enumerate(questions.seeds(spots), start=1):
        text = questions.text(run, contexts[-1] + TARGETS, seed)
        repeated |= text.repeated
        with run.autocast():
            found.append([_loss_after(run.model, text.text, one, questions.dtype) for one in contexts])
        log(f"spot {spot} of {spots}: {', '.join(f'{loss:.3f}' for loss in found[-1])}")
        progress(spot, spots, time.perf_counter() - started)
    return PositionsResult(
        run=run.name,
        step=run.step,
        spots=spots,
        bytes_a_spot=TARGETS - 1,
        dtype=name_of_dtype(questions.dtype),
        repeated=repeated,
        losses=average(contexts, list(zip(*found, strict=True))),
    )


def average(contexts: Sequence[int], losses: Sequence[Sequence[float]]) -> tuple[ContextLoss, ...]:
    """Means of losses (contexts spots), and the paired changes from each context to the next."""
    means = [Mean.of(one) for one in losses]
    changes = [
        Mean.of([longer - shorter for shorter, longer in zip(*pair, strict=True)])
        for pair in pairwise(losses)
    ]
    first = ContextLoss(context=contexts[0], loss=means[0].value, stderr=means[0].stderr)
    others = (
        ContextLoss(
            context=context,
            loss=mean.value,
            stderr=mean.stderr,
            change=change.value,
            change_stderr=change.stderr,
        )
        for context, mean, change in zip(contexts[1:], means[1:], changes, strict=True)
    )
    return (first, *others)


def _loss_after(decoder: Decoder, text: NDArray[np.uint8], context: int, dtype: torch.dtype) -> float:
    """Nats a byte of the last TARGETS - 1 bytes of a text, after the byte and the context before them."""
    ids = torch.from_numpy(text[len(text) - TARGETS - context :].copy())[None]
    before, targets = ids[:, :-TARGETS], ids[:, -TARGETS:].to(decoder.head_weight.device, torch.int64)
    cache = prefill(decoder, before, dtype=dtype).cache if context else KVCache(dtype=dtype)
    states = decoder.hidden(targets[:, :-1], cache=cache).states
    return F.cross_entropy(decoder.logits(states)[0].float(), targets[0, 1:]).item()
