"""The plan: (token, choice) pairs sorted by expert, stably, with no wait for the device.

experts (t k) -> pair_of_row (p), row_of_pair (p), offsets (e+1). The row of a pair is the number of pairs
that come before it; an id outside 0..e-1 counts as expert e, which comes last and runs nowhere.

Few pairs: one launch, in which every pair compares itself with every other. Many pairs: they are counted in
chunks, the counts are summed over chunks and over experts, and a pair adds up the pairs of earlier experts,
those of its expert in earlier chunks, and those of its expert before it in its own chunk.
Everything is a count of integers, so the result never varies, and the launches depend on shapes alone.

Tiles have the pairs that are compared along their first axis, queries along their second: each thread then
keeps the count of its own query, where the other way round every element needs a sum over the warp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .checks import require_rank
from .launch import ceil_div, is_plain, launch, power_of_2
from .replay import replayed

FEW_PAIRS = 4096  # p² comparisons cost less than three more launches up to here


@triton.jit
def load_experts(experts_ptr, pairs, P, E):
    """The experts of some pairs; e for every id outside 0..e-1 and for pairs that do not exist."""
    is_pair = pairs < P
    experts = tl.load(experts_ptr + pairs, mask=is_pair, other=0)
    return tl.where(is_pair & (experts >= 0) & (experts < E), experts, E).to(tl.int32)


@triton.jit(do_not_specialize=["P", "E"])
def sort_few_kernel(
    experts_ptr, pair_of_row_ptr, row_of_pair_ptr, offsets_ptr,  # (p), (p), (p), (e+1)
    P, E, QUERIES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Each of p + e + 1 queries counts the pairs before it: pair i of an expert has the key expert * p + i.

    A query is a pair, which thereby finds its row, or the start of an expert, which has the key expert * p.
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    expert = tl.where(query < P, load_experts(experts_ptr, query, P, E), query - P)
    key = expert * P + tl.where(query < P, query, 0)
    count = tl.zeros((QUERIES,), tl.int64)
    for start in range(0, P, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        keys = load_experts(experts_ptr, pairs, P, E) * P + pairs
        count += tl.sum((keys[:, None] < key[None, :]).to(tl.int32), 0)
    tl.store(row_of_pair_ptr + query, count, mask=query < P)
    tl.store(pair_of_row_ptr + count, query.to(tl.int64), mask=query < P)
    tl.store(offsets_ptr + (query - P), count, mask=(query >= P) & (query - P <= E))


@triton.jit(do_not_specialize=["P", "E"])
def count_kernel(experts_ptr, counts_ptr, P, E, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """counts (chunks e+1): pairs of each expert in each chunk; BINS experts a program."""
    chunk, first = tl.program_id(0), tl.program_id(1) * BINS
    experts = load_experts(experts_ptr, chunk * CHUNK + tl.arange(0, CHUNK), P, E) - first
    counts = tl.histogram(experts, BINS, mask=(experts >= 0) & (experts < BINS))
    bins = first + tl.arange(0, BINS)
    tl.store(counts_ptr + chunk.to(tl.int64) * (E + 1) + bins, counts, mask=bins <= E)


@triton.jit(do_not_specialize=["CHUNKS", "E"])
def sum_chunks_kernel(
    counts_ptr, starts_ptr, totals_ptr, CHUNKS, E, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """starts (chunks e+1): pairs of each expert in all earlier chunks; totals (e+1): in all of them."""
    experts = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    is_expert = (experts <= E)[None, :]
    earlier = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, CHUNKS, ROWS):
        chunks = (start + tl.arange(0, ROWS))[:, None]
        at = chunks.to(tl.int64) * (E + 1) + experts[None, :]
        counts = tl.load(counts_ptr + at, mask=is_expert & (chunks < CHUNKS), other=0)
        starts = earlier[None, :] + tl.cumsum(counts, 0) - counts
        tl.store(starts_ptr + at, starts, mask=is_expert & (chunks < CHUNKS))
        earlier += tl.sum(counts, 0)
    tl.store(totals_ptr + experts, earlier, mask=experts <= E)


@triton.jit(do_not_specialize=["E"])
def sum_experts_kernel(totals_ptr, offsets_ptr, E, BLOCK: tl.constexpr):
    """offsets (e+1): pairs of all earlier experts, from the totals (e+1)."""
    earlier = tl.zeros((), tl.int64)
    for start in range(0, E + 1, BLOCK):
        experts = start + tl.arange(0, BLOCK)
        totals = tl.load(totals_ptr + experts, mask=experts <= E, other=0).to(tl.int64)
        tl.store(offsets_ptr + experts, earlier + tl.cumsum(totals, 0) - totals, mask=experts <= E)
        earlier += tl.sum(totals)


@triton.jit(do_not_specialize=["P", "E"])
def place_kernel(
    experts_ptr, starts_ptr, offsets_ptr, pair_of_row_ptr, row_of_pair_ptr,
    P, E, CHUNK: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Row of a pair = offset of its expert + that expert's pairs in earlier chunks + those before it here."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    chunk = tl.program_id(0) // (CHUNK // QUERIES)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    expert, experts = load_experts(experts_ptr, query, P, E), load_experts(experts_ptr, pairs, P, E)
    is_before = (experts[:, None] == expert[None, :]) & (pairs[:, None] < query[None, :])
    rank = tl.sum(is_before.to(tl.int32), 0)
    rank += tl.load(starts_ptr + chunk.to(tl.int64) * (E + 1) + expert)
    row = tl.load(offsets_ptr + expert) + rank
    tl.store(row_of_pair_ptr + query, row, mask=query < P)
    tl.store(pair_of_row_ptr + row, query.to(tl.int64), mask=query < P)


@replayed()
def sort_pairs(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_by_expert` as launches, for tensors on any device."""
    experts = experts.contiguous()
    pairs = experts.numel()
    pair_of_row = experts.new_empty(pairs, dtype=torch.int64)
    row_of_pair = experts.new_empty(pairs, dtype=torch.int64)
    offsets = experts.new_empty(num_experts + 1, dtype=torch.int64)
    sort = _sort_few if pairs <= FEW_PAIRS and pairs * (num_experts + 2) < 2**31 else _sort_many
    sort(experts, pair_of_row, row_of_pair, offsets)
    return pair_of_row, row_of_pair, offsets


