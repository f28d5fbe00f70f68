"""The same needle, alone, 64 tokens before its question: what can be read when nothing has to be found."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moe.decoder import Decoder
from moe.generate import evaluating
from moe.kv_cache import KVCache
from moe.probes.needle.ask import BATCH, groups
from moe.probes.senses.bank import Bank
from moe.probes.senses.filler import draw_filler
from moe.probes.senses.haystack import SensesQuestion
from moe.probes.senses.tokens import Tokens

DISTANCE = 64  # tokens of filler between the needle and its question
BEFORE = 64  # and so many, or more, before the needle


@torch.no_grad()
def answer_near(
    decoder: Decoder,
    bank: Bank,
    text: NDArray[np.uint8],
    questions: Sequence[SensesQuestion],
    *,
    seed: int,
    batch: int = BATCH,
) -> tuple[bytes, ...]:
    """The answers when each needle, of the very same frames, stands alone in fresh filler.

    Raises:
        FloatingPointError: the decoder computes NaN.
    """
    rng = np.random.default_rng([seed, DISTANCE])
    device = decoder.head_weight.device
    size = BEFORE + DISTANCE + max(len(question.needle.tokens) for question in questions)
    given: dict[int, bytes] = {}
    for group in groups(questions, batch):
        contexts = [_context(rng, bank, text, questions[i].needle.tokens, size) for i in group]
        dense = zip(*(context.interleaved(bank).dense() for context in contexts), strict=True)
        embeds = decoder.embed(*(torch.stack(rows).to(device) for rows in dense))
        cache = KVCache(capacity=size + 32)
        with evaluating(decoder):
            decoder.hidden(inputs_embeds=embeds, cache=cache, at=0)
        queries = torch.tensor([list(questions[i].query) for i in group], device=device)
        new = max(len(questions[i].answer) for i in group)
        out = decoder.generate(queries, max_new_tokens=new, temperature=0.0, cache=cache)
        written = out[:, queries.shape[1] :].tolist()
        given |= {i: bytes(row[: len(questions[i].answer)]) for i, row in zip(group, written, strict=True)}
    return tuple(given[i] for i in range(len(questions)))


def _context(
    rng: np.random.Generator, bank: Bank, text: NDArray[np.uint8], needle: Tokens, size: int
) -> Tokens:
    filler, _ = draw_filler(rng, bank, text, size - len(needle))
    before = len(filler) - DISTANCE
    return Tokens.concatenate([filler[:before], needle, filler[before:]])
