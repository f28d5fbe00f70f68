"""Reading a long prompt into a KV cache, piece by piece, exactly.

Axes: b batch, s tokens of the prompt, d model width.

Nothing of a prompt but the keys and values of its tokens matters to what comes after, and the state of its
last token. So the last layer computes keys and values alone for all tokens but the last: YOCO's early exit
(2405.04254). Where that layer is the only one that sees everything, a prompt costs time and memory linear in
its length, and the result is that of a whole forward pass all the same.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.decoder import NEEDS_MODALITIES, Decoder
from moe.decoder_config import DecoderConfig
from moe.decoder_inputs import check_ids
from moe.generate import evaluating
from moe.kv_cache import KVCache
from moe.modality_sequence import Interleaved
from moe.prompts import Prompts

CHUNK = 8192  # tokens at a time: their activations stay in the caches of a CPU

Progress = Callable[[int, int, float], None]  # tokens done, tokens in all, seconds so far


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """A prompt that was read.

    cache    holds its tokens
    state    (b d) of its last token, after the final norm: `Decoder.logits` of it is the next token
    path     which way was taken, in words
    seconds  that it took
    """

    cache: KVCache
    state: Tensor
    path: str
    seconds: float


@torch.no_grad()
def prefill(
    decoder: Decoder,
    ids: Tensor | Interleaved,
    *,
    chunk: int = CHUNK,
    dtype: torch.dtype | None = None,
    every_place: bool = False,
    progress: Progress = lambda done, total, seconds: None,
) -> Prefill:
    """Read the prompt ids (b s), of any integer dtype, or one interleaved sequence, `chunk` tokens at a time.

    dtype: what layers without a window keep, such as torch.bfloat16; None: that of the model.
    every_place: no early exit; the last layer computes every place, as a whole forward pass does.

    Stopped half-way, the decoder is as before. Experts with a capacity drop other tokens than in one pass.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, features that the decoder has no place for
            or that are not finite, a chunk below 1; before anything is read.
    """
    _check(ids, decoder.config, chunk)
    total = len(ids) if isinstance(ids, Interleaved) else ids.shape[1]
    cache = KVCache(capacity=total + 1, dtype=dtype)
    device = decoder.head_weight.device
    started, done = time.perf_counter(), 0
    states = torch.empty(0)
    with evaluating(decoder):
        for piece in _pieces(ids, chunk, device):
            done += piece.ids.shape[1]
            wanted = None if every_place else int(done == total)
            states = piece.hidden(decoder, cache, at=wanted).states
            progress(done, total, time.perf_counter() - started)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # or the seconds would end before the last pieces do
    path = describe_path(decoder.config, every_place=every_place)
    return Prefill(cache, states[:, -1], path, time.perf_counter() - started)


def _pieces(ids: Tensor | Interleaved, chunk: int, device: torch.device) -> Iterator[Prompts]:
    if isinstance(ids, Interleaved):
        yield from (Prompts.of(piece, None, device) for piece in ids.pieces(chunk))
    else:
        yield from (Prompts(piece.to(device, torch.int64)) for piece in ids.split(chunk, dim=1))


def _check(ids: Tensor | Interleaved, config: DecoderConfig, chunk: int) -> None:
    if isinstance(ids, Interleaved):
        _check_features(ids.features, config)
        ids = ids.ids[None]
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(f"ids must be prompts (b s) of at least one token, got shape {tuple(ids.shape)}.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be whole numbers, such as int64 or uint8, got {ids.dtype}.")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1.")
    for piece in ids.split(CHUNK, dim=1):
        check_ids(piece.to(torch.int64), config.vocab_size)


def _check_features(features: Tensor, config: DecoderConfig) -> None:
    """Refuse features (n f) that the decoder cannot embed."""
    if config.modalities is None:
        raise ValueError(f"the prompt has modalities, but the decoder has none. {NEEDS_MODALITIES}")
    if features.shape[1] != config.modalities.feature_size:
        raise ValueError(
            f"the prompt has {features.shape[1]} features a token, the decoder "
            f"{config.modalities.feature_size}. Interleave with the decoder's own config.modalities."
        )
    if not all(bool(piece.isfinite().all()) for piece in features.split(CHUNK)):
        raise ValueError("the prompt holds features that are NaN or infinite.")


def describe_path(config: DecoderConfig, *, every_place: bool = False) -> str:
    """What a prefill computes, and how its cost grows."""
    full = [layer for layer in range(config.num_hidden_layers) if config.window(layer) is None]
    last = config.num_hidden_layers - 1
    pairs = [layer for layer in full if every_place or layer != last]
    early_exit = "early exit: keys and values alone in the last layer"
    way = "every place of every layer" if every_place else early_exit
    cost = f"all pairs of places in layers {pairs}" if pairs else "cost linear in the length"
    return f"{way}; {cost}"


def cache_bytes(config: DecoderConfig, tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """What a cache of one row takes for so many tokens; layers with a window keep next to nothing."""
    if config.kv_lora_rank is None:
        width = 2 * config.kv_heads * config.head_size
    else:
        width = config.kv_lora_rank + config.qk_rope_head_dim
    full = sum(config.window(layer) is None for layer in range(config.num_hidden_layers))
    return full * width * tokens * dtype.itemsize