def _sort_few(experts: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, offsets: Tensor) -> None:
    pairs, num_experts = experts.numel(), offsets.numel() - 1
    queries, block, num_warps = (16, 64, 2) if pairs <= 64 else (32, 1024, 8)
    arguments = {
        "experts_ptr": experts,
        "pair_of_row_ptr": pair_of_row,
        "row_of_pair_ptr": row_of_pair,
        "offsets_ptr": offsets,
        "P": pairs,
        "E": num_experts,
        "QUERIES": queries,
        "PAIRS": block,
    }
    grid = (ceil_div(pairs + num_experts + 1, queries),)
    launch(sort_few_kernel, grid, arguments, num_warps=num_warps)


def _sort_many(experts: Tensor, pair_of_row: Tensor, row_of_pair: Tensor, offsets: Tensor) -> None:
    pairs, num_experts = experts.numel(), offsets.numel() - 1
    chunk = min(max(256, power_of_2(num_experts)), 2048)  # more experts, fewer counts
    chunks, bins = ceil_div(pairs, chunk), min(power_of_2(num_experts + 1), 1024)
    counts = experts.new_empty(chunks, num_experts + 1, dtype=torch.int32)
    starts = torch.empty_like(counts)
    totals = experts.new_empty(num_experts + 1, dtype=torch.int32)
    sizes = {"P": pairs, "E": num_experts, "CHUNK": chunk}
    launch(
        count_kernel,
        (chunks, ceil_div(num_experts + 1, bins)),
        {"experts_ptr": experts, "counts_ptr": counts, **sizes, "BINS": bins},
    )
    columns = {"counts_ptr": counts, "starts_ptr": starts, "totals_ptr": totals, "CHUNKS": chunks}
    arguments = {**columns, "E": num_experts, "ROWS": 256, "EXPERTS": 8}
    launch(sum_chunks_kernel, (ceil_div(num_experts + 1, 8),), arguments)
    arguments = {"totals_ptr": totals, "offsets_ptr": offsets, "E": num_experts, "BLOCK": 1024}
    launch(sum_experts_kernel, (1,), arguments)
    queries = min(64, 2**15 // chunk)
    results = {"offsets_ptr": offsets, "pair_of_row_ptr": pair_of_row, "row_of_pair_ptr": row_of_pair}
    arguments = {"experts_ptr": experts, "starts_ptr": starts, **results, **sizes, "QUERIES": queries}
    launch(place_kernel, (ceil_div(pairs, queries),), arguments, num_warps=8)


@torch.library.custom_op("moe_triton::sort_by_expert", mutates_args=())
def _sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return sort_pairs(experts, num_experts)


@_sort_by_expert.register_fake
def _(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (experts.numel(), experts.numel(), num_experts + 1)
    pair_of_row, row_of_pair, offsets = (experts.new_empty(size, dtype=torch.int64) for size in sizes)
    return pair_of_row, row_of_pair, offsets


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """experts (t k) -> pair_of_row (p), row_of_pair (p), offsets (e+1); any integers, any strides.

    Reference: moe.ops.reference.sort_by_expert. An id outside 0..e-1 marks a pair that no expert runs.

    Raises:
        ValueError: experts has not two axes, or holds no integers.
    """
    require_rank("experts", experts, "t k")
    if experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool:
        raise ValueError(f"experts is {experts.dtype}; it must hold the numbers of the experts.")
    if is_plain(experts) and not is_in_torch_dispatch_mode():
        return sort_pairs(experts, num_experts)
    return _sort_by_expert(experts, num_experts)
