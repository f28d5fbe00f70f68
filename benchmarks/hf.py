"""A Hugging Face model with our experts against the same model with those of transformers.

    python -m benchmarks.hf --threads 2             about 5 minutes on 2 cores
    python -m benchmarks.hf --threads 2 --quick     one minute

The model is OLMoE (64 experts, 8 a token) at a quarter of its width and of its depth; its vocabulary is cut
so that the head keeps its 8 % of the active parameters. One model, the same weights: only the name under
which it finds its experts changes. Prints a table and the goals, writes benchmarks/results/hf_*.json.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResultError
from benchmarks.measure import Budget, Prepare, Timing, time_in_turns
from benchmarks.record import FULL, environment, headline, kind_of, save, table
from moe.hf import register

OURS, DEFAULT, EAGER = "sparse_moe", "grouped_mm", "eager"
CANDIDATES = (OURS, DEFAULT, EAGER)
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 3072,
}
GOAL = 1.2  # times as fast as transformers' default, when generating and when training
TOLERANCE = 1e-5  # of the largest logit or gradient, against eager in float32


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed: tokens in, and how many are generated; none means a training step."""

    name: str
    batch: int
    length: int
    new_tokens: int = 0
    optimizer: bool = False


CASES = (
    Case("generate 64 after 64", 1, 64, 64),
    Case("generate 64 after 64", 4, 64, 64),
    Case("read a prompt", 1, 512, 1),
    Case("forward + backward", 4, 256),
    Case("training step, AdamW", 4, 256, optimizer=True),
)
QUICK_CASES = (CASES[0], CASES[3])


