"""Hugging Face checkpoint folders as decoders, and back; transformers is not needed.

A decoder remembers what it was read from (`Origin`), so that saving writes the same tensors under the same
names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.atomic import atomic_folder, readable_folder
from moe.checkpoint import CONFIG_NAME, keep_other_files, save_tensors
from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.json_files import read_json, write_json
from moe.ops.choose import Backend
from moe.tensor_files import StoredTensor, TensorReader, list_tensors

from .export import describe_as
from .families import decoder_config
from .fit import BLOCKS, EMBEDDING, HEAD, SCALES, check_places, find_places
from .mxfp4 import decode_mxfp4
from .router_table import FAMILIES as ROUTERS
from .router_table import Key
from .tensor_names import LAYER, NEVER_READ, Layout, Names, Place, family_names, their_names


@dataclass(frozen=True, slots=True)
class Origin:
    """What a decoder was read from.

    config   their config.json
    places   their tensors in the order of the files, and which part of ours each one is
    shapes   of those that are stored with axes of 1 more than ours
    dtypes   of those that we keep in another dtype
    empty    shapes of those without a number: a block that always has shared experts, of width 0
    """

    config: dict[str, Any]
    places: dict[str, Place]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    empty: dict[str, tuple[int, ...]] = field(default_factory=dict)


def load_decoder(
    folder: str | Path,
    *,
    backend: Backend = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """Read a Hugging Face folder, in evaluation mode; see `Decoder.from_pretrained`."""
    folder = readable_folder(folder)
    config_file = folder / CONFIG_NAME
    raw = read_json(config_file)
    try:
        config = decoder_config(raw)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    _check_quantisation(raw, config_file)
    with torch.device("meta"):
        decoder = Decoder(config, backend=backend)
    listed = list_tensors(folder)
    stored = _without_ignored(listed, raw)
    places = find_places(stored, decoder)
    check_places(stored, places, decoder, folder)
    tensors = _read(stored, places, decoder, device or "cpu", folder)
    decoder.load_state_dict(tensors, assign=True)
    empty = {key: tensor.shape for key, tensor in listed.items() if 0 in tensor.shape}
    decoder.origin = _origin(raw, stored, places, tensors, empty)
    return decoder.to(dtype).eval() if dtype else decoder.eval()


def save_decoder(
    folder: str | Path, decoder: Decoder, *, layout: Layout | None, max_shard_bytes: float
) -> None:
    """Write a Hugging Face folder; see `Decoder.save_pretrained`. layout None: as it was read."""
    origin = decoder.origin
    if origin is None or layout is not None:
        origin = describe(decoder, layout or "hub")
    state = decoder.state_dict()
    tensors = {key: _stored_form(key, state, origin) for key in origin.places}
    tensors |= {key: state[EMBEDDING].new_empty(shape) for key, shape in origin.empty.items()}
    with atomic_folder(folder) as temporary:
        keep_other_files(folder, temporary)
        write_json(temporary / CONFIG_NAME, _config_of_dtype(origin.config, state[EMBEDDING].dtype))
        save_tensors(temporary, tensors, max_shard_bytes=max_shard_bytes)


def describe(decoder: Decoder, layout: Layout) -> Origin:
    """How a decoder would stand in a folder of a Hugging Face architecture: its own, or one that fits.

    Raises:
        ValueError: an unknown layout, or no architecture computes what this decoder does.
    """
    if layout not in ("hub", "packed"):
        raise ValueError(f"layout={layout!r} must be 'hub' or 'packed'.")
    raw = describe_as(decoder.config) if decoder.origin is None else decoder.origin.config
    raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    names = family_names(raw["model_type"], layout)
    places: dict[str, Place] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    state = decoder.state_dict()
    for ours in state:
        for key, place in their_names(ours, names, decoder.config):
            places[key] = place
            if ours.endswith("e_score_correction_bias") and names.selection_bias_axes == 2:
                shapes[key] = (1, *state[ours].shape)
    return Origin(raw, places, shapes, empty=_empty_shared(raw, names, decoder.config))


def _empty_shared(raw: Mapping[str, Any], names: Names, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shared experts of width 0, for an architecture that has them always."""
    row = ROUTERS.get(raw["model_type"])
    if row is None or config.n_shared_experts or not isinstance(row.settings.get("n_shared_experts"), Key):
        return {}
    d, layers = config.hidden_size, filter(config.is_moe_layer, range(config.num_hidden_layers))
    shapes = {"gate_proj": (0, d), "up_proj": (0, d), "down_proj": (d, 0)}
    return {
        f"model.layers.{layer}.{names.block}.{names.shared}.{part}.weight": shape
        for layer in layers
        for part, shape in shapes.items()
    }


