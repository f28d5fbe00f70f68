"""The parts of a GGUF file: metadata under the names of the `gguf` package, then one tensor at a time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.hf.gguf_tensors import Piece

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {"MXFP4": "MOSTLY_MXFP4_MOE", "BF16": "MOSTLY_BF16", "F16": "MOSTLY_F16", "F32": "ALL_F32"}
ALWAYS_F32 = ("_norm.weight", ".bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "sinks.weight")
WRITTEN_AS = {"F32": np.float32, "F16": np.float16, "BF16": np.int16, "MXFP4": np.uint8}
FLOATS = (  # JSON may write 1.0 as 1
    "Attention.LAYERNORM_RMS_EPS",
    "Attention.SCALE",
    "LLM.EMBEDDING_SCALE",
    "LLM.RESIDUAL_SCALE",
    "LLM.LOGIT_SCALE",
    "LLM.EXPERT_WEIGHTS_SCALE",
)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One tensor of the file: its name there, how it is made, a name of `gguf.GGMLQuantizationType`."""

    name: str
    piece: Piece
    type: str

    @classmethod
    def of(cls, name: str, piece: Piece, dtype: torch.dtype | None) -> "Entry":
        """With the type that llama.cpp wants for it: float32 for what is small, else dtype, else as stored.

        Raises:
            ValueError: a stored dtype that has no place in the file.
        """
        if piece.is_mxfp4:
            return cls(name, piece, "MXFP4")
        stored = piece.sources[0].dtype
        if stored not in TYPES:
            raise ValueError(
                f"{piece.key} is {stored}, which is not exported. Save the model in bfloat16 first."
            )
        is_small = len(piece.shape) == 1 or name.endswith(ALWAYS_F32)
        return cls(name, piece, "F32" if is_small else TYPES[dtype or stored])


def add_settings(gguf: Any, writer: Any, values: Mapping[str, Any]) -> None:
    """Add metadata to a `gguf.GGUFWriter`: {"LLM.EXPERT_COUNT": 8} under the name of its architecture."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in values.items():
        section, key = name.split(".")
        kind = float if name in FLOATS else type(value)
        kinds[kind](getattr(getattr(gguf.Keys, section), key).format(arch=writer.arch), value)


def file_type(entries: Iterable[Entry]) -> str:
    """What most of the file is made of, a name of `gguf.LlamaFileType`: that of its narrowest tensor."""
    present = {entry.type for entry in entries}
    return next(name for kind, name in FILE_TYPES.items() if kind in present)


def write_tensors(gguf: Any, writer: Any, entries: Sequence[Entry]) -> None:
    """Write the whole file: the header, which names all tensors, then each tensor, made just before.

    Raises:
        ValueError: a number that float16 has no room for.
    """
    for entry in entries:
        shape, written = entry.piece.shape, np.dtype(WRITTEN_AS[entry.type])
        kind = gguf.GGMLQuantizationType[entry.type]
        writer.add_tensor_info(entry.name, shape, written, prod(shape) * written.itemsize, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_encode(entry))
    finally:
        writer.close()


def _encode(entry: Entry) -> NDArray[Any]:
    tensor = entry.piece.build()
    if entry.type == "F32":
        tensor = tensor.float()
    elif entry.type == "BF16":
        tensor = tensor.bfloat16().view(torch.int16)
    elif entry.type == "F16":
        tensor = _half(tensor, entry.piece.key)
    return tensor.contiguous().numpy()


def _half(tensor: Tensor, key: str) -> Tensor:
    half = tensor.half()
    if half.isinf().any() and not tensor.isinf().any():
        raise ValueError(
            f"{key} goes up to {tensor.abs().max():.3g}, too large for float16: at most 65504. "
            f"Export with dtype=torch.bfloat16."
        )
    return half
