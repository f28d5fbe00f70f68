"""The metadata of a GGUF file from a config.json: sizes, routing, positions."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.hf.gguf_families import DENSE, Config, Family, find

ROTARY = ("default", "linear", "yarn", "llama3")


def settings(config: Config, family: Family, head_dim: int) -> dict[str, Any]:
    """Metadata as {key of gguf.Keys: value}.

    Raises:
        ValueError: config.json lacks a value, or scales positions in a way that llama.cpp does not have.
    """
    rotated = _rotated(config, head_dim)
    wanted = {
        **DENSE,
        "LLM.CONTEXT_LENGTH": lambda config: context_length(config),
        "Attention.KEY_LENGTH": lambda config: head_dim,
        "Attention.VALUE_LENGTH": lambda config: head_dim,
        "Rope.DIMENSION_COUNT": lambda config: rotated,
        **family.settings,
    }
    values = {
        key: source(config) if callable(source) else find(config, source) for key, source in wanted.items()
    }
    optional = ("n_group", "topk_group", "q_lora_rank")  # absent means that there is none
    missing = [s for k, s in wanted.items() if values[k] is None and isinstance(s, str) and s not in optional]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}, which a GGUF file needs. Add it.")
    return {key: value for key, value in values.items() if value is not None} | _positions(config, family)


def rope_parameters(config: Config) -> Mapping[str, Any]:
    """How positions turn and scale, as transformers 5 writes it; older files say it in two places."""
    new = config.get("rope_parameters")
    if new:
        return new
    old = config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta"), "rope_type": old.get("type", "default"), **old}


def rope_factors(config: Config, head_dim: int) -> Tensor | None:
    """What the frequencies are divided by (head_dim/2), for rope_type llama3; else None.

    High frequencies stay, low ones are divided by `factor`, between them it is a straight line in the number
    of turns over the original context (transformers, modeling_rope_utils, llama3).
    """
    rope = rope_parameters(config)
    if rope.get("rope_type") != "llama3":
        return None
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    rotated = _rotated(config, head_dim)
    exponents = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
    turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** -exponents / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / factor + kept)).float()


def context_length(config: Config) -> int | None:
    """Up to where llama.cpp computes the same: it has no window that slides, but for gpt_oss."""
    longest, window = config.get("max_position_embeddings"), sliding_window(config)
    return min(longest, window) if longest and window else longest


def sliding_window(config: Config) -> int | None:
    """The window that llama.cpp ignores, or None."""
    slides = config.get("use_sliding_window") is not False and config.get("model_type") != "gpt_oss"
    kinds = config.get("layer_types")
    if not slides or (kinds and "sliding_attention" not in kinds):
        return None
    return config.get("sliding_window") or None


def _rotated(config: Config, head_dim: int) -> int:
    part = find({**config, **rope_parameters(config)}, "partial_rotary_factor")
    return find(config, "rotary_dim") or int(head_dim * (1.0 if part is None else part))


def _positions(config: Config, family: Family) -> dict[str, Any]:
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if rope.get("rope_theta") is None:
        raise ValueError("config.json lacks rope_theta, which a GGUF file needs. Add it.")
    if kind not in ROTARY or (kind == "llama3" and family.arch != "LLAMA"):
        raise ValueError(
            f"rope_type={kind!r}: llama.cpp has no such positions in its architecture {family.arch}. "
            f"Known there: {', '.join(ROTARY[:3])}, and llama3 in LLAMA."
        )
    values: dict[str, Any] = {"Rope.FREQ_BASE": float(rope["rope_theta"])}
    if kind in ("linear", "yarn"):
        values |= {"Rope.SCALING_TYPE": kind, "Rope.SCALING_FACTOR": float(rope["factor"])}
    return values | (_yarn(rope, config, family) if kind == "yarn" else {})


def _yarn(rope: Mapping[str, Any], config: Config, family: Family) -> dict[str, Any]:
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    values: dict[str, Any] = {
        "Rope.SCALING_ORIG_CTX_LEN": original,
        "Rope.SCALING_YARN_BETA_FAST": float(rope.get("beta_fast") or 32),
        "Rope.SCALING_YARN_BETA_SLOW": float(rope.get("beta_slow") or 1),
    }
    if family.arch == "DEEPSEEK2":
        every = rope.get("mscale_all_dim")
        if not every or rope.get("mscale") != every or rope.get("attention_factor"):
            raise ValueError(
                f"yarn with mscale={rope.get('mscale')} and mscale_all_dim={every}: llama.cpp has only "
                f"the case in which they are there and equal. This model cannot be exported to GGUF."
            )
        return values | {"Rope.SCALING_YARN_LOG_MUL": 0.1 * every}
    if factor := rope.get("attention_factor"):  # llama.cpp multiplies it by yarn's own
        values["Rope.SCALING_ATTN_FACTOR"] = factor / (0.1 * math.log(rope["factor"]) + 1)
    return values
