"""Sparse Mixture-of-Experts transformers on your own machine.

One notation everywhere, in docstrings, comments, einops patterns and error messages:

    t  tokens              k  experts a token chooses      p  (token, choice) pairs, t * k
    e  experts             d  model width                  h  width of one expert
    b  sequences           s  positions in a sequence      v  vocabulary
    n  attention heads     c  channels of a head           i, o  inputs and outputs of a linear map
"""

from moe.balance import add_selection_bias, update_selection_bias
from moe.config import MoEConfig
from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.layer import MoE, MoEOutput
from moe.losses import load_balancing_loss, max_violation, router_z_loss
from moe.parameters import count_parameters, flops_per_token
from moe.plan import RoutingPlan
from moe.routing import Router, Routing
from moe.version import __version__

__all__ = [
    "Decoder",
    "DecoderConfig",
    "MoE",
    "MoEConfig",
    "MoEOutput",
    "Router",
    "Routing",
    "RoutingPlan",
    "__version__",
    "add_selection_bias",
    "count_parameters",
    "flops_per_token",
    "load_balancing_loss",
    "max_violation",
    "router_z_loss",
    "update_selection_bias",
]
