"""A run that is killed and resumed is the run that was not: same weights, same log, no lost checkpoint."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import tiny_run

from moe.train import claim
from moe.train.loop import train
from moe.train.overrides import change
from moe.train.run_folder import RunFolder
from moe.train.settings import RunConfig

TIMES = ("seconds", "tokens_per_second", "mfu", "memory_bytes", "eta_seconds")
JITTER = "model.router_jitter_noise=0.1"  # makes every step draw random numbers


def log_of(run: Path) -> list[dict]:
    """metrics.jsonl without the columns that measure time; every line must be whole."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def assert_same_run(one: Path, other: Path) -> None:
    assert log_of(one) == log_of(other)
    ours, theirs = (RunFolder(path).latest_checkpoint() for path in (one, other))
    assert ours is not None and theirs is not None and ours.name == theirs.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        left, right = load_file(ours / file), load_file(theirs / file)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name


class Killed(BaseException):
    """Ends a run inside the process as abruptly as Python allows."""


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_at(step: int):
    def log(line: str) -> None:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= step:
            raise Killed

    return log


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [5, 10, 20])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, step, accumulation):
    more = ("train.steps=22", "train.eval_every=5", JITTER, f"train.accumulation={accumulation}")
    config = tiny_run(tmp_path, *more)
    train(config, tmp_path / "straight")
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped", log=stop_at(step))
    torch.manual_seed(99)
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def train_in_a_process(config: RunConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    train(config, folder, resume=(folder / "run_config.json").exists())


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a fork server")
def test_killing_the_process_at_random_moments_changes_nothing(tmp_path):
    more = ("train.steps=60", "train.log_every=2", "train.checkpoint_every=2", JITTER)
    config = tiny_run(tmp_path, *more)
    train(config, tmp_path / "straight")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe.train.loop", "torch._dynamo"])  # imported once, not once a kill
    draw = random.Random(time.time_ns())
    steps_at_kills = []
    for attempt in range(9):
        process = context.Process(target=train_in_a_process, args=(config, tmp_path / "killed"))
        process.start()
        if attempt < 8:
            wait_for_progress(tmp_path / "killed", len(steps_at_kills) > 3)
            process.join(timeout=draw.uniform(0, 0.3))
            process.kill()
        process.join(timeout=200)
        assert process.exitcode in (0, -signal.SIGKILL)
        steps_at_kills.append(RunFolder(tmp_path / "killed").latest_checkpoint())
    assert process.exitcode == 0 and len(set(steps_at_kills)) >= 3  # it was interrupted in several places
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def wait_for_progress(run: Path, checkpoint: bool) -> None:
    """Until the run writes its first line, or one more checkpoint, or is over."""
    before = set(run.glob("checkpoints/step_*"))
    for _ in range(2000):
        new = set(run.glob("checkpoints/step_*")) - before
        if new or any(run.glob("checkpoints/step_00000060")):
            return
        if not checkpoint and (run / "metrics.jsonl").exists():
            return
        time.sleep(0.01)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    config = tiny_run(tmp_path)
    train(config, tmp_path / "straight")
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped", log=stop_at(5))
    assert not RunFolder(tmp_path / "stopped").checkpoints()
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    config = tiny_run(tmp_path)
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = train(config, tmp_path / "run", resume=True)
    assert result.checkpoint.name == "step_00000012"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_more_steps_continue_a_finished_run(tmp_path):
    config = tiny_run(tmp_path, "optim.schedule=constant")
    train(change(config, None, ["train.steps=20"]), tmp_path / "straight")
    train(change(config, None, ["train.steps=10"]), tmp_path / "longer")
    train(change(config, None, ["train.steps=20"]), tmp_path / "longer", resume=True)
    ours, theirs = (log_of(tmp_path / name) for name in ("longer", "straight"))
    assert [r for r in ours if r["kind"] == "train"] == [r for r in theirs if r["kind"] == "train"]


def test_what_a_killed_writer_leaves_is_never_taken_for_a_checkpoint(tmp_path):
    config = tiny_run(tmp_path)
    train(config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    (run.checkpoints_folder / ".step_00000099.tmp-12345678").mkdir()
    (run.checkpoints_folder / ".step_00000001.removed").mkdir()
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [path.name for path in run.checkpoints()] == ["step_00000010", "step_00000012"]
    train(config, run.path, resume=True)
    assert not list(run.checkpoints_folder.glob(".*"))
    assert [record["step"] for record in log_of(run.path)][-1] == 12


def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    config = tiny_run(tmp_path)
    train(config, tmp_path / "run")
    before = content_of(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"already holds a run.*--resume"):
        train(config, tmp_path / "run")
    assert before == content_of(tmp_path / "run")


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds other files"):
        train(tiny_run(tmp_path), tmp_path / "run")


def test_resuming_with_other_settings_is_refused_with_the_differences(tmp_path):
    config = tiny_run(tmp_path)
    train(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.01 -> 0\.5.*train\.steps"):
        train(change(config, None, ["optim.lr=0.5", "train.steps=40"]), tmp_path / "run", resume=True)


def test_resuming_with_changed_text_is_refused(tmp_path):
    config = tiny_run(tmp_path)
    train(config, tmp_path / "run")
    (tmp_path / "text" / "00.txt").write_text("changed")
    before = content_of(tmp_path / "run")
    with pytest.raises(ValueError, match="the text of this run changed"):
        train(change(config, None, ["train.steps=14"]), tmp_path / "run", resume=True)
    assert content_of(tmp_path / "run") == before


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    config = tiny_run(tmp_path)
    train(config, tmp_path / "run")
    before = content_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"train\.steps=11 is below the 12 steps"):
        train(change(config, None, ["train.steps=11"]), tmp_path / "run", resume=True)
    assert content_of(tmp_path / "run") == before


def test_a_changed_machine_is_told_and_the_facts_of_the_beginning_are_kept(tmp_path, monkeypatch):
    train(tiny_run(tmp_path), tmp_path / "run")
    before = (tmp_path / "run" / "env.json").read_bytes()
    now = claim.environment() | {"torch": "9.9"}
    monkeypatch.setattr(claim, "environment", lambda device: now)
    lines: list[str] = []
    train(tiny_run(tmp_path, "train.steps=14"), tmp_path / "run", resume=True, log=lines.append)
    (line,) = [line for line in lines if "is 9.9" in line]
    assert line.startswith("changed since the run began: torch was") and "exact only with the same" in line
    assert (tmp_path / "run" / "env.json").read_bytes() == before


def test_a_second_process_is_refused_while_the_first_one_trains(tmp_path):
    config = tiny_run(tmp_path)
    code = "import sys; from pathlib import Path; from moe.train.claim import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    train(config, tmp_path / "run")
    before = content_of(tmp_path / "run")
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match=r"another process is training in .*--out"):
            train(config, tmp_path / "run", resume=True)
        assert content_of(tmp_path / "run") == before
        first.kill()
    train(config, tmp_path / "run", resume=True)


def test_resuming_from_moved_text_is_the_same_run(tmp_path):
    config = tiny_run(tmp_path)
    train(config, tmp_path / "run")
    (tmp_path / "text").rename(tmp_path / "elsewhere")
    moved = change(config, None, [f'data.folder="{tmp_path / "elsewhere"}"', "train.steps=14"])
    assert train(moved, tmp_path / "run", resume=True).checkpoint.name == "step_00000014"


def test_resuming_where_there_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        train(tiny_run(tmp_path), tmp_path / "nothing", resume=True)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path, file):
    config = tiny_run(tmp_path)
    path = train(config, tmp_path / "run").checkpoint / file
    path.write_bytes(path.read_bytes()[:20])
    before = content_of(tmp_path / "run")
    with pytest.raises(ValueError, match=file):
        train(change(config, None, ["train.steps=14"]), tmp_path / "run", resume=True)
    assert content_of(tmp_path / "run") == before


def test_checkpoints_hold_safetensors_and_json_only(tmp_path):
    checkpoint = train(tiny_run(tmp_path), tmp_path / "run").checkpoint
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}
    for path in checkpoint.glob("*.json"):
        json.loads(path.read_text())
    for path in checkpoint.glob("*.safetensors"):
        load_file(path)


def test_the_newest_checkpoints_are_kept(tmp_path):
    config = tiny_run(tmp_path, "train.steps=50", "train.keep_checkpoints=3")
    train(config, tmp_path / "run")
    names = [path.name for path in RunFolder(tmp_path / "run").checkpoints_folder.iterdir()]
    assert sorted(names) == ["step_00000030", "step_00000040", "step_00000050"]
