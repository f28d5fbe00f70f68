"""What a decoder is trained on to find needles; plain data, a part of a run's configuration."""

import math
from dataclasses import dataclass

from moe.config import did_you_mean
from moe.probes.needle.needles import TEMPLATES


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleConfig:
    """The training sequences and the weights of their losses.

    Raises:
        ValueError: a template that does not exist, or a share, a weight or a length out of range.
    """

    share: float = 1.0  # of the steps, beside the shares of a run's other tasks
    templates: tuple[str, ...] = ("key_value", "sentence")
    near_duplicate_keys: float = 0.3  # of the keys: an earlier key with one letter changed
    near_duplicate_values: float = 0.5  # of the values: one of the last 20 with one digit changed
    needle_share: float = 0.75  # of the bytes of a sequence: needles, queries and answers; the rest is text
    text_sequences: float = 0.0  # of the sequences: text alone, passages from all over the corpus
    text_share: float = 0.1  # of the places that are no answers: predicted as well
    short_length: int = 512  # bytes of a sequence in the first part of the run
    short_fraction: float = 0.05  # of the steps: that first part
    text_loss: float = 0.5  # weight of the places that are no answers; answers have weight 1
    pointer_loss: float = 0.5  # weight of the attention on the byte to copy; 0 switches it off

    def __post_init__(self) -> None:
        self._check_templates()
        for name in (
            "near_duplicate_keys",
            "near_duplicate_values",
            "text_sequences",
            "text_share",
            "short_fraction",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"needle.{name}={getattr(self, name)} is a share: give a number from 0 to 1."
                )
        if not 0 < self.needle_share < 1:
            raise ValueError(
                f"needle.needle_share={self.needle_share} must be between 0 and 1: "
                f"a sequence has needles and text. Set needle.needle_share=0.75."
            )
        for name in ("text_loss", "pointer_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"needle.{name}={getattr(self, name)} is the weight of a loss: "
                    f"give a number from 0, which switches it off."
                )
        if self.short_fraction and self.short_length < self.least_length:
            raise ValueError(
                f"needle.short_length={self.short_length} must be at least {self.least_length}: the longest "
                f"needle and its query have to fit into needle.needle_share={self.needle_share} of it. "
                f"Raise it, or set needle.short_fraction=0 for no short sequences."
            )

    @property
    def least_length(self) -> int:
        """Bytes of the shortest sequence that has an answer whatever is drawn."""
        longest = max(TEMPLATES[name].most_pair_bytes for name in self.templates)
        return math.ceil(longest / self.needle_share)

    def shape(self, step: int, steps: int, *, length: int, batch: int) -> tuple[int, int]:
        """Length and number of the sequences of a step, counted from 0, of a run of `steps`.

        `length` and `batch` are those of the run; the short sequences of the first part are as many as
        their bytes fit into it, at least one.
        """
        if step >= self.short_fraction * steps or length <= self.short_length:
            return length, batch
        return self.short_length, max(1, length * batch // self.short_length)

    def _check_templates(self) -> None:
        if not self.templates:
            raise ValueError(
                f"needle.templates is empty: needles have to be written somehow. "
                f"Choose at least one of {list(TEMPLATES)}."
            )
        for name in self.templates:
            if name not in TEMPLATES:
                raise ValueError(
                    f"needle.templates has no {name!r}; there are {list(TEMPLATES)}."
                    f"{did_you_mean(name, list(TEMPLATES))}"
                )
        if len(set(self.templates)) < len(self.templates):
            raise ValueError(f"needle.templates={list(self.templates)} names one twice. Name each once.")
