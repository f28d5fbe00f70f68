"""Named layer sizes, and how much arithmetic they are."""

from dataclasses import dataclass, replace

from moe.config import MoEConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one MoE layer with SwiGLU experts: d model width, h expert width, e experts, k choices.

    gpt_oss: the experts have biases, a clamped SwiGLU, interleaved gate and up, and projections stored as
    (e d 2h) and (e h d). The benchmark of the kernels runs them so; that of whole layers runs plain SwiGLU.
    """

    d: int
    h: int
    e: int
    k: int
    gpt_oss: bool = False

    def with_experts(self, experts: int) -> "Shape":
        """The same layer with another number of experts: total parameters change, active ones stay."""
        return replace(self, e=experts)

    def config(self) -> MoEConfig:
        """The layer behind a softmax router; its bias is what skews the load (benchmarks/candidates.py)."""
        return MoEConfig(
            hidden_size=self.d,
            moe_intermediate_size=self.h,
            num_experts=self.e,
            num_experts_per_tok=self.k,
            router_bias=True,
        )

    @property
    def dense_width(self) -> int:
        """Width of the dense feed-forward of equal active FLOPs."""
        return self.k * self.h

    @property
    def expert_numbers(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.d * self.h


# Sizes of published models. Their routers differ; the experts' arithmetic does not, but for gpt-oss's biases.
SHAPES = {
    "cpu_small": Shape(d=512, h=256, e=16, k=4),
    "olmoe": Shape(d=2048, h=1024, e=64, k=8),
    "qwen3_30b": Shape(d=2048, h=768, e=128, k=8),
    "gpt_oss_20b": Shape(d=2880, h=2880, e=32, k=4, gpt_oss=True),
    "mixtral": Shape(d=4096, h=14336, e=8, k=2),
    "deepseek_v3": Shape(d=7168, h=2048, e=256, k=8),
}

# What the bars of SonicMoE's figure 14 were measured on (2512.14080): four models in three granularities.
SONIC_TOKENS = {"1.4b": 40960, "7b": 24576, "30b": 32768, "120b": 32768}
SONIC_SHAPES = {
    "sonic_1.4b_h256": Shape(d=768, h=256, e=128, k=8),
    "sonic_1.4b_h512": Shape(d=768, h=512, e=64, k=4),
    "sonic_1.4b_h1024": Shape(d=768, h=1024, e=32, k=2),
    "sonic_7b_h256": Shape(d=1536, h=256, e=128, k=8),
    "sonic_7b_h512": Shape(d=1536, h=512, e=64, k=4),
    "sonic_7b_h1024": Shape(d=1536, h=1024, e=32, k=2),
    "sonic_30b_h256": Shape(d=4096, h=256, e=256, k=16),
    "sonic_30b_h512": Shape(d=4096, h=512, e=128, k=8),
    "sonic_30b_h1024": Shape(d=4096, h=1024, e=64, k=4),
    "sonic_120b_h512": Shape(d=4096, h=512, e=256, k=16),
    "sonic_120b_h1024": Shape(d=4096, h=1024, e=128, k=8),
    "sonic_120b_h2048": Shape(d=4096, h=2048, e=64, k=4),
}


def sonic_tokens(name: str) -> int:
    """The number of tokens that belongs to one of SONIC_SHAPES."""
    return SONIC_TOKENS[name.split("_")[1]]


def experts_flops(pairs: int, d: int, h: int, *, backward: bool = False) -> float:
    """Floating-point operations of SwiGLU experts over p pairs: 6 p d h forward, 3 times that with backward.

    A pair meets three matrices of d h weights (gate, up, down), each a multiplication and an addition:
    2 * 3 d h. The backward pass takes two products for each one of the forward pass: one for the gradient of
    the input, one for the gradient of the weight. The activation, the weighted sum and the router (2 t d e)
    are left out. The dense layer of width k h does the same number over its t tokens: 6 t d (k h).
    """
    return 6.0 * pairs * d * h * (3 if backward else 1)