def _check_quantisation(raw: Mapping[str, Any], config_file: Path) -> None:
    method = (raw.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        raise ValueError(
            f"{config_file}: the weights are quantised with {method!r}, which is not decoded here (only "
            f"'mxfp4' is). Take a checkpoint in bfloat16."
        )


def _without_ignored(stored: Mapping[str, StoredTensor], raw: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Without what follows from the config, and without the layers that predict tokens further ahead."""
    layers = raw["num_hidden_layers"]
    ahead = range(layers, layers + (raw.get("num_nextn_predict_layers") or raw.get("num_mtp_layers") or 0))

    def is_read(key: str) -> bool:
        in_layer = LAYER.fullmatch(key)
        return (
            0 not in stored[key].shape
            and not NEVER_READ.fullmatch(key)
            and (in_layer is None or int(in_layer[1]) not in ahead)
        )

    return {key: tensor for key, tensor in stored.items() if is_read(key)}


def _read(
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, Place],
    decoder: Decoder,
    device: torch.device | str,
    folder: Path,
) -> dict[str, Tensor]:
    """Our tensors, filled one stored tensor at a time."""
    shapes = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    with TensorReader() as reader:
        for key, tensor in stored.items():
            place = places[key]
            if place.name not in tensors:
                dtype = torch.bfloat16 if key.endswith((BLOCKS, SCALES)) else tensor.dtype
                tensors[place.name] = torch.empty(shapes[place.name], dtype=dtype, device=device)
            target = place.view(tensors[place.name])
            if key.endswith(BLOCKS):
                _decode(reader, tensor, stored[key.removesuffix(BLOCKS) + SCALES], target)
            elif key == HEAD and place.name == EMBEDDING:
                _check_tied(reader, tensor, stored[EMBEDDING], folder)
            elif not key.endswith(SCALES):
                reader.fill(target, tensor)
    return tensors


def _check_tied(reader: TensorReader, head: StoredTensor, embedding: StoredTensor, folder: Path) -> None:
    if not torch.equal(reader.load(head), reader.load(embedding)):
        raise ValueError(
            f"{folder / CONFIG_NAME} says tie_word_embeddings=true, but {HEAD} and {EMBEDDING} differ. "
            f"Set it to false, or remove {HEAD}."
        )


def _decode(reader: TensorReader, blocks: StoredTensor, scales: StoredTensor, target: Tensor) -> None:
    """Expert by expert, from (outputs, inputs) into (inputs, outputs)."""
    for expert, into in enumerate(target):
        decoded = decode_mxfp4(reader.load(blocks[expert]), reader.load(scales[expert]), target.dtype)
        into.copy_(decoded.T)


def _origin(
    raw: dict[str, Any],
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, Place],
    tensors: Mapping[str, Tensor],
    empty: dict[str, tuple[int, ...]],
) -> Origin:
    """Packed 4-bit tensors are remembered under the names of what they hold."""
    kept = {key.removesuffix(BLOCKS): place for key, place in places.items() if not key.endswith(SCALES)}
    views = {key: place.view(tensors[place.name]) for key, place in kept.items()}
    plain = [key for key in kept if key in stored]
    shapes = {key: stored[key].shape for key in plain if stored[key].shape != tuple(views[key].shape)}
    dtypes = {
        key: views[key].dtype for key in plain if key.endswith("e_score_correction_bias")
    }  # the router keeps it in float32
    raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    return Origin(raw, kept, shapes, dtypes, empty)


def _stored_form(key: str, state: Mapping[str, Tensor], origin: Origin) -> Tensor:
    place = origin.places[key]
    tensor = place.view(state[place.name])
    if key == HEAD and place.name == EMBEDDING:
        tensor = tensor.clone()  # a file holds no tensor twice
    tensor = tensor.to(origin.dtypes.get(key, tensor.dtype))
    return tensor.reshape(origin.shapes.get(key, tensor.shape))


def _config_of_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return config | {key: str(dtype).removeprefix("torch.")}
