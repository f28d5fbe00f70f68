"""What decoding remembers of the tokens so far.

Axes: b batch, g key heads, s new tokens, l all tokens so far, c channels.
"""

import torch
from torch import Tensor


class KVCache:
    """The keys and values of the tokens so far, for every layer; buffers double when they are full.

    A layer stores any number of tensors (b g s c), of widths of their own: keys and values, or the latents
    from which they are computed (DeepSeek-V2).

    length  tokens held, padding included
    seen    (b length) bool, True at real tokens; None while every token is real

    Each layer calls `append` in turn, then the decoder `advance`, once: a forward pass that fails half-way
    leaves the cache as it was.
    """

    def __init__(self, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1.")
        self.capacity = capacity
        self.length = 0
        self.seen: Tensor | None = None
        self._layers: list[list[Tensor]] = []  # each (b g capacity c)

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Store what a layer keeps of the new tokens, each (b g s c); returns all so far, each (b g l c).

        Raises:
            ValueError: another batch size, model, dtype or device than the tokens held; or gradients asked.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in new):
            raise ValueError(
                "a KVCache keeps no gradients. Decode inside torch.no_grad(), or pass cache=None."
            )
        end = self.length + new[0].shape[2]
        buffers = self._room(layer, new, end)
        for buffer, tensor in zip(buffers, new, strict=True):
            buffer[:, :, self.length : end] = tensor
        return tuple(buffer[:, :, :end] for buffer in buffers)

    def advance(self, tokens: int, mask: Tensor | None) -> None:
        """Count the tokens that every layer has now stored; `mask` (b tokens) is True at real ones."""
        if mask is not None or self.seen is not None:
            batch, device = self._layers[0][0].shape[0], self._layers[0][0].device
            before = known(self.seen, (batch, self.length), device)
            self.seen = torch.cat([before, known(mask, (batch, tokens), device)], dim=1)
        self.length += tokens

    def _room(self, layer: int, new: tuple[Tensor, ...], end: int) -> list[Tensor]:
        """The buffers of a layer, with room for `end` tokens."""
        if layer == len(self._layers) and self.length == 0:
            self._layers.append(_empty(new, max(self.capacity, end)))
        if layer >= len(self._layers):
            raise ValueError(
                f"this cache was filled by a model of {len(self._layers)} layers. Use a new KVCache."
            )
        buffers = self._layers[layer]
        if self.length == 0 and _kinds(buffers) != _kinds(new):  # left by a forward pass that failed
            self._layers[layer] = buffers = _empty(new, max(self.capacity, end))
        if (held := _kinds(buffers)) != (given := _kinds(new)):
            raise ValueError(
                f"this cache holds (batch, key heads, channels, dtype, device) = {held[0]}, got {given[0]}. "
                f"Use a new KVCache for another batch or model."
            )
        if end > buffers[0].shape[2]:
            grown = _empty(new, max(end, 2 * buffers[0].shape[2]))
            for old, larger in zip(buffers, grown, strict=True):
                larger[:, :, : self.length] = old[:, :, : self.length]
            self._layers[layer] = buffers = grown
        return buffers


def known(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The mask itself, or one that is True everywhere."""
    return torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask


def _empty(new: tuple[Tensor, ...], capacity: int) -> list[Tensor]:
    return [x.new_empty(x.shape[0], x.shape[1], capacity, x.shape[3]) for x in new]


def _kinds(tensors: "list[Tensor] | tuple[Tensor, ...]") -> list[tuple[int, int, int, str, str]]:
    return [(x.shape[0], x.shape[1], x.shape[3], str(x.dtype), str(x.device)) for x in tensors]
