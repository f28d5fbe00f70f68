"""What a decoder is made of: the settings of its layers, its attention and its losses, as frozen data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moe.config import MoEConfig, require_positive
from moe.modality_config import ModalityConfig
from moe.rotary import RopeScaling

LossConvention = Literal["hf", "megatron", "olmo", "megablocks"]
LossGranularity = Literal["layer", "sequence"]
QKNorm = Literal["head", "full"]
LayerType = Literal["full_attention", "sliding_attention"]
AttentionInit = Literal["normal", "induction", "copying"]
LETTERS: dict[str, LayerType] = {"L": "sliding_attention", "G": "full_attention"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig(MoEConfig):
    """A decoder-only transformer whose feed-forward layers are dense or MoE.

    Layer i is MoE when `num_experts > 0`, i >= `first_k_dense_replace`, (i + 1) % `decoder_sparse_step` == 0
    and i is not in `mlp_only_layers`; otherwise it is a dense SwiGLU of width `intermediate_size`.

    With `kv_lora_rank` attention is multi-head latent attention (DeepSeek-V2, 2405.04434), which has no
    grouped heads and takes its head sizes from the `qk_` and `v_` keys.

    Raises:
        ValueError: as MoEConfig, and heads or widths that do not fit together.
    """

    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int

    moe_intermediate_size: int = 0
    num_experts: int = 0  # 0: every layer is dense
    num_experts_per_tok: int = 0
    num_key_value_heads: int | None = None  # None: as num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    intermediate_size: int | None = None  # dense layers; needed when there is one
    first_k_dense_replace: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    mlp_bias: bool = False  # of dense layers
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True

    # Attention
    use_qk_norm: bool = False
    qk_norm: QKNorm = "head"  # "full": over all heads at once, before they are parted (OLMoE, MiniMax-M2)
    clip_qkv: float | None = None  # queries, keys and values are clamped to its range (OLMoE)
    attention_bias: bool = False  # of q, k and v
    attention_output_bias: bool = False
    attention_sinks: bool = False  # a learnt logit a head in the softmax, without a value (gpt-oss)
    attention_multiplier: float | None = None  # scale of q . k; None: 1 / sqrt(channels of a head)
    sliding_window: int | None = None  # a query sees so many tokens, its own included
    # None: all sliding with a sliding_window, else all full. Also a pattern: "LLG" is two sliding (local)
    # layers and a full (global) one, "LLLGx2" the same twice
    layer_types: tuple[LayerType, ...] | str | None = None
    use_ssmax: bool = False  # full layers: logits grow with the logarithm of the number of keys (2501.19399)
    ssmax_power: float = 1.0  # of that logarithm; above 1, far beyond the trained length logits grow faster
    # "induction": full layers begin as induction heads; "copying": and sliding ones give back what they see
    attention_init: AttentionInit = "normal"

    # Short causal convolutions (Canon layers, 2512.17351): one word for each layer, of the letters
    # A before attention, B on queries, keys and values, K on keys alone, C before the feed-forward
    canon_set: tuple[str, ...] | None = None
    canon_kernel: int = 4  # taps: the token itself and those before it

    # Rotary embedding
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0  # the share of a head's channels that turn
    no_rope_layers: tuple[int, ...] | None = None  # for each layer 1: rotary, 0: no positions (NoPE), as HF
    rope_interleave: bool = False  # pairs are neighbours (DeepSeek, ERNIE), not the two halves

    # Multi-head latent attention
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None  # None: queries are not compressed
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    # Scales of the streams (Granite)
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # logits are divided by it

    embedding_initializer_range: float | None = None  # None: as initializer_range

    modalities: ModalityConfig | None = None  # None: text alone

    # Coefficients of the auxiliary losses in `Decoder.loss`; 0 leaves a loss out
    router_aux_loss_coef: float = 0.0
    router_aux_loss_convention: LossConvention = "megatron"
    router_aux_loss_granularity: LossGranularity = "layer"
    router_z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):  # plain data, as to_dict makes it
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(self.rope_scaling))
        if isinstance(self.modalities, Mapping):
            object.__setattr__(self, "modalities", ModalityConfig.from_dict(self.modalities))
        if isinstance(self.layer_types, str):
            object.__setattr__(self, "layer_types", layer_pattern(self.layer_types))
        MoEConfig.__post_init__(self)
        for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "kv_heads"):
            require_positive(self, name)
        for name in ("decoder_sparse_step", "max_position_embeddings", "logits_scaling"):
            require_positive(self, name)
        for name in ("intermediate_size", "sliding_window", "clip_qkv", "kv_lora_rank", "q_lora_rank"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        self._check_heads()
        self._check_layers()

    def _check_heads(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                f"{self.num_attention_heads}; change one of them or set head_dim."
            )
        if self.head_size <= 0:
            raise ValueError(f"head_dim={self.head_size} must be positive.")
        if self.rotary_size <= 0 or self.rotary_size % 2:
            raise ValueError(
                f"head_dim={self.head_size} with partial_rotary_factor={self.partial_rotary_factor} lets "
                f"{self.rotary_size} channels turn: it must be positive and even, since pairs turn."
            )
        if self.kv_lora_rank is None and self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.kv_heads}: each key head serves a whole group of query heads."
            )
        if self.kv_lora_rank is not None:
            for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                require_positive(self, name)
            for name in ("use_qk_norm", "attention_sinks", "clip_qkv", "use_ssmax", "no_rope_layers"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)}: latent attention has none.")

    def _check_layers(self) -> None:
        layers = range(self.num_hidden_layers)
        if not set(self.mlp_only_layers) <= set(layers):
            raise ValueError(
                f"mlp_only_layers={self.mlp_only_layers} must be numbers of the {len(layers)} layers."
            )
        if self.intermediate_size is None and not all(map(self.is_moe_layer, layers)):
            raise ValueError("intermediate_size is not set, but at least one layer is dense. Give its width.")
        types = self.layer_types
        if types is not None and len(types) != len(layers):
            raise ValueError(f"layer_types={types} must be one for each of the {len(layers)} layers.")
        if types is not None and "sliding_attention" in types and self.sliding_window is None:
            raise ValueError("layer_types has a sliding_attention, but sliding_window is not set.")
        self._check_convolutions()
        if self.use_ssmax and self.max_position_embeddings < 2:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} with use_ssmax=True must be at "
                f"least 2: the scale begins at 1 / log of it."
            )
        if self.ssmax_power <= 0 or (self.ssmax_power != 1 and not self.use_ssmax):
            raise ValueError(
                f"ssmax_power={self.ssmax_power} must be above 0, and 1 without use_ssmax, which has the "
                f"logarithm that it is the power of."
            )
        if self.no_rope_layers is not None and (
            len(self.no_rope_layers) != len(layers) or not set(self.no_rope_layers) <= {0, 1}
        ):
            raise ValueError(
                f"no_rope_layers={self.no_rope_layers} must be {len(layers)} numbers, 1 for a layer with "
                f"rotary embedding and 0 for one without positions."
            )

    def _check_convolutions(self) -> None:
        words = self.canon_set
        if words is not None and (
            len(words) != self.num_hidden_layers or any(set(word) - set("ABKC") for word in words)
        ):
            raise ValueError(
                f"canon_set={words} must be a word for each of the {self.num_hidden_layers} layers, of the "
                f"letters A, B, K and C; an empty word is a layer without convolutions."
            )
        if self.canon_kernel < 2:
            raise ValueError(f"canon_kernel={self.canon_kernel} must be at least 2: one tap is the token.")
        if self.kv_lora_rank is not None and any(set(word) & set("BK") for word in words or ()):
            raise ValueError(f"canon_set={words}: latent attention has no convolutions B and K.")
        if self.attention_init != "normal":
            self._check_induction()

    def _check_induction(self) -> None:
        full = [i for i in range(self.num_hidden_layers) if self.window(i) is None]
        if self.kv_lora_rank is not None or not full:
            what = "there is no full layer" if self.kv_lora_rank is None else "latent attention has no shift"
            raise ValueError(f'attention_init="{self.attention_init}": {what}. Set attention_init="normal".')
        if not all(set(self.canon_letters(i)) & set("BK") for i in full):
            raise ValueError(
                f'attention_init="{self.attention_init}" shifts the keys of full layers {full} by one token: '
                f"each needs B or K in canon_set={self.canon_set}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is its inverse. Without modalities there is no such key."""
        data = MoEConfig.to_dict(self)
        return data if self.modalities is not None else {k: v for k, v in data.items() if k != "modalities"}

    @property
    def embedding_std(self) -> float:
        """The spread of the token embeddings when they are drawn."""
        std = self.embedding_initializer_range
        return self.initializer_range if std is None else std

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Channels of one attention head; of its keys with latent attention."""
        if self.kv_lora_rank is not None:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_size(self) -> int:
        """Channels of a head that rotary embedding turns."""
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim
        return int(self.head_size * self.partial_rotary_factor)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) routes its feed-forward."""
        past_dense = layer >= self.first_k_dense_replace and layer not in self.mlp_only_layers
        return self.num_experts > 0 and past_dense and (layer + 1) % self.decoder_sparse_step == 0

    def window(self, layer: int) -> int | None:
        """How many tokens a query of layer number `layer` sees, its own included; None: all."""
        is_full = self.layer_types is not None and self.layer_types[layer] == "full_attention"
        return None if is_full else self.sliding_window

    def is_rotary(self, layer: int) -> bool:
        """Whether layer number `layer` turns queries and keys by their places."""
        return self.no_rope_layers is None or bool(self.no_rope_layers[layer])

    def canon_letters(self, layer: int) -> str:
        """Where layer number `layer` has short convolutions."""
        return "" if self.canon_set is None else self.canon_set[layer]


def layer_pattern(pattern: str) -> tuple[LayerType, ...]:
    """The types of layers that a pattern such as "LLG" or "LLLGx2" stands for.

    Raises:
        ValueError: other letters, or no number after the x.
    """
    letters, times, count = pattern.partition("x")
    is_count = count.isdecimal() and len(count) < 5 and int(count) > 0
    if not letters or set(letters) - set(LETTERS) or (times and not is_count):
        raise ValueError(
            f'layer_types={pattern!r} must be letters L (sliding) and G (full), such as "LLG", or those '
            f'and how often they come, up to 9999 times, such as "LLLGx2".'
        )
    types: list[LayerType] = [LETTERS[letter] for letter in letters]
    return tuple(types * int(count or 1))
