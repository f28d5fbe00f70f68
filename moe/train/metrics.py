"""What a step leaves behind: sums kept on the device, read once an interval, one line and one record each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.decoder_config import DecoderConfig
from moe.decoder_loss import DecoderLoss
from moe.losses import max_violation, uniform_value

_NEVER = torch.iinfo(torch.int64).max
_EMA = 0.8


class NonFiniteError(FloatingPointError):
    """A loss, a gradient, a weight or router logits became NaN or infinite."""


class Meter:
    """Sums over the steps of an interval; nothing is copied to the host before `read`.

    loads       (l e) pairs that chose each expert, for the l MoE layers
    first_bad   (2 + l) the first step, from 0, with a gradient norm, a loss, or router logits of layer l
                that are not finite
    """

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self.config = config
        self.layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
        self.first_bad = torch.full((2 + len(self.layers),), _NEVER, device=device)
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Begin an interval."""
        self.steps = 0
        self.losses = torch.zeros(4, device=self.device)  # total, cross-entropy, balance, z
        self.grad_norm = torch.zeros((), device=self.device)
        self.loads = torch.zeros(
            len(self.layers), self.config.num_experts, dtype=torch.int64, device=self.device
        )
        self.kept = torch.zeros((), dtype=torch.int64, device=self.device)
        self.largest_logit = torch.zeros(len(self.layers), device=self.device)

    @torch.no_grad()
    def add_part(self, step: int, loss: DecoderLoss, share: float) -> Tensor:
        """Count one forward pass, a `share` of its step; returns the pairs of each expert (l e)."""
        losses = torch.stack([loss.total, loss.cross_entropy, loss.balance, loss.z]).float()
        self.losses += share * losses
        logits = [routing.logits.detach() for routing in loss.routings]
        self._note_bad(step, self.first_bad[1:], losses.sum(), *(x.float().sum() for x in logits))
        if not logits:
            return self.loads.new_zeros(0)
        self.largest_logit = torch.maximum(self.largest_logit, torch.stack([x.abs().max() for x in logits]))
        self.kept += torch.stack([plan.offsets[-1] for plan in loss.plans]).sum()
        loads = torch.stack([routing.tokens_per_expert() for routing in loss.routings])
        self.loads += loads
        return loads

    @torch.no_grad()
    def add_step(self, step: int, grad_norm: Tensor) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self.grad_norm += grad_norm
        self._note_bad(step, self.first_bad[:1], grad_norm)

    def check(self) -> None:
        """Refuse to go on with numbers that are not finite.

        Raises:
            NonFiniteError: names the first step, from 1 as in the log, and the lowest layer.
        """
        steps = self.first_bad.tolist()
        first = min(steps)
        if first == _NEVER:
            return
        bad_layers = [layer for layer, step in zip(self.layers, steps[2:], strict=True) if step == first]
        other = "the loss" if steps[1] == first else "the gradient norm"
        what = f"the router logits of layer {bad_layers[0]}" if bad_layers else other
        raise NonFiniteError(f"step {first + 1}: {what} became NaN or infinite.")

    def _note_bad(self, step: int, first_bad: Tensor, *checked: Tensor) -> None:
        """Write `step` into `first_bad`, a view, where a number is not finite for the first time."""
        fine = torch.stack(checked).isfinite() | (first_bad < _NEVER)
        first_bad.copy_(torch.where(fine, first_bad, step))

    def read(self) -> dict[str, Any]:
        """The interval's means as plain data, and a new interval begun."""
        total, cross_entropy, balance, z = (self.losses / max(self.steps, 1)).tolist()
        record = {
            "loss": total,
            "cross_entropy": cross_entropy,
            "balance": balance,
            "z": z,
            "grad_norm": self.grad_norm.item() / max(self.steps, 1),
            **describe_loads(self.loads, self.kept),
            "largest_logit": self.largest_logit.tolist(),
        }
        self.reset()
        return record


def describe_loads(loads: Tensor, kept: Tensor) -> dict[str, Any]:
    """Balance of the layers (l e): load over ideal load, MaxVio of each, dead experts, dropped share."""
    loads = loads.cpu()  # an Apple GPU has no float64
    ideal = loads.double().mean(-1, keepdim=True).clamp(min=1)
    pairs = loads.sum().item()
    return {
        "load": [[round(x, 4) for x in layer] for layer in (loads / ideal).tolist()],
        "max_violation": [round(max_violation(layer).item(), 4) for layer in loads],
        "dead": int((loads == 0).sum()),
        "dropped": 1 - kept.item() / pairs if pairs else 0.0,
    }


@dataclass(slots=True)
class Progress:
    """Where a run stands; written into every checkpoint. Step counts the optimizer steps done."""

    step: int = 0
    seconds: float = 0.0
    ema: float | None = None

    def smooth(self, loss: float) -> float:
        """Take a loss into the exponential mean over intervals."""
        self.ema = loss if self.ema is None else _EMA * self.ema + (1 - _EMA) * loss
        return self.ema


def train_line(record: dict[str, Any], steps: int, config: DecoderConfig) -> str:
    """One interval for a person and for grep: the words and their order never change."""
    step = record["step"]
    parts = [
        f"step {step:>{len(str(steps))}}/{steps} {step / steps:6.1%}",
        f"loss {record['cross_entropy']:.3f} (ema {record['ema']:.3f})",
        f"bpb {record['bits_per_byte']:.3f}",
        f"aux {_auxiliary(record, config)} z {record['z']:.1f}",
        _balance(record),
        f"lr {record['lr']:.1e} gn {record['grad_norm']:.2f}",
        f"{count(record['tokens_per_second'])} tok/s mfu {percent(record['mfu'])}",
        f"{record['memory_bytes'] / 1e9:.1f} GB",
        f"eta {duration(record['eta_seconds'])}",
    ]
    return " | ".join(parts)


def eval_line(record: dict[str, Any], steps: int) -> str:
    """The line of a validation."""
    step = f"step {record['step']:>{len(str(steps))}}/{steps}"
    return f"{step} validation | loss {record['loss']:.3f} | bpb {record['bits_per_byte']:.3f}"


def count(number: float) -> str:
    """12.3k, 4.5M, 6.7G: three digits and a unit."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def percent(share: float | None) -> str:
    """31.4%, or n/a."""
    return "n/a" if share is None else f"{share:.1%}"


def duration(seconds: float) -> str:
    """4m12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _auxiliary(record: dict[str, Any], config: DecoderConfig) -> str:
    """The balancing loss over its value at uniform routing: 1.00 is balanced."""
    if not config.router_aux_loss_coef or not record["load"]:
        return "n/a"
    layers, top_k = len(record["load"]), config.num_experts_per_tok
    uniform = uniform_value(config.router_aux_loss_convention, layers, top_k)
    return f"{record['balance'] / uniform:.2f}"


def _balance(record: dict[str, Any]) -> str:
    if not record["load"]:
        return "util n/a"
    loads = [x for layer in record["load"] for x in layer]
    return (
        f"util max {max(loads):.2f} min {min(loads):.2f} dead {record['dead']}/{len(loads)} "
        f"drop {record['dropped']:.1%}"
    )
