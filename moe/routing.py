"""The router: which experts a token goes to, and how much each of them counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from moe.autocast import autocast_dtype
from moe.config import MoEConfig


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What a router decided. Gradients flow through logits, scores and weights.

    logits   (t e)  router output (with its bias and soft-cap, without the selection bias), as multiplied:
                    with router_logits_dtype="model" in the model's dtype
    scores   (t e)  the score function of the logits, over all experts
    experts  (t k)  chosen experts, int64; the id e marks the pairs of a padding token
    weights  (t k)  how much each choice counts; 0 at padding
    mask     (t)    True at real tokens; None when all are real
    """

    logits: Tensor
    scores: Tensor
    experts: Tensor
    weights: Tensor
    mask: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """Number of experts e."""
        return self.logits.shape[-1]

    @property
    def top_k(self) -> int:
        """Choices of a token k."""
        return self.experts.shape[-1]

    def tokens_per_expert(self) -> Tensor:
        """Pairs that chose each expert (e), int64, before any capacity; padding is not counted."""
        return count_experts(self.experts, self.num_experts)


def count_experts(experts: Tensor, num_experts: int) -> Tensor:
    """Occurrences of 0..num_experts-1 in experts (...) -> (e) int64. No host sync."""
    ids = experts.flatten()
    return ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]


def jitter(x: Tensor, noise: float) -> Tensor:
    """x times a number drawn for each element from [1 - noise, 1 + noise) (Switch, 2101.03961)."""
    return x * torch.empty_like(x).uniform_(1 - noise, 1 + noise)


