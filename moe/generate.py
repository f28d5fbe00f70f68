"""Sampling from a decoder with a KV cache.

Axes: b batch, s prompt, n new tokens, v vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Required, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from moe.kv_cache import KVCache
from moe.prompts import Prompt, Prompts

if TYPE_CHECKING:
    from moe.decoder import Decoder

STOPPED = -1

Stop = int | Sequence[int | Sequence[int]]


class SamplingOptions(TypedDict, total=False):
    """How a token is drawn. Filters apply in this order, each to what the one before left.

    max_new_tokens  required; at least 1
    temperature     logits are divided by it; 0 takes the likeliest token. Default 1
    top_k           keep the k likeliest tokens (and those as likely as the k-th)
    top_p           keep the fewest likeliest tokens whose probabilities reach p in sum (1904.09751)
    min_p           keep tokens at least p times as likely as the likeliest (2407.01082)
    stop            a token id, or several ids and sequences of ids: a row ends with the first it completes
    seed            the same seed draws the same tokens; None: another draw every time
    mask            (b s) bool, True at real tokens of the prompts; padding must stand left
    cache           what the prompts continue, such as a `fork` of a long text that was read once; it grows
    """

    max_new_tokens: Required[int]
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    stop: Stop | None
    seed: int | None
    mask: Tensor | None
    cache: KVCache | None


class Options(SamplingOptions, total=False):
    """Options of `generate`: those of sampling, and two of its own.

    on_token  called with each step's tokens (b) as they are drawn, -1 (STOPPED) where a row has stopped
    pad       fills rows that stop before the longest; default 0
    """

    on_token: Callable[[Tensor], object] | None
    pad: int


def generate(decoder: "Decoder", ids: Prompt, **options: Unpack[Options]) -> Tensor:
    """Continue the prompts ids (b s) -> (b s + n) int64: prompt, new tokens, and `pad` after a row's stop.

    Instead of ids, a prompt may be an `Interleaved` sequence, or a `ModalityBatch` that is padded at the left
    and needs no mask: they are continued with text, and their tokens that are no text count as id 0. The
    global random state, the training mode and the gradient mode are left as they were.

    Raises:
        ValueError: an option or a prompt that makes no sense.
        FloatingPointError: the model returns NaN. Greedy on a GPU, that is found with the last token.
    """
    on_token, pad = options.pop("on_token", None), options.pop("pad", 0)
    sampling = Sampling(**cast("SamplingOptions", options))
    prompts = sampling.read_prompt(decoder, ids)
    steps: list[Tensor] = []
    for tokens in _steps(decoder, prompts, sampling):
        steps.append(tokens)
        if on_token is not None:
            on_token(tokens)
    new = torch.stack(steps, dim=1)
    return torch.cat([prompts.ids, new.masked_fill(new == STOPPED, pad)], dim=1)


def stream(decoder: "Decoder", ids: Prompt, **options: Unpack[SamplingOptions]) -> Iterator[Tensor]:
    """Yield each step's tokens (b) int64 as they are drawn; -1 (STOPPED) in rows that have stopped.

    Ends after `max_new_tokens`, or when all rows have stopped. A stop is yielded too. Raises as `generate`,
    and at the call, not at the first token.
    """
    sampling = Sampling(**options)
    return _steps(decoder, sampling.read_prompt(decoder, ids), sampling)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (b v), -inf below the k-th largest of the row."""
    smallest_kept = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (b v), -inf outside the fewest likeliest tokens whose probabilities reach p; lower ids first."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    reached_before = probabilities.cumsum(-1) - probabilities >= p
    return logits.masked_fill(torch.zeros_like(reached_before).scatter(1, order, reached_before), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits (b v), -inf where a token is less than p times as likely as the row's likeliest."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sampling:
    """`SamplingOptions`, checked."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: Stop | None = None
    seed: int | None = None
    mask: Tensor | None = None
    cache: KVCache | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be a number >= 0; 0 takes the likeliest token."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None to keep all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, or None to keep all tokens.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be from 0 to 1, or None to keep all tokens.")
        if any(not sequence for sequence in self.stops):
            raise ValueError(f"stop={self.stop!r} holds an empty sequence; give ids or sequences of ids.")
        if not all(isinstance(token, int) for sequence in self.stops for token in sequence):
            raise ValueError(f"stop={self.stop!r} must hold token ids; encode text with the tokenizer first.")

    @property
    def stops(self) -> tuple[tuple[int, ...], ...]:
        """Every stop as a sequence of ids."""
        stop = () if self.stop is None else self.stop
        each = (stop,) if isinstance(stop, int) else stop
        return tuple((one,) if isinstance(one, int) else tuple(one) for one in each)

    def read_prompt(self, decoder: "Decoder", prompt: Prompt) -> Prompts:
        """The prompts, which have something to continue.

        Raises:
            ValueError: they have not, or a mask that does not belong.
        """
        prompts = Prompts.of(prompt, self.mask, decoder.head_weight.device)
        ids, mask = prompts.ids, prompts.mask
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(
                f"ids must be prompts (b s) of at least one token, got shape {tuple(ids.shape)}. "
                f"Start with a token such as the end of a document."
            )
        if mask is not None and mask.shape == ids.shape and not bool(mask[:, -1].all()):
            raise ValueError(
                "mask is False at the end of a prompt; pad on the left, so that tokens can follow."
            )
        return prompts

    def must_look(self, device: torch.device) -> bool:
        """Whether each step needs the numbers of the one before; if not, a GPU need not be waited for."""
        return device.type != "cuda" or self.temperature > 0 or bool(self.stops)

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Logits (b v) of the next token, none of them NaN unless the temperature is 0 -> tokens (b)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # tiny temperatures stay finite
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()  # around each step, not around what the caller does between two steps
def _steps(decoder: "Decoder", prompts: Prompts, sampling: Sampling) -> Iterator[Tensor]:
    ids, cache = prompts.ids, sampling.cache
    if cache is None:
        cache = KVCache(capacity=ids.shape[1] + min(sampling.max_new_tokens, 1024))
    generator = torch.Generator(ids.device)
    generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    ended = _Ended(sampling.stops, rows=ids.shape[0])
    tokens, is_broken = ids, torch.zeros((), dtype=torch.bool, device=ids.device)
    for left in reversed(range(sampling.max_new_tokens)):
        with evaluating(decoder):
            if tokens is ids:
                hidden = prompts.hidden(decoder, cache, at=1)
            else:  # not checked again: ids that were drawn are in the vocabulary, and looking waits for a GPU
                hidden = decoder.model(tokens, None, cache, 1)
            logits = decoder.logits(hidden.states[:, -1])
            is_broken |= logits.isnan().any()
            if sampling.must_look(logits.device) or not left:
                _refuse_nan(is_broken)
            drawn = sampling.draw(logits, generator)
        yield ended.hide(drawn)
        if ended.after(drawn):
            return
        tokens = drawn[:, None]


def _refuse_nan(is_broken: Tensor) -> None:
    if bool(is_broken):
        raise FloatingPointError("the model returned NaN logits: damaged weights, or a dtype that overflows.")


class _Ended:
    """Which rows have completed a stop."""

    def __init__(self, stops: tuple[tuple[int, ...], ...], rows: int) -> None:
        self.stops = stops
        self.rows = [False] * rows
        self._new: list[tuple[int, ...]] = [()] * rows
        self._longest = max(map(len, stops), default=0)

    def hide(self, drawn: Tensor) -> Tensor:
        """Each row's token (b), STOPPED in rows that have ended."""
        if not any(self.rows):
            return drawn
        return drawn.masked_fill(torch.tensor(self.rows, device=drawn.device), STOPPED)

    def after(self, drawn: Tensor) -> bool:
        """Take in each row's token (b); whether all rows have ended."""
        if not self.stops:
            return False
        for row, token in enumerate(drawn.tolist()):
            self._new[row] = new = (*self._new[row], token)[-self._longest :]
            self.rows[row] |= any(new[-len(stop) :] == stop for stop in self.stops)
        return all(self.rows)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each submodule's own mode afterwards."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
