"""benchmarks.long_context, tiny: it counts operations right, refuses wrong results, judges goals honestly."""

import argparse
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import (
    long_context,
    long_context_attention,
    long_context_experts,
    long_context_goals,
    long_context_model,
    long_context_peer,
    long_context_reading,
    tables,
)
from benchmarks.accuracy import WrongResultError
from benchmarks.long_context_attention import (
    BATCH,
    OURS,
    ROWS,
    SHARP,
    SINGLE,
    WHOLE,
    measure_all_pairs,
    measure_over_cache,
    over_cache,
)
from benchmarks.long_context_model import (
    all_pairs_flops,
    length_of,
    lengths_of,
    make_decoder,
    make_questions,
    sees_all_pairs,
    strict_config,
)
from benchmarks.long_context_reading import ALONE, TOGETHER, Bench, check_answering, check_reading
from benchmarks.measure import Budget
from benchmarks.statistics import fisher_lower
from moe.parameters import count_parameters
from moe.prefill import prefill
from moe.probes.needle.table import format_length
from moe.train.presets import needle
from moe.train.run_folder import RunFolder
from moe.train.settings import RunConfig

CPU = torch.device("cpu")
ONCE = Budget(0.0, 1, 1, 1)


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder of some 20 kB of lines, none twice."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        lines = [f"line {j} of file {i}: the sum is {j * j + i}\n" for j in range(160)]
        (folder / f"{i}.py").write_text("".join(lines))
    return folder


def small_settings() -> RunConfig:
    """The preset `needle`, narrow and with short sequences."""
    full = needle()
    assert full.needle is not None
    return replace(
        full,
        model=replace(full.model, hidden_size=16, head_dim=16, moe_intermediate_size=8),
        data=replace(full.data, sequence_length=256),
        needle=replace(full.needle, short_length=200),
    )


