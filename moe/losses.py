"""Auxiliary losses and balance figures: pure functions of `Routing`.

Every load-balancing loss is a scaled sum over experts of f_e * P_e: the share of pairs that chose expert e,
times the mean probability of e. Counts carry no gradient; it flows through P alone. Libraries disagree in
scale and pooling, so a coefficient means something only together with its convention:

| convention | over layers                      | P                               | at uniform routing |
|------------|----------------------------------|---------------------------------|--------------------|
| megatron   | sum of the layers' losses        | scores, normalised with + 1e-20 | number of layers   |
|            |                                  | f is of their own top k         |                    |
| olmo       | sum of the layers' losses        | scores + 1e-7, normalised       | number of layers   |
| megablocks | mean of the layers' losses       | softmax of the logits           | 1                  |
| hf         | f and P pooled, then one product | softmax of the logits; f is of  | k                  |
|            |                                  | its own top k                   |                    |

"Own top k": counted from P, as those libraries do, and not from the real choice, which a selection bias or
expert groups may have changed.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from moe.decoder_config import LossConvention
from moe.routing import Routing, count_experts

Granularity = Literal["layer", "sequence"]


def load_balancing_loss(
    routings: Routing | Sequence[Routing],
    *,
    convention: LossConvention = "megatron",
    granularity: Granularity = "layer",
    sequences: int | None = None,
) -> Tensor:
    """Load-balancing loss over the MoE layers of a model -> scalar, float32 or wider.

    granularity  "layer": f and P over all tokens of the batch (Switch, 2101.03961).
                 "sequence": over each of `sequences` equally long sequences, then averaged over those
                 that hold a real token (DeepSeek-V3, 2412.19437).

    Raises:
        ValueError: no routing, an unknown convention, tokens that do not divide into the sequences,
            sequences with "layer" or with "hf", which pools all tokens.
    """
    routings = [routings] if isinstance(routings, Routing) else list(routings)
    if not routings:
        raise ValueError("load_balancing_loss needs the routing of at least one MoE layer, got none.")
    if granularity not in ("layer", "sequence"):
        raise ValueError(f'granularity={granularity!r} must be "layer" or "sequence".')
    if (granularity == "sequence") != (sequences is not None) or (sequences is not None and sequences < 1):
        raise ValueError(
            f"granularity={granularity!r} with sequences={sequences}: give the number of sequences "
            f'with "sequence", 1 or more, and none with "layer".'
        )
    if convention == "hf":
        if granularity == "sequence":
            raise ValueError(
                'convention="hf" pools all tokens; use granularity="layer" or another convention.'
            )
        return _joint_loss(routings)
    losses = torch.stack([_layer_loss(routing, convention, sequences or 1) for routing in routings])
    return losses.mean() if convention == "megablocks" else losses.sum()


def uniform_value(convention: LossConvention, layers: int, top_k: int) -> float:
    """What `load_balancing_loss` gives when routing is perfectly uniform; divide by it to compare runs."""
    return {"megatron": layers, "olmo": layers, "megablocks": 1, "hf": top_k}[convention]


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over real tokens of logsumexp(logits)², to keep logits small (ST-MoE, 2202.08906) -> scalar."""
    squares = _as_float(routing.logits).logsumexp(-1).square()
    return _masked_mean(squares[:, None], routing.mask)[0]


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """MaxVio: largest load over mean load, minus 1; 0 is perfect balance, 0 for no tokens (2408.15664)."""
    load = tokens_per_expert.double()
    return load.max() / load.mean().clamp(min=torch.finfo(load.dtype).tiny) - (load.sum() > 0).double()


def _layer_loss(routing: Routing, convention: LossConvention, sequences: int) -> Tensor:
    probabilities = _probabilities(routing, convention)
    tokens, num_experts = probabilities.shape
    if tokens % sequences:
        raise ValueError(f"{tokens} tokens do not divide into sequences={sequences} of equal length.")
    mask = routing.mask if routing.mask is not None else probabilities.new_ones(tokens, dtype=torch.bool)
    by_sequence = rearrange(mask, "(b s) -> b s", b=sequences).to(probabilities.dtype)
    real_tokens = by_sequence.sum(1)
    probabilities = rearrange(probabilities, "(b s) e -> b s e", b=sequences)
    mean_probability = (probabilities * by_sequence[..., None]).sum(1) / real_tokens.clamp(min=1)[:, None]

    experts = routing.experts
    if convention == "megatron":
        experts = _own_choice(routing.scores, routing)
    experts = rearrange(experts, "(b s) k -> b (s k)", b=sequences)
    counts = probabilities.new_zeros(sequences, num_experts + 1)
    counts.scatter_add_(1, experts, torch.ones_like(experts, dtype=counts.dtype))
    share = counts[:, :num_experts] / (real_tokens.clamp(min=1) * routing.top_k)[:, None]

    losses = num_experts * (share * mean_probability).sum(1)
    return losses.sum() / (real_tokens > 0).sum().clamp(min=1)


