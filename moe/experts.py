"""The experts of a layer: many small feed-forward networks in a few stacked tensors."""

import torch
from torch import Tensor, nn

from moe.autocast import autocast_dtype
from moe.config import MoEConfig
from moe.ops.choose import Backend, check_backend, choose_ops
from moe.plan import RoutingPlan


class Experts(nn.Module):
    """e feed-forward networks; each row of the plan runs through the one that owns it.

    gate_up_proj       (e 2h d)  gate rows first, then up rows (interleaved unless `is_concatenated`)
    up_proj            (e h d)   instead of gate_up_proj for activations without a gate
    down_proj          (e d h)
    gate_up_proj_bias  (e 2h), up_proj_bias (e h), down_proj_bias (e d), when `expert_bias`

    With `is_transposed` the weights are stored (e d 2h) and (e h d), as in gpt-oss, and used through views.
    Names and layout are those of Hugging Face transformers 5, so its checkpoints and PEFT fit.

    batch_invariant: given its experts and their weights, a token's output has the same bits whatever else is
    in the batch. Needs the Triton kernels, costs some speed.
    """

    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        config: MoEConfig,
        *,
        backend: Backend = "auto",
        output_scale: float = 1.0,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.config = config
        self.backend: Backend = backend
        self.output_scale = output_scale
        self.batch_invariant = batch_invariant
        e, d, h = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.up_name = "gate_up_proj" if config.is_gated else "up_proj"
        width = 2 * h if config.is_gated else h
        for name, outputs, inputs in ((self.up_name, width, d), ("down_proj", d, h)):
            shape = (e, inputs, outputs) if config.is_transposed else (e, outputs, inputs)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            bias = nn.Parameter(torch.empty(e, outputs)) if config.expert_bias else None
            self.register_parameter(f"{name}_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, initializer_range²), down_proj times output_scale; zero the biases."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std * self.output_scale if name == "down_proj" else std)

    def forward(self, x: Tensor, weights: Tensor, plan: RoutingPlan) -> Tensor:
        """x (t d), weights (t k) -> (t d). Under autocast the products run in its dtype.

        Raises:
            ValueError: x has another dtype than the weights, or as `experts_ffn`.
            RuntimeError: the requested backend cannot run here, or cannot be batch_invariant.
        """
        config = self.config
        up_proj, down_proj = getattr(self, self.up_name), self.down_proj  # read once: PEFT swaps them here
        up_bias, down_bias = getattr(self, f"{self.up_name}_bias"), self.down_proj_bias
        dtype = autocast_dtype(x.device)
        if dtype is None and x.dtype != down_proj.dtype:
            raise ValueError(
                f"x is {x.dtype}, but the layer is {down_proj.dtype}: "
                f"cast one of them, or run under torch.autocast."
            )
        if dtype is not None:
            x, up_proj, down_proj = x.to(dtype), up_proj.to(dtype), down_proj.to(dtype)
            up_bias = None if up_bias is None else up_bias.to(dtype)
            down_bias = None if down_bias is None else down_bias.to(dtype)
        if config.is_transposed:
            up_proj, down_proj = up_proj.mT, down_proj.mT
        return choose_ops(x.device, self.backend, x.dtype).experts_ffn(
            x,
            weights,
            plan.pair_of_row,
            plan.row_of_pair,
            plan.offsets,
            up_proj,
            down_proj,
            up_bias,
            down_bias,
            activation=config.activation,
            interleaved=not config.is_concatenated,
            limit=config.swiglu_limit,
            alpha=config.swiglu_alpha,
            weights_on_input=config.apply_router_weight_on_input,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        """Sizes, activation, the requested backend and batch_invariant when set."""
        c = self.config
        return (
            f"{c.num_experts} x ({c.hidden_size} -> {c.moe_intermediate_size} -> {c.hidden_size}), "
            f"{c.activation}, backend={self.backend!r}"
            + (", batch_invariant=True" if self.batch_invariant else "")
        )
