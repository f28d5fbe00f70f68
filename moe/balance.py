"""Balancing without an auxiliary loss: a bias that steers the choice of experts and nothing else."""

from dataclasses import replace

import torch
from torch import Tensor

from moe.routing import Router


@torch.no_grad()
def update_selection_bias(router: Router, tokens_per_expert: Tensor, rate: float = 1e-3) -> None:
    """Raise the selection bias of experts below the mean load, lower it above: b += rate * sign(mean - load).

    tokens_per_expert (e): counts over the whole batch of an optimizer step - all micro-batches, all ranks.
    The step is centred, so the biases keep their mean. Equal loads change nothing.
    Source: Wang et al. 2408.15664; centred as in torchtitan.

    Raises:
        ValueError: the router has no selection bias, or the counts have another length.
    """
    bias = router.e_score_correction_bias
    if bias is None:
        raise ValueError(
            "this router has no selection bias; build it with use_selection_bias=True, "
            "or call add_selection_bias(router)."
        )
    if tokens_per_expert.shape != bias.shape:
        raise ValueError(
            f"tokens_per_expert has shape {tuple(tokens_per_expert.shape)}, "
            f"expected one count for each of the {bias.numel()} experts."
        )
    sign = torch.sign(tokens_per_expert.sum() - tokens_per_expert * bias.numel()).to(bias)
    bias += rate * (sign - sign.mean())


@torch.no_grad()
def add_selection_bias(router: Router) -> None:
    """Give a router that has none a selection bias of zeros, so that `update_selection_bias` can steer it.

    For models that were made without one, such as OLMoE and Qwen3-MoE: routing stays the same until the first
    update. The bias is float32 and part of the state; a checkpoint format of another library that has no
    place for it loses it.

    Raises:
        ValueError: the router has a selection bias already.
    """
    if router.e_score_correction_bias is not None:
        raise ValueError("this router has a selection bias already; update_selection_bias moves it.")
    bias = torch.zeros(router.weight.shape[0], dtype=torch.float32, device=router.weight.device)
    router.e_score_correction_bias = bias
    router.config = replace(router.config, use_selection_bias=True)
