"""A model as a folder: `config.json` and safetensors, in Hugging Face's layout, never half-written.

    config.json                       the keys of DecoderConfig, and "model_type": "sparse_moe"
    model.safetensors                 all tensors, or, above `max_shard_bytes`,
    model-00001-of-0000n.safetensors  their shards, and
    model.safetensors.index.json      which shard holds which tensor

Only safetensors and JSON are read, and only files that lie inside the folder. moe/atomic.py says how a
folder is replaced.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moe.atomic import atomic_folder, readable_folder, write_atomically
from moe.decoder_config import DecoderConfig
from moe.json_files import read_json, write_json
from moe.tensor_files import StoredTensor, list_tensors, map_tensors

__all__ = [
    "atomic_folder",
    "check_tensors",
    "is_foreign",
    "keep_other_files",
    "load_config",
    "load_tensors",
    "read_json",
    "readable_folder",
    "save_config",
    "save_tensors",
    "write_atomically",
    "write_json",
]

MODEL_TYPE = "sparse_moe"
CONFIG_NAME = "config.json"
MAX_SHARD_BYTES = 5_000_000_000

_MODEL_FILE = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    name: str = "model",
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> None:
    """Write `NAME.safetensors`, or shards and their index when there are more than `max_shard_bytes`.

    A shard holds whole tensors in the order given; a tensor larger than `max_shard_bytes` has its own.
    Use inside `atomic_folder`: alone, a kill leaves half a file.

    Raises:
        ValueError: `max_shard_bytes` below 1.
    """
    shards = _split(tensors, max_shard_bytes)
    if len(shards) <= 1:
        _save_file(folder / f"{name}.safetensors", tensors)
        return
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        shard = f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_file(folder / shard, {key: tensors[key] for key in keys})
        weight_map |= dict.fromkeys(keys, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{name}.safetensors.index.json", index)


def load_tensors(folder: str | Path, *, name: str = "model") -> dict[str, Tensor]:
    """The tensors of `NAME.safetensors` or of the shards in `NAME.safetensors.index.json`, on the CPU.

    They are views of the files until copied. The inverse of `save_tensors`.

    Raises:
        FileNotFoundError, ValueError: as `moe.tensor_files.list_tensors`; or no folder.
    """
    return map_tensors(list_tensors(readable_folder(folder), name=name))


def check_tensors(
    found: Mapping[str, StoredTensor | Tensor], expected: Mapping[str, Tensor], where: str | Path
) -> None:
    """Refuse `found` unless it has exactly the names and shapes of `expected`.

    Raises:
        ValueError: all missing, unexpected and wrong-shape tensors, in one message.
    """
    problems = [f"missing: {key} {_shape(expected[key])}" for key in expected if key not in found]
    problems += [f"unexpected: {key} {_shape(found[key])}" for key in found if key not in expected]
    problems += [
        f"wrong shape: {key} is {_shape(found[key])}, the model has {_shape(expected[key])}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"the tensors in {where} do not fit the model of its {CONFIG_NAME}:\n  {listing}")


def _shape(tensor: Tensor | StoredTensor) -> str:
    return f"({' '.join(map(str, tensor.shape))})"


def _split(tensors: Mapping[str, Tensor], max_shard_bytes: float) -> list[list[str]]:
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1.")
    shards: list[list[str]] = []
    room = 0.0
    for key, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(key)
        room -= tensor.nbytes
    return shards


def _save_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors leaves 0600, unreadable to the group


def save_config(folder: Path, config: DecoderConfig) -> None:
    """Write `config.json`."""
    write_json(folder / CONFIG_NAME, {"model_type": MODEL_TYPE, **config.to_dict()})


def load_config(folder: str | Path) -> DecoderConfig:
    """Read `config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not JSON, another model's, an unknown key (with a suggestion) or a value that is refused.
    """
    path = readable_folder(folder) / CONFIG_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a folder that save_pretrained wrote.")
    data = read_json(path)
    model_type = data.pop("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE:
        raise ValueError(f'{path} has model_type={model_type!r}; this loads "{MODEL_TYPE}" only.')
    try:
        return DecoderConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_foreign(folder: str | Path) -> bool:
    """Whether `config.json` is of another library's model: it names a `model_type` that is not ours."""
    path = readable_folder(folder) / CONFIG_NAME
    return path.exists() and read_json(path).get("model_type", MODEL_TYPE) != MODEL_TYPE


def keep_other_files(old: str | Path, new: Path) -> None:
    """Bring the files of `old` that are no part of a saved model (a tokenizer, a README) along into `new`.

    They are hard links where the disk has them, else copies.

    Raises:
        ValueError: `old` holds subfolders: saving a model there is likely a mistake.
    """
    old = Path(old)
    if not old.is_dir():
        return
    subfolders = sorted(path.name for path in old.iterdir() if path.is_dir())
    if subfolders:
        raise ValueError(
            f"{old} holds subfolders ({', '.join(subfolders)}); a model is saved into a folder of its own. "
            f"Give a new or an empty one."
        )
    for path in old.iterdir():
        if not _MODEL_FILE.fullmatch(path.name) and not (new / path.name).exists():
            _link(path, new / path.name)


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)
