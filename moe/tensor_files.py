"""The safetensors of a folder: what they hold, and their tensors one after the other.

`NAME.safetensors`, or the shards that `NAME.safetensors.index.json` lists. Tensors are read into the memory
of the model itself, so reading needs no memory besides. Only files inside the folder are read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from moe.json_files import read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, or a part of one: `kind` is its dtype in safetensors, `offset` its first byte."""

    file: Path
    shape: tuple[int, ...]
    kind: str
    offset: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype it is read as; None for one that no model here has, such as 8-bit floats."""
        return DTYPES.get(self.kind)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self._itemsize

    def __getitem__(self, index: int) -> "StoredTensor":
        """One entry of the first axis."""
        inner = replace(self, shape=self.shape[1:])
        return replace(inner, offset=self.offset + index * inner.nbytes)

    @property
    def _itemsize(self) -> int:
        if self.dtype is None:
            raise ValueError(f"tensors of {self.file} are {self.kind}, which is not read here.")
        return self.dtype.itemsize


class TensorReader:
    """Reads stored tensors straight into the memory where they stay, one file open at a time.

    Plain reads: to touch a page of a mapped file for the first time can cost more than to read it.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BufferedReader | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def load(self, stored: StoredTensor) -> Tensor:
        """A new tensor on the CPU."""
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.fill(tensor, stored)
        return tensor

    def fill(self, target: Tensor, stored: StoredTensor) -> None:
        """Read into a tensor with as many numbers, of any device, dtype and strides."""
        if target.device.type != "cpu" or target.dtype != stored.dtype or not target.is_contiguous():
            target.copy_(self.load(stored).view(target.shape))
        elif target.numel():
            memory = target.detach().reshape(-1).view(torch.uint8).numpy()
            if self._at(stored).readinto(memory.data) != memory.nbytes:
                raise ValueError(f"{stored.file} became shorter while it was read. Copy or save it again.")

    def _at(self, stored: StoredTensor) -> BufferedReader:
        if self._file is None or self._path != stored.file:
            self.__exit__()
            self._path, self._file = stored.file, stored.file.open("rb")
        self._file.seek(stored.offset)
        return self._file


def list_tensors(folder: Path, *, name: str = "model") -> dict[str, StoredTensor]:
    """Names, shapes and kinds of all tensors, file by file in the order in which they lie there.

    Raises:
        FileNotFoundError: no weights in the folder, or a shard is missing.
        ValueError: a file that is truncated or not safetensors, an index that is not one, that points outside
            the folder or that its shards contradict, a tensor that two shards hold.
    """
    single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    if single.exists() or single.is_symlink():
        return _list_file(inside(folder, single.name))
    if not index.exists():
        raise FileNotFoundError(_no_weights(folder, single.name, index.name))
    weight_map, found = read_weight_map(index), dict[str, StoredTensor]()
    for shard in sorted(set(weight_map.values())):
        for key, stored in _list_file(inside(folder, shard)).items():
            if key in found:
                raise ValueError(
                    f"{key} is in two files, {found[key].file.name} and {shard}. Copy the folder again."
                )
            found[key] = stored
    if absent := sorted(weight_map.keys() - found.keys()):
        raise ValueError(f"{index} lists tensors that their files do not hold: {', '.join(absent)}.")
    wrong = [key for key, shard in weight_map.items() if found[key].file.name != Path(shard).name]
    if wrong:
        raise ValueError(f"{index} says that {wrong[0]} is in {weight_map[wrong[0]]}, but it is not.")
    return found


def map_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Tensors as views of their files, on the CPU: bytes are read when they are touched."""
    files = {stored.file for stored in tensors.values()}
    mapped = {file: load_file(file) for file in files}
    return {key: mapped[stored.file][key] for key, stored in tensors.items()}


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder.

    Raises:
        ValueError: it leads outside.
        FileNotFoundError: there is none.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{name!r} leads outside the folder {folder}; only files inside it are read. "
            f"Put a copy of the file there."
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: the folder is incomplete. Copy the whole folder again.")
    return path


def read_weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, from an index.

    Raises:
        ValueError: not JSON, or not an index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f'{index} needs an object "weight_map" from tensor names to file names.')
    return weight_map


def _list_file(path: Path) -> dict[str, StoredTensor]:
    """By the file's header: the length of its JSON in 8 bytes, the JSON, then the tensors."""
    try:
        safe_open(path, framework="pt")  # the library looks whether lengths and offsets are sound
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}). Copy or save it again."
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {
        key: StoredTensor(path, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def _no_weights(folder: Path, single: str, index: str) -> str:
    files = folder.iterdir() if folder.is_dir() else ()
    if pickled := sorted(path.name for path in files if path.suffix in PICKLES):
        return (
            f"{folder} has no {single} and no {index}, only {', '.join(pickled[:3])}: such files are not "
            f"read, because they can run code. Save the model as safetensors where it comes from."
        )
    return (
        f"{folder} has no {single} and no {index}. Give a folder that save_pretrained wrote; "
        f"other weight formats (.bin, .pt) are not read, because they can run code."
    )
