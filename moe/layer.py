"""The sparse Mixture-of-Experts layer, to be put wherever a feed-forward layer stands."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe.config import GATED_ACTIVATIONS, MoEConfig
from moe.experts import Experts
from moe.feed_forward import Projection
from moe.ops.choose import Backend
from moe.plan import RoutingPlan, drop_over_capacity
from moe.routing import Router, Routing, jitter

# The function inside a shared expert; the names are those of whole activations
NONLINEARITIES = {"swiglu": F.silu, "geglu": F.gelu, "relu2": lambda x: F.relu(x).square(), "gelu": F.gelu}


@dataclass(frozen=True, slots=True, eq=False)
class MoEOutput:
    """What a layer computed. Losses and logs are the caller's.

    y        shape and dtype of the input (under autocast, its dtype)
    routing  what the router decided, before any capacity
    plan     what ran: pairs over capacity and padding are not in it
    """

    y: Tensor
    routing: Routing
    plan: RoutingPlan


class SharedExpert(nn.Module):
    """A feed-forward layer that every token runs, optionally times sigmoid(gate . x) (Qwen2-MoE).

    down_proj(act(gate_proj(x)) * up_proj(x)), or down_proj(act(up_proj(x))) for activations without a gate.
    """

    def __init__(self, config: MoEConfig, *, output_scale: float = 1.0) -> None:
        super().__init__()
        d, h, std = config.hidden_size, config.shared_width, config.initializer_range
        self.activation = config.shared_expert_activation
        is_gated = self.activation in GATED_ACTIVATIONS
        self.gate_proj = Projection(d, h, std=std) if is_gated else None
        self.up_proj = Projection(d, h, std=std)
        self.down_proj = Projection(h, d, std=std * output_scale)
        self.gate = Projection(d, 1, std=std) if config.shared_expert_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """x (... d) -> (... d)."""
        act = NONLINEARITIES[self.activation]
        up = self.up_proj(x)
        y = self.down_proj(act(up) if self.gate_proj is None else act(self.gate_proj(x)) * up)
        return y if self.gate is None else torch.sigmoid(self.gate(x)) * y


class MoE(nn.Module):
    """Sparse Mixture-of-Experts feed-forward layer.

    1. the router scores every expert for every token and chooses k of them
    2. the plan sorts the (token, choice) pairs by expert, less those over capacity, if there is one
    3. each expert runs on its rows; a token's outputs are summed with the router's weights
    4. shared experts, if any, run on every token and are added

    backend: "auto" takes the fastest that works on the input's device, "reference" and "torch" run anywhere,
    "triton" needs a GPU. output_scale: down-projections are drawn from N(0, (initializer_range *
    output_scale)²); a decoder makes them smaller. batch_invariant: given its routing, a token's routed output
    has the same bits whatever else is in the batch; needs the Triton kernels, costs some speed. The products
    of the router and of shared experts stay torch's.

    Sources: Shazeer et al. 1701.06538, Switch 2101.03961, DeepSeekMoE 2401.06066 (shared experts).
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        backend: Backend = "auto",
        output_scale: float = 1.0,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        if config.num_experts < 1:
            raise ValueError(f"num_experts={config.num_experts}: a MoE layer needs at least one expert.")
        self.config = config
        self.backend: Backend = backend
        self.router = Router(config)
        self.experts = Experts(
            config, backend=backend, output_scale=output_scale, batch_invariant=batch_invariant
        )
        self.shared_expert = (
            SharedExpert(config, output_scale=output_scale) if config.n_shared_experts else None
        )

    @classmethod
    def from_hf(
        cls, block: nn.Module, *, backend: Backend = "auto", config: Mapping[str, Any] | None = None
    ) -> Self:
        """The layer of a Hugging Face MoE block, router included, with the block's own Parameters.

        Nothing is copied: a step of an optimizer moves both. (A selection bias that is not float32 is: it is
        kept in float32 here.) config: the plain data of the model's config, for blocks that hold none.

        Raises:
            ValueError: no MoE block, a family that is not supported (with the nearest that is), quantised
                weights, or a config that contradicts the block's tensors.
        """
        from moe.hf.import_block import import_block  # hf knows layers; layers do not know hf

        return import_block(cls, block, backend=backend, config=config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> MoEOutput:
        """Run x (... d). mask (...) is True at real tokens; padding gets no expert and a routed output of 0.

        Raises:
            ValueError: the last dimension is not hidden_size, the mask is not a bool tensor shaped like x
                without it, or dtypes or devices differ.
            RuntimeError: the requested backend cannot run here, or cannot be batch_invariant.
        """
        self._check(x, mask)
        tokens = rearrange(x, "... d -> (...) d")
        if mask is not None:
            mask = mask.reshape(-1)
            tokens = tokens.masked_fill(~mask[:, None], 0)  # whatever padding holds, it reaches no gradient
        if self.training and self.config.jitter_experts:
            tokens = jitter(tokens, self.config.router_jitter_noise)
        routing = self.router(tokens, mask)
        plan = self._plan(routing)
        y = self.experts(tokens, routing.weights, plan)
        if self.shared_expert is not None:
            y = y + self.shared_expert(tokens)
            y = y / 2 if self.config.shared_expert_combination == "average" else y
        return MoEOutput(y.view(x.shape), routing, plan)

    def _plan(self, routing: Routing) -> RoutingPlan:
        config, experts, backend = self.config, routing.experts, self.backend
        if config.capacity_factor is not None:
            capacity = math.ceil(config.capacity_factor * experts.numel() / config.num_experts)
            experts = drop_over_capacity(
                experts,
                routing.weights,
                config.num_experts,
                capacity,
                config.capacity_policy,
                backend=backend,
            )
        return RoutingPlan.from_experts(experts, config.num_experts, backend=backend)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        device = self.router.weight.device
        if x.dim() == 0 or x.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; its last dimension must be "
                f"hidden_size={self.config.hidden_size}."
            )
        if x.device != device:
            raise ValueError(f"x is on {x.device}, but the layer is on {device}; move one of them.")
        if mask is not None and mask.device != x.device:
            raise ValueError(f"mask is on {mask.device}, but x is on {x.device}; move one of them.")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be torch.bool of shape "
                f"{tuple(x.shape[:-1])}, True at real tokens."
            )
