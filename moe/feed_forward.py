"""The dense feed-forward that every token runs: a decoder's dense layers and the shared experts."""

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Linear):
    """A linear layer, by default without bias, drawn once from N(0, std²); a bias starts at 0."""

    def __init__(self, inputs: int, outputs: int, *, std: float, bias: bool = False) -> None:
        self.std = std  # reset_parameters, which nn.Linear calls, reads it
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (2002.05202), of width h; down is drawn with `output_std`."""

    def __init__(self, d: int, h: int, *, std: float, output_std: float, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Projection(d, h, std=std, bias=bias)
        self.up_proj = Projection(d, h, std=std, bias=bias)
        self.down_proj = Projection(h, d, std=output_std, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (... d) -> (... d)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
