"""A look inside routing: who goes where, how even that is, and two ways to even it out.

The tokens share a direction, as hidden states of a language model do. An untrained router then sends most of
them to the same few experts. A loss can push against that; so can a bias that takes part in the choice only.

python examples/02_inside_routing.py
"""

import math
from typing import get_args

import torch
from torch import Tensor

import moe
from moe.decoder_config import LossConvention
from moe.losses import uniform_value

TOKENS, WIDTH, EXPERTS, TOP_K = 1024, 64, 8, 2


def bars(counts: Tensor) -> str:
    """One line per expert; `|` marks the even share."""
    even = int(counts.double().mean().item() / 16)
    lines = []
    for expert, count in enumerate(counts.tolist()):
        bar = list("#" * (count // 16)) + [" "] * even
        bar[even] = "|"
        lines.append(f"  expert {expert}  {count:4d}  {''.join(bar).rstrip()}")
    return "\n".join(lines)


def evenness(router: moe.Router, x: Tensor) -> float:
    """The largest load over the mean load, minus 1: 0 is even."""
    return float(moe.max_violation(router(x).tokens_per_expert()))


torch.manual_seed(0)
config = moe.MoEConfig(
    hidden_size=WIDTH,
    moe_intermediate_size=32,
    num_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    scoring_func="sigmoid",
    use_selection_bias=True,
)
router = moe.Router(config)
torch.nn.init.normal_(router.weight, std=0.1)
x = torch.randn(TOKENS, WIDTH) + 0.7 * torch.randn(WIDTH)

routing = router(x)
print("token  chosen experts and their weights")
for token in range(4):
    pairs = zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True)
    print(f"{token:5d}  " + ", ".join(f"expert {expert}: {weight:.2f}" for expert, weight in pairs))

counts = routing.tokens_per_expert()
share = counts / counts.sum()
entropy = -(share * share.clamp_min(1e-9).log()).sum().item()
before = evenness(router, x)
print(f"\nload before, MaxVio {before:.2f}")
print(bars(counts))
print(f"entropy of the load {entropy:.2f} of {math.log(EXPERTS):.2f} nats")

# One idea under four conventions: know which one a paper means before copying its coefficient.
print(f"\nrouter z-loss {moe.router_z_loss(routing).item():.2f}; load-balancing loss under each convention:")
for convention in get_args(LossConvention):
    loss = moe.load_balancing_loss(routing, convention=convention).item()
    print(f"  {convention:10s}  {loss:.3f}   at an even load {uniform_value(convention, 1, TOP_K)}")

# The loss has a gradient in the router's weights: follow it.
optimizer = torch.optim.Adam([router.weight], lr=3e-3)
for _ in range(100):
    optimizer.zero_grad()
    moe.load_balancing_loss(router(x)).backward()
    optimizer.step()
print(f"\nMaxVio after 100 steps down the loss: {before:.2f} -> {evenness(router, x):.2f}")

# The bias needs no gradient and bends no weight: it moves against the load and takes part in the choice only.
bias = router.e_score_correction_bias
assert bias is not None  # because use_selection_bias=True
torch.manual_seed(0)
torch.nn.init.normal_(router.weight, std=0.1)
for _ in range(400):
    moe.update_selection_bias(router, router(x).tokens_per_expert(), rate=1e-3)
after = evenness(router, x)
print(f"MaxVio after 400 updates of the bias alone: {before:.2f} -> {after:.2f}")
print(bars(router(x).tokens_per_expert()))
print(f"bias {[round(b, 3) for b in bias.tolist()]}")
assert after < before / 4
