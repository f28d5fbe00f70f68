"""The calls whose launches are compiled: every row of each table, and on sm_90 what else can be asked for."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.launches import Launch, recorded
from benchmarks.shapes import SHAPES, Shape
from moe_triton import activation, routing, rows
from moe_triton.activation import ACTIVATIONS, GATED
from moe_triton.attention import in_parts
from moe_triton.attention_schedule import PASS_KEYS
from moe_triton.config import FOLDER, TABLES, Config, choose_config, override, read_table
from moe_triton.experts_ffn import backward, forward
from moe_triton.launch import Target
from moe_triton.settings import Settings

SMALL, LARGE, GPT_OSS = "qwen3_30b", "deepseek_v3", "gpt_oss_20b"
ATTENTION_CHANNELS = (64, 128, 256)
MANY_ROWS = 512  # of an expert, at least, for the rows of a table without a bound

Calls = dict[str, Callable[[], object]]


def collect(target: Target, shapes: Sequence[str] | None = None) -> dict[str, list[Launch]]:
    """What there is to compile for a target, by the call that needs it first; every launch once.

    shapes: only layers of these sizes, with the numbers of tokens that the target's table tells apart.
    """
    seen: set[Any] = set()
    found: dict[str, list[Launch]] = {}
    for what, call in (layers(sizes(target, shapes)) if shapes else calls(target)).items():
        with recorded(what, target) as launches:
            call()
        new = {one.key: one for one in launches if one.key not in seen}
        seen |= set(new)
        found[what] = list(new.values())
    return found


def calls(target: Target) -> Calls:
    """Every row of the target's table, one token, the routing, attention; on sm_90 what else there is."""
    found = layers(sizes(target))
    found[f"{SMALL}, 1 token"] = lambda: layer(SHAPES[SMALL], 1, train=False)
    for experts in (8, 128, 256):
        found[f"routing, {experts} experts"] = lambda experts=experts: sort(experts)
    for channels in ATTENTION_CHANNELS:
        found[f"attention, {channels} channels"] = lambda channels=channels: attention(channels)
    if target.name == "sm_90":
        found |= variations()
    return found


def layers(wanted: Iterable[tuple[str, int]]) -> Calls:
    """Layers of these (shape, tokens)."""
    return {
        f"{name}, {tokens} tokens": lambda name=name, tokens=tokens: layer_of(SHAPES[name], tokens)
        for name, tokens in wanted
    }


def layer_of(shape: Shape, tokens: int) -> None:
    """A layer as the models of this shape have it."""
    if shape.gpt_oss:
        layer(shape, tokens, Settings("clamped_swiglu", interleaved=True), bias=True, transposed=True)
    else:
        layer(shape, tokens)


