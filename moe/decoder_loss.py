"""The loss of a decoder: its objective, and what its routers add."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.backbone import Hidden
from moe.decoder_config import DecoderConfig
from moe.losses import load_balancing_loss, router_z_loss
from moe.plan import RoutingPlan
from moe.routing import Routing


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLoss:
    """Scalars in nats per token. `balance` and `z` are before their coefficients, and 0 when those are 0.

    total = cross_entropy + router_aux_loss_coef * balance + router_z_loss_coef * z
    """

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor
    z: Tensor
    routings: tuple[Routing, ...]
    plans: tuple[RoutingPlan, ...]


def add_router_losses(
    config: DecoderConfig, cross_entropy: Tensor, objective: Tensor, hidden: Hidden, sequences: int
) -> DecoderLoss:
    """The losses of a batch of so many sequences, whose objective, without those of the routers, is given."""
    routings = hidden.routings
    balance = z = torch.zeros_like(cross_entropy)
    if routings and config.router_aux_loss_coef:
        granularity = config.router_aux_loss_granularity
        balance = load_balancing_loss(
            routings,
            convention=config.router_aux_loss_convention,
            granularity=granularity,
            sequences=sequences if granularity == "sequence" else None,
        )
    if routings and config.router_z_loss_coef:
        z = torch.stack([router_z_loss(routing) for routing in routings]).mean()
    total = objective + config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
    return DecoderLoss(total, cross_entropy, balance, z, routings, hidden.plans)
