"""What a decoder is trained on to find needles of every sense; plain data, a part of a run's settings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from moe.config import did_you_mean
from moe.modality_config import Modality
from moe.probes.needle.needles import KEY_LETTERS, RANDOM_TEMPLATES

NAMES: dict[str, Modality] = {modality.name.lower(): modality for modality in Modality}
TEMPLATE = RANDOM_TEMPLATES["key_value"]  # text stands around every value, and asks for it
VALUE_DIGITS = 4
FRAMES = 3  # tokens that show one digit, but for text, and for recorded speech


@dataclass(frozen=True, kw_only=True, slots=True)
class SensesConfig:
    """The training sequences and the weights of their losses.

    Raises:
        ValueError: a modality that does not exist, or a share, a count or a weight out of range.
    """

    modalities: tuple[str, ...] = tuple(NAMES)  # of the needles; the filler has all of them
    near_duplicate_keys: float = 0.7  # of the keys: an earlier key with one letter changed
    near_duplicate_values: float = 0.5  # of the values: one of the last 20 with one digit changed
    needle_share: float = 0.75  # of the tokens of a sequence: needles, queries and answers
    predicted_share: float = 0.3  # of the places of a sequence: predicted; all answers, and others
    reading_share: float = 0.6  # of those others, at most: digits to be read where they stand
    short_length: int = 512  # tokens of a sequence in the first part of the run
    short_fraction: float = 0.2  # of the steps: that first part
    text_loss: float = 0.5  # weight of the next byte of other text; answers have weight 1
    reading_loss: float = 0.3  # weight of the name of a digit, at each of its frames
    pointer_loss: float = 0.5  # weight of the attention on the frames to copy; 0 switches it off
    image_copies: int = 30  # random affine copies of each training image
    speech_folder: str | None = None  # recordings of spoken digits; None: keypad tones, which are synthetic
    speech_frames: int = 6  # tokens that show a spoken digit

    def __post_init__(self) -> None:
        check_modalities(self.modalities, "senses.modalities")
        for field in fields(self):
            value, name = getattr(self, field.name), f"senses.{field.name}"
            is_weight = field.name in ("text_loss", "reading_loss", "pointer_loss")
            if is_weight and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} is the weight of a loss: give a number from 0.")
            if field.type is float and not is_weight and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is a share: give a number from 0 to 1.")
            if field.type is int and value < (0 if field.name == "image_copies" else 1):
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 < self.needle_share < 1:
            raise ValueError(
                f"senses.needle_share={self.needle_share} must be between 0 and 1: "
                f"a sequence has needles and filler. Set senses.needle_share=0.75."
            )
        if self.short_fraction and self.short_length < self.least_length:
            raise ValueError(
                f"senses.short_length={self.short_length} must be at least {self.least_length}: the longest "
                f"needle and its query have to fit into senses.needle_share={self.needle_share} of it, and "
                f"its answer into senses.predicted_share={self.predicted_share} of its places. Raise it, or "
                f"set senses.short_fraction=0 for no short sequences."
            )

    def frames(self, modality: Modality) -> int:
        """Tokens that show one digit."""
        if modality is Modality.TEXT:
            return 1
        return self.speech_frames if modality is Modality.AUDIO and self.speech_folder else FRAMES

    @property
    def least_length(self) -> int:
        """Tokens of the shortest sequence that has an answer whatever is drawn."""
        most = max(pair_tokens(KEY_LETTERS[1], self.frames(NAMES[name])) for name in self.modalities)
        return max(math.ceil(most / self.needle_share), math.ceil(VALUE_DIGITS / self.predicted_share))

    def predicted(self, length: int) -> int:
        """How many places of a sequence are predicted."""
        return round(self.predicted_share * length)

    def shape(self, step: int, steps: int, *, length: int, batch: int) -> tuple[int, int]:
        """Length and number of the sequences of a step, counted from 0, of a run of `steps`.

        `length` and `batch` are those of the run; the short sequences of the first part are as many as
        their tokens fit into it, at least one.
        """
        if step >= self.short_fraction * steps or length <= self.short_length:
            return length, batch
        return self.short_length, max(1, length * batch // self.short_length)


def pair_tokens(key: int, frames: int) -> int:
    """Tokens of a needle, its query and the closed answer, with a key of so many letters."""
    own = sum(map(len, (*TEMPLATE.needle, *TEMPLATE.query, TEMPLATE.close)))
    return own + 2 * key + VALUE_DIGITS * (frames + 1)


def check_modalities(names: Sequence[str], what: str) -> None:
    """Refuse names that are no different modalities.

    Raises:
        ValueError: says which.
    """
    if not names:
        raise ValueError(f"{what} is empty: choose at least one of {list(NAMES)}.")
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"{what} has no {name!r}; there are {list(NAMES)}.{did_you_mean(name, list(NAMES))}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"{what}={list(names)} names one twice. Name each once.")
