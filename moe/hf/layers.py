"""`moe.MoE` in the place of Hugging Face's MoE blocks, inside their models."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import did_you_mean
from moe.layer import MoE, MoEOutput
from moe.ops.choose import Backend
from moe.routing import Routing

from .blocks import BLOCKS, Block
from .import_block import import_block, looks_like_moe, row_of, tensors_of


def replace_moe_layers(model: nn.Module, *, backend: Backend = "auto") -> "ReplacedLayers":
    """Put a `moe.MoE` in the place of every supported MoE block of a Hugging Face model.

    The model keeps its Parameters: optimizers, tied weights and gradients stay as they are. Forward,
    backward, `generate`, `output_router_logits`, `state_dict` and `save_pretrained` (with the keys of
    transformers) work as before. Blocks that cannot be replaced are named in a warning and stay.

    Called as a module, a layer in the model returns what the block returned; its `forward` returns MoEOutput.
    Parameters that have another place here (the router, shared experts) have our names in
    `named_parameters`. Hooks on a router go on hearing what they heard; hooks on a block itself stay with it.
    (transformers 5.17 records router logits of Llama 4 by hooks on its blocks: there they are lost.)

    Returns the layers by name; `ReplacedLayers.restore` is the way back.

    Raises:
        ValueError: nothing could be replaced, or a block cannot be imported (as `moe.MoE.from_hf`). The model
            is then as it was.
    """
    blocks = {name: block for name, block in model.named_modules() if type(block).__name__ in BLOCKS}
    others = [
        f"{name} ({type(block).__name__})" for name, block in model.named_modules() if looks_like_moe(block)
    ]
    if "" in blocks:
        raise ValueError("this model is itself a MoE block; use moe.MoE.from_hf(block).")
    if not blocks:
        raise ValueError(_nothing_to_replace(model, others))
    config = getattr(model, "config", None)
    data = config.to_dict() if config is not None else None
    layers = {name: import_block(MoE, block, backend=backend, config=data) for name, block in blocks.items()}
    if others:
        warnings.warn(f"MoE blocks that stay as they are, unsupported: {', '.join(others)}.", stacklevel=2)
    return ReplacedLayers(model, {name: (blocks[name], layer) for name, layer in layers.items()})


@contextmanager
def record_routings(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """What every `moe.MoE` of a model routed in its latest forward pass inside the `with`, by layer name.

    >>> with record_routings(model) as routings:
    ...     loss = model(ids, labels=ids).loss
    >>> loss = loss + 0.01 * load_balancing_loss(list(routings.values()))

    Raises:
        ValueError: the model has no `moe.MoE`.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoE)}
    if not layers:
        raise ValueError("this model has no moe.MoE; call replace_moe_layers(model) first.")
    routings: dict[str, Routing] = {}
    handles = [
        layer.router.register_forward_hook(_Recorder(routings, name)) for name, layer in layers.items()
    ]
    try:
        yield routings
    finally:
        for handle in handles:
            handle.remove()


class ReplacedLayers(dict[str, MoE]):
    """The layers that now stand in a model, by name."""

    def __init__(self, model: nn.Module, pairs: Mapping[str, tuple[nn.Module, MoE]]) -> None:
        super().__init__({name: layer for name, (_, layer) in pairs.items()})
        self._model = model
        self._blocks = {name: block for name, (block, _) in pairs.items()}
        self._handles = [handle for block, layer in pairs.values() for handle in _stand_in(layer, block)]
        for name, layer in self.items():
            model.set_submodule(name, layer)

    def restore(self) -> None:
        """Put the blocks back, with the tensors as they are now. The layers stay usable on their own.

        Raises:
            ValueError: a layer has got a tensor that its block has no place for: an adapter, or a selection
                bias that was added. Nothing is changed then.
        """
        for name, block in self._blocks.items():
            row, places = row_of(block), tensors_of(block)
            homeless = [ours for ours in tensors_of(self[name]) if row.place_of(ours) not in places]
            if homeless:
                raise ValueError(
                    f"{type(block).__name__} has no place for {homeless} of {name}. Merge adapters or unload "
                    f"them; drop an added selection bias with router.e_score_correction_bias = None."
                )
        for handle in self._handles:
            handle.remove()
        for name, block in self._blocks.items():
            layer = self[name]
            row = row_of(block)
            del layer.get_submodule(row.listener.rpartition(".")[0]).gate
            for ours, tensor in tensors_of(layer).items():
                _give_back(block, row.place_of(ours), tensor)
            self._model.set_submodule(name, block.train(layer.training))
        self._handles, self._blocks = [], {}