@pytest.fixture
def bench() -> Bench:
    """A small decoder and a random text of 900 bytes."""
    decoder = make_decoder(small_settings().model, CPU)
    ids = torch.randint(256, (1, 900), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Bench(decoder, ids, CPU, 0.0, lambda line: None)


# What is read, and how operations are counted


@pytest.mark.parametrize(
    ("pattern", "every_place", "layers"), [("LLG", False, []), ("LLG", True, [2]), ("LGG", False, [1])]
)
def test_a_pair_of_places_takes_four_operations_a_channel_and_head(pattern, every_place, layers):
    model = replace(
        small_settings().model, layer_types=pattern, canon_set=("A", "AB", "AB"), no_rope_layers=None
    )
    tokens = 64
    pairs = sum(query + 1 for query in range(tokens))
    exact = len(layers) * pairs * model.num_attention_heads * 4 * model.head_size
    assert abs(all_pairs_flops(model, tokens, every_place=every_place) - exact) <= exact / tokens


def test_torch_counts_the_same_operations_in_the_products_of_attention():
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = small_settings().model, 48
    shape = (1, model.num_attention_heads, tokens, model.head_size)
    q, k, v = (torch.randn(shape) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        (q @ k.mT) @ v
    assert counter.get_total_flops() == 2 * all_pairs_flops(model, tokens, every_place=True)  # both halves


def test_the_strict_pattern_has_its_full_layer_before_the_last_one_and_the_same_widths():
    model = needle().model
    middle = strict_config(model)
    assert not sees_all_pairs(model) and sees_all_pairs(middle)
    assert [middle.window(layer) for layer in range(4)] == [32, 32, None, 32]
    assert (middle.hidden_size, middle.head_size) == (model.hidden_size, model.head_size)
    assert strict_config(middle) == middle


@pytest.mark.parametrize(("words", "tokens"), [("16k", 16384), ("1M", 2**20), ("10M", 10**7), ("5000", 5000)])
def test_a_length_is_written_as_in_the_tables(words, tokens):
    assert length_of(words) == tokens
    assert length_of(format_length(tokens).replace(",", "")) == tokens


@pytest.mark.parametrize("words", ["", "k", "0", "-1", "1.5M", "1G"])
def test_what_is_no_length_is_refused(words):
    with pytest.raises(argparse.ArgumentTypeError, match="is no length"):
        length_of(words)


def test_questions_differ_and_have_one_length():
    questions = make_questions(64)
    assert len({question.query for question in questions}) == 64
    assert len({len(question.query) for question in questions}) == 1


# Attention over a cache


def cache_of(g: int, keys: int = 300, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(1, g, keys, 16).to(dtype) for _ in range(2))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("g", [1, 2])
def test_every_way_of_attending_to_a_shared_cache_is_the_softmax(g):
    keys, values = cache_of(g)
    queries = torch.randn(5, 4, 1, 16)
    k, v = (x.repeat_interleave(4 // g, 1) for x in (keys, values))
    expected = (queries @ k.mT * SHARP).softmax(-1) @ v
    ways = over_cache(queries, keys, values)
    assert set(ways) == {OURS, ROWS} | ({BATCH, SINGLE} if g == 1 else set())
    for name, way in ways.items():
        torch.testing.assert_close(way(), expected, msg=name)


def test_attention_that_errs_more_than_torch_s_is_refused(monkeypatch):
    keys, values = cache_of(1)
    right = long_context_attention.streamed_attention

    def spoilt(queries: Tensor, *others, **options):
        part = right(queries, *others, **options)
        return part if queries.dtype == torch.float64 else replace(part, out=part.out * 1.001)

    measure_over_cache(keys, values, 2, 3, ONCE, [])
    monkeypatch.setattr(long_context_attention, "streamed_attention", spoilt)
    with pytest.raises(WrongResultError, match="ours, attention to 300 places"):
        measure_over_cache(keys, values, 2, 3, ONCE, [])


def test_a_16_bit_cache_costs_torch_the_bits_of_the_queries_as_well():
    keys, values = cache_of(1, dtype=torch.bfloat16)
    errors = measure_over_cache(keys, values, 2, 8, ONCE, [])["errors"]
    assert errors[OURS] < errors[ROWS] / 10


def test_all_pairs_chunk_by_chunk_are_those_of_one_causal_call(monkeypatch):
    cell = measure_all_pairs(200, 2, 16, torch.float32, 64, CPU, ONCE)
    assert set(cell["timings"]) == {OURS, WHOLE} and max(cell["errors"].values()) < 1e-5
    right = long_context_attention.attend
    monkeypatch.setattr(long_context_attention, "attend", lambda *x, **o: right(*x, **o) * 1.001)
    with pytest.raises(WrongResultError):
        measure_all_pairs(200, 2, 16, torch.float32, 64, CPU, ONCE)


def test_what_would_take_minutes_is_left_out_by_its_time_at_a_shorter_length():
    keys, values = cache_of(1)
    slow = {"length": 100, "dtype": "float32", "skipped": {}, "timings": {BATCH: {"ms": 9000.0}}}
    cell = measure_over_cache(keys, values, 2, 3, ONCE, [slow])
    assert cell["skipped"] == {BATCH: "would take about 27 s a run"} and BATCH not in cell["timings"]
    assert SINGLE in cell["timings"]
    again = measure_over_cache(keys, values, 2, 3, ONCE, [slow, cell])
    assert again["skipped"] == cell["skipped"]


def test_a_way_of_torch_s_that_takes_too_much_memory_is_left_out(monkeypatch):
    right = long_context_attention.over_cache

    def hungry() -> Tensor:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(long_context_attention, "over_cache", lambda *x: right(*x) | {BATCH: hungry})
    cell = measure_over_cache(*cache_of(1), 2, 3, ONCE, [])
    assert cell["skipped"] == {BATCH: "takes too much memory"} and set(cell["timings"]) == {
        OURS,
        ROWS,
        SINGLE,
    }


# Reading and answering


def test_a_text_read_wrong_is_refused(bench, monkeypatch):
    check_reading(bench, 500)

    def shifted(decoder, ids, **options):
        return prefill(decoder, ids.roll(1, 1), **options)

    monkeypatch.setattr(long_context_reading, "prefill", shifted)
    with pytest.raises(WrongResultError, match="500 tokens in pieces"):
        check_reading(bench, 500)


def test_questions_that_disturb_each_other_are_refused(bench, monkeypatch):
    cache, questions = bench.read(500).cache, make_questions(5)
    check_answering(bench.decoder, cache, questions)
    right = bench.decoder.hidden

    def disturbed(ids, **options):
        hidden = right(ids, **options)
        return replace(hidden, states=hidden.states + 0.01 * (len(ids) - 1))

    monkeypatch.setattr(bench.decoder, "hidden", disturbed)
    with pytest.raises(WrongResultError, match="question 0 of 5"):
        check_answering(bench.decoder, cache, questions)


def test_a_cache_beyond_memory_is_named(bench, monkeypatch):
    assert long_context_reading.why_no_memory(bench, 900, torch.float32) is None
    monkeypatch.setattr(long_context_reading, "memory_available", lambda device: 10**9)
    assert "GB are free" in str(long_context_reading.why_no_memory(bench, 10**7, torch.float32))


def timing(ms: float) -> dict:
    return {"ms": ms, "p20": ms, "p80": ms, "runs": 3}


def answered(*, together: float = 2000.0, alone: float = 2400.0, ours: float = 1.0) -> dict:
    """A result as `measure_cache` makes it, with invented times in ms."""
    size = {"length": 2**20, "dtype": "float32"}
    return size | {
        "cache_bytes": 10**9, "peak_bytes": 2 * 10**9, "path": "p", "steps": 6, "logit_difference": 0.0,
        "questions": {TOGETHER: 64, ALONE: 8},
        "answering": {TOGETHER: timing(together), ALONE: timing(alone)},
        "attention": size | {
            "rows": 64, "skipped": {}, "errors": {OURS: 1e-6, ROWS: 2e-6},
            "timings": {OURS: timing(ours), ROWS: timing(1.0)},
        },
    }  # fmt: skip


def test_the_cache_is_read_once_a_digit_and_once_for_all_questions_together():
    cell = answered(together=2000.0, alone=2400.0)
    assert long_context_goals.ms_an_answer(cell, TOGETHER) == 2000 / 64
    assert long_context_goals.ms_an_answer(cell, ALONE) == 300
    assert long_context_goals.read_bytes_per_second(cell, TOGETHER) == 6e9 / 2
    assert math.isclose(long_context_goals.read_bytes_per_second(cell, ALONE), 8 * 6e9 / 2.4)


# More experts


def test_four_times_the_parameters_need_more_than_four_times_the_experts():
    model = needle().model
    number = long_context_experts.experts_for(model, 4)
    total = count_parameters(model).total
    sizes = [count_parameters(replace(model, num_experts=e)).total / total for e in (number - 8, number)]
    assert sizes[0] < 4 <= sizes[1] and number > 32
    actives = {count_parameters(replace(model, num_experts=e)).active for e in (8, number)}
    assert max(actives) / min(actives) < 1.1, "only the router grows"


def test_two_runs_may_differ_in_their_experts_alone(tmp_path):
    settings = small_settings()
    more = replace(settings, model=replace(settings.model, num_experts=32))
    wider = replace(settings, model=replace(settings.model, num_experts=32, moe_intermediate_size=16))
    for name, config in {"few": settings, "many": more, "wide": wider}.items():
        RunFolder(tmp_path / name).start(config)
    few, many, wide = (tmp_path / name for name in ("few", "many", "wide"))
    assert long_context_experts.in_order([many, few]) == [few, many]
    assert long_context_experts.settings_by_experts([many, few]) == [settings, more]
    with pytest.raises(ValueError, match="differ in more than"):
        long_context_experts.settings_by_experts([few, wide])


def test_fisher_s_test_by_hand():
    assert fisher_lower(0, 3, 3, 3) == pytest.approx(1 / 20)
    assert fisher_lower(3, 3, 3, 3) == fisher_lower(3, 3, 0, 3) == 1
    assert fisher_lower(1, 2, 2, 2) == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="at least one question"):
        fisher_lower(0, 0, 1, 1)


# Goals and tables


def record_of(**changes) -> dict:
    """A record with invented figures that meets every goal."""
    ms = timing(100.0)
    names = ["8 experts", "32 experts"]
    recall = [{"name": name, "right": 300, "asked": 300} for name in names]
    return {
        "environment": {"device": "cpu"},
        "reading": [{"length": 2**20, "timings": {"float32": ms}}],
        "answering": [answered()],
        "all_pairs": [{"length": 64, "dtype": "float32", "timings": {OURS: ms, WHOLE: ms}}],
        "experts": {
            "names": names,
            "models": [{"total": 1, "active": 1}, {"total": 4, "active": 1}],
            "prefill": dict.fromkeys(names, ms),
            "training": dict.fromkeys(names, ms),
        },
        "recall": recall,
    } | changes


def goal(record: dict, *words: str) -> dict:
    (found,) = [g for g in long_context_goals.judge(record) if all(word in g["goal"] for word in words)]
    return found


def test_goals_are_met_not_met_or_not_measured():
    met = {g["goal"]: g["met"] for g in long_context_goals.judge(record_of())}
    assert [goal for goal, is_met in met.items() if is_met is None] == [g for g in met if g.startswith("10M")]
    assert all(is_met for is_met in met.values() if is_met is not None)
    slow = record_of(answering=[answered(together=64 * 60.0, ours=1.2)])
    assert goal(slow, "an answer about 1M")["met"] is False
    assert goal(slow, "over a cache")["met"] is False and "1M, float32" in goal(slow, "over a cache")["note"]
    assert goal(slow, "3 haystacks")["measured"] == pytest.approx((3 * 0.1 + 300 * 0.06) / 60)


def test_recall_is_lower_only_beyond_luck():
    def judged(right: int) -> bool | None:
        recall = [{"name": "few", "right": 300, "asked": 300}, {"name": "many", "right": right, "asked": 300}]
        return goal(record_of(recall=recall), "recall")["met"]

    assert (judged(300), judged(299), judged(290)) == (True, True, False)
    assert goal(record_of(recall=[]), "recall")["met"] is None


def test_a_token_of_more_experts_may_cost_a_fifth_more():
    record = record_of()
    record["experts"]["training"] = {"8 experts": {"ms": 100.0}, "32 experts": {"ms": 121.0}}
    assert goal(record, "prefill")["met"] and goal(record, "training")["met"] is False
    assert "4.0 x the parameters" in goal(record, "training")["goal"]


def test_a_gpu_has_no_goals_of_two_cores():
    found = long_context_goals.judge(record_of(environment={"device": "cuda"}))
    assert not any("haystacks" in g["goal"] or "answer" in g["goal"] for g in found) and found


# The whole


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ("", "full"),
        ("--run a --run b --queries 9 --json x --threads 1", "full"),
        ("--lengths 16k,64k,256k,1M,10M", "full"),
        ("--quick", "quick"),
        ("--lengths 10M", "partial"),
        ("--dtypes float32", "partial"),
        ("--strict 16k", "partial"),
    ],
)
def test_only_the_whole_grid_counts_as_full(arguments, kind):
    options = long_context.parse([*arguments.split(), "--device", "cpu"])
    assert options.kind == kind and options.lengths == tuple(sorted(options.lengths))


def test_three_runs_and_unknown_dtypes_are_refused(capsys):
    for words in (["--run", "a", "--run", "b", "--run", "c"], ["--dtypes", "int8"]):
        with pytest.raises(SystemExit):
            long_context.parse(words)
    assert "at most twice" in (told := capsys.readouterr().err) and "no dtype int8" in told


def test_the_benchmark_prints_tables_and_writes_where_when_and_with_what(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_context_model, "find_preset", lambda name: small_settings())
    monkeypatch.setattr(long_context, "why_absent", lambda: "is not compared here")
    monkeypatch.setattr(long_context, "gemm_flops_per_second", lambda device, dtype: 1e11)
    monkeypatch.setattr(long_context, "bytes_per_second", lambda device: 1e10)
    monkeypatch.setattr(long_context_reading, "chunk_of", lambda device: 256)  # a text in several pieces
    for module in (long_context_experts, long_context_reading, long_context):
        monkeypatch.setattr(module, "Budget", lambda seconds, **others: ONCE)
    words = ["--lengths", "700", "--strict", "300", "--dtypes", "float32,bfloat16", "--seconds", "0"]
    where = ["--folder", str(text), "--results", str(tmp_path), "--device", "cpu", "--threads", "1"]
    assert long_context.main([*words, *where]) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.glob("long_context_partial_*.json")
    saved = json.loads(path.read_text())
    assert [list(cell["timings"]) for cell in saved["reading"]] == [["float32", "bfloat16"]]
    differences = [cell["logit_difference"] for cell in saved["answering"]]
    assert differences[0] == 0 < differences[1] < 0.1
    assert saved["left_out"] == {"transformers": "is not compared here"}
    assert len(saved["experts"]["names"]) == 3 and saved["environment"]["commit"]
    titles = ("Reading", "Answers of 6 digits", "One step of 64", "Every pair", "More experts", "Goals")
    assert all(f"**{title}" in shown for title in titles)
    assert tables.render(path, "long_context").endswith(shown.split("\n\nwritten")[0])


def test_the_peer_reads_and_answers_as_one_pass_of_its_own_does(bench):
    pytest.importorskip("transformers")
    model = long_context_peer.make_model(bench.decoder.config, CPU)
    ids, query = torch.randint(256, (1, 40)), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        cache = long_context_peer.read(model, ids)
        found = long_context_peer.answer_greedily(model, cache, query, 4)
        tokens = torch.cat([ids, query], 1)
        for _ in range(4):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert found == tokens[0, 43:].tolist()


def test_the_benchmark_explains_itself(capsys):
    module = importlib.import_module("benchmarks.long_context")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0 and "python -m benchmarks.long_context" in capsys.readouterr().out


def test_lengths_come_in_rising_order():
    assert lengths_of("1M,16k") == (2**14, 2**20)