def sizes(target: Target, shapes: Sequence[str] | None = None) -> list[tuple[str, int]]:
    """(shape, tokens) that take every row of the target's table, or these shapes at all its row counts."""
    table = read_table(TABLES / f"{target.name}.json")
    bounds = [row["max_rows_per_expert"] for row in table]
    many = max(MANY_ROWS, 2 * max((bound for bound in bounds if bound), default=0))
    wanted = {
        (LARGE if row["size"] == "large" else SMALL, row["max_rows_per_expert"] or many) for row in table
    }
    wanted |= {(SMALL, many)}
    if shapes:
        wanted = set(product(shapes, {height for _, height in wanted}))
    return [(name, height * SHAPES[name].e // SHAPES[name].k) for name, height in sorted(wanted)]


def covers(row: Mapping[str, Any], target: Target) -> bool:
    """Whether one of `sizes` takes this row of the target's table."""
    with mock.patch.dict(os.environ, {FOLDER: os.devnull}):
        chosen = [
            choose_config(row["pass"], target, torch.bfloat16, tokens * shape.k, shape.e, shape.d, shape.h)
            for shape, tokens in ((SHAPES[name], tokens) for name, tokens in sizes(target))
        ]
    return any(row["config"].items() <= {f: getattr(c, f) for f in c.__slots__}.items() for c in chosen)


def variations() -> Calls:
    """What a call can ask for besides a size, each once at a size where experts have many rows."""
    small, tokens = SHAPES[SMALL], MANY_ROWS * SHAPES[SMALL].e // SHAPES[SMALL].k
    few = tokens // 32
    found: Calls = {
        "float16": lambda: layer(small, tokens, dtype=torch.float16),
        "float32": lambda: layer(small, tokens, dtype=torch.float32),
        "biases": lambda: layer(small, tokens, bias=True),
        "transposed": lambda: layer(small, tokens, transposed=True),
        "transposed, few rows": lambda: layer(small, few, transposed=True),
        "interleaved": lambda: layer(small, tokens, Settings("swiglu", interleaved=True)),
        "weights on input": lambda: layer(small, tokens, Settings("swiglu", weights_on_input=True)),
        "odd sizes": lambda: layer(Shape(d=2050, h=770, e=128, k=8), tokens),
        "many experts": lambda: layer(Shape(d=256, h=128, e=512, k=2), 64),
        "persistent": lambda: persistent(small, tokens),
        "level 1": lambda: level_one(small, tokens),
        "every expert chosen": lambda: layer(Shape(d=256, h=128, e=256, k=256), 8),
        "attention, float16": lambda: attention(64, torch.float16),
        "attention, float32": lambda: [attention(c, torch.float32) for c in ATTENTION_CHANNELS],
        "attention, 96 channels": lambda: attention(96),
        "attention, unaligned": lambda: [attention(c, odd=True) for c in ATTENTION_CHANNELS],
    }
    for name in ACTIVATIONS[1:]:  # the first is everywhere else
        found[name] = lambda name=name: layer(small, tokens, Settings(name))
    heights = (16, MANY_ROWS)
    gpt_oss = SHAPES[GPT_OSS]
    return found | layers((GPT_OSS, height * gpt_oss.e // gpt_oss.k) for height in heights)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight(e: int, o: int, i: int, dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
    """(e o i), or a view of (e i o)."""
    return meta(e, i, o, dtype=dtype).mT if transposed else meta(e, o, i, dtype=dtype)


def sort(experts: int, top_k: int = 8) -> None:
    """Routing of few pairs, as in decoding, and of many."""
    for tokens in (1, 128, 8192):
        routing.sort_pairs(meta(tokens, top_k, dtype=torch.int64), experts)


def attention(channels: int, dtype: torch.dtype = torch.bfloat16, *, odd: bool = False) -> None:
    """Queries of every tile's height over a long cache, all of the keys or causal, in one pass and in two.

    odd: a cache that the accelerator cannot address.
    """
    cache = meta(1, 2, PASS_KEYS + 999, channels + odd, dtype=dtype)[..., :channels]
    for sequences, length in ((1, 1), (1, 16), (16, 16), (1, 1 << 16)):
        queries = meta(sequences, 4, length, channels, dtype=dtype)
        for first in (None, cache.shape[2] - length - 1):
            in_parts(queries, cache, cache, 1.0, first)


def layer(
    shape: Shape,
    tokens: int,
    settings: Settings = Settings("swiglu"),  # noqa: B008  frozen
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    transposed: bool = False,
    train: bool = True,
) -> None:
    """The experts of a layer forward, once to predict and once to train, and backward."""
    d, h, e = shape.d, shape.h, shape.e
    wide = 2 * h if settings.activation in GATED else h
    pairs, offsets = meta(tokens * shape.k, dtype=torch.int64), meta(e + 1, dtype=torch.int64)
    x, weights = meta(tokens, d, dtype=dtype), meta(tokens, shape.k, dtype=torch.float32)
    up = weight(e, wide, d, dtype, transposed=transposed)
    down = weight(e, d, h, dtype, transposed=transposed)
    up_bias, down_bias = (meta(e, n, dtype=dtype) if bias else None for n in (wide, d))
    arguments = (x, weights, pairs, pairs, offsets, up, down, up_bias, down_bias)
    forward(*arguments, settings, keep_pre=False)
    if train:
        _, pre = forward(*arguments, settings, keep_pre=True)
        assert pre is not None
        backward(meta(tokens, d, dtype=dtype), *arguments, pre, settings, (True,) * 4 + (bias,) * 2)


def persistent(shape: Shape, tokens: int) -> None:
    """The passes that may walk over many tiles, doing so."""
    config = Config(128, 256, 64, 8, 3, persistent=True)
    with override("down", config), override("grad_rows", config):
        layer(shape, tokens)


def level_one(shape: Shape, tokens: int) -> None:
    """Every operation that can be called alone, and its gradients."""
    grouped = import_module("moe_triton.grouped_linear")  # the package's attribute is the function
    pairs, d, h, e = tokens * shape.k, shape.d, shape.h, shape.e
    x, weights, row = meta(tokens, d), meta(tokens, shape.k), meta(pairs, dtype=torch.int64)
    offsets, matrix = meta(e + 1, dtype=torch.int64), meta(e, h, d)
    by_row, wide = meta(pairs, d), meta(pairs, h)
    with mock.patch.object(grouped, "is_plain", lambda *_: True):  # meta tensors go no further otherwise
        grouped.grouped_linear(by_row, matrix, offsets, meta(e, h))
        grouped.grouped_linear_grad_rows(wide, matrix, offsets)
        grouped.grouped_linear_grad_weight(wide, by_row, offsets)
        grouped.grouped_linear_grad_weight(wide, by_row, offsets, out=meta(e, h, d, dtype=torch.float32))
    rows.expert_sums(wide, offsets, None, 1, None, dtype=wide.dtype)
    rows.gather_rows(x, row, shape.k)
    rows.sum_rows(by_row, row, None, shape.k, None)
    rows.sum_rows(by_row, row, offsets, shape.k, weights)
    rows.combine_grads(x, by_row, weights, row, offsets)
    for name in ACTIVATIONS:
        for interleaved in (False, True) if name in GATED else (False,):
            with mock.patch.object(activation, "is_plain", lambda *_: True):
                activation.activate(wide, name, interleaved=interleaved)
            out = meta(pairs, h // 2 if name in GATED else h)
            activation._launch(wide, out, wide, out.numel(), name, interleaved, 7.0, 1.702)