# A layer in the place of a block


def _stand_in(layer: MoE, block: nn.Module) -> list[Any]:
    """Let the layer answer, save and load as the block does; the handles that undo it."""
    row = row_of(block)
    shapes = {name: tensor.shape for name, tensor in tensors_of(block).items()}
    names = {name: row.place_of(name) for name in tensors_of(layer)}
    listener = _listener(block.get_submodule(row.router))
    layer.get_submodule(row.listener.rpartition(".")[0]).add_module("gate", listener)
    return [
        layer.register_forward_hook(_Result(row)),
        layer.router.register_forward_hook(_Announcement(row, listener)),
        layer.register_state_dict_post_hook(_ToTheirs(names, shapes)),
        layer.register_load_state_dict_pre_hook(_ToOurs(names)),
    ]


def _listener(router: nn.Module) -> nn.Module:
    """A module of the router's class, without tensors, that returns what it is given.

    transformers records router logits by hooks on every module of that class, set at the first request. The
    listener shares the router's hooks, those already there and those to come.
    """
    listener = type(router).__new__(type(router))
    nn.Module.__init__(listener)
    listener.forward = _echo
    listener._forward_hooks = router._forward_hooks
    listener._forward_hooks_with_kwargs = router._forward_hooks_with_kwargs
    listener._forward_hooks_always_called = router._forward_hooks_always_called
    listener._is_hf_initialized = True  # it has no weights to initialise  # type: ignore[assignment]
    return listener


def _echo(*output: Tensor) -> tuple[Tensor, ...]:
    return output


@dataclass(frozen=True)
class _Result:
    """Hook on a layer: give their decoder layer what their block gives."""

    row: Block

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: MoEOutput) -> Any:
        return self.row.result(output)


@dataclass(frozen=True)
class _Announcement:
    """Hook on a router: let those who listen to their router hear it."""

    row: Block
    listener: nn.Module

    def __call__(self, router: nn.Module, inputs: tuple[Any, ...], routing: Routing) -> None:
        if self.listener._forward_hooks:
            self.listener(*self.row.announcement(routing))


@dataclass(frozen=True)
class _Recorder:
    """Hook on a router: keep its latest routing under a layer's name."""

    routings: dict[str, Routing]
    name: str

    def __call__(self, router: nn.Module, inputs: tuple[Any, ...], routing: Routing) -> None:
        self.routings[self.name] = routing


@dataclass
class _ToTheirs:
    """Hook on a layer's state dict: their names; ERNIE's selection bias is (1 e) there."""

    names: Mapping[str, str]
    shapes: Mapping[str, torch.Size]

    def __call__(self, layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for ours, theirs in self.names.items():
            if prefix + ours not in state:  # an adapter has taken its place
                continue
            tensor = state.pop(prefix + ours)
            shape = self.shapes.get(theirs, tensor.shape)
            state[prefix + theirs] = tensor if tensor.shape == shape else tensor.view(shape)


@dataclass
class _ToOurs:
    """Hook before a layer loads: our names again."""

    names: Mapping[str, str]

    def __call__(self, layer: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
        for ours, theirs in self.names.items():
            if prefix + theirs in state:
                tensor = state.pop(prefix + theirs)
                is_bias = ours.endswith("e_score_correction_bias")
                state[prefix + ours] = tensor.flatten() if is_bias else tensor


def _give_back(block: nn.Module, place: str, tensor: Tensor) -> None:
    holder, _, leaf = place.rpartition(".")
    module = block.get_submodule(holder)
    if isinstance(tensor, nn.Parameter):
        setattr(module, leaf, tensor)
        return
    theirs = getattr(module, leaf)
    with torch.no_grad():
        theirs.data = tensor.view(theirs.shape)


def _nothing_to_replace(model: nn.Module, others: list[str]) -> str:
    if any(isinstance(module, MoE) for module in model.modules()):
        return "nothing to replace: the MoE blocks of this model are moe.MoE already."
    if others:
        hint = did_you_mean(others[0].split("(")[1].rstrip(")"), list(BLOCKS))
        return f"nothing to replace: unsupported MoE blocks {', '.join(others)}.{hint}"
    return f"nothing to replace: {type(model).__name__} has no MoE block."
