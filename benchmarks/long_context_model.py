"""The decoders that long texts are read with, what is read, what is asked, and how operations are counted.

T tokens of a text, n query heads, c channels of a head.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.prefill import CHUNK
from moe.probes.needle.haystack import Question
from moe.probes.needle.haystack_text import find_text
from moe.probes.needle.needles import KEY_LETTERS, TEMPLATES, draw_needles
from moe.train.overrides import find_preset
from moe.train.runs import open_run
from moe.train.settings import RunConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHUNK_ON_GPU = 1 << 15  # tokens at a time: a GPU that gets fewer waits for its launches
_UNITS = {"k": 2**10, "M": 2**20}
_DECIMAL = 10  # from so many M on, an M is a million, as in the tables of moe.probes.needle


def settings_of(folder: Path | None) -> RunConfig:
    """The settings of a run, or those of the preset `needle`."""
    if folder is None:
        return find_preset("needle")
    from moe.train.run_folder import RunFolder

    return RunFolder(folder).read_config()


def make_decoder(
    config: DecoderConfig, device: torch.device, folder: Path | None = None, seed: int = 0
) -> Decoder:
    """The newest checkpoint of a run, or random weights of this shape: they cost the same time."""
    if folder is not None:
        return open_run(folder, device=str(device)).model
    torch.manual_seed(seed)
    return Decoder(config).to(device).eval()


def strict_config(config: DecoderConfig) -> DecoderConfig:
    """The same widths with the full layer in the middle, LLGL: no exit before it, so every pair counts.

    A pattern whose full layers are not the last one alone stays as it is.
    """
    if sees_all_pairs(config):
        return config
    return replace(
        config,
        num_hidden_layers=4,
        layer_types="LLGL",
        no_rope_layers=(1, 1, 0, 1),
        canon_set=("AC", "AC", "AB", "A"),
    )


def sees_all_pairs(config: DecoderConfig) -> bool:
    """Whether a layer before the last one sees everything."""
    return any(config.window(layer) is None for layer in range(config.num_hidden_layers - 1))


def all_pairs_flops(config: DecoderConfig, tokens: int, *, every_place: bool = False) -> float:
    """Operations of the attention of all places to all before them: 2 T² n c a layer, exact but for 1 / T.

    T² / 2 pairs of a query and a key; 2 c for the product of both and 2 c for the sum of the values; n heads.
    Counted are layers that see everything and of which all places are computed: without `every_place`, a
    prefill leaves the last layer. What is linear in T (windows, projections, experts) is not counted.
    """
    layers = range(config.num_hidden_layers - (0 if every_place else 1))
    full = sum(config.window(layer) is None for layer in layers)
    return 2.0 * tokens**2 * config.num_attention_heads * config.head_size * full


def read_text(folder: Path | None, tokens: int) -> Tensor:
    """The first `tokens` bytes (1 T) uint8 of a folder's text, repeated where it is too short: for speed."""
    return torch.from_numpy(find_text(folder, bytes_needed=tokens, seed=0, repeat=True).text.copy())[None]


def make_questions(count: int) -> tuple[Question, ...]:
    """Questions of one length, so that as many as wanted share a read."""
    template = TEMPLATES["key_value"]
    rng = np.random.default_rng(0)
    facts = draw_needles(rng, 20 * count, near_duplicate_keys=0.0, near_duplicate_values=0.0)
    chosen = [fact for fact in facts if len(fact.key) == KEY_LETTERS[0]][:count]
    return tuple(Question(template.ask(fact.key), fact.value, 0.0, template.name, 0) for fact in chosen)


def chunk_of(device: torch.device) -> int:
    """Tokens that a prefill reads at a time."""
    return CHUNK_ON_GPU if device.type == "cuda" else CHUNK


def length_of(text: str) -> int:
    """ "64k" is 65536, "1M" is 2^20, "10M" is 10^7, "5000" is itself: as lengths are written in tables."""
    letter = text[-1:] if text[-1:] in _UNITS else ""
    digits = text.removesuffix(letter)
    if not digits.isdecimal() or not int(digits):
        raise argparse.ArgumentTypeError(f"{text!r} is no length: give tokens, such as 65536, 64k or 1M.")
    number = int(digits)
    if letter == "M" and number >= _DECIMAL:
        return number * 10**6
    return number * _UNITS.get(letter, 1)


def lengths_of(text: str) -> tuple[int, ...]:
    """ "16k,64k" as (16384, 65536), in rising order."""
    return tuple(sorted({length_of(part) for part in text.split(",")}))
