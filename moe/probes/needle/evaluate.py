"""Recall of a trained run over haystacks of several lengths, and what is refused before anything is read."""

from collections.abc import Callable, Sequence

import torch

from moe.decoder_config import DecoderConfig
from moe.prefill import Progress, cache_bytes
from moe.probes.needle.ask import ask, unwatched
from moe.probes.needle.pooling import Result, facts_of_text, make_row
from moe.probes.needle.questions import Questions, make_haystacks
from moe.probes.needle.record import NeedleRow
from moe.train.device import memory_available
from moe.train.runs import Run

Log = Callable[[str], None]
BESIDE_CACHE = 600_000_000  # bytes: Python and torch, activations of a chunk and scores of a batch
PER_TOKEN = 3  # bytes: the text, the haystack, and one of them in the making


def evaluate_needles(
    run: Run,
    questions: Questions,
    length: int,
    *,
    name: str | None = None,
    progress: Progress = unwatched,
    answered: Progress = unwatched,
    log: Log = lambda line: None,
) -> list[NeedleRow]:
    """One row a template: recall over haystacks of `length` bytes, every question asked alone.

    name: of the run in the rows; None: that of its folder. `progress` follows the reading of each haystack,
    in bytes, `answered` its questions.

    Raises:
        ValueError: as `check_model`, `check_memory`, `make_haystacks`.
    """
    check_model(run, questions.dtype)
    check_memory(run, questions.dtype, [length])
    results: list[Result] = []
    for number, (haystack, text) in enumerate(make_haystacks(run, questions, length), start=1):
        with run.autocast():
            asked = ask(
                run.model,
                haystack,
                dtype=questions.dtype,
                batch=questions.batch,
                progress=progress,
                answered=answered,
            )
        results.append(Result.of(haystack, facts_of_text(text), asked))
        log(f"haystack {number}: {results[-1]}")
        del haystack, text, asked  # ten million tokens are not kept twice
    return [
        make_row(
            run,
            results,
            length=length,
            template=template,
            dtype=questions.dtype,
            variant=questions.variant,
            name=name,
        )
        for template in questions.templates
    ]


def check_run(run: Run, questions: Questions, lengths: Sequence[int]) -> None:
    """Refuse what cannot be measured, before anything is read: builds the shortest and the longest haystack.

    Raises:
        ValueError: no length; as `check_model` and `check_memory`; too little text; needles that do not fit,
            or are too few.
    """
    if not lengths:
        raise ValueError("there is no length to measure at. Give at least one, such as 65536.")
    check_model(run, questions.dtype)
    check_memory(run, questions.dtype, lengths)
    for length in {min(lengths), max(lengths)}:
        next(make_haystacks(run, questions, length))


def check_model(run: Run, dtype: torch.dtype) -> None:
    """Refuse a run that cannot be asked with a cache of this dtype.

    Raises:
        ValueError: a model of other tokens than bytes, or as `check_dtype`.
    """
    if run.config.data.tokenizer != "bytes":
        raise ValueError(
            f"{run.folder} was trained with data.tokenizer={run.config.data.tokenizer!r}; needles are bytes. "
            f'Train with data.tokenizer="bytes", such as the preset needle.'
        )
    check_dtype(dtype, run.device)


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a dtype that a device cannot store and convert.

    Raises:
        ValueError: it cannot.
    """
    try:
        torch.ones(2, dtype=dtype, device=device).float().sum().item()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device} has no {dtype} ({error}). Keep the cache in float32.") from None


def check_memory(run: Run, dtype: torch.dtype, lengths: Sequence[int], *, per_token: int = PER_TOKEN) -> None:
    """Refuse lengths whose haystack, `per_token` bytes a token, and cache do not fit into free memory.

    Raises:
        ValueError: one does not; says what would fit.
    """
    for length in lengths:
        for what, (size, device) in _places(run.config.model, dtype, run.device, per_token).items():
            free, needed = memory_available(device), size * length + BESIDE_CACHE
            if free is None or needed <= free:
                continue
            fits = max(free - BESIDE_CACHE, 0) // size
            cheaper = "" if dtype.itemsize < 4 else ", or keep the cache in bfloat16"
            raise ValueError(
                f"length={length} needs {needed / 1e9:.1f} GB of {what}, and {free / 1e9:.1f} GB are free: "
                f"{fits} would fit. Give a shorter length{cheaper}."
            )


def _places(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device, per_token: int = PER_TOKEN
) -> dict[str, tuple[int, torch.device]]:
    """Where memory is needed: its name, how many bytes a token takes there, and its device."""
    host, cache = torch.device("cpu"), cache_bytes(config, 1, dtype)
    if device.type == "cpu":
        return {"memory": (per_token + cache, host)}
    return {"memory": (per_token, host), f"memory of {device}": (max(cache, 1), device)}
