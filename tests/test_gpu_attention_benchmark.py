"""benchmarks.gpu_attention without a GPU: it counts right, peers see what ours sees, wrong has no speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu_attention
from benchmarks.accuracy import WrongResultError
from benchmarks.gpu_attention import CELLS, QUICK, TINY, why_not
from benchmarks.gpu_attention_cell import checked
from benchmarks.gpu_attention_peers import (
    FLASH,
    FLEX,
    HEADS,
    Problem,
    lower_right_mask,
    make_candidates,
    make_problem,
    sampled_truth,
)
from benchmarks.gpu_attention_tables import OURS, render

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[1]


def small(queries: int = 1, keys: int = 50) -> Problem:
    """Three questions, or a piece of one prompt."""
    return make_problem(3 if queries == 1 else 1, queries, keys, 16, device=CPU, dtype=torch.float32)


def seen(problem: Problem) -> torch.Tensor:
    """(s l) bool: which keys a query sees."""
    s, l = problem.queries.shape[2], problem.keys.shape[2]
    return torch.ones(s, l, dtype=torch.bool).tril(l - s if problem.causal else l)


def definition(problem: Problem) -> torch.Tensor:
    """(b n s c) in float64."""
    queries, keys, values = (t.double() for t in (problem.queries, problem.keys, problem.values))
    logits = (problem.scale * queries @ keys.mT).masked_fill(~seen(problem), -torch.inf)
    return logits.softmax(-1) @ values


@pytest.mark.parametrize("queries", [1, 7])
def test_operations_are_counted_by_the_keys_that_are_seen(queries):
    problem = small(queries)
    assert problem.causal == (queries > 1)
    heads = problem.queries.shape[0] * HEADS
    assert problem.flops == 4 * 16 * heads * seen(problem).sum()
    assert problem.bytes == 4 * (2 * 50 * 16 + 2 * heads * queries * 16)


@pytest.mark.parametrize("queries", [1, 7])
def test_the_sampled_truth_is_the_definition(queries, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_attention_peers.STEP", 16)
    problem = small(queries)
    chosen, truth, fused = sampled_truth(problem)
    expected = definition(problem).flatten(0, 2)[chosen]
    torch.testing.assert_close(truth, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e-6)
    assert {0, problem.queries[..., 0].numel() - 1} <= set(chosen.tolist())


@pytest.mark.parametrize("name", [FLASH, FLEX])
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (7, 50), (150, 390), (128, 256), (300, 300)])
@pytest.mark.filterwarnings("ignore")  # torch's notes on CPUs
def test_peers_see_what_ours_sees(name, queries, keys):
    problem = small(queries, keys)
    assert checked(make_candidates(problem)[name], *sampled_truth(problem)) < 1e-5


@pytest.mark.parametrize(("s", "l"), [(1, 1), (128, 128), (129, 129), (150, 390), (130, 1000), (512, 513)])
def test_a_mask_of_blocks_is_the_lower_right_triangle(s, l):
    """A block in which some see something is in one list: whole where all see all of it."""
    mask = lower_right_mask(s, l, CPU)
    blocks, expected = mask.to_dense()[0, 0].bool(), torch.ones(s, l, dtype=torch.bool).tril(l - s)
    for i, row in enumerate(blocks):
        whole = set(mask.full_kv_indices[0, 0, i, : mask.full_kv_num_blocks[0, 0, i]].tolist())
        partly = set(mask.kv_indices[0, 0, i, : mask.kv_num_blocks[0, 0, i]].tolist())
        assert not whole & partly
        for j in range(len(row)):
            tile = expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert (j in whole | partly) == bool(tile.any())
            assert bool(tile.all()) or j not in whole


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_a_wrong_result_is_refused(factor):
    problem = small(7)
    truth, right = sampled_truth(problem), definition(problem).float()
    assert checked(lambda: right, *truth) < 1e-6
    with pytest.raises(WrongResultError):
        checked(lambda: right * factor, *truth)


def test_the_sizes_are_those_of_the_question():
    rows = {(cell.sequences * HEADS, cell.keys, cell.channels) for cell in CELLS if cell.queries == 1}
    assert rows == {(r, l, c) for r in (64, 384) for l in (1 << 20, 10_000_000) for c in (64, 128)}
    assert {(cell.queries, cell.keys, cell.channels) for cell in CELLS if cell.queries > 1} == {
        (16_384, 1 << 20, 64),
        (16_384, 1 << 20, 128),
    }
    assert set(QUICK) < set(CELLS)
    assert "tokens of a prompt" in str(TINY[1]) and str(TINY[0]).startswith("6 rows")


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_attention.main([]) == 2
    assert "CUDA device" in capsys.readouterr().err


def test_a_size_without_memory_or_time_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 30, 80 << 30))
    options = gpu_attention.parse([])
    device = torch.device("cuda")
    assert why_not(CELLS[0], 100.0, device, options) is None
    assert "GiB" in str(why_not(CELLS[-1], 100.0, device, options))
    assert "3 s were left" in str(why_not(CELLS[0], 3.0, device, options))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The whole command in the interpreter; prints, and leaves a record."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_attention", "--device", "cpu", "--tiny"]
    command += ["--dtype", "float16", "--seconds", "0.01", "--results", str(folder), "--commit", "abc"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    (file,) = folder.glob("gpu_attention_partial_*.json")
    return done, json.loads(file.read_text()), file


def test_the_command_prints_a_table_and_leaves_a_record(tiny_run, capsys):
    done, record, file = tiny_run
    assert done.returncode == 0, done.stderr
    assert [result["size"] for result in record["results"]] == [str(cell) for cell in TINY]
    for result in record["results"]:
        assert {OURS, FLASH, FLEX} <= set(result["timings"]) == set(result["errors"])
        assert "RuntimeError" in result["skipped"]["sdpa efficient"]
        assert result["schedule"]["rows"] == 16
    assert record["environment"]["commit"] == "abc"
    assert f"{render(record)}\n\nwritten: {file}" in done.stdout
    assert gpu_attention.main(["--show", str(file)]) == 0
    assert capsys.readouterr().out.strip() == render(record)


def test_what_has_no_speed_is_listed_and_not_in_the_table(tiny_run):
    record = json.loads(json.dumps(tiny_run[1]))
    first = record["results"][0]
    del first["timings"][OURS], first["errors"][OURS]
    first["skipped"][OURS] = "wrong: error 1.00e+00"
    record["left_out"]["a large size"] = "3 s were left"
    text = render(record)
    assert "6 rows, 300 keys, 16 channels: ours: wrong: error 1.00e+00" in text
    assert "- a large size: left out: 3 s were left" in text
    assert sum("ours |" in line for line in text.splitlines() if line.startswith("| 6 rows")) == 0
