"""Tiny decoders with every kind of attention, and a whole decoder in loops that shares no code with ours."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe import Decoder, DecoderConfig
from moe.rotary import RopeScaling

BASE = DecoderConfig(
    vocab_size=23,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=20,
    head_dim=8,
    initializer_range=0.3,
)
LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
LONG = {
    "layer_types": "LLG",
    "sliding_window": 3,
    "no_rope_layers": (1, 1, 0),
    "use_ssmax": True,
    "use_qk_norm": True,
    "canon_set": ("AC", "AC", "AB"),
    "attention_init": "induction",
}
EXPERTS = {
    "moe_intermediate_size": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "use_selection_bias": True,
    "mlp_only_layers": (0,),
}
VARIANTS = {
    "window": {"sliding_window": 4},
    "window in some layers": {
        "sliding_window": 3,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    },
    "sinks": {"attention_sinks": True},
    "sinks and windows": {"attention_sinks": True, "sliding_window": 3},
    "norm over all heads": {"use_qk_norm": True, "qk_norm": "full", "clip_qkv": 0.7},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "a quarter of the channels turns": {"partial_rotary_factor": 0.25},
    "neighbours turn": {"rope_interleave": True},
    "multipliers": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "latents": LATENT | {"rope_interleave": True},
    "latents of queries": LATENT | {"q_lora_rank": 7, "attention_bias": True, "attention_output_bias": True},
    "no positions in one layer": {"no_rope_layers": (1, 0, 1)},
    "logits grow with the keys": {"use_ssmax": True, "use_qk_norm": True},
    "logits grow faster": {"use_ssmax": True, "ssmax_power": 2.5, "use_qk_norm": True},
    "convolutions": {"canon_set": ("ABC", "", "KC"), "canon_kernel": 3},
    "convolutions longer than the pieces": {"canon_set": ("A", "B", "C"), "canon_kernel": 6},
    "long context": LONG,
    "long context of one key head": LONG | {"num_key_value_heads": 1, "attention_sinks": True},
    "long context of experts": LONG | EXPERTS,
    "long context, full in the middle": LONG
    | {"num_hidden_layers": 4, "layer_types": "LLGL", "no_rope_layers": (1, 1, 0, 1)}
    | {"canon_set": ("AC", "", "ABC", "KC"), "attention_sinks": True},
    "latents and convolutions": LATENT | {"canon_set": ("AC", "C", "A"), "sliding_window": 3},
    "yarn": {"rope_scaling": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)},
}


def drawn(name: str) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(replace(BASE, **VARIANTS[name])).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:  # norms, biases and sinks, which start at 1 and 0
                parameter.add_(torch.randn_like(parameter) / 3)
        for bias in decoder.buffers():  # it chooses experts, and starts at 0
            bias.normal_()
    return decoder


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(1))


def by_loops(decoder: Decoder, ids: list[int]) -> Tensor:
    """The logits (s v) after each id of one row: token by token, head by head, key by key, tap by tap.

    Of grouped-query attention with the options that `DecoderConfig` documents for long context; no padding.
    """
    return layers_by_loops(decoder, [decoder.model.embed_tokens.weight[token] for token in ids])


def layers_by_loops(decoder: Decoder, stream: list[Tensor]) -> Tensor:
    """The logits (s v) after each embedding (d) of one row."""
    config, weights = decoder.config, dict(decoder.named_parameters())
    for layer in range(config.num_hidden_layers):
        of = {
            name.removeprefix(f"model.layers.{layer}."): weight
            for name, weight in (weights | dict(decoder.named_buffers())).items()
            if name.startswith(f"model.layers.{layer}.")
        }
        normed = [unit_rms(x, config) * of["input_layernorm.weight"] for x in stream]
        if "A" in config.canon_letters(layer):
            normed = convolved(normed, of["input_conv.weight"])
        stream = [x + y for x, y in zip(stream, attention_by_loops(normed, of, config, layer), strict=True)]
        normed = [unit_rms(x, config) * of["post_attention_layernorm.weight"] for x in stream]
        if "C" in config.canon_letters(layer):
            normed = convolved(normed, of["post_attention_conv.weight"])
        feed_forward = experts_by_loops if config.is_moe_layer(layer) else dense
        stream = [x + feed_forward(y, of, config) for x, y in zip(stream, normed, strict=True)]
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return torch.stack([head @ (unit_rms(x, config) * weights["model.norm.weight"]) for x in stream])


def attention_by_loops(
    xs: list[Tensor], of: dict[str, Tensor], config: DecoderConfig, layer: int
) -> list[Tensor]:
    n, g, c = config.num_attention_heads, config.kv_heads, config.head_size
    letters, window = config.canon_letters(layer), config.window(layer)
    heads = {}
    for name, convolving in (("q", "B"), ("k", "BK"), ("v", "B")):
        ys = [of[f"self_attn.{name}_proj.weight"] @ x for x in xs]
        if any(letter in letters for letter in convolving):
            ys = convolved(ys, of[f"self_attn.{name}_conv.weight"])
        heads[name] = [y.split(c) for y in ys]  # of each token
    for name in "qk":
        heads[name] = [
            [prepared(x, name, place, of, config, layer) for x in own]
            for place, own in enumerate(heads[name])
        ]
    outputs = []
    for query in range(len(xs)):
        first = 0 if window is None else max(0, query - window + 1)
        mixed = []
        for head in range(n):
            shares = []
            for key in range(first, query + 1):
                score = heads["q"][query][head] @ heads["k"][key][head * g // n]
                score = score * (config.attention_multiplier or c**-0.5)
                if config.use_ssmax and window is None:
                    score = score * of["self_attn.ssmax"][head] * math.log(query + 1) ** config.ssmax_power
                shares.append(score.exp())
            total = sum(shares) + (of["self_attn.sinks"][head].exp() if config.attention_sinks else 0)
            values = [heads["v"][key][head * g // n] for key in range(first, query + 1)]
            mixed.append(sum(share / total * value for share, value in zip(shares, values, strict=True)))
        outputs.append(of["self_attn.o_proj.weight"] @ torch.cat(mixed))
    return outputs


def prepared(
    x: Tensor, name: str, place: int, of: dict[str, Tensor], config: DecoderConfig, layer: int
) -> Tensor:
    """A query or key of one head, normalised and turned."""
    if config.use_qk_norm:
        x = unit_rms(x, config) * of[f"self_attn.{name}_norm.weight"]
    if config.no_rope_layers is not None and config.no_rope_layers[layer] == 0:
        return x
    half = len(x) // 2
    angles = [place * config.rope_theta ** (-i / half) for i in range(half)]
    cos, sin = (x.new_tensor([turn(angle) for angle in angles]) for turn in (math.cos, math.sin))
    left, right = x[:half], x[half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin])


def unit_rms(x: Tensor, config: DecoderConfig) -> Tensor:
    return x / (x.square().mean() + config.rms_norm_eps).sqrt()


def convolved(xs: list[Tensor], taps: Tensor) -> list[Tensor]:
    """y_t = x_t + sum of tap_i * x_(t - i)."""
    return [
        x + sum(taps[i] * xs[place - i] for i in range(len(taps)) if place >= i) for place, x in enumerate(xs)
    ]


def dense(x: Tensor, of: dict[str, Tensor], config: DecoderConfig, where: str = "mlp") -> Tensor:
    gate, up, down = (of[f"{where}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


def experts_by_loops(x: Tensor, of: dict[str, Tensor], config: DecoderConfig) -> Tensor:
    """Sigmoid scores; those with a bias choose, those without weigh; and the shared expert."""
    scores = torch.sigmoid(of["mlp.router.weight"] @ x)
    preference = (scores + of["mlp.router.e_score_correction_bias"]).tolist()
    chosen = sorted(range(len(scores)), key=lambda e: -preference[e])[: config.num_experts_per_tok]
    y = dense(x, of, config, "mlp.shared_expert")
    for expert in chosen:
        gate, up = of["mlp.experts.gate_up_proj"][expert].chunk(2)
        out = of["mlp.experts.down_proj"][expert] @ (F.silu(gate @ x) * (up @ x))
        y = y + scores[expert] / sum(scores[e] for e in chosen) * out
    return y
