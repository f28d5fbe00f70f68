"""What decoding remembers of the tokens so far.

Axes: b batch, g key heads, s new tokens, l all tokens so far, c channels, w - 1 tokens that a window keeps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SPARE = 256  # places that a window's buffer has beyond what it keeps: it is moved once in so many tokens


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """The last tokens of a layer with a window: places stop - held to stop - 1 of buffers (b g room c)."""

    buffers: tuple[Tensor, ...]
    stop: int
    held: int

    def content(self, more: int = 0) -> tuple[Tensor, ...]:
        """The tokens held, and the next `more` places."""
        return tuple(x[:, :, self.stop - self.held : self.stop + more] for x in self.buffers)


class KVCache:
    """The keys and values of the tokens so far, for every layer; buffers double when they are full.

    A layer stores any number of tensors (b g s c), of widths of their own: keys and values, or the latents
    from which they are computed (DeepSeek-V2). A layer with a sliding window keeps the last of them only.

    capacity  tokens that the first buffers have room for
    dtype     of what layers without a window keep; None: as given
    length    tokens held, padding included
    seen      (b length) bool, True at real tokens; None while every token is real

    Each layer calls `append` in turn, then the decoder `advance`, once: a forward pass that fails half-way
    leaves the cache as it was.
    """

    def __init__(self, capacity: int = 256, *, dtype: torch.dtype | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1.")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating-point type, such as torch.bfloat16.")
        self.capacity = capacity
        self.dtype = dtype
        self.length = 0
        self.seen: Tensor | None = None
        self._layers: dict[int, list[Tensor]] = {}  # each (b g capacity c)
        self._windows: dict[int, _Window] = {}
        self._recent: dict[str, Tensor] = {}  # each (b w-1 d): the last inputs of a short convolution
        self._next: list[tuple[dict, int | str, _Window | Tensor]] = []  # what `advance` puts into place
        self._shared: dict[int, tuple[Tensor, ...]] = {}  # each (1 g l c), of the cache that this one forked
        self._begin = 0  # tokens that are shared

    def append(self, layer: int, *new: Tensor, window: int | None = None) -> tuple[Tensor, ...]:
        """Store what a layer keeps of the new tokens, each (b g s c); returns all that they can see.

        Each result is (b g l c): all tokens so far, or with a `window` the last w - 1 and the new ones. In a
        fork, those that are shared come from `shared` instead.

        Raises:
            ValueError: another batch size, model, dtype or device than the tokens held; or gradients asked.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in new):
            raise ValueError(
                "a KVCache keeps no gradients. Decode inside torch.no_grad(), or pass cache=None."
            )
        if self.length and layer not in (self._layers if window is None else self._windows):
            if layer not in self._layers | self._windows:
                had = f"a model of {len(self._layers) + len(self._windows)} layers"
            else:
                had = f"a model whose layer {layer} has {'a' if window is None else 'no'} sliding window"
            raise ValueError(f"this cache was filled by {had}. Use a new KVCache.")
        if window is not None:
            return self._append_window(layer, new, window - 1)
        new = tuple(x if self.dtype is None else x.to(self.dtype) for x in new)
        start = self.length - self._begin
        end = start + new[0].shape[2]
        buffers = self._room(layer, new, end)
        for buffer, tensor in zip(buffers, new, strict=True):
            buffer[:, :, start:end] = tensor
        return tuple(buffer[:, :, :end] for buffer in buffers)

    def shared(self, layer: int) -> tuple[Tensor, ...] | None:
        """What a layer kept of the tokens before a fork, each (1 g l c); None: nothing is shared."""
        return self._shared.get(layer)

    def recent(self, name: str, new: Tensor, zeros: Tensor, mask: Tensor | None) -> Tensor:
        """The last tokens that a short convolution has read, (b w-1 d); those of `new` (b s d) come next.

        zeros: what stands before the first token. mask (b s) is True at real tokens: only they are kept.

        Raises:
            ValueError: another batch size, model, dtype or device than the tokens held.
        """
        held = self._recent.get(name) if self.length else zeros
        if held is None:
            raise ValueError(
                f"this cache was filled by a model without the convolution {name}. Use a new KVCache."
            )
        if _inputs(held) != _inputs(zeros):
            raise ValueError(
                f"this cache holds, for the convolution {name}, (batch, tokens, channels, dtype, device) = "
                f"{_inputs(held)}, got {_inputs(zeros)}. Use a new KVCache for another batch or model."
            )
        both = torch.cat([held, new], dim=1)
        keep, stop = zeros.shape[1], both.shape[1]
        if mask is None:
            last = both[:, stop - keep :].clone()
        else:  # those that end with the last real one, which padding may follow
            counted = torch.arange(1, new.shape[1] + 1, device=new.device)
            first = (mask * counted).amax(1, keepdim=True)
            places = first + torch.arange(keep, device=new.device)
            last = both.gather(1, places[..., None].expand(-1, -1, both.shape[2]))
        self._next.append((self._recent, name, last))
        return held

    def advance(self, tokens: int, mask: Tensor | None) -> None:
        """Count the tokens that every layer has now stored; `mask` (b tokens) is True at real ones."""
        for where, key, value in self._next:
            where[key] = value
        self._next.clear()
        if mask is not None or self.seen is not None:
            batch, device = len(self._some()), self._some().device
            before = known(self.seen, (batch, self.length), device)
            self.seen = torch.cat([before, known(mask, (batch, tokens), device)], dim=1)
        self.length += tokens

    def begin(self) -> None:
        """Forget what a forward pass that failed left behind; the decoder calls it before its layers."""
        self._next.clear()
        if not self.length:
            self._layers.clear()

    def fork(self, rows: int) -> "KVCache":
        """A cache of `rows` rows that all go on from the one row of this one, and share its memory.

        This cache must stay as it is while the fork is used: what layers without a window keep is not
        copied. So any number of questions about one long text cost its memory once.

        Raises:
            ValueError: rows below 1, or this cache holds no token, more than one row, padding, or is a fork
                itself.
        """
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1.")
        if not self.length:
            raise ValueError("this cache holds no token to go on from. Read a prompt into it first.")
        if self._begin:
            raise ValueError("this cache is a fork itself. Fork the one that it came from, once more.")
        if self.seen is not None:
            raise ValueError("a cache with padding cannot be forked. Read one prompt without a mask into it.")
        if (held := len(self._some())) != 1:
            raise ValueError(f"a cache of {held} rows cannot be forked; it must have one.")
        child = KVCache(capacity=64, dtype=self.dtype)
        child.length = child._begin = self.length
        for layer, buffers in self._layers.items():
            child._shared[layer] = tuple(x[:, :, : self.length] for x in buffers)
            child._layers[layer] = [x.new_empty(rows, x.shape[1], 64, x.shape[3]) for x in buffers]
        for layer, window in self._windows.items():
            held = tuple(x.expand(rows, -1, -1, -1) for x in window.content())
            child._windows[layer] = _roomy(held)
        child._recent = {name: x.expand(rows, -1, -1).clone() for name, x in self._recent.items()}
        return child

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, those that are shared not counted."""
        kept = [x for buffers in self._layers.values() for x in buffers]
        kept += [x for window in self._windows.values() for x in window.buffers]
        return sum(x.nbytes for x in (*kept, *self._recent.values()))

    def _some(self) -> Tensor:
        """One of the buffers (b g capacity c)."""
        first = next(iter(self._layers.values()), None) or next(iter(self._windows.values())).buffers
        return first[0]

    def _append_window(self, layer: int, new: tuple[Tensor, ...], keep: int) -> tuple[Tensor, ...]:
        s = new[0].shape[2]
        window = self._windows.get(layer) if self.length else None
        if window is not None:
            _check_kinds(window.buffers, new)
            if window.held != min(self.length, keep):
                raise ValueError(
                    f"this cache holds {window.held} tokens of layer {layer}, whose window of {keep + 1} "
                    f"needs {min(self.length, keep)}: it was filled by another model. Use a new KVCache."
                )
        if window is not None and window.stop + s <= window.buffers[0].shape[2]:
            for buffer, tensor in zip(window.buffers, new, strict=True):
                buffer[:, :, window.stop : window.stop + s] = tensor
            held = min(window.held + s, keep)
            self._next.append((self._windows, layer, _Window(window.buffers, window.stop + s, held)))
            return window.content(more=s)
        if window is not None:
            new = tuple(torch.cat(pair, dim=2) for pair in zip(window.content(), new, strict=True))
        total = new[0].shape[2]
        held = tuple(x[:, :, total - min(total, keep) :] for x in new)
        self._next.append((self._windows, layer, _roomy(held)))
        return new

    def _room(self, layer: int, new: tuple[Tensor, ...], end: int) -> list[Tensor]:
        """The buffers of a layer, with room for `end` tokens."""
        if layer not in self._layers:
            self._layers[layer] = _empty(new, max(self.capacity, end))
        buffers = self._layers[layer]
        if self.length == 0 and _kinds(buffers) != _kinds(new):  # left by a forward pass that failed
            self._layers[layer] = buffers = _empty(new, max(self.capacity, end))
        _check_kinds(buffers, new)
        if end > buffers[0].shape[2]:
            grown = _empty(new, max(end, 2 * buffers[0].shape[2]))
            held = self.length - self._begin
            for old, larger in zip(buffers, grown, strict=True):
                larger[:, :, :held] = old[:, :, :held]
            self._layers[layer] = buffers = grown
        return buffers


def known(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The mask itself, or one that is True everywhere."""
    return torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask


