"""Short causal convolutions: each channel takes a little of the tokens just before.

Axes: b batch, s new tokens, d channels, w taps.
"""

import torch
from torch import Tensor, nn

from moe.kv_cache import KVCache

INITIAL_STD = 0.1  # small beside the 1 of the residual


class ShortConv(nn.Module):
    """y_t = x_t + sum over i < w of weight_i * x_(t - i), channel by channel: a Canon layer (2512.17351).

    weight  (w d); tap 0 is the token itself, drawn from N(0, INITIAL_STD²)

    Tokens before the first are 0, and so is padding. `name` is where a cache keeps the last w - 1 tokens.
    """

    def __init__(self, channels: int, taps: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(taps, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the taps anew."""
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def shift_(self) -> None:
        """Make each token, up to the noise of the taps, the one before it (key shift; 2411.19574)."""
        with torch.no_grad():
            self.weight[0] -= 1
            self.weight[1] += 1

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """x (b s d), mask (b s) True at real tokens -> (b s d)."""
        before = len(self.weight) - 1
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        held = x.new_zeros(x.shape[0], before, x.shape[2])
        if cache is not None:
            held = cache.recent(self.name, x, held, mask)
        padded = torch.cat([held, x], dim=1)
        y = x
        for tap, weight in enumerate(self.weight.to(x.dtype)):
            start = before - tap
            y = torch.addcmul(y, padded[:, start : start + x.shape[1]], weight)
        return y

    def extra_repr(self) -> str:
        """Channels and taps."""
        return f"{self.weight.shape[1]}, taps={self.weight.shape[0]}"
