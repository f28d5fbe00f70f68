"""Muon for models with experts: the matrix of each expert is orthogonalised by itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_STEPS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315  # singular values of 0.01 to 1 become 0.7 to 1.2
_RMS = 0.2  # of an update, as AdamW's are: so both take the same learning rate and weight decay


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups that say `use_muon`, AdamW for the others.

    Matrices get the momentum of their gradients, Nesterov's, with all singular values made about 1 and scaled
    by 0.2 sqrt(max(rows, columns)) (2502.16982). A parameter (... rows columns) is a stack of matrices, such
    as those of experts (e o i), each of which is treated by itself. `momentum` of a group: 0.95 if not given.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        """Options are AdamW's.

        Raises:
            ValueError: a group with `use_muon` has a parameter that is no matrix.
        """
        super().__init__(params, **options)
        for group in self.param_groups:
            group.setdefault("use_muon", False)
            group.setdefault("momentum", 0.95)
            for parameter in group["params"] if group["use_muon"] else ():
                if parameter.ndim < 2:
                    raise ValueError(
                        f"Muon takes matrices, got a parameter of shape {tuple(parameter.shape)}. "
                        f"Put it into a group without use_muon."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; returns what the closure does."""
        every = self.param_groups
        self.param_groups = [group for group in every if not group["use_muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            for parameter in group["params"] if group["use_muon"] else ():
                if parameter.grad is not None:
                    self._turn(parameter, parameter.grad, group)
        return loss

    def _turn(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = orthogonalised(grad.lerp(mean, group["momentum"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * _RMS * max(parameter.shape[-2:]) ** 0.5)


def orthogonalised(x: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T: (... r c) -> (... r c); a matrix of zeros stays one.

    Five steps of the quintic Newton-Schulz iteration of Muon, on a GPU in bfloat16.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    y = x.mT if is_tall else x
    y = y.reshape(-1, *y.shape[-2:]).to(torch.bfloat16 if x.is_cuda else x.dtype)
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), y, beta=_A)
    y = y.mT if is_tall else y
    return y.reshape(x.shape).to(x.dtype)