def make_model(sizes: dict[str, int], seed: int = 0) -> Any:
    """A random OLMoE of these sizes. A larger spread than at the start of training: choices are then firm."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(seed)
    config = OlmoeConfig(**sizes, initializer_range=0.05, eos_token_id=None, pad_token_id=0)  # pyright: ignore
    return OlmoeForCausalLM(config).float()


def measure_cases(
    model: Any, cases: Sequence[Case], seconds: float, log: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Check, then time, each case for all candidates in turns."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    for case in cases:
        log(f"{case.name}, batch {case.batch}")
        generator = torch.Generator().manual_seed(1)
        shape = (8, case.batch, case.length)
        inputs = torch.randint(1, model.config.vocab_size, shape, generator=generator)
        check(model, case, inputs[0])
        works = {name: work_of(model, optimizer, name, case, inputs) for name in CANDIDATES}
        # Eager by itself: its backward frees gigabytes, which the next candidate would have to fetch again.
        timings = {
            name: timing
            for names, share in (((OURS, DEFAULT), seconds), ((EAGER,), seconds / 4))
            for name, timing in time_in_turns(
                {name: works[name] for name in names},
                torch.device("cpu"),
                Budget(share, warmups=1, min_rounds=3),
            ).items()
        }
        yield {"case": asdict(case), "timings": {name: asdict(t) for name, t in timings.items()}}


def check(model: Any, case: Case, ids: Tensor) -> None:
    """Refuse to time a wrong result: tokens, logits and gradients must be those of eager.

    Raises:
        WrongResultError: they are not.
    """
    outcomes = {}
    for name in CANDIDATES:
        model.set_experts_implementation(name)
        outcomes[name] = _outcome(model, case, ids)
    for name in (OURS, DEFAULT):
        for what, truth in outcomes[EAGER].items():
            error = (outcomes[name][what].double() - truth.double()).abs().max() / truth.abs().max()
            if not error <= (0 if what == "tokens" else TOLERANCE):
                raise WrongResultError(f"{name}, {case.name}: {what}: error {error:.1e} of the largest value")


def _outcome(model: Any, case: Case, ids: Tensor) -> dict[str, Tensor]:
    if case.new_tokens:
        with torch.no_grad():
            return {"logits": model(ids).logits, "tokens": _generate(model, case, ids)}
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    experts = model.model.layers[0].mlp.experts
    return {
        "logits": output.logits.detach(),
        "gradient of gate_up_proj": experts.gate_up_proj.grad.clone(),
        "gradient of the embedding": model.model.embed_tokens.weight.grad.clone(),
    }


def _generate(model: Any, case: Case, ids: Tensor) -> Tensor:
    model.eval()
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=case.new_tokens,
        min_new_tokens=case.new_tokens,
    )


def work_of(model: Any, optimizer: torch.optim.Optimizer, name: str, case: Case, inputs: Tensor) -> Prepare:
    """Generate, or train, with the experts of this name."""

    def prepare(number: int) -> Callable[[], object]:
        ids = inputs[number % len(inputs)]
        model.set_experts_implementation(name)
        model.zero_grad()
        if case.new_tokens:
            return lambda: _generate(model, case, ids)

        def train() -> None:
            model.train()
            model(ids, labels=ids).loss.backward()
            if case.optimizer:
                optimizer.step()

        return train

    return prepare


def render(record: dict[str, Any]) -> str:
    """The table and the goals as Markdown."""
    rows = []
    for result in record["results"]:
        case, timings = result["case"], result["timings"]
        rows.append(
            [
                case["name"],
                f"{case['batch']} x {case['length']}",
                *(str(Timing(**timings[name])) for name in CANDIDATES),
                f"{speedup(result, DEFAULT):.2f}",
                f"{speedup(result, EAGER):.2f}",
            ]
        )
    head = ["", "tokens", *(f"{name}, ms" for name in CANDIDATES), f"{DEFAULT} / ours", f"{EAGER} / ours"]
    goals = [
        f"- {goal['goal']}: {goal['measured']:.2f}, {'met' if goal['met'] else '**NOT met**'}"
        for goal in record["goals"]
    ]
    return "\n\n".join([headline(record["environment"]), table(head, rows), "\n".join(goals)])


def speedup(result: dict[str, Any], other: str) -> float:
    """How many times as fast as `other` ours is, by medians."""
    return result["timings"][other]["ms"] / result["timings"][OURS]["ms"]


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At least GOAL times as fast as the default in every case that generates or trains; never slower."""
    wanted = [r for r in results if r["case"]["new_tokens"] != 1]
    names = [f"{r['case']['name']}, batch {r['case']['batch']}: at least {GOAL}" for r in wanted]
    goals = [{"goal": name, "measured": speedup(r, DEFAULT)} for name, r in zip(names, wanted, strict=True)]
    slowest = min(speedup(r, DEFAULT) for r in results)
    judged = [goal | {"met": goal["measured"] >= GOAL} for goal in goals]
    return [*judged, {"goal": "never slower than the default", "measured": slowest, "met": slowest >= 1}]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 0 also when a goal is missed: the table says so."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    register()
    sizes = SIZES | {"hidden_size": options.hidden, "intermediate_size": options.hidden // 2}
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    record: dict[str, Any] = {
        "benchmark": "hf",
        "mode": options.kind,
        "environment": environment(torch.device("cpu")),
        "settings": {"family": "olmoe", "dtype": "float32", **sizes},
    }
    cases = QUICK_CASES if options.quick else CASES
    record["results"] = list(measure_cases(make_model(sizes), cases, options.seconds, log))
    record["goals"] = judge(record["results"])
    print(render(record))
    if not options.no_save:
        name = "hf" if options.kind == FULL else f"hf_{options.kind}"
        print(f"\nwritten: {save(name, record, options.results)}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hf", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cases, a minute")
    parser.add_argument("--hidden", type=int, default=512, help="width; the experts get half of it")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for one case")
    parser.add_argument("--results", type=Path, help="folder of the JSON file")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args(argv)
    options.kind = kind_of(parser, options, quick=options.quick)
    return options


if __name__ == "__main__":
    sys.exit(main())
