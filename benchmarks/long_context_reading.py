"""What a long text costs: reading it, answering from its cache, and computing every pair of places.

No speed for a wrong result: a text read in pieces gives the state of one whole pass, and questions that share
a read give the states of questions asked alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResultError
from benchmarks.long_context_attention import measure_over_cache
from benchmarks.long_context_model import DTYPES, all_pairs_flops, chunk_of
from benchmarks.measure import Budget, Prepare, Timing, peak_bytes, time_in_turns
from moe.decoder import Decoder
from moe.kv_cache import KVCache
from moe.prefill import Prefill, cache_bytes, describe_path, prefill
from moe.probes.needle.ask import answer
from moe.probes.needle.evaluate import BESIDE_CACHE
from moe.probes.needle.haystack import Question
from moe.train.device import memory_available

TOGETHER, ALONE = "together", "alone"
ALONE_QUESTIONS = 8  # asked one after another, so that both candidates take about as long
EARLY, EVERY, MIDDLE, WHOLE = "early exit", "every place", "LLGL", "one pass, sdpa"
CHECKED = 1 << 14  # places at most of the text whose states are compared
TOLERANCE = 1e-3  # of logits, and of states, whose mean square is 1
VERY_LONG = 1 << 21  # from here on one run after the warm-up

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What the parts share: the decoder, a text (1 T) to read, the time for a cell."""

    decoder: Decoder
    text: Tensor
    device: torch.device
    seconds: float
    log: Log

    def ids(self, length: int) -> Tensor:
        """The first tokens of the text."""
        return self.text[:, :length]

    def budget(self, length: int) -> Budget:
        """Fewer rounds of what takes minutes."""
        if length >= VERY_LONG:
            return Budget(0.0, warmups=1, min_rounds=1, max_rounds=1)
        return Budget(self.seconds, warmups=1, min_rounds=3, max_rounds=20)

    def read(self, length: int, **options: Any) -> Prefill:
        """A prefill of the first tokens."""
        return prefill(self.decoder, self.ids(length), chunk=chunk_of(self.device), **options)


def why_no_memory(bench: Bench, length: int, dtype: torch.dtype) -> str | None:
    """Why a cache of this length does not fit here, or None."""
    needed, free = (
        cache_bytes(bench.decoder.config, length, dtype) + BESIDE_CACHE,
        memory_available(bench.device),
    )
    if free and needed > free:
        return f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return None


