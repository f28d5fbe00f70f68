"""AdamW or Muon in parameter groups, and learning-rate schedules as pure functions of the step."""

import math

import torch
from torch import Tensor, nn

from moe.train.muon import Muon
from moe.train.settings import OptimConfig

_ADAMW_STATE, _MUON_STATE = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)


def make_optimizer(model: nn.Module, config: OptimConfig) -> Muon:
    """AdamW (1711.05101) with a group for each kind of parameter: decaying or not, of a router or not.

    With `config.optimizer="muon"` the matrices of layers, but for the routers', are a group of Muon's.
    Each group carries `lr_scale`, which `set_learning_rate` multiplies in. Fused where torch has a fused
    kernel for the device.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            uses_muon = config.optimizer == "muon" and is_hidden_matrix(name, parameter)
            kind = (has_decay(name, parameter, config), is_router(name), uses_muon)
            groups.setdefault(kind, []).append(parameter)
    return Muon(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_scale": config.router_lr_scale if router else 1.0,
                "use_muon": uses_muon,
                "momentum": config.momentum,
            }
            for (decays, router, uses_muon), parameters in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(p.device.type in ("cpu", "cuda") for p in model.parameters()),
    )


def has_decay(name: str, parameter: Tensor, config: OptimConfig) -> bool:
    """Weight decay is for matrices: embeddings, norms, biases (those of experts are (e o)) and the taps of
    short convolutions (w d), which are numbers for each channel, go without."""
    if "embed" in name:
        return config.decay_embeddings
    return is_matrix(name, parameter)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether this is a matrix, or a stack of them, and not numbers for each channel or expert."""
    return parameter.ndim >= 2 and not name.endswith(("bias", "conv.weight"))


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether this is a matrix of a layer that is not its router's: neither of embeddings nor of a head."""
    return "layers" in name.split(".") and is_matrix(name, parameter) and not is_router(name)


def is_router(name: str) -> bool:
    """Whether this parameter belongs to a router."""
    return "router" in name.split(".")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of step 0 <= step < steps: linear warm-up, then the schedule.

    cosine    half a cosine from lr down to final_fraction * lr at the last step (1608.03983)
    wsd       warm-up, stable, decay: lr until the last decay_fraction of the run, then a straight line
              down to final_fraction * lr (2404.06395)
    constant  lr
    """
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    last = max(steps - 1, 1)
    if config.schedule == "wsd":
        start = max(warmup, round(steps * (1 - config.decay_fraction)))
        down = min(max((step - start + 1) / (last - start + 1), 0.0), 1.0) if last >= start else 0.0
    else:
        down = 0.5 - 0.5 * math.cos(math.pi * min((step - warmup) / max(last - warmup, 1), 1.0))
    return config.lr * (1 - (1 - config.final_fraction) * down)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of the optimizer as named tensors: "PARAMETER.exp_avg" and so on."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put the tensors of `optimizer_tensors` back.

    Raises:
        ValueError: a tensor is missing, unexpected, or has the wrong shape.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    turned = {id(p) for group in optimizer.param_groups if group.get("use_muon") for p in group["params"]}
    expected = {
        f"{name}.{key}"
        for name, parameter in parameters.items()
        for key in (_MUON_STATE if id(parameter) in turned else _ADAMW_STATE)
    }
    if expected != tensors.keys():
        raise ValueError(
            f"the optimizer state does not fit the model; missing: {sorted(expected - tensors.keys())}, "
            f"unexpected: {sorted(tensors.keys() - expected)}."
        )
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        parameter = parameters[name]
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(
                f"the optimizer state {full_name!r} has shape {tuple(value.shape)}, "
                f"its parameter {tuple(parameter.shape)}."
            )
        optimizer.state[parameter][key] = _place_state(key, value, parameter, optimizer)


def _place_state(key: str, value: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Moments live beside their parameter; the step count too when the kernel is fused."""
    beside = key != "step" or optimizer.defaults.get("fused")
    return value.to(parameter.device if beside else "cpu").clone()
