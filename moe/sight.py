"""Where the new tokens of a forward pass are, and what they may see.

Axes as in moe.attention. One pass makes one `Sight` for each reach, which all layers of that reach share.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from moe.kv_cache import KVCache, known
from moe.places import At, places_of, select


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """Where the new tokens are and what they may see.

    positions  (b s) or (1 s) int64: a token's place among the real tokens of its row
    allowed    (b 1 s l) bool: which keys a query may see; None: each sees the keys up to its own, where the
               queries are the last of the l places, at most `window` of them
    places     (b m) int64: of queries that are some of the tokens, rising; None: they are the last ones
    """

    positions: Tensor
    allowed: Tensor | None = None
    window: int | None = None
    places: Tensor | None = None

    @classmethod
    def causal(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        mask: Tensor | None,
        cache: KVCache | None,
        window: int | None = None,
    ) -> Self:
        """Every real token sees itself and the real tokens before it, cached or new, within the window.

        `shape` is (b s); `mask` (b s) bool is True at real tokens, None when all are. A padding token also
        sees itself, so that no row of the softmax is empty; no real token sees a padding token. The window
        counts places, padding included, as Hugging Face does.

        Raises:
            ValueError: the cache holds padding of another batch.
        """
        s = shape[1]
        past = 0 if cache is None else cache.length
        seen = None if cache is None else cache.seen
        if mask is None and seen is None:
            return cls(torch.arange(past, past + s, device=device)[None], None, window)
        if seen is not None and len(seen) != shape[0]:
            raise ValueError(f"this cache holds a batch of {len(seen)}, got {shape[0]}. Use a new KVCache.")
        real = known(mask, shape, device)
        before = known(seen, (shape[0], past), device)
        positions = (before.sum(1, keepdim=True) + real.cumsum(1) - 1).clamp(min=0)
        held = past if window is None else min(past, window - 1)  # what a layer of this reach keeps
        keys = rearrange(torch.cat([before[:, past - held :], real], dim=1), "b l -> b 1 1 l")
        itself = torch.eye(s, dtype=torch.bool, device=device)
        itself = F.pad(itself, (held, 0))
        return cls(positions, keys & reach(s, held + s, window, device) | itself, window)

    def narrowed(self, at: At) -> "Sight":
        """The sight of some of the new tokens; a tensor of places needs a pass without a cache."""
        if at is None:
            return self
        positions = select(self.positions, at)
        if isinstance(at, int):
            allowed = self.allowed
            if allowed is not None:
                allowed = allowed[:, :, max(allowed.shape[2] - at, 0) :]
            return replace(self, positions=positions, allowed=allowed)
        allowed = places_of(at, self.positions.shape[1], self.window)
        if self.allowed is not None:
            allowed = rearrange(select(self.allowed[:, 0], at), "b m l -> b 1 m l")
        return replace(self, positions=positions, allowed=allowed, places=at)


def reach(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(s l) bool: the last query sees all keys, or the last `window`; every earlier one a key less."""
    lower = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return lower if window is None else lower.triu(keys - queries - window + 1)
