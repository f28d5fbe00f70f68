"""What a call asks for besides its tensors."""

from dataclasses import dataclass
from typing import Literal

from .activation import GATED


@dataclass(frozen=True, slots=True)
class Settings:
    """The non-linearity of the experts, where the routing weight goes, and whether the batch may matter."""

    activation: str
    interleaved: bool = False
    limit: float = 7.0
    alpha: float = 1.702
    weights_on_input: bool = False
    batch_invariant: bool = False

    @property
    def gate(self) -> Literal["none", "halves", "pairs"]:
        """How gate and up lie in the pre-activation: no gate, one after the other, or interleaved."""
        if self.activation not in GATED:
            return "none"
        return "pairs" if self.interleaved else "halves"
