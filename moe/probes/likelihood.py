"""How likely a model finds a text: windows of the length that it knows, in which each token counts once."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Ids = list[int]


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability (nats) of a continuation, and whether greedy decoding would have written it."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Window:
    """What the model reads, and how many of the last tokens that it predicts count. `ids` holds both."""

    ids: Ids
    count: int


def windows_of(context: Ids, continuation: Ids, length: int) -> Iterator[Window]:
    """The windows of at most `length` tokens read, in which each token of the continuation counts once.

    One window with as much context as fits, if the continuation fits; else those of `rolling_windows`.
    """
    if not context:
        raise ValueError(
            "the context is empty: begin with the end of text, which closes the document before."
        )
    if not continuation:
        return
    if len(continuation) <= length:
        yield Window((context + continuation)[-length - 1 :], len(continuation))
    else:
        yield from rolling_windows(context[-1], continuation, length)


def rolling_windows(first: int, text: Ids, length: int) -> Iterator[Window]:
    """Windows of `length` tokens read, one after the other; `first` stands before the text.

    Every token counts once. The last window reaches back to be full, and only what is new counts in it; this
    is how lm-eval computes perplexities.
    """
    ids = [first, *text]
    for end in range(length, len(text) + length, length):
        end = min(end, len(text))
        count = end % length or length
        yield Window(ids[max(end - length, 0) : end + 1], count)


def score_window(logits: Tensor, window: Window) -> Score:
    """The score of a window from the logits (n v) of the n tokens that count."""
    targets = torch.tensor(window.ids[-window.count :], device=logits.device)
    likelihoods = logits.float().log_softmax(-1).gather(1, targets[:, None])
    return Score(likelihoods.double().sum().item(), bool((logits.argmax(-1) == targets).all()))
