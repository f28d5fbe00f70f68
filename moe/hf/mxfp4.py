"""MXFP4, in which gpt-oss stores its experts: 4-bit floats, a scale for every 32 (OCP Microscaling 1.0)."""

import torch
from einops import rearrange
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1 without its sign, which is the highest of 4 bits
EXPONENT_BIAS = 127


def decode_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """blocks (... groups 16) uint8, two numbers a byte, low half first; scales (... groups) uint8 -> (... n).

    Exact in bfloat16 and wider while 2^scale is in range.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"MXFP4 needs uint8 blocks (... groups bytes) and uint8 scales (... groups); got "
            f"{tuple(blocks.shape)} of {blocks.dtype} and {tuple(scales.shape)} of {scales.dtype}."
        )
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=dtype, device=blocks.device)
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1)
    numbers = table[rearrange(pairs, "... bytes two -> ... (bytes two)").int()]
    exponents = scales.int() - EXPONENT_BIAS
    return rearrange(torch.ldexp(numbers, exponents[..., None]), "... groups n -> ... (groups n)")
