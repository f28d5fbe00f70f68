"""Whether the tensors of a checkpoint are those of a decoder, each one once; what does not fit is named."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint import CONFIG_NAME
from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.tensor_files import StoredTensor

from .tensor_names import LAYER, Place, find_place

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BLOCKS, SCALES = "_blocks", "_scales"  # what MXFP4 makes of one tensor


def find_places(stored: Iterable[str], decoder: Decoder) -> dict[str, Place]:
    """Our place of each stored tensor; without those that have none."""
    places: dict[str, Place] = {}
    for key in stored:
        place = find_place(key.removesuffix(BLOCKS).removesuffix(SCALES))
        if place is not None and place.name == HEAD and decoder.lm_head is None:
            place = Place(EMBEDDING)  # tied, and stored all the same
        if place is not None:
            places[key] = place
    return places


def check_places(
    stored: Mapping[str, StoredTensor], places: Mapping[str, Place], decoder: Decoder, folder: Path
) -> None:
    """Refuse a checkpoint unless its tensors are ours, each one once.

    Raises:
        ValueError: everything that does not fit, in one message.
    """
    state = decoder.state_dict()  # on the meta device: shapes
    problems = _contradictions(stored, places, decoder.config)
    taken: dict[Place, str] = {}
    kinds: dict[str, str] = {}
    for key, tensor in stored.items():
        place = places.get(key)
        if place is None or place.name not in state or not _exists(place, state[place.name], decoder.config):
            problems.append(f"unexpected: {key} {_shape(tensor.shape)}")
        elif place in taken and not key.endswith(SCALES) and place.name != EMBEDDING:
            problems.append(f"twice: {taken[place]} and {key} are the same tensor of the model")
        else:
            problems += _wrong_form(key, tensor, place.view(state[place.name]))
            taken[place] = key
            if kinds.setdefault(place.name, tensor.kind) != tensor.kind:
                problems.append(f"two dtypes: {key} is {tensor.kind}, others of it are {kinds[place.name]}")
    problems += [f"missing: {place}" for place in _missing(taken, state)]
    problems += [f"missing: {key}" for key in _other_halves(stored) if key not in stored]
    if problems:
        listing = "\n  ".join(problems[:50])
        more = f"\n  and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise ValueError(f"the tensors in {folder} do not fit its {CONFIG_NAME}:\n  {listing}{more}")


def _other_halves(stored: Iterable[str]) -> list[str]:
    """Of 4-bit tensors: the scales of the blocks that are there, and the blocks of the scales."""
    scales = [key.removesuffix(BLOCKS) + SCALES for key in stored if key.endswith(BLOCKS)]
    return scales + [key.removesuffix(SCALES) + BLOCKS for key in stored if key.endswith(SCALES)]


def _exists(place: Place, tensor: Tensor, config: DecoderConfig) -> bool:
    if place.expert is None:
        return True
    one_by_one = config.is_concatenated and not config.is_transposed
    return one_by_one and tensor.dim() == 3 and place.expert < len(tensor)


def _wrong_form(key: str, tensor: StoredTensor, view: Tensor) -> list[str]:
    if key.endswith((BLOCKS, SCALES)):
        e, inputs, outputs = view.shape
        shape = (e, outputs, inputs // 32, 16)[: 4 if key.endswith(BLOCKS) else 3]
        fits = tensor.dtype == torch.uint8 and tensor.shape == shape and inputs % 32 == 0
        what = f"{tensor.kind} {_shape(tensor.shape)}, not U8 {_shape(shape)}"
        return [] if fits else [f"not MXFP4: {key} is {what}"]
    if tensor.dtype not in FLOATS:
        return [f"not decoded: {key} is {tensor.kind}; weights must be F64, F32, F16 or BF16"]
    if tensor.shape not in (tuple(view.shape), (1, *view.shape)):
        return [f"wrong shape: {key} is {_shape(tensor.shape)}, the model has {_shape(view.shape)}"]
    return []


def _contradictions(
    stored: Mapping[str, StoredTensor], places: Mapping[str, Place], config: DecoderConfig
) -> list[str]:
    """Numbers of the config that the tensors contradict, before the many tensors that follow from it."""
    layers = {int(found[1]) for key in stored if (found := LAYER.fullmatch(key)) is not None}
    found = {"num_hidden_layers": 1 + max(layers, default=-1)}
    if EMBEDDING in stored and len(stored[EMBEDDING].shape) == 2:
        found["vocab_size"], found["hidden_size"] = stored[EMBEDDING].shape
    experts = {place.expert for place in places.values() if place.expert is not None}
    fused = [
        stored[key].shape[0] for key, place in places.items() if place.name.endswith("experts.down_proj")
    ]
    if config.num_experts and (experts or fused):
        found["num_experts"] = 1 + max(experts) if experts else fused[0]
    return [
        f"{name} is {getattr(config, name)} in {CONFIG_NAME}, but {number} by the tensors"
        for name, number in found.items()
        if number != getattr(config, name)
    ]


def _missing(taken: Mapping[Place, str], state: Mapping[str, Tensor]) -> list[str]:
    """Names of our tensors, or parts of them, that nothing fills."""
    filled: dict[str, set[tuple[int | None, int | None]]] = {}
    for place in taken:
        filled.setdefault(place.name, set()).add((place.expert, place.half))
    missing: list[str] = []
    for name, tensor in state.items():
        parts = filled.get(name, set())
        if (None, None) in parts:
            continue
        if not parts:
            missing.append(f"{name} {_shape(tensor.shape)}")
            continue
        halves = (0, 1) if name.endswith("gate_up_proj") else (None,)
        words = {0: " gate_proj", 1: " up_proj", None: ""}
        missing += [
            f"{name} of expert {expert}{words[half]}"
            for expert in range(len(tensor))
            for half in halves
            if (expert, half) not in parts
        ]
    return missing


def _shape(shape: Iterable[int]) -> str:
    return f"({' '.join(map(str, shape))})"
