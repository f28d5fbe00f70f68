"""What else is asked of long contexts: several needles, where a function is defined, loss by position."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from moe.decoder import Decoder
from moe.kv_cache import KVCache
from moe.prefill import Progress, prefill
from moe.probes.needle.ask import Asked, ask
from moe.probes.needle.codebase import build_codebase
from moe.probes.needle.evaluate import Questions, Result, make_row, trained_digests
from moe.probes.needle.haystack import build_haystack
from moe.probes.needle.haystack_text import find_text
from moe.probes.needle.needles import DEFINITION
from moe.probes.needle.record import NeedleRow
from moe.probes.needle.several import SeveralQuestion, ask_several, build_multi_value
from moe.train.runs import Run

KEYS = VALUES = 4  # of a multi-query and a multi-value question, as in RULER
HUNDRED = 100
CONTEXTS = (0, 512, 4096, 32_768, 262_144, 1_048_576)
TARGETS = 512  # bytes whose loss is measured after each context


@dataclass(frozen=True, slots=True)
class SeveralResult:
    """How many of the values asked for came back, over all haystacks."""

    task: str
    length: int
    right: int
    asked: int


@torch.no_grad()
def evaluate_several(
    run: Run, questions: Questions, length: int, *, log: Callable[[str], None] = lambda line: None
) -> list[SeveralResult]:
    """RULER's tasks of several needles (2404.06654), each answered in one suffix, answer after answer.

    multi-query  4 keys one after another        multi-value  the 4 values of one key, in any order
    hundred      100 needles, all of them asked for
    The decoder is trained on none of them but single questions.
    """
    tasks: dict[str, list[int]] = {"multi-query": [0, 0], "multi-value": [0, 0], "hundred": [0, 0]}
    each = -(-questions.queries // (KEYS * questions.haystacks))
    for number in range(questions.haystacks):
        seed = questions.seed + number
        text = find_text(
            questions.folder,
            bytes_needed=length,
            seed=seed,
            exclude_digests=trained_digests(run),
            repeat=questions.repeat,
        ).text
        plain = build_haystack(text, length=length, queries=1, seed=seed, templates=questions.templates)
        few = build_haystack(
            text, length=length, queries=1, seed=seed, templates=questions.templates, needles=HUNDRED
        )
        values, about_values = build_multi_value(text, length=length, keys=each, values=VALUES, seed=seed)
        for task, haystack, asked in (
            ("multi-query", plain, ask_several(plain, keys=KEYS, questions=each, seed=seed)),
            ("multi-value", values, about_values),
            ("hundred", few, ask_several(few, keys=HUNDRED, questions=1, seed=seed)),
        ):
            read = prefill(run.model, torch.from_numpy(haystack.ids)[None], dtype=questions.dtype)
            found = tasks[task]
            for question in asked:
                found[0] += question.count_correct(answer_steps(run.model, read.cache, question))
                found[1] += len(question.steps)
            log(f"haystack {number + 1}, {task}: {found[0]}/{found[1]} so far")
    return [SeveralResult(task, length, *found) for task, found in tasks.items()]


def answer_steps(decoder: Decoder, cache: KVCache, question: SeveralQuestion) -> list[bytes]:
    """The answers of one suffix, each after the query of its step and all answers before it."""
    device = decoder.head_weight.device
    suffix, answers, unread = cache.fork(1), list[bytes](), b""
    for step in question.steps:
        ids = torch.tensor([list(unread + step.query)], device=device)
        count = len(step.accepted[0])
        out = decoder.generate(ids, max_new_tokens=count, temperature=0.0, cache=suffix)
        answers.append(bytes(out[0, ids.shape[1] :].tolist()))
        unread = answers[-1][-1:]  # the last byte written has not been read yet
    return answers


def evaluate_code(
    run: Run,
    questions: Questions,
    package: Path,
    *,
    progress: Progress = lambda done, total, seconds: None,
) -> NeedleRow:
    """ "Where is function F defined?" over a whole package; the answer is the path of its file.

    Raises:
        ValueError: the run was not trained on the template `definition`, or as `build_codebase`.
    """
    needle = run.config.needle
    if needle is None or DEFINITION.name not in needle.templates:
        raise ValueError(
            f"{run.folder} was not trained on the template {DEFINITION.name!r}. "
            f"Train the variant code: sparse-moe needle train --variant code."
        )
    haystack = build_codebase(
        package, queries=questions.queries, seed=questions.seed, exclude_digests=trained_digests(run)
    )
    asked: Asked = ask(run.model, haystack, dtype=questions.dtype, progress=progress)
    result = Result.of_package(haystack, package, asked)
    return make_row(run, questions, len(haystack.ids), DEFINITION.name, [result], None)


@torch.no_grad()
def losses_by_context(
    run: Run,
    questions: Questions,
    *,
    longest: int,
    spots: int = 40,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, float]]:
    """Mean loss of the same held-out bytes after contexts of growing length.

    Each result has `context` (bytes), `loss` (nats a byte), `stderr` (over spots), and, but for the first,
    `change` from the context before and `change_stderr`, both paired spot by spot.
    """
    contexts = [context for context in CONTEXTS if context <= longest]
    losses: list[list[float]] = [[] for _ in contexts]
    for spot in range(spots):
        text = find_text(
            questions.folder,
            bytes_needed=contexts[-1] + TARGETS,
            seed=questions.seed + spot,
            exclude_digests=trained_digests(run),
            repeat=questions.repeat,
        ).text
        for found, context in zip(losses, contexts, strict=True):
            found.append(_loss_after(run.model, text[len(text) - TARGETS - context :], questions.dtype))
        log(f"spot {spot + 1} of {spots}: {', '.join(f'{found[-1]:.3f}' for found in losses)}")
    results = []
    for i, (context, found) in enumerate(zip(contexts, losses, strict=True)):
        result = {"context": context, **_mean(found)}
        if i:
            change = _mean([a - b for a, b in zip(found, losses[i - 1], strict=True)])
            result |= {"change": change["loss"], "change_stderr": change["stderr"]}
        results.append(result)
    return results


def _loss_after(decoder: Decoder, text: np.ndarray, dtype: torch.dtype) -> float:
    """Nats a byte of the last TARGETS - 1 bytes of a text, after all that stands before them."""
    ids = torch.from_numpy(text.astype(np.int64))[None].to(decoder.head_weight.device)
    context, targets = ids[:, :-TARGETS], ids[:, -TARGETS:]
    cache = KVCache(dtype=dtype)
    if context.shape[1]:
        cache = prefill(decoder, context, dtype=dtype).cache
    states = decoder.hidden(targets[:, :-1], cache=cache).states
    return F.cross_entropy(decoder.logits(states)[0].float(), targets[0, 1:]).item()


def _mean(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"loss": statistics.fmean(values), "stderr": spread / len(values) ** 0.5}
