"""Everything that defines a run: four frozen dataclasses, refused at once when they contradict each other.

`RunConfig` is plain data: it goes to run_config.json and comes back equal. How presets, TOML files and
command-line overrides become one is in `moe.train.overrides`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from moe.config import did_you_mean
from moe.decoder_config import DecoderConfig
from moe.ops.choose import Backend
from moe.probes.language.config import LanguageConfig
from moe.probes.needle.config import NeedleConfig
from moe.probes.senses.config import SensesConfig

Encoding = Literal["utf-8", "bytes"]
TokenizerKind = Literal["bytes", "bpe"]
OptimizerKind = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]

BYTE_VOCABULARY = 256
LEAST_BPE_VOCABULARY = BYTE_VOCABULARY + 2  # an end of text and one merge

# Keys that may change when a run is resumed. All others decide what the next step computes.
# A changed train.steps stretches the schedule, so the steps after the resume differ from the old plan.
CHANGEABLE_ON_RESUME = (
    "data.folder",  # the corpus is compared by its content
    "data.cache",
    "train.steps",
    "train.device",
    "train.keep_checkpoints",
    "train.tensorboard",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens.

    Raises:
        ValueError: a fraction or a length that no corpus can have.
    """

    folder: str | None = None  # None: the running interpreter's own standard library
    suffixes: tuple[str, ...] = ()  # such as [".txt", ".md"]; empty: every file that is not hidden
    include_tests: bool = True  # standard library only: its tests are about 60 % of the bytes
    encoding: Encoding = "utf-8"
    tokenizer: TokenizerKind = "bytes"
    sequence_length: int = 128
    validation_fraction: float = 0.1
    cache: str | None = None  # folder of tokenised corpora; None: the user's cache folder

    def __post_init__(self) -> None:
        _check_choices(self, encoding=Encoding, tokenizer=TokenizerKind)
        _at_least(self, 1, "sequence_length")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction} must be between 0 and 1: "
                f"both splits need text."
            )
        if self.tokenizer == "bpe" and self.encoding == "bytes":
            raise ValueError('data.tokenizer="bpe" reads text; use data.encoding="utf-8".')


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizer, its schedule and the balancing rate.

    Raises:
        ValueError: a rate, a fraction or a schedule out of range.
    """

    optimizer: OptimizerKind = "adamw"  # "muon": for the matrices in the layers, each expert's by itself
    momentum: float = 0.95  # of Muon
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only
    decay_embeddings: bool = False
    router_lr_scale: float = 1.0  # learning rate of the router weights, as a multiple of lr
    clip: float = 1.0  # largest gradient norm; 0 leaves gradients alone
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    final_fraction: float = 0.1  # the last learning rate, as a multiple of lr
    decay_fraction: float = 0.2  # wsd: the last part of the run, where the rate goes down
    selection_bias_rate: float = 1e-3  # 2408.15664

    def __post_init__(self) -> None:
        _check_choices(self, optimizer=OptimizerKind, schedule=Schedule)
        _at_least(self, 0, *(f.name for f in fields(self) if f.type in (int, float)))
        for name in ("momentum", "beta1", "beta2", "final_fraction", "decay_fraction"):
            if getattr(self, name) > 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, how much at once, on what, and what is written down.

    Raises:
        ValueError: counts that do not fit together.
    """

    steps: int = 1000
    batch_size: int = 16  # sequences a step, over all accumulated parts
    accumulation: int = 1  # parts of a batch; changes memory, never the order of the data
    seed: int = 0
    device: str = "auto"  # a GPU when there is one
    precision: Precision = "auto"  # bfloat16 autocast on a GPU, float32 on a CPU
    compile: bool = False
    backend: Backend = "auto"
    log_every: int = 20
    eval_every: int = 200  # 0: only at the end
    eval_tokens: int = 32_768  # at each eval_every, spread evenly over the final ones
    final_eval_tokens: int = 1_048_576  # the first of the validation split, at the end
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    tensorboard: bool = True  # when it is installed

    def __post_init__(self) -> None:
        _check_choices(self, precision=Precision, backend=Backend)
        _at_least(self, 1, "steps", "batch_size", "accumulation", "log_every", "checkpoint_every")
        _at_least(self, 1, "keep_checkpoints", "eval_tokens", "final_eval_tokens")
        _at_least(self, 0, "seed", "eval_every")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.batch_size={self.batch_size} must be divisible by "
                f"train.accumulation={self.accumulation}: all parts have the same size."
            )
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"train.checkpoint_every={self.checkpoint_every} must be a multiple of "
                f"train.log_every={self.log_every}: a checkpoint closes a logging interval."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run.

    Raises:
        ValueError: a part that is nonsense, or parts that do not fit together.
    """

    model: DecoderConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    # Tasks: without any a run is trained on the next token; with several, steps alternate between them
    needle: NeedleConfig | None = None
    senses: SensesConfig | None = None
    language: LanguageConfig | None = None

    def __post_init__(self) -> None:
        if self.model.vocab_size < BYTE_VOCABULARY:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} must be at least {BYTE_VOCABULARY}: "
                f"every byte is a token."
            )
        if self.data.tokenizer == "bytes" and self.model.vocab_size != BYTE_VOCABULARY:
            raise ValueError(
                f'model.vocab_size={self.model.vocab_size} with data.tokenizer="bytes": bytes have exactly '
                f'{BYTE_VOCABULARY} tokens. Set model.vocab_size={BYTE_VOCABULARY} or data.tokenizer="bpe".'
            )
        if self.data.tokenizer == "bpe" and self.model.vocab_size < LEAST_BPE_VOCABULARY:
            raise ValueError(
                f'model.vocab_size={self.model.vocab_size} with data.tokenizer="bpe" must be at least '
                f"{LEAST_BPE_VOCABULARY}: {BYTE_VOCABULARY} bytes, an end of text and one merge. "
                f"Set model.vocab_size=4096."
            )
        tasks = [part for part in TASKS if getattr(self, part) is not None]
        if tasks and self.data.tokenizer != "bytes":
            raise ValueError(
                f"data.tokenizer={self.data.tokenizer!r} with a part {tasks[0]}: it is made of bytes. "
                f'Set data.tokenizer="bytes" and model.vocab_size={BYTE_VOCABULARY}.'
            )
        for part in tasks:
            if not 0 < (share := getattr(self, part).share) < math.inf:
                raise ValueError(
                    f"{part}.share={share} must be above 0. To leave the task out, leave the part out."
                )
        if self.needle is not None and self.data.sequence_length < self.needle.least_length:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} must be at least "
                f"{self.needle.least_length}: a needle and its query have to fit."
            )
        if self.senses is not None:
            check_senses(self.model, self.data, self.senses)
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} is over model.max_position_embeddings="
                f"{self.model.max_position_embeddings}. Raise that or shorten the sequence."
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data for JSON; `from_dict` is its inverse."""
        present = {part: getattr(self, part) for part in PARTS if getattr(self, part) is not None}
        plain = {p: v.to_dict() if isinstance(v, DecoderConfig) else asdict(v) for p, v in present.items()}
        return {part: _plain(values) for part, values in plain.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from nested plain data.

        Raises:
            ValueError: an unknown key (with the nearest known one), or values that do not fit together.
        """
        for part in data:
            if part not in PARTS:
                raise ValueError(f"a run has no part {part!r}.{did_you_mean(part, list(PARTS))}")
        named = [part for part in PARTS if part not in TASKS or data.get(part) is not None]
        return cls(**{part: _build(PARTS[part], part, data.get(part, {})) for part in named})


PARTS: dict[str, type] = {
    "model": DecoderConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "needle": NeedleConfig,
    "senses": SensesConfig,
    "language": LanguageConfig,
}
TASKS = ("needle", "senses", "language")  # a run may have them or not


def check_senses(model: DecoderConfig, data: DataConfig, senses: SensesConfig) -> None:
    """Refuse a model or text that needles of several senses cannot be made for.

    Raises:
        ValueError: says which.
    """
    if model.modalities is None:
        raise ValueError(
            "model.modalities is not set, with a part senses: this decoder reads text alone. "
            "Start from the preset senses, or set model.modalities={}."
        )
    if data.sequence_length < senses.least_length:
        raise ValueError(
            f"data.sequence_length={data.sequence_length} must be at least {senses.least_length}: "
            f"a needle and its query have to fit."
        )


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, with the old and the new value."""
    before, after = old.to_dict(), new.to_dict()
    return {
        f"{part}.{key}": (before.get(part, {}).get(key), after.get(part, {}).get(key))
        for part in PARTS
        for key in before.get(part, {}) | after.get(part, {})
        if before.get(part, {}).get(key) != after.get(part, {}).get(key)
    }


def _build(kind: type, part: str, values: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(f"{part} has no key {key!r}.{did_you_mean(key, known)}")
    try:
        return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except TypeError as error:
        raise ValueError(f"{part}: {error}") from None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _part_of(config: object) -> str:
    return next(part for part, kind in PARTS.items() if isinstance(config, kind))


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:  # also refuses NaN
            raise ValueError(f"{_part_of(config)}.{name}={getattr(config, name)} must be at least {least}.")


def _check_choices(config: object, **choices: Any) -> None:
    for name, choice in choices.items():
        if getattr(config, name) not in get_args(choice):
            raise ValueError(
                f"{_part_of(config)}.{name}={getattr(config, name)!r} must be one of "
                f"{list(get_args(choice))}."
            )
