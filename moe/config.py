"""What a layer is made of: frozen, validated data with Hugging Face's key names.

A config holds no device, no tensor and no callable, so it can be built, compared and written to JSON
anywhere. Nonsense is refused when the object is made.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Union, cast, get_args, get_origin

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Activation = Literal["swiglu", "geglu", "clamped_swiglu", "relu2", "gelu"]
Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupScore = Literal["max", "top2"]
CapacityPolicy = Literal["score", "position"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
RouterDType = DType | Literal["model"]
WeightsDType = DType | Literal["model", "logits"]
SharedCombination = Literal["sum", "average"]

UNIONS = (UnionType, Union)
Config = TypeVar("Config", bound="DataclassInstance")

GATED_ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "geglu", "clamped_swiglu")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """One sparse Mixture-of-Experts feed-forward layer.

    Sizes: `hidden_size` d, `moe_intermediate_size` h, `num_experts` e, `num_experts_per_tok` k.
    The defaults are the plain softmax router of Mixtral and Qwen3-MoE over SwiGLU experts.

    Raises:
        ValueError: a size, a choice or a combination that no layer can have.
    """

    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int

    # Experts
    activation: Activation = "swiglu"
    expert_bias: bool = False
    swiglu_limit: float = 7.0  # clamped_swiglu only; gpt-oss
    swiglu_alpha: float = 1.702  # clamped_swiglu only; gpt-oss
    is_transposed: bool = False  # weights stored (e, in, out), as gpt-oss does
    is_concatenated: bool = True  # False: gate and up interleaved (g0, u0, g1, u1, ...), as gpt-oss does
    # True: the routing weight multiplies what an expert reads instead of what it writes, as in Llama 4
    # (Llama4TextMoe in transformers; the key is vLLM's)
    apply_router_weight_on_input: bool = False

    # Router
    scoring_func: Score = "softmax"
    topk_before_score: bool = (
        False  # True: top-k of the logits, then the score over those k (gpt-oss, Granite)
    )
    use_selection_bias: bool = False  # a bias that chooses experts and never weighs them (2408.15664)
    n_group: int = 1
    topk_group: int = 1
    group_score: GroupScore = "top2"
    norm_topk_prob: bool = True
    norm_topk_eps: float = 0.0
    norm_topk_min: float = 0.0  # what the sum is raised to before the division (moe_norm_min of ERNIE 4.5)
    # False: a token's choices stand in the order in which torch.topk(sorted=False) finds them, as in
    # DeepSeek-V3. The choices are the same; the sum that renormalises them may differ in its last bit
    topk_sorted: bool = True
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    router_logit_softcap: float | None = None
    router_jitter_noise: float = 0.0
    jitter_experts: bool = False  # True: the experts read the jittered x too, as in Mixtral's block
    # Logits, scores and weights are computed in this dtype, or in that of x if wider. "model": in the dtype
    # that x and the router's weight have, as gpt-oss does. Under autocast the model's dtype is autocast's
    router_dtype: RouterDType = "float32"
    # The product x . weight alone; None: as router_dtype. "model" with router_dtype="float32" is what Mixtral
    # and Qwen do: a product in bfloat16, then scores in float32
    router_logits_dtype: RouterDType | None = None
    # What the experts are given; None: as router_dtype. "model": the dtype of x (Granite, ERNIE 4.5),
    # "logits": the dtype of the product (Qwen)
    routing_weights_dtype: WeightsDType | None = None

    # Shared experts: one dense FFN of width n_shared_experts * shared_expert_intermediate_size
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None  # None: as moe_intermediate_size
    shared_expert_gate: bool = False  # True: multiplied by sigmoid(x . w), as Qwen2-MoE does
    shared_expert_activation: Activation = "swiglu"  # any but clamped_swiglu
    shared_expert_combination: SharedCombination = "sum"  # "average": (routed + shared) / 2, as in Cohere 2

    # Capacity: None is dropless. It grows with the batch, so a later token can decide whether an earlier one
    # is dropped, and decoding with a cache drops other tokens than a whole forward pass does
    capacity_factor: float | None = None
    capacity_policy: CapacityPolicy = "score"

    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_experts:
            self._check_routing()

    def _check_routing(self) -> None:
        for name in ("hidden_size", "moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group"):
            require_positive(self, name)
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be between 1 and "
                f"num_experts={self.num_experts}: each token picks distinct experts. "
                f"Lower num_experts_per_tok or add experts."
            )
        if self.num_experts % self.n_group:
            raise ValueError(
                f"num_experts={self.num_experts} must be divisible by n_group={self.n_group}: "
                f"all groups have the same size."
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} must be at most n_group={self.n_group}.")
        group_size = self.num_experts // self.n_group
        if self.num_experts_per_tok > self.topk_group * group_size:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the "
                f"{self.topk_group * group_size} experts in topk_group={self.topk_group} groups of "
                f"{group_size}. Raise topk_group."
            )
        if self.n_group > 1 and self.group_score == "top2" and group_size < 2:
            raise ValueError(
                f'group_score="top2" needs at least 2 experts a group, got {group_size} '
                f'(num_experts={self.num_experts}, n_group={self.n_group}). Use group_score="max".'
            )
        if self.topk_before_score and self.n_group > 1:
            raise ValueError(
                "topk_before_score=True chooses by logits and has no expert groups; set n_group=1."
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must be positive, or None for dropless."
            )
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"router_jitter_noise={self.router_jitter_noise} must be in [0, 1).")
        if self.router_logit_softcap is not None and self.router_logit_softcap <= 0:
            raise ValueError(f"router_logit_softcap={self.router_logit_softcap} must be positive, or None.")
        if not self.is_gated and not self.is_concatenated:
            raise ValueError(
                f'activation="{self.activation}" has no gate to interleave; set is_concatenated=True.'
            )
        if self.shared_expert_intermediate_size is not None:
            require_positive(self, "shared_expert_intermediate_size")
        if self.shared_expert_gate and not self.n_shared_experts:
            raise ValueError("shared_expert_gate=True needs n_shared_experts >= 1.")
        if self.shared_expert_activation == "clamped_swiglu":
            raise ValueError(
                'shared_expert_activation="clamped_swiglu": shared experts have no limit to clamp at. '
                'Use "swiglu".'
            )

    @property
    def is_gated(self) -> bool:
        """Whether an expert has a gate beside its up-projection."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def shared_expert_width(self) -> int:
        """Width of one shared expert."""
        width = self.shared_expert_intermediate_size
        return self.moe_intermediate_size if width is None else width

    @property
    def shared_width(self) -> int:
        """Width of the one dense FFN that stands for all shared experts; 0 when there is none."""
        return self.n_shared_experts * self.shared_expert_width

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from plain data.

        Raises:
            ValueError: an unknown key (with the nearest known one), or a missing one.
        """
        return from_plain(cls, data)


def from_plain(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """A config of this class from plain data; raises as `MoEConfig.from_dict`."""
    known = [f.name for f in fields(cls)]
    for key in data:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no key {key!r}.{did_you_mean(key, known)}")
    try:
        return cls(**{key: as_tuple(value) for key, value in data.items()})
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def as_tuple(value: Any) -> Any:
    """A list, which is what JSON has for a tuple, as one; any other value as it is."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def did_you_mean(word: str, known: list[str]) -> str:
    """A hint that ends an error message: the nearest known word, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."


def require_positive(config: object, name: str) -> None:
    """Refuse a number below 1."""
    value = getattr(config, name)
    if value <= 0:
        raise ValueError(f"{name}={value} must be at least 1.")


def _check_type(name: str, value: object, kind: Any) -> None:
    """Refuse a value of another type than its field's; a whole number may stand for a real one."""
    options = get_args(kind) if get_origin(kind) in UNIONS else (kind,)
    if value is None and NoneType in options:
        return
    kind, words = options[0], _words(kind)
    if words and value not in words:
        raise ValueError(f"{name}={value!r} must be one of {words}.")
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name}={value!r} must be a list.")
        for item in cast("tuple[object, ...]", value):
            _check_type(name, item, get_args(kind)[0])
    if isinstance(kind, type) and is_dataclass(kind) and not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} must be a table of {kind.__name__} keys.")
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false.")
    if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{name}={value!r} must be a whole number.")
    if kind is float and (
        not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value)
    ):
        raise ValueError(f"{name}={value!r} must be a finite number.")


def _words(kind: Any) -> list[str]:
    """The words of a Literal, or of the Literals in a union; none for any other type."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [word for part in get_args(kind) for word in _words(part)] if get_origin(kind) in UNIONS else []


def check_fields(config: "DataclassInstance") -> None:
    """Refuse values of another type than their field's, negative numbers, and words outside their choices."""
    for field in fields(config):
        value = getattr(config, field.name)
        _check_type(field.name, value, field.type)
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{field.name}={value} must not be negative.")
