"""The tensors of a checkpoint as llama.cpp wants them: experts stacked, halves apart, rows in its order.

Every change of a tensor is a function of tensors: run on `meta` tensors it tells the shape, and run on the
real ones, one result at a time, the bytes.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from moe.hf.gguf_families import NUM_EXPERTS, Config, Family, find

Change = Callable[..., Tensor]
WEIGHT_OF_EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<expert>\d+)\.(?P<name>\w+\.weight)")
LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One tensor of the GGUF file: `change(*sources)`. `key` is what Hugging Face would call it."""

    key: str
    sources: tuple[Tensor, ...]
    change: Change

    def build(self) -> Tensor:
        """The tensor itself."""
        return self.change(*self.sources)

    @property
    def is_mxfp4(self) -> bool:
        """Whether `build` returns bytes of blocks, not numbers."""
        return isinstance(self.change, partial) and self.change.func is pack_mxfp4

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, without building it."""
        return tuple(self.change(*(source.to("meta") for source in self.sources)).shape)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the changes need to know of a model."""

    num_heads: int
    num_key_value_heads: int
    key_nope: int
    permuted: bool
    transposed: bool  # experts as (e in out) with gate and up rows in turns: gpt_oss


def pieces(tensors: Mapping[str, Tensor], config: Config, family: Family) -> Iterator[Piece]:
    """The tensors of a hub or packed checkpoint, in the order of the layers.

    Raises:
        ValueError: experts that are missing or too many.
    """
    sizes = Sizes(
        num_heads=config["num_attention_heads"],
        num_key_value_heads=find(config, "num_key_value_heads | num_attention_heads"),
        key_nope=config.get("qk_nope_head_dim") or 0,
        permuted=family.permuted,
        transposed=family.arch == "GPT_OSS",
    )
    stacks: dict[str, dict[int, Tensor]] = {}
    for key in sorted(tensors, key=_place):
        if expert := WEIGHT_OF_EXPERT.fullmatch(key):
            stack = stacks.setdefault(f"{expert['stack']}.{expert['name']}", {})
            stack[int(expert["expert"])] = tensors[key]
        else:
            yield from _changed(key, tensors, sizes)
    for key, stack in stacks.items():
        if sorted(stack) != list(range(len(stack))) or len(stack) != find(config, NUM_EXPERTS):
            raise ValueError(
                f"{key} has the experts {sorted(stack)}, but config.json says {find(config, NUM_EXPERTS)} "
                f"of them: the folder is incomplete, or the two do not belong together."
            )
        yield Piece(key, tuple(stack[i] for i in range(len(stack))), stack_experts)


def _place(key: str) -> tuple[int, str]:
    layer = LAYER.match(key)
    return (int(layer[1]) if layer else -1, key)


def _changed(key: str, tensors: Mapping[str, Tensor], sizes: Sizes) -> Iterator[Piece]:
    """A tensor on its own, by the first rule that fits its key."""
    if key.removesuffix("_scales") + "_blocks" in tensors:
        return  # the blocks bring them along
    for pattern, rule in RULES:
        if found := re.search(pattern, key):
            sources = (tensors[key], *_scales(key, tensors))
            for new_key, change in rule(sizes).items():
                yield Piece(key[: found.start()] + found.expand(new_key), sources, change)
            return
    yield Piece(key, (tensors[key],), same)


