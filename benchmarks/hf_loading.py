"""How long a Hugging Face checkpoint takes to load, and how much memory: our decoder beside transformers.

    python -m benchmarks.hf_loading             a folder of 1 GB, made on the spot; about 5 minutes on 2 cores
    python -m benchmarks.hf_loading --quick     a fifth of its layers; one minute

The model is an OLMoE with many small experts, 64 in each of 16 layers, in float32 and in the layout of the
hub: three tensors an expert. Candidates take turns, each in a process of its own, which first imports
everything and loads a tiny model. Memory is how much the process grows at its peak; logits must agree.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.measure import peak_bytes
from benchmarks.record import FULL, QUICK, environment, headline, save, table

CANDIDATES = ("ours", "transformers")
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 148,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 256,
}
AGREE = 1e-4  # of logits in float32


def make_folder(folder: Path, **changes: int) -> int:
    """Write a random checkpoint as transformers does; returns the bytes of its tensors."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(**{**SIZES, **changes}, eos_token_id=None)  # pyright: ignore
    model = OlmoeForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def load(candidate: str, folder: str) -> Any:
    """The model of a folder, by one of the candidates."""
    if candidate == "ours":
        from moe import Decoder

        return Decoder.from_pretrained(folder)
    from transformers import OlmoeForCausalLM

    return OlmoeForCausalLM.from_pretrained(folder)


def measure_here(candidate: str, folder: str, tiny: str) -> dict[str, Any]:
    """Load in this process: seconds, peak bytes, a few logits."""
    ids = torch.arange(16)[None]
    with torch.no_grad():
        load(candidate, tiny)(ids)
    found: dict[str, Any] = {}

    def work() -> None:
        start = time.perf_counter()
        found["model"] = load(candidate, folder)
        found["seconds"] = time.perf_counter() - start

    peak = peak_bytes(work, torch.device("cpu"))
    with torch.no_grad():
        logits = found["model"](ids).logits[0, -1, :8].tolist()
    return {"seconds": found["seconds"], "peak": peak, "logits": logits}


def measure(candidate: str, folder: Path, tiny: Path) -> dict[str, Any]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.hf_loading", "--child", candidate, str(folder), str(tiny)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and the goals, write a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="the folder of the record")
    parser.add_argument("--child", nargs=3, metavar=("CANDIDATE", "FOLDER", "TINY"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure_here(*options.child)))
        return 0
    with TemporaryDirectory() as root:
        folder, tiny = Path(root) / "model", Path(root) / "tiny"
        size = make_folder(folder, **({"num_hidden_layers": 3} if options.quick else {}))
        make_folder(tiny, num_hidden_layers=1, num_experts=8)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES}
        for number in range(options.rounds):
            for name in CANDIDATES if number % 2 else CANDIDATES[::-1]:
                runs[name].append(measure(name, folder, tiny))
    ours, theirs = (torch.tensor(runs[name][0]["logits"]) for name in CANDIDATES)
    if not (ours - theirs).abs().max() <= AGREE:
        raise ValueError(f"the loaded models disagree: logits {ours.tolist()} and {theirs.tolist()}")
    kind = QUICK if options.quick else FULL
    name = "hf_loading_quick" if options.quick else "hf_loading"
    record = {
        "benchmark": "hf_loading",
        "mode": kind,
        "environment": environment(torch.device("cpu")),
        "bytes": size,
        "runs": runs,
    }
    print(headline(record["environment"]), "\n")
    print(render(record))
    print(f"\nwritten: {save(name, record, options.results)}")
    return 0


def render(record: dict[str, Any]) -> str:
    """The table of a record, and the goals of the loader."""
    seconds, peaks = (
        {name: [run[what] for run in record["runs"][name]] for name in CANDIDATES}
        for what in ("seconds", "peak")
    )
    rows = [
        (
            name,
            f"{median(seconds[name]):.2f} ({min(seconds[name]):.2f}-{max(seconds[name]):.2f})",
            f"{median(peaks[name]) / 1e6:.0f}",
            f"{median(peaks[name]) / record['bytes']:.2f}",
        )
        for name in CANDIDATES
    ]
    head = ("loaded by", "seconds (range)", "peak MB", "peak / model")
    faster = median(seconds["transformers"]) / median(seconds["ours"])
    less = median(peaks["ours"]) / median(peaks["transformers"])
    goals = [
        ("not slower than transformers", f"{faster:.2f} x as fast", "met" if faster >= 1 else "**NOT met**"),
        ("less memory at the peak", f"{less:.2f} x", "met" if less < 1 else "**NOT met**"),
    ]
    size = f"{record['bytes'] / 1e9:.2f} GB of tensors"
    return "\n".join([size, "", table(head, rows), "", table(("goal", "measured", ""), goals)])


if __name__ == "__main__":
    sys.exit(main())
