"""What a token costs while experts are added and the active parameters stay: time, decoding, memory."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.candidates import EAGER_LIMIT_S, SLICE_BYTES_S
from benchmarks.measure import Budget, Prepare, Timing, peak_bytes, time_in_turns
from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig
from moe.kv_cache import KVCache
from moe.ops.choose import Backend, triton_obstacle
from moe.parameters import count_parameters, flops_per_token

EXPERTS = (4, 8, 16, 32, 64, 128, 256)
QUICK_EXPERTS = (4, 16, 64, 256)
PROMPT = 64  # tokens in the cache when decoding is timed


@dataclass(frozen=True, slots=True)
class CostSetting:
    """One decoder whose number of experts varies; a batch (b s) for the passes, one token to decode."""

    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    expert_width: int = 256
    top_k: int = 4
    batch: int = 8
    sequence: int = 256
    experts: tuple[int, ...] = EXPERTS
    seconds: float = 20.0

    def config(self, experts: int) -> DecoderConfig:
        """The decoder with this many experts a layer; 0: dense, of equal active FLOPs."""
        return DecoderConfig(
            vocab_size=256,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.top_k * self.expert_width,
            moe_intermediate_size=self.expert_width,
            num_experts=experts,
            num_experts_per_tok=self.top_k,
            use_qk_norm=True,
        )


@dataclass(slots=True)
class Model:
    """One row of the table: sizes from the config, then what was measured."""

    backend: str
    experts: int
    total: int
    active: int
    flops_per_token: float
    timings: dict[str, Timing] = field(default_factory=dict)
    peak_bytes: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)


def measure_cost(setting: CostSetting, device: torch.device, log: Callable[[str], None]) -> dict[str, Any]:
    """All models timed in turns, in three modes; and the peak memory of a training pass without optimizer.

    Dense stands first. The models live side by side, so that noise hits all of them alike.
    """
    rows, decoders = _models(setting, device)
    ids = _tokens(setting, device)
    for mode, work in (("forward", _forward), ("forward_backward", _forward_backward), ("decode", _Decoding)):
        log(f"cost: {mode}")
        works: dict[str, Prepare] = {}
        for name, decoder in decoders.items():
            reason = _why_not(rows[name], setting, mode)
            if reason:
                rows[name].skipped[mode] = reason
            else:
                works[name] = work(decoder, ids)
        budget = Budget(setting.seconds, max_rounds=64 if mode == "decode" else 20)
        for name, timing in time_in_turns(works, device, budget).items():
            rows[name].timings[mode] = timing
    log("cost: memory")
    for name, decoder in decoders.items():
        if "forward_backward" in rows[name].timings:
            decoder.zero_grad(set_to_none=True)
            held = sum(parameter.nbytes for parameter in decoder.parameters())
            taken = peak_bytes(_forward_backward(decoder, ids)(0), device)
            rows[name].peak_bytes = None if taken is None else held + taken
            decoder.zero_grad(set_to_none=True)
    return {"setting": asdict(setting), "models": [asdict(row) for row in rows.values()]}


def backends(device: torch.device) -> list[Backend]:
    """Every backend that runs here, the specification last."""
    fast: list[Backend] = ["torch"] if triton_obstacle(device) else ["torch", "triton"]
    return [*fast, "reference"]


def _models(setting: CostSetting, device: torch.device) -> tuple[dict[str, Model], dict[str, Decoder]]:
    """Rows and decoders by name. All backends share the weights of a size."""
    rows: dict[str, Model] = {}
    decoders: dict[str, Decoder] = {}
    for experts in (0, *setting.experts):
        config, first = setting.config(experts), None
        for backend in backends(device) if experts else backends(device)[:1]:
            name = f"{backend} {experts}"
            torch.manual_seed(0)
            decoder = Decoder(config, backend=backend)
            if first is not None:
                decoder.load_state_dict(first.state_dict(), assign=True)
            first = first or decoder.to(device)
            count = count_parameters(config)
            flops = flops_per_token(config, setting.sequence)
            rows[name] = Model(backend if experts else "dense", experts, count.total, count.active, flops)
            decoders[name] = decoder
    return rows, decoders


def _tokens(setting: CostSetting, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (setting.batch, setting.sequence), generator=generator).to(device)


def _why_not(row: Model, setting: CostSetting, mode: str) -> str | None:
    """The reference slices the stack of experts; backward, a slice makes a gradient of the whole stack."""
    if row.backend != "reference" or mode != "forward_backward":
        return None
    stack_bytes = 4 * 3 * setting.hidden_size * setting.expert_width * row.experts
    seconds = setting.layers * row.experts * stack_bytes / SLICE_BYTES_S
    return f"would take about {seconds:.0f} s a run" if seconds > EAGER_LIMIT_S / 4 else None


def _forward(decoder: Decoder, ids: Tensor) -> Prepare:
    def run() -> None:
        with torch.no_grad():
            decoder.loss(ids, ids)

    return lambda number: run


def _forward_backward(decoder: Decoder, ids: Tensor) -> Prepare:
    def prepare(number: int) -> Callable[[], object]:
        decoder.zero_grad(set_to_none=True)
        return lambda: decoder.loss(ids, ids).total.backward()

    return prepare


class _Decoding:
    """One generated token a run, each on a longer cache and with another token, so that experts change."""

    def __init__(self, decoder: Decoder, ids: Tensor) -> None:
        self.decoder, self.ids = decoder, ids.flatten()
        self.cache: KVCache | None = None

    def __call__(self, number: int) -> Callable[[], object]:
        last = len(self.ids) - 1
        if self.cache is None or self.cache.length >= last:
            self.cache = KVCache(capacity=last + 1)
            with torch.no_grad():
                self.decoder(self.ids[None, :PROMPT], cache=self.cache)
        token = self.ids[None, self.cache.length : self.cache.length + 1]

        def run() -> None:
            with torch.no_grad():
                self.decoder(token, cache=self.cache)

        return run


def quick(setting: CostSetting) -> CostSetting:
    """Fewer sizes, less time for each."""
    return replace(setting, experts=QUICK_EXPERTS, seconds=5.0)