def _roomy(held: tuple[Tensor, ...]) -> _Window:
    """A copy of the tokens held, with room for some more."""
    count = held[0].shape[2]
    buffers = tuple(_empty(held, count + max(SPARE, count)))
    for buffer, tensor in zip(buffers, held, strict=True):
        buffer[:, :, :count] = tensor
    return _Window(buffers, count, count)


def _empty(new: tuple[Tensor, ...], capacity: int) -> list[Tensor]:
    return [x.new_empty(x.shape[0], x.shape[1], capacity, x.shape[3]) for x in new]


def _check_kinds(buffers: "list[Tensor] | tuple[Tensor, ...]", new: tuple[Tensor, ...]) -> None:
    if (held := _kinds(buffers)) != (given := _kinds(new)):
        raise ValueError(
            f"this cache holds (batch, key heads, channels, dtype, device) = {held[0]}, got {given[0]}. "
            f"Use a new KVCache for another batch or model."
        )


def _inputs(x: Tensor) -> tuple[int | str, ...]:
    return (*x.shape, str(x.dtype), str(x.device))


def _kinds(tensors: "list[Tensor] | tuple[Tensor, ...]") -> list[tuple[int, int, int, str, str]]:
    return [(x.shape[0], x.shape[1], x.shape[3], str(x.dtype), str(x.device)) for x in tensors]