class Router(nn.Module):
    """Linear router with the options of `MoEConfig`; ROUTERS in the README says which model is which.

    1. logits = x . weight (+ bias), optionally soft-capped: cap * tanh(logits / cap)
    2. scores = softmax | sigmoid | sqrt(softplus) of the logits
    3. choose the top k of (scores, or logits if `topk_before_score`) + selection bias, in the best groups
    4. weights = scores of the chosen (or the score function over the chosen logits), optionally
       renormalised to sum 1, times `routed_scaling_factor`

    Sources: Switch 2101.03961 (softmax), DeepSeek-V3 2412.19437 (sigmoid, groups), 2408.15664 (selection
    bias), DeepSeek-V4 (sqrt-softplus), gpt-oss (top-k first). Input jitter multiplies what the router sees;
    with `jitter_experts` the layer has already done it, for the experts as well.

    weight  (e d)
    bias    (e), when `router_bias`
    e_score_correction_bias  (e) buffer, when `use_selection_bias`; float32, also when the module is cast
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    e_score_correction_bias: Tensor | None

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        selection_bias = (
            torch.zeros(config.num_experts, dtype=torch.float32) if config.use_selection_bias else None
        )
        self.register_buffer("e_score_correction_bias", selection_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, initializer_range²); zero the biases."""
        nn.init.normal_(self.weight, std=self.config.initializer_range)
        for bias in (self.bias, self.e_score_correction_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route x (t d). mask (t) is True at real tokens; the others get no expert."""
        x = x if mask is None else x.masked_fill(~mask[:, None], 0)
        dtype = autocast_dtype(x.device)
        if dtype is None:
            return self._route(x, torch.promote_types(x.dtype, self.weight.dtype), mask)
        with torch.autocast(x.device.type, enabled=False):
            return self._route(x, dtype, mask)

    def _route(self, x: Tensor, model_dtype: torch.dtype, mask: Tensor | None) -> Routing:
        logits = self._logits(x, model_dtype)
        scores = self._score(logits)
        experts = self._choose(logits if self.config.topk_before_score else scores)
        weights = self._weigh(x, logits, scores, experts)
        if mask is not None:
            experts = experts.masked_fill(~mask[:, None], self.config.num_experts)
            weights = weights.masked_fill(~mask[:, None], 0)
        return Routing(logits, scores, experts, weights, mask)

    def _logits(self, x: Tensor, model_dtype: torch.dtype) -> Tensor:
        config = self.config
        if self.training and config.router_jitter_noise and not config.jitter_experts:
            x = jitter(x, config.router_jitter_noise)
        name = config.router_logits_dtype or config.router_dtype
        dtype = model_dtype if name == "model" else torch.promote_types(x.dtype, getattr(torch, name))
        bias = None if self.bias is None else self.bias.to(dtype)
        logits = F.linear(x.to(dtype), self.weight.to(dtype), bias)
        if config.router_logit_softcap is not None:
            capped = torch.tanh(self._as_router(logits) / config.router_logit_softcap)
            logits = config.router_logit_softcap * capped
        return logits

    def _as_router(self, logits: Tensor) -> Tensor:
        """Logits in the dtype of the scores, which no narrower `router_dtype` rounds."""
        name = self.config.router_dtype
        if name == "model":
            return logits
        return logits.to(torch.promote_types(logits.dtype, getattr(torch, name)))

    def _score(self, logits: Tensor) -> Tensor:
        logits = self._as_router(logits)
        if self.config.scoring_func == "softmax":
            return logits.softmax(-1)
        if self.config.scoring_func == "sigmoid":
            return logits.sigmoid()
        tiny = torch.finfo(logits.dtype).tiny  # the root has no slope at 0, where softplus underflows
        return F.softplus(logits).clamp(min=tiny).sqrt()

    def _choose(self, preference: Tensor) -> Tensor:
        """The top k of preference (t e), after selection bias and group limits -> experts (t k)."""
        preference = preference.detach()
        if self.e_score_correction_bias is not None:
            preference = preference + self.e_score_correction_bias
        if self.config.n_group > 1:
            preference = self._keep_best_groups(preference)
        config = self.config
        return preference.topk(config.num_experts_per_tok, dim=-1, sorted=config.topk_sorted).indices

    def _keep_best_groups(self, preference: Tensor) -> Tensor:
        """-inf everywhere but in the `topk_group` best groups; 0 would win over a negative preference."""
        config = self.config
        groups = rearrange(preference, "t (g m) -> t g m", g=config.n_group)
        best = groups.topk(1 if config.group_score == "max" else 2, dim=-1).values
        kept_groups = best.sum(-1).topk(config.topk_group, dim=-1).indices
        is_kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, kept_groups, True)
        is_kept = repeat(is_kept, "t g -> t (g m)", m=groups.shape[-1])
        return preference.masked_fill(~is_kept, -torch.inf)

    def _weigh(self, x: Tensor, logits: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
        config = self.config
        if config.topk_before_score:
            weights = self._score(logits.gather(1, experts))
        else:
            weights = scores.gather(1, experts)
        if config.norm_topk_prob and not (config.topk_before_score and config.scoring_func == "softmax"):
            total = weights.sum(-1, keepdim=True) + config.norm_topk_eps
            weights = weights / total.clamp(min=max(torch.finfo(total.dtype).tiny, config.norm_topk_min))
        if config.routed_scaling_factor != 1.0:
            weights = weights * config.routed_scaling_factor
        dtype = config.routing_weights_dtype
        if dtype is None:
            return weights
        return weights.to({"model": x.dtype, "logits": logits.dtype}.get(dtype) or getattr(torch, dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as any module; the selection bias stays float32: bfloat16 would swallow its steps."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]  # torch gives `fn` no type
        after = self.e_score_correction_bias
        if before is not None and after is not None:
            source = after if before.is_meta else before  # to_empty() leaves the meta device
            self.e_score_correction_bias = source.to(after.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load as any module; a selection bias that was stored in 16 bits becomes float32 again."""
        super()._load_from_state_dict(*args, **kwargs)  # pyright: ignore[reportUnknownMemberType]
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias = self.e_score_correction_bias.float()

    def extra_repr(self) -> str:
        """Sizes and the options that differ from the plain softmax router."""
        config = self.config
        choice = f"top {config.num_experts_per_tok} of {config.num_experts}"
        return f"{config.hidden_size} -> {choice}, {config.scoring_func}"
