"""The same widths in transformers: its attention, its cache, every layer full, as its Qwen3-MoE has them."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.long_context_reading import Bench
from benchmarks.measure import Budget, time_in_turns
from moe.decoder_config import DecoderConfig
from moe.probes.needle.ask import answer
from moe.probes.needle.haystack import Question

OURS, THEIRS = "ours", "transformers"


def why_absent() -> str | None:
    """Why transformers is not compared, or None."""
    return None if find_spec("transformers") else "transformers is not installed"


def make_model(config: DecoderConfig, device: torch.device) -> Any:
    """A random Qwen3-MoE of the widths, heads and experts of a decoder; no windows, no convolutions."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    theirs = Qwen3MoeConfig(  # pyright: ignore[reportCallIssue]: a dataclass made by a decorator
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,  # pyright: ignore[reportCallIssue]
        moe_intermediate_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        max_position_embeddings=1 << 20,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(theirs)
    return model.to(device).eval()


@torch.no_grad()
def measure_peer(bench: Bench, length: int, question: Question) -> dict[str, Any]:
    """Reading a text in one pass, and one answer of a few digits from the cache; both models in turns."""
    model = make_model(bench.decoder.config, bench.device)
    ids = bench.ids(length).to(bench.device, torch.int64)
    query = torch.tensor([list(question.query)], device=bench.device)
    cache = bench.read(length).cache
    theirs = read(model, ids)
    reading: dict[str, Callable[[], object]] = {
        OURS: partial(bench.read, length),
        THEIRS: partial(read, model, ids),
    }
    answering: dict[str, Callable[[], object]] = {
        OURS: partial(answer, bench.decoder, cache, [question]),
        THEIRS: partial(answer_greedily, model, theirs, query, len(question.answer)),
    }
    budget = Budget(bench.seconds, warmups=1, min_rounds=3, max_rounds=20)
    timings = {
        what: time_in_turns(
            {name: lambda number, work=work: work for name, work in works.items()}, bench.device, budget
        )
        for what, works in (("reading", reading), ("answering", answering))
    }
    return {
        "length": length,
        "layers": model.config.num_hidden_layers,
        **{what: {name: asdict(t) for name, t in found.items()} for what, found in timings.items()},
    }


def read(model: Any, ids: Tensor) -> Any:
    """The cache after a text (1 T) in one pass; logits of its last token only."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    _step(model, ids, cache)
    return cache


def answer_greedily(model: Any, cache: Any, query: Tensor, steps: int) -> list[int]:
    """As many tokens as an answer has. The cache keeps them: a few more among thousands cost nothing."""
    tokens, found = query, []
    for _ in range(steps):
        tokens = _step(model, tokens, cache).argmax(-1, keepdim=True)
        found.append(int(tokens))
    return found


def _step(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Logits (1 v) of what follows. The cache by its place: its name differs between versions."""
    return model(tokens, None, None, cache, use_cache=True, logits_to_keep=1).logits[:, -1]