def _joint_loss(routings: Sequence[Routing]) -> Tensor:
    """transformers' `load_balancing_loss_func`: imbalances of two layers can cancel (its issue 31464)."""
    probabilities = torch.cat([_probabilities(routing, "hf") for routing in routings])
    masks = [
        r.mask if r.mask is not None else torch.ones_like(r.logits[:, 0], dtype=torch.bool) for r in routings
    ]
    mask = torch.cat(masks)
    num_experts = routings[0].num_experts
    experts = torch.cat([_own_choice(routing.logits, routing) for routing in routings])
    counts = count_experts(experts, num_experts)
    share = counts / mask.sum().clamp(min=1)
    return num_experts * (share * _masked_mean(probabilities, mask)).sum()


def _own_choice(preference: Tensor, routing: Routing) -> Tensor:
    """The top k of preference (t e) -> experts (t k), with the id e at padding."""
    experts = preference.detach().topk(routing.top_k, dim=-1).indices
    return (
        experts if routing.mask is None else experts.masked_fill(~routing.mask[:, None], routing.num_experts)
    )


def _probabilities(routing: Routing, convention: LossConvention) -> Tensor:
    """P before the mean: (t e), rows sum to 1."""
    if convention in ("hf", "megablocks"):
        return _as_float(routing.logits).softmax(-1)
    scores = _as_float(routing.scores)
    if convention == "megatron":
        return scores / (scores.sum(-1, keepdim=True) + 1e-20)
    if convention == "olmo":
        scores = scores + 1e-7
        return scores / scores.sum(-1, keepdim=True)
    raise ValueError(f'convention={convention!r} must be "hf", "megatron", "olmo" or "megablocks".')


def _as_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real rows of x (t n) -> (n); 0 when there is none."""
    if mask is None:
        return x.sum(0) / max(x.shape[0], 1)
    return x.masked_fill(~mask[:, None], 0).sum(0) / mask.sum().clamp(min=1)


def pointer_loss(
    queries: Tensor, keys: Tensor, places: Tensor, pointers: Tensor, widths: Tensor | None = None
) -> Tensor:
    """Mean of -log of the attention that the chosen queries pay to the keys they should look at -> scalar.

    queries (b n m c), scaled, and keys (b g l c) as in `Hidden.attended`, where l are all tokens; places
    (b m) int64 of the queries; pointers (b m) int64: the place of the key, -1 where there is none to look at;
    widths (b m) int64: so many keys, from that one on, may share the attention (None: it alone). A query sees
    the keys up to its own place. 0 when nothing is pointed at. At uniform attention log((place + 1) / width).

    Supervises attention itself, as pointer networks are trained (1506.03134).
    """
    rows = []
    widest = 1 if widths is None else int(widths.max())
    widths = torch.ones_like(pointers) if widths is None else widths
    for q, k, at, pointed, width in zip(queries, keys, places, pointers, widths, strict=True):
        chosen = pointed >= 0
        q, at, pointed, width = q[:, chosen], at[chosen], pointed[chosen], width[chosen]
        group = q.shape[0] // k.shape[0]
        q = rearrange(_as_float(q), "(g r) m c -> g (r m) c", r=group)
        with torch.autocast(q.device.type, enabled=False):  # logits of 80 would be off by 0.25 in bfloat16
            logits = q @ _as_float(k).mT
        logits = rearrange(logits, "g (r m) l -> (g r) m l", r=group)
        hidden = torch.arange(k.shape[1], device=k.device) > at[:, None]
        logs = logits.masked_fill(hidden, -torch.inf).log_softmax(-1)
        offsets = torch.arange(widest, device=at.device)
        shared = (pointed[:, None] + offsets).clamp(max=k.shape[1] - 1)
        logs = logs.gather(-1, shared.expand(len(logs), -1, -1))  # (n m widest)
        rows.append(logs.masked_fill(offsets >= width[:, None], -torch.inf).logsumexp(-1).flatten())
    logs = torch.cat(rows)
    return -logs.sum() / max(logs.numel(), 1)