def check_reading(bench: Bench, length: int) -> None:
    """A text in pieces gives the logits of one whole pass.

    Raises:
        WrongResultError: it does not.
    """
    ids = bench.ids(min(length, CHECKED))
    decoder = bench.decoder
    with torch.no_grad():
        pieces = prefill(decoder, ids, chunk=max(1, ids.shape[1] // 3)).state
        whole = decoder.hidden(ids.to(bench.device, torch.int64), at=1).states[:, -1]
        error = (decoder.logits(pieces) - decoder.logits(whole)).abs().max().item()
    if not error <= TOLERANCE:
        raise WrongResultError(f"{ids.shape[1]} tokens in pieces: logits are {error:.1e} from one whole pass")


def check_answering(decoder: Decoder, cache: KVCache, questions: tuple[Question, ...]) -> None:
    """Questions together find the states of questions alone.

    Raises:
        WrongResultError: they do not.
    """
    ids = torch.tensor([list(question.query) for question in questions], device=decoder.head_weight.device)
    with torch.no_grad():
        together = decoder.hidden(ids, cache=cache.fork(len(ids)), at=1).states
        for row in (0, len(ids) - 1):
            alone = decoder.hidden(ids[row : row + 1], cache=cache.fork(1), at=1).states
            error = (together[row] - alone[0]).abs().max().item()
            if not error <= TOLERANCE:
                raise WrongResultError(f"question {row} of {len(ids)}: its state is {error:.1e} off")


def measure_reading(bench: Bench, length: int, dtypes: list[str]) -> dict[str, Timing]:
    """Prefills with caches of each dtype, in turns."""

    def prepare(dtype: torch.dtype) -> Prepare:
        return lambda number: partial(bench.read, length, dtype=dtype)

    works = {name: prepare(DTYPES[name]) for name in dtypes}
    return time_in_turns(works, bench.device, bench.budget(length))


def measure_cache(
    bench: Bench,
    length: int,
    dtype: str,
    questions: tuple[Question, ...],
    earlier: list[dict[str, Any]],
) -> dict[str, Any]:
    """Read once more, for the peak of memory; then answer from that cache, and attend to it.

    `earlier`: the results of attention to shorter caches.
    """
    kept: list[Prefill] = []
    peak = peak_bytes(lambda: kept.append(bench.read(length, dtype=DTYPES[dtype])), bench.device)
    cache, logits = kept[0].cache, bench.decoder.logits(kept[0].state).detach().cpu()
    check_answering(bench.decoder, cache, questions)
    timings = measure_answers(bench, cache, questions, length)
    keys, values = shared_by(cache, bench.decoder.config.num_hidden_layers)
    heads, budget = bench.decoder.config.num_attention_heads, bench.budget(length)
    attention = measure_over_cache(keys, values, heads, len(questions), budget, earlier)
    return {
        "length": length,
        "dtype": dtype,
        "cache_bytes": cache.nbytes,
        "peak_bytes": peak,
        "path": kept[0].path,
        "logits": logits.tolist(),
        "questions": {TOGETHER: len(questions), ALONE: min(ALONE_QUESTIONS, len(questions))},
        "steps": len(questions[0].answer),
        "answering": {name: asdict(timing) for name, timing in timings.items()},
        "attention": attention,
    }


def shared_by(cache: KVCache, layers: int) -> tuple[Tensor, ...]:
    """The keys and values (1 g l c) of the first layer that keeps all of them."""
    fork = cache.fork(1)
    return next(kept for layer in range(layers) if (kept := fork.shared(layer)) is not None)


def measure_answers(
    bench: Bench, cache: KVCache, questions: tuple[Question, ...], length: int
) -> dict[str, Timing]:
    """All questions in one read of the cache, and some of them one at a time, in turns."""
    some = questions[:ALONE_QUESTIONS]
    works: dict[str, Prepare] = {
        TOGETHER: lambda number: partial(answer, bench.decoder, cache, questions, batch=len(questions)),
        ALONE: lambda number: partial(answer, bench.decoder, cache, some, batch=1),
    }
    return time_in_turns(works, bench.device, bench.budget(length))


def measure_strict(bench: Bench, middle: Decoder, length: int, dtype: str) -> dict[str, Any]:
    """The same text with the early exit, at every place, with the full layer in the middle, in one pass.

    The one pass is what a user has without pieces: F.scaled_dot_product_attention over the whole text, as
    `Decoder.hidden` without a cache calls it.
    """
    ids, chunk, kind = bench.ids(length), chunk_of(bench.device), DTYPES[dtype]
    whole = ids.to(bench.device, torch.int64)

    @torch.no_grad()
    def one_pass() -> Tensor:
        return bench.decoder.hidden(whole).states[:, -1]

    works: dict[str, Callable[[], object]] = {
        EARLY: partial(prefill, bench.decoder, ids, chunk=chunk, dtype=kind),
        EVERY: partial(prefill, bench.decoder, ids, chunk=chunk, dtype=kind, every_place=True),
        MIDDLE: partial(prefill, middle, ids, chunk=chunk, dtype=kind),
        WHOLE: one_pass,
    }
    peaks = {}
    for name, work in list(works.items()):
        try:
            peaks[name] = peak_bytes(work, bench.device)
        except torch.OutOfMemoryError:  # of a GPU, where a whole pass may be too much
            if name != WHOLE:
                raise
            del works[name]
    timings = time_in_turns(
        {name: lambda number, work=work: work for name, work in works.items()},
        bench.device,
        Budget(bench.seconds, warmups=1, min_rounds=2, max_rounds=20),
    )
    config = bench.decoder.config
    return {
        "length": length,
        "dtype": dtype,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "peak_bytes": peaks,
        "flops": {
            EARLY: all_pairs_flops(config, length),
            EVERY: all_pairs_flops(config, length, every_place=True),
            MIDDLE: all_pairs_flops(middle.config, length),
            WHOLE: all_pairs_flops(config, length, every_place=True),
        },
        "paths": {
            EVERY: describe_path(config, every_place=True),
            MIDDLE: describe_path(middle.config),
        },
    }
