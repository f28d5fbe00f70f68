"""benchmarks.hf runs end to end, tiny, and gives no speed for a wrong result."""

import json

import pytest

import moe.hf.experts
from benchmarks import hf
from benchmarks.accuracy import WrongResultError

TINY = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}
ARGUMENTS = ["--hidden", "32", "--seconds", "0", "--threads", "1"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(hf, "SIZES", TINY)
    cases = (hf.Case("generate", 1, 4, 3), hf.Case("train", 2, 6, optimizer=True))
    monkeypatch.setattr(hf, "CASES", cases)


def test_it_prints_a_table_with_goals_and_writes_what_it_measured(tmp_path, capsys):
    hf.main([*ARGUMENTS, "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "sparse_moe, ms" in printed and "never slower than the default" in printed
    (path,) = tmp_path.glob("hf_partial_*.json")
    record = json.loads(path.read_text())
    assert [r["case"]["name"] for r in record["results"]] == ["generate", "train"]
    assert all(set(r["timings"]) == set(hf.CANDIDATES) for r in record["results"])
    assert record["environment"]["versions"]["transformers"]


def test_a_wrong_result_gets_no_speed(tmp_path, capsys, monkeypatch):
    original = moe.hf.experts._fused
    monkeypatch.setattr(moe.hf.experts, "_fused", lambda *arguments: original(*arguments) * 1.01)
    with pytest.raises(WrongResultError, match="sparse_moe, generate: logits: error"):
        hf.main([*ARGUMENTS, "--results", str(tmp_path)])
    assert "|" not in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_goals_are_judged_by_medians():
    def result(name, new_tokens, ours, default):
        timings = {hf.OURS: {"ms": ours}, hf.DEFAULT: {"ms": default}}
        return {"case": {"name": name, "batch": 1, "new_tokens": new_tokens}, "timings": timings}

    goals = hf.judge([result("a", 64, 10, 12), result("b", 0, 10, 11), result("c", 1, 10, 9)])
    assert [goal["met"] for goal in goals] == [True, False, False]
    assert [goal["measured"] for goal in goals] == [1.2, 1.1, 0.9]
