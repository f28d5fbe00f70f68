"""The safetensors of a folder: what they hold, and their tensors one after the other.

`NAME.safetensors`, or the shards that `NAME.safetensors.index.json` lists. Files are mapped into memory and
let go of again every so many bytes, so reading a model needs little more memory than the model. Only files
inside the folder are read.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.json_files import read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAPPED_BYTES = 64 << 20  # so much of a file is mapped at a time, or one tensor that is larger
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
    """One tensor of a file; `kind` is the name of its dtype in safetensors."""

    file: Path
    shape: tuple[int, ...]
    kind: str

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype it is read as; None for one that no model here has, such as 8-bit floats."""
        return DTYPES.get(self.kind)


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


def read_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in turn, as a view of its file on the CPU: copy what you keep before you take the next."""
    for file in dict.fromkeys(stored.file for stored in tensors.values()):
        keys = deque(key for key, stored in tensors.items() if stored.file == file)
        while keys:
            taken = 0
            with _open(file) as handle:
                while keys and taken < MAPPED_BYTES:
                    view = handle.get_tensor(keys[0])
                    taken += view.nbytes
                    yield keys.popleft(), view
                    del view


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
    with _open(path) as handle:
        keys = handle.offset_keys() if hasattr(handle, "offset_keys") else handle.keys()
        slices = {key: handle.get_slice(key) for key in keys}
        return {
            key: StoredTensor(path, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()
        }


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}). Copy or save it again."
        ) from error


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
