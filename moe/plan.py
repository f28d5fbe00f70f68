"""Which pair runs where: the integers that every operation shares."""

from dataclasses import dataclass
from typing import get_args

import torch
from einops import rearrange
from torch import Tensor

from moe.config import CapacityPolicy
from moe.ops.choose import Backend, choose_ops


@dataclass(frozen=True, slots=True, eq=False)  # eq=False: tensors have no single truth value
class RoutingPlan:
    """The (token, choice) pairs, sorted by expert.

    Pair number = token * top_k + choice. A *row* is a pair's place in the sorted order.
    Pairs that run nowhere (dropped, padding) come last, in rows offsets[e] and above.

    pair_of_row  (p)    which pair sits in each row; a permutation of range(p)
    row_of_pair  (p)    its inverse
    offsets      (e+1)  expert i owns rows offsets[i] to offsets[i+1] - 1
    """

    pair_of_row: Tensor
    row_of_pair: Tensor
    offsets: Tensor
    top_k: int

    @classmethod
    def from_experts(cls, experts: Tensor, num_experts: int, *, backend: Backend = "auto") -> "RoutingPlan":
        """Sort the pairs of experts (t k). Stable: tokens keep their order within an expert.

        An id outside 0..num_experts-1 marks a pair that no expert runs. No host sync.

        Raises:
            ValueError: an unknown backend.
            RuntimeError: the requested backend cannot run here.
        """
        plan = choose_ops(experts.device, backend).sort_by_expert(experts, num_experts)
        return cls(*plan, top_k=experts.shape[1])

    @property
    def num_experts(self) -> int:
        """Number of experts e."""
        return self.offsets.shape[0] - 1

    @property
    def token_of_row(self) -> Tensor:
        """Token of each row (p)."""
        return self.pair_of_row // self.top_k

    @property
    def tokens_per_expert(self) -> Tensor:
        """Rows that each expert runs (e)."""
        return self.offsets.diff()


def drop_over_capacity(
    experts: Tensor,
    weights: Tensor,
    num_experts: int,
    capacity: int,
    policy: CapacityPolicy,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Keep at most `capacity` pairs an expert; the others get the id `num_experts`, which runs nowhere.

    experts (t k), weights (t k) -> experts (t k). The weights of the kept pairs stay as they are
    (Switch, 2101.03961; Megatron core does the same).

    policy  "score": the pairs with the largest weights stay (ties: the earlier token).
            "position": the first pairs in token order stay.

    Raises:
        ValueError: an unknown policy or backend.
        RuntimeError: the requested backend cannot run here.
    """
    if policy not in get_args(CapacityPolicy):
        raise ValueError(f"policy={policy!r} must be one of {list(get_args(CapacityPolicy))}.")
    if policy == "score":
        order = torch.sort(rearrange(weights.detach(), "t k -> (t k)"), descending=True, stable=True).indices
    else:
        order = torch.arange(experts.numel(), device=experts.device)
    ordered = rearrange(experts, "t k -> (t k)")[order][:, None]
    plan = RoutingPlan.from_experts(ordered, num_experts, backend=backend)
    pairs = order[plan.pair_of_row]
    expert_of_row = rearrange(experts, "t k -> (t k)")[pairs]
    is_real = (expert_of_row >= 0) & (expert_of_row < num_experts)
    first_row = plan.offsets[expert_of_row.clamp(0, num_experts)]
    rank = torch.arange(pairs.numel(), device=pairs.device) - first_row
    kept = torch.where(is_real & (rank < capacity), expert_of_row, num_experts)
    return torch.empty_like(pairs).scatter_(0, pairs, kept).view_as(experts)
