"""A finished (or interrupted) run, opened again: its model, what it writes, how well it predicts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe.decoder import Decoder
from moe.train.data import Windows
from moe.train.device import autocast, choose_device, choose_precision
from moe.train.evaluate import compressors, evaluate, evaluated_text
from moe.train.files import write_json
from moe.train.run_folder import RunFolder, step_of
from moe.train.settings import RunConfig
from moe.train.tokenizer import Tokenizer, load_tokenizer
from moe.train.tokens import load_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A model with everything needed to use it. `step` is that of its checkpoint."""

    folder: Path
    config: RunConfig
    step: int
    model: Decoder
    tokenizer: Tokenizer


def open_run(folder: Path, *, checkpoint: str | None = None, device: str | None = None) -> Run:
    """Load the newest checkpoint of a run folder, or the one with this name, such as step_00000400.

    Raises:
        FileNotFoundError: no run, or no such checkpoint, in the folder.
        ValueError: a damaged file, or a device that this machine lacks.
    """
    files = RunFolder(folder)
    config = files.read_config()
    names = {path.name: path for path in files.checkpoints()}
    path = files.latest_checkpoint() if checkpoint is None else names.get(checkpoint)
    if path is None:
        wanted = "no checkpoint yet" if checkpoint is None else f"no checkpoint {checkpoint!r}"
        raise FileNotFoundError(f"{folder} has {wanted}. It has: {', '.join(names) or 'none'}.")
    place = choose_device(config.train.device if device is None else device)
    model = Decoder.from_pretrained(path, backend=config.train.backend, device=place).eval()
    return Run(folder, config, step_of(path), model, load_tokenizer(config, folder))


def evaluate_run(
    run: Run, *, max_tokens: int | None = None, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Validation loss and bits per byte beside gzip and xz on the same bytes; also written to eval.json.

    Raises:
        ValueError: the text of the run changed since it began; or as `load_tokens`.
    """
    corpus = load_tokens(run.config, tokenizer=run.tokenizer, log=log)
    RunFolder(run.folder).claim_corpus(corpus.manifest)
    windows = Windows(corpus.validation, run.config.data.sequence_length)
    limit = run.config.train.final_eval_tokens if max_tokens is None else max_tokens
    dtype = choose_precision(run.config.train, next(run.model.parameters()).device)
    result = evaluate(run.model, windows, run.tokenizer, max_tokens=limit, dtype=dtype)
    record = {
        "step": run.step,
        **asdict(result),
        **compressors(evaluated_text(windows, run.tokenizer, limit)),
    }
    write_json(run.folder / "eval.json", record)
    return record


def sample_text(
    run: Run,
    prompt: str = "",
    *,
    tokens: int = 300,
    seed: int = 0,
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> str:
    """Text that continues the prompt (included); without one, a document from its beginning."""
    start = run.tokenizer.encode(prompt.encode("utf-8")).tolist() or [run.tokenizer.end_of_text]
    device = next(run.model.parameters()).device
    dtype = choose_precision(run.config.train, device)
    with torch.inference_mode(), autocast(device, dtype):
        ids = run.model.generate(
            torch.tensor([start], device=device),
            max_new_tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            stop=[run.tokenizer.end_of_text],
            seed=seed,
        )
    return run.tokenizer.decode(ids[0].tolist()).decode("utf-8", errors="replace")