def _scales(key: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The scales of MXFP4 blocks; nothing for other tensors."""
    if not key.endswith("_blocks"):
        return ()
    name = key.removesuffix("blocks") + "scales"
    if name not in tensors:
        raise ValueError(f"{name} is missing: {key} means nothing without it. Copy the whole folder again.")
    return (tensors[name],)


# What happens to a tensor


def same(tensor: Tensor) -> Tensor:
    """Nothing."""
    return tensor


def stack_experts(*experts: Tensor) -> Tensor:
    """e times (o i) -> (e o i)."""
    return torch.stack(experts)


def permute_heads(tensor: Tensor, *, num_heads: int) -> Tensor:
    """Rows of queries or keys from (half, pair) to (pair, half) within each head; a weight or a bias."""
    return rearrange(tensor, "(heads half pair) ... -> (heads pair half) ...", heads=num_heads, half=2)


def chunk(tensor: Tensor, *, part: int, dim: int) -> Tensor:
    """The first or the second half along an axis."""
    return tensor.chunk(2, dim)[part]


def take_turns(tensor: Tensor, *, part: int, transposed: bool) -> Tensor:
    """Even (0) or odd (1) rows of (e 2h d), stored as (e d 2h) where `transposed`; or of a bias (e 2h)."""
    rows = tensor.mT if transposed else tensor
    return rows[:, part::2]


def transpose(tensor: Tensor) -> Tensor:
    """(e i o) -> (e o i)."""
    return tensor.mT


def key_of_latent(kv_b: Tensor, *, heads: int, nope: int) -> Tensor:
    """The part of kv_b_proj that makes keys, transposed: llama.cpp moves queries into the latent space."""
    return rearrange(kv_b, "(heads rows) rank -> heads rows rank", heads=heads)[:, :nope].mT


def value_of_latent(kv_b: Tensor, *, heads: int, nope: int) -> Tensor:
    """The part of kv_b_proj that makes values."""
    return rearrange(kv_b, "(heads rows) rank -> heads rows rank", heads=heads)[:, nope:]


def flatten(tensor: Tensor) -> Tensor:
    """(1 e) or (e) -> (e)."""
    return tensor.reshape(-1)


def pack_mxfp4(blocks: Tensor, scales: Tensor, *, part: int | None) -> Tensor:
    """Blocks (e o g 16) and scales (e o g) in the order of ggml, (e o 17 g) bytes; part: of rows in turns.

    A byte holds two neighbours on disk, low half first; in ggml element i and element i + 16.
    """
    if part is not None:
        blocks, scales = blocks[:, part::2], scales[:, part::2]
    low, high = blocks & 0xF, blocks >> 4
    values = torch.stack([low, high], dim=-1)  # (e o g 16 2), in order of the elements
    first, second = rearrange(values, "e o g (half pairs) two -> half e o g (pairs two)", half=2)
    packed = torch.cat([rearrange(scales, "e o g -> e o g 1"), first | (second << 4)], dim=-1)
    return rearrange(packed, "e o g bytes -> e o (g bytes)")


def _permutation(heads: str) -> Callable[[Sizes], dict[str, Change]]:
    def rule(sizes: Sizes) -> dict[str, Change]:
        count = getattr(sizes, heads)
        return {r"\g<0>": partial(permute_heads, num_heads=count) if sizes.permuted else same}

    return rule


def _halves(gate: str, up: str, change: Change, **options: Any) -> Callable[[Sizes], dict[str, Change]]:
    return lambda sizes: {
        gate: partial(change, part=0, **options),
        up: partial(change, part=1, **options),
    }


def _gate_up(sizes: Sizes) -> dict[str, Change]:
    change = partial(take_turns, transposed=True) if sizes.transposed else partial(chunk, dim=1)
    return {
        "mlp.experts.gate_proj.weight": partial(change, part=0),
        "mlp.experts.up_proj.weight": partial(change, part=1),
    }


def _latent(sizes: Sizes) -> dict[str, Change]:
    options = {"heads": sizes.num_heads, "nope": sizes.key_nope}
    return {
        ".k_b_proj.weight": partial(key_of_latent, **options),
        ".v_b_proj.weight": partial(value_of_latent, **options),
    }


RULES: list[tuple[str, Callable[[Sizes], dict[str, Change]]]] = [
    (r"\.q_proj\.(weight|bias)$", _permutation("num_heads")),
    (r"\.k_proj\.(weight|bias)$", _permutation("num_key_value_heads")),
    (r"\.kv_b_proj\.weight$", _latent),
    (r"(mlp|block_sparse_moe)\.experts\.gate_up_proj$", _gate_up),
    (r"\.gate_up_proj_bias$", _halves(".gate_proj.bias", ".up_proj.bias", take_turns, transposed=False)),
    (r"\.gate_up_proj_blocks$", _halves(".gate_proj.weight", ".up_proj.weight", pack_mxfp4)),
    (
        r"(mlp|block_sparse_moe)\.experts\.down_proj$",
        lambda sizes: {"mlp.experts.down_proj.weight": transpose if sizes.transposed else same},
    ),
    (r"\.down_proj_bias$", lambda sizes: {".down_proj.bias": same}),
    (r"\.down_proj_blocks$", lambda sizes: {".down_proj.weight": partial(pack_mxfp4, part=None)}),
    (
        r"block_sparse_moe\.input_linear\.weight$",
        _halves("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight", chunk, dim=1),
    ),
    (
        r"shared_mlp\.input_linear\.weight$",
        _halves("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", chunk, dim=0),
    ),
    (r"(block_sparse_moe\.router)\.weight$", lambda sizes: {r"\1.layer.weight": same}),
    (
        r"(\.gate)?(\.moe_statics)?\.e_score_correction_bias$",
        lambda sizes: {".gate.e_score_correction.bias": flatten},
    ),
    (r"\.sinks$", lambda sizes: {r"\g<0>.weight": same}),
]
