"""A model as a folder: `config.json` and safetensors, in Hugging Face's layout, never half-written.

    config.json                       the keys of DecoderConfig, and "model_type": "sparse_moe"
    model.safetensors                 all tensors, or, above `max_shard_bytes`,
    model-00001-of-0000n.safetensors  their shards, and
    model.safetensors.index.json      which shard holds which tensor

Only safetensors and JSON are read, and only files that lie inside the folder. moe/atomic.py says how a
folder is replaced.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.atomic import atomic_folder, readable_folder, write_atomically
from moe.config import DecoderConfig

__all__ = [
    "atomic_folder",
    "check_tensors",
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
        FileNotFoundError: no folder, no weights in it, or a shard is missing.
        ValueError: a file that is truncated or not safetensors, an index that is not one, that points
            outside the folder or names tensors that its shards lack.
    """
    folder = readable_folder(folder)
    single = folder / f"{name}.safetensors"
    index = folder / f"{name}.safetensors.index.json"
    if single.exists() or single.is_symlink():
        return _load_file(folder, single.name)
    if not index.exists():
        raise FileNotFoundError(
            f"{folder} has no {single.name} and no {index.name}. Give a folder that save_pretrained wrote; "
            f"other weight formats (.bin, .pt) are not read, because they can run code."
        )
    weight_map = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        tensors |= {
            key: tensor for key, tensor in _load_file(folder, shard).items() if weight_map.get(key) == shard
        }
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise ValueError(f"{index} lists tensors that their files do not hold: {', '.join(absent)}.")
    return tensors


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str | Path) -> None:
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


def _shape(tensor: Tensor) -> str:
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


def _load_file(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / name
    if not path.resolve().is_relative_to(folder):
        raise ValueError(
            f"{name!r} leads outside the folder {folder}; only files inside it are read. "
            f"Put a copy of the file there."
        )
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: the folder is incomplete. Copy the whole folder again."
        ) from None
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}). Copy or save it again."
        ) from error


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f'{index} needs an object "weight_map" from tensor names to file names.')
    return weight_map


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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as indented JSON, ending in a newline."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: not UTF-8, not JSON, or JSON that is no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Copy or save it again.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}.")
    return data
