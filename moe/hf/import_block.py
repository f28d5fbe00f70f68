"""From the tensors of a Hugging Face MoE block to a `moe.MoE`: checks, and no copies."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe.config import MoEConfig, did_you_mean
from moe.layer import MoE
from moe.ops.choose import Backend

from .blocks import BLOCKS, Block
from .router_table import FAMILIES
from .routers import moe_settings

Layer = TypeVar("Layer", bound=MoE)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What a router module remembers of its config, by our names; someone may have changed it since
REMEMBERED = {
    "top_k": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
}


def import_block(
    cls: type[Layer], block: nn.Module, *, backend: Backend = "auto", config: Mapping[str, Any] | None = None
) -> Layer:
    """`moe.MoE.from_hf`: a layer that holds the block's own Parameters."""
    row = row_of(block)
    layer = _empty_layer(cls, _settings(block, row, config), backend)
    taken: set[int] = set()
    for name, ours in tensors_of(layer).items():
        place = row.place_of(name)
        theirs = _find(block, place)
        _check_tensor(type(block).__name__, place, theirs, ours)
        _put(layer, name, theirs)
        taken.add(id(theirs))
    left = [name for name, tensor in tensors_of(block).items() if id(tensor) not in taken]
    if left:
        raise ValueError(f"{type(block).__name__} has tensors that moe.MoE has no place for: {left}.")
    return layer.train(block.training)


def row_of(block: nn.Module) -> Block:
    """The row of a block's class.

    Raises:
        ValueError: no MoE block, or one of an unsupported family (with the nearest supported one).
    """
    name = type(block).__name__
    if name in BLOCKS:
        return BLOCKS[name]
    if not looks_like_moe(block):
        raise ValueError(f"{name} is no MoE block: it has no router beside its experts.")
    raise ValueError(f"{name} is not a supported MoE block.{did_you_mean(name, list(BLOCKS))}")


def looks_like_moe(block: nn.Module) -> bool:
    """Whether this is a MoE block of a family that is not in the table."""
    children = dict(block.named_children())
    is_known = isinstance(block, MoE) or type(block).__name__ in BLOCKS
    return not is_known and "experts" in children and ("gate" in children or "router" in children)


def _settings(block: nn.Module, row: Block, config: Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        held = [getattr(module, "config", None) for module in block.modules()]
        held = [config for config in held if config is not None]
        if not held:
            raise ValueError(f"{type(block).__name__} holds no config; give config=model.config.to_dict().")
        config = held[0].to_dict()
    assert config is not None
    model_type = config.get("model_type")
    if FAMILIES.get(str(model_type)) is not FAMILIES[row.model_type] and "text_config" in config:
        return _settings(block, row, config["text_config"])
    if FAMILIES.get(str(model_type)) is not FAMILIES[row.model_type]:
        raise ValueError(
            f"{type(block).__name__} is of {row.model_type!r}, but its config says model_type={model_type!r}."
        )
    settings = moe_settings(config)
    router = block.get_submodule(row.router)
    for attribute, ours in REMEMBERED.items():
        value = getattr(router, attribute, None)
        if value is not None and ours in settings and settings[ours] != value:
            raise ValueError(
                f"the config says {ours}={settings[ours]}, but {row.router}.{attribute} is {value}. "
                f"Make them agree."
            )
    return settings


def _empty_layer(cls: type[Layer], settings: dict[str, Any], backend: Backend) -> Layer:
    with torch.device("meta"):
        return cls(MoEConfig(**settings), backend=backend)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _find(block: nn.Module, place: str) -> Tensor:
    tensor = tensors_of(block).get(place)
    if tensor is None:
        raise ValueError(
            f"{type(block).__name__} has no tensor {place}; it has {list(tensors_of(block))}. "
            f"Is it quantised or wrapped? Import the plain model."
        )
    return tensor


def _check_tensor(block: str, place: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.is_meta:
        raise ValueError(
            f"{place} of {block} has no memory (meta device). Load the model without offloading."
        )
    if theirs.dtype not in DTYPES:
        raise ValueError(
            f"{place} of {block} is {theirs.dtype}: quantised weights cannot be imported. "
            f"Load the model in one of {[str(dtype) for dtype in DTYPES]}."
        )
    if theirs.numel() != ours.numel() or theirs.shape[-ours.dim() :] != ours.shape:
        raise ValueError(
            f"{place} of {block} has shape {tuple(theirs.shape)}; its config asks for {tuple(ours.shape)}."
        )


def _put(layer: MoE, name: str, tensor: Tensor) -> None:
    """Their Parameter itself; a selection bias shares their memory, unless it has to become float32."""
    place, _, leaf = name.rpartition(".")
    if leaf == "e_score_correction_bias":
        tensor = tensor.detach().flatten().float()
    setattr(layer.get_submodule(place), leaf, tensor)
