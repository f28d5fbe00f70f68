"""How many parameters a decoder has, how many a token uses, and what a token costs; from the config alone."""

from dataclasses import dataclass

from moe.decoder_config import DecoderConfig
from moe.modality_config import Modality


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of parameters.

    total                 all; a tied head is the embedding and counts once
    active                those a token uses: `num_experts_per_tok` of the experts, and everything that all
                          tokens share: shared experts, routers, attention, norms, embedding and head. The
                          embedding counts whole, though a token looks up one row of it
    embedding             the embedding, those of modalities and, when untied, the head
    non_embedding_total   total - embedding
    non_embedding_active  active - embedding: the usual measure of a MoE model's size
    router                router weights and biases of all layers (in total and in active)
    """

    total: int
    active: int
    embedding: int
    non_embedding_total: int
    non_embedding_active: int
    router: int


def count_parameters(config: DecoderConfig) -> ParameterCount:
    """Count without building the model; the selection bias is a buffer and does not count.

    attention   2 d n c + 2 d g c; norms, biases and sinks where the config has them
    convolution w channels for each letter of `canon_set`; SSMax n
    latent      queries, d (r + c'') for latents, r n (c' + v) for keys and values, n v d
    dense       3 d f, and 2 f + d with biases            f = intermediate_size
    expert      3 d h when gated, else 2 d h; with biases 2 h + d or h + d more
    shared      3 d h', and d with a gate                 h' = config.shared_width
    router      e d, and e with a bias
    norms       2 d a layer, and d at the end
    embedding   v d, twice when untied; with modalities (w_image + w_audio) d and 4 d
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    sparse = sum(map(config.is_moe_layer, range(layers)))
    embedding = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    if (modalities := config.modalities) is not None:
        embedding += (modalities.image_width + modalities.audio_width + len(Modality)) * d
    router = sparse * _router(config)
    everywhere = layers * (_attention(config) + 2 * d) + d
    everywhere += sum(_beside_attention(config, layer) for layer in range(layers))
    dense = (layers - sparse) * _dense(config)
    common = everywhere + dense + router + sparse * _shared(config)
    total = common + sparse * config.num_experts * _expert(config)
    active = common + sparse * config.num_experts_per_tok * _expert(config)
    return ParameterCount(total + embedding, active + embedding, embedding, total, active, router)


def flops_per_token(config: DecoderConfig, sequence: int) -> float:
    """Forward floating-point operations for a token of a causal sequence, on average; training takes 3 times.

    2 per weight of every matrix a token is multiplied with: attention, router, k experts, shared experts,
    dense layers and the head (v d, tied or not). The embedding is a look-up and costs nothing; norms,
    activations, softmax, biases (below 1 %), short convolutions (2 w a channel) and the embedders of other
    modalities (2 w d) are left out.
    4 n c a layer per key seen, for q k^T and the sum of values; a token sees (sequence + 1) / 2 on average,
    fewer in a sliding window. Latents make keys and values once a token, as in training.

    The backward pass takes two products for each one of the forward pass, hence the 3. Total parameters do
    not appear: at fixed k, experts are free.

    Raises:
        ValueError: `sequence` below 1.
    """
    if sequence < 1:
        raise ValueError(f"sequence={sequence} must be at least 1.")
    d, layers = config.hidden_size, config.num_hidden_layers
    sparse = sum(map(config.is_moe_layer, range(layers)))
    values = config.head_size if config.kv_lora_rank is None else config.v_head_dim
    mixed = config.num_attention_heads * (config.head_size + values)  # channels of q k^T, and of its values
    routed = config.num_experts * d + config.num_experts_per_tok * _expert_matrices(config) + _shared(config)
    matrices = (
        layers * _attention_matrices(config)
        + (layers - sparse) * 3 * d * (config.intermediate_size or 0)
        + sparse * routed
        + config.vocab_size * d
    )
    keys = sum(_keys_seen(config.window(layer), sequence) for layer in range(layers))
    return 2.0 * matrices + 2 * mixed * keys


def _keys_seen(window: int | None, sequence: int) -> float:
    """Keys that a token of a causal sequence sees on average; `window` of them at most."""
    reach = sequence if window is None else min(window, sequence)
    return (reach * (reach + 1) / 2 + (sequence - reach) * reach) / sequence


def _attention_matrices(config: DecoderConfig) -> int:
    d, n, c = config.hidden_size, config.num_attention_heads, config.head_size
    if config.kv_lora_rank is None:
        return 2 * d * c * (n + config.kv_heads)
    queries = d * n * c if config.q_lora_rank is None else config.q_lora_rank * (d + n * c)
    latents = d * (config.kv_lora_rank + config.qk_rope_head_dim)
    heads = config.kv_lora_rank * n * (config.qk_nope_head_dim + config.v_head_dim)
    return queries + latents + heads + n * config.v_head_dim * d


def _attention(config: DecoderConfig) -> int:
    d, n, g, c = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size
    if config.kv_lora_rank is None:
        biases = n * c + 2 * g * c
        norms = (n + g if config.qk_norm == "full" else 2) * c if config.use_qk_norm else 0
    else:
        compressed = config.q_lora_rank or 0
        biases = compressed + config.kv_lora_rank + config.qk_rope_head_dim
        norms = compressed + config.kv_lora_rank
    return (
        _attention_matrices(config)
        + norms
        + (biases if config.attention_bias else 0)
        + (d if config.attention_output_bias else 0)
        + (n if config.attention_sinks else 0)
    )


def _beside_attention(config: DecoderConfig, layer: int) -> int:
    """Short convolutions and the scales of SSMax, which not every layer has."""
    d, n, g, c = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size
    channels = {"A": d, "B": (n + 2 * g) * c, "K": g * c, "C": d}
    letters = set(config.canon_letters(layer))
    if "B" in letters:
        letters.discard("K")  # B has the convolution on keys already
    taps = config.canon_kernel * sum(channels[letter] for letter in letters)
    return taps + (n if config.use_ssmax and config.window(layer) is None else 0)


def _dense(config: DecoderConfig) -> int:
    width = config.intermediate_size or 0
    return 3 * config.hidden_size * width + (2 * width + config.hidden_size if config.mlp_bias else 0)


def _expert_matrices(config: DecoderConfig) -> int:
    return (3 if config.is_gated else 2) * config.hidden_size * config.moe_intermediate_size


def _expert(config: DecoderConfig) -> int:
    up_width = (2 if config.is_gated else 1) * config.moe_intermediate_size
    return _expert_matrices(config) + (up_width + config.hidden_size if config.expert_bias else 0)


def _shared(config: DecoderConfig) -> int:
    gate = config.hidden_size if config.shared_expert_gate else 0
    return 3 * config.hidden_size * config.shared_width + gate


def _router(config: DecoderConfig) -> int:
    return config.num_experts * (config.hidden_size + int(config.router_bias))
