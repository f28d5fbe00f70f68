"""Where each tensor of a Hugging Face checkpoint stands in our decoder, and how a family calls ours.

Reading goes by the names alone, whatever the family: experts one by one (two conventions), stacked, or fused.
Writing goes by the family: its hub layout, which is what transformers writes, or its packed one, which is
what transformers holds in memory.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moe.decoder_config import DecoderConfig

Layout = Literal["hub", "packed"]

BLOCK = r"(?:mlp|block_sparse_moe)\."
# Pattern of what follows `model.layers.N.` -> our name. %s: which half of gate and up; {}: the expert.
IN_LAYER: Sequence[tuple[str, str]] = (
    (r"(self_attn\.[\w.]+|(?:input|post_attention)_layernorm\.weight)", r"\1"),
    (BLOCK + r"(?:gate|router|router\.layer)\.(weight|bias)", r"mlp.router.\1"),
    (BLOCK + r"(?:gate\.)?(?:moe_statics\.)?e_score_correction_bias", "mlp.router.e_score_correction_bias"),
    (BLOCK + r"(?:experts\.gate_up_proj|input_linear\.weight)", "mlp.experts.gate_up_proj"),
    (BLOCK + r"(?:experts\.down_proj|output_linear\.weight)", "mlp.experts.down_proj"),
    (BLOCK + r"experts\.((?:gate_up|down)_proj_bias)", r"mlp.experts.\1"),
    (BLOCK + r"shared_experts?\.(\w+_proj\.weight)", r"mlp.shared_expert.\1"),
    (BLOCK + r"shared_expert_gate\.weight", "mlp.shared_expert.gate.weight"),
    (r"(mlp\.(?:gate|up|down)_proj\.(?:weight|bias))", r"\1"),
)
ONE_EXPERT = re.compile(BLOCK + r"experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
PARTS: dict[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
NO_LAYER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
NEVER_READ = re.compile(r".*rotary_emb\.inv_freq")  # old checkpoints hold what follows from the config


@dataclass(frozen=True, slots=True)
class Place:
    """A part of one of our tensors: all of it, one expert, or the gate (0) or up (1) rows of one expert."""

    name: str
    expert: int | None = None
    half: int | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """This part of the whole tensor, sharing its memory."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part if self.half is None else part.chunk(2)[self.half]


def find_place(key: str) -> Place | None:
    """Where a stored tensor stands in our decoder; None for a name that no layout has."""
    if key in NO_LAYER:
        return Place(key)
    if (in_layer := LAYER.fullmatch(key)) is None:
        return None
    number, rest = in_layer.groups()
    prefix = f"model.layers.{number}."
    if (one := ONE_EXPERT.fullmatch(rest)) is not None:
        name, half = PARTS[one[2]]
        return Place(f"{prefix}mlp.experts.{name}", int(one[1]), half)
    for pattern, ours in IN_LAYER:
        if (found := re.fullmatch(pattern, rest)) is not None:
            return Place(prefix + found.expand(ours))
    return None


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a family calls what others call otherwise.

    experts  names of gate, up and down of one expert in `block.experts.N`, or of all: gate_up and down
    """

    block: str = "mlp"
    router: str = "gate"
    selection_bias: str = "gate.e_score_correction_bias"
    selection_bias_axes: int = 1
    experts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"


FUSED = ("experts.gate_up_proj", "experts.down_proj")
BIAS = "e_score_correction_bias"
ERNIE_BIAS = f"moe_statics.{BIAS}"
MIXTRAL = Names(block="block_sparse_moe", experts=("w1", "w3", "w2"), selection_bias=BIAS)
HUB: dict[str, Names] = {
    "mixtral": MIXTRAL,
    "minimax_m2": MIXTRAL,
    "qwen2_moe": Names(shared="shared_expert"),
    "granitemoe": Names(
        block="block_sparse_moe",
        router="router.layer",
        experts=("input_linear.weight", "output_linear.weight"),
    ),
    "gpt_oss": Names(router="router", experts=FUSED),
    "ernie4_5_moe": Names(selection_bias=ERNIE_BIAS, selection_bias_axes=2),
}
PACKED: dict[str, Names] = {
    "minimax_m2": Names(experts=FUSED, selection_bias=BIAS),
    "qwen2_moe": Names(experts=FUSED, shared="shared_expert"),
    "granitemoe": Names(block="block_sparse_moe", router="router", experts=FUSED),
    "gpt_oss": Names(router="router", experts=FUSED),
    "ernie4_5_moe": Names(experts=FUSED, selection_bias=f"gate.{ERNIE_BIAS}", selection_bias_axes=2),
}


def family_names(model_type: str, layout: Layout) -> Names:
    """The names of a family in one of its layouts; most are alike."""
    if layout == "hub":
        return HUB.get(model_type, Names())
    return PACKED.get(model_type, Names(experts=FUSED))


def their_names(ours: str, names: Names, config: DecoderConfig) -> Iterator[tuple[str, Place]]:
    """The tensors under which a family stores one of ours, and which part of it each one is."""
    in_layer = LAYER.fullmatch(ours)
    if in_layer is None or not in_layer[2].startswith("mlp.") or not config.is_moe_layer(int(in_layer[1])):
        yield ours, Place(ours)
        return
    prefix, rest = f"model.layers.{in_layer[1]}.{names.block}.", in_layer[2].removeprefix("mlp.")
    if rest in ("experts.gate_up_proj", "experts.down_proj"):
        yield from _expert_names(ours, prefix, rest.removeprefix("experts."), names, config)
    elif rest == "router.e_score_correction_bias":
        yield prefix + names.selection_bias, Place(ours)
    elif rest == "shared_expert.gate.weight":
        yield prefix + "shared_expert_gate.weight", Place(ours)
    else:
        rest = re.sub(r"^router\.", f"{names.router}.", rest)
        yield prefix + re.sub(r"^shared_expert\.", f"{names.shared}.", rest), Place(ours)


def _expert_names(
    ours: str, prefix: str, which: str, names: Names, config: DecoderConfig
) -> Iterator[tuple[str, Place]]:
    if len(names.experts) == 2:
        yield prefix + names.experts[0 if which == "gate_up_proj" else 1], Place(ours)
        return
    gate, up, down = names.experts
    parts = [(gate, 0), (up, 1)] if which == "gate_up_proj" else [(down, None)]
    for expert in range(config.num_experts):
        for part, half in parts:
            yield f"{prefix}experts.{expert}.{part}.weight", Place(ours, expert, half)
