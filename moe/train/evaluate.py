"""Validation loss, bits per byte, and what general-purpose compressors make of the same bytes."""

import gzip
import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moe.decoder import Decoder
from moe.train.data import Windows
from moe.train.device import autocast
from moe.train.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Cross-entropy in nats a token over `tokens` targets, and in bits over the `bytes` they stand for.

    An end of text costs bits and stands for no byte, so bits per byte include finding where files end.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate(
    model: Decoder,
    windows: Windows,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    spread_over: int | None = None,
    batch: int = 16,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure `max_tokens` tokens, each window on its own: the first ones, or windows spread evenly over
    the first `spread_over` tokens.

    The first token of a window is predicted from one token of context, so a longer sequence does better.
    """
    indices = _spread(_count(windows, max_tokens), _count(windows, spread_over or max_tokens))
    count = len(indices)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, size = 0.0, 0
    with torch.inference_mode(), autocast(device, dtype):
        for start in range(0, count, batch):
            ids, targets = windows.take(indices[start : start + batch])
            loss = model.loss(ids.to(device), targets.to(device)).cross_entropy
            nats += loss.item() * targets.numel()
            size += int(tokenizer.token_bytes[targets.numpy()].sum())
            progress(min(start + batch, count), count)
    model.train(was_training)
    tokens = count * windows.sequence
    return Evaluation(nats / tokens, nats / math.log(2) / max(size, 1), tokens, size)


def evaluated_text(windows: Windows, tokenizer: Tokenizer, max_tokens: int) -> bytes:
    """The bytes that `evaluate` predicts, without ends of text."""
    count = _count(windows, max_tokens)
    return tokenizer.decode(windows.tokens[1 : count * windows.sequence + 1].tolist())


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9e on the whole text at once."""
    sizes = {
        "gzip": len(gzip.compress(text, 9)),
        "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / max(len(text), 1) for name, size in sizes.items()}


def _count(windows: Windows, tokens: int) -> int:
    return min(len(windows), max(1, tokens // windows.sequence))


def _spread(count: int, total: int) -> NDArray[np.int64]:
    """`count` different numbers of range(total), evenly apart; all of them when there are no more."""
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // count
