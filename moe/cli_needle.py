"""The command `sparse-moe needle`: trains a model that finds needles, measures it, draws the figure."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.probes.needle.evaluate import Questions
    from moe.probes.needle.record import NeedleRecord, NeedleRow

BAR = 30
UNITS = {"k": 2**10, "m": 2**20}
GRID = "16k,64k,256k,1M"


def length_of(text: str) -> int:
    """ "64k" as 65536, "1M" as 2^20, "5000" as it is."""
    unit = UNITS.get(text[-1:].lower(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal() or not int(digits):
        raise argparse.ArgumentTypeError(f"{text!r} is no length: give bytes, such as 65536, 64k or 1M.")
    return int(digits) * unit


def lengths_of(text: str) -> list[int]:
    """ "16k,64k" as [16384, 65536]."""
    return [length_of(part) for part in text.split(",") if part]
