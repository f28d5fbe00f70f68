"""The command: from settings to a sample, and every user's error in one line."""

import json
import os
import signal
import subprocess
import sys

import pytest
from train_helpers import tiny_overrides, tiny_run, write_corpus

from moe.cli import COMMANDS, main, parse, show_results
from moe.train.loop import train


def test_train_eval_and_sample_work_from_end_to_end(tmp_path, capsys):
    write_corpus(tmp_path / "text")
    run = str(tmp_path / "run")
    assert (
        main(["train", "--preset", "tiny", "--out", run, "--device", "cpu", *tiny_overrides(tmp_path)]) == 0
    )
    output = capsys.readouterr().out
    for words in (
        "settings: preset tiny with",
        "parameters in total",
        "step 12/12",
        "sample",
        "gzip -9",
        "xz -9e",
        "figure",
    ):
        assert words in output
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"eval.json", "samples.txt", "figure.png"} <= names
    assert main(["eval", run, "--tokens", "64"]) == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["tokens"] == 64
    capsys.readouterr()
    assert main(["sample", run, "--prompt", "the ", "--tokens", "5", "--seed", "3"]) == 0
    assert capsys.readouterr().out.startswith("the ")


def test_a_finished_run_is_measured_without_reading_the_corpus_again(tmp_path, monkeypatch, capsys):
    result = train(tiny_run(tmp_path), tmp_path / "run")
    monkeypatch.setattr("moe.train.runs.load_tokens", None)
    show_results(result, None)
    assert "gzip -9" in capsys.readouterr().out
    text = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert text["step"] == 12


def test_resume_takes_the_settings_of_the_run(tmp_path, capsys):
    train(tiny_run(tmp_path), tmp_path / "run")
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", *out, "--resume", "--no-report", "train.steps=14"]) == 0
    assert "train.steps=14 (was 12)" in capsys.readouterr().out
    assert main(["train", *out, "--resume", "optim.lr=1.0"]) == 2
    assert "optim.lr: 0.01 -> 1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "dmeo"], "Did you mean 'demo'?"),
        (["train", "optim.lrr=1"], "Did you mean 'lr'?"),
        (["train", "--config", "nowhere.toml"], "no settings file"),
        (["train", "data.folder=nowhere"], "does not exist"),
        (["train", "--device", "abacus"], "abacus"),
        (["train", "--resume"], "holds no run"),
        (["sample", "nowhere"], "holds no run"),
        (["eval", "nowhere"], "holds no run"),
        (["bench", "no-such-benchmark"], "bench"),
        (["doctor", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_overrides_may_stand_anywhere_and_unknown_options_nowhere(capsys):
    parsed = parse(["train", "a.b=1", "--preset", "tiny", "c.d=2", "--resume", "e.f=3"])
    assert parsed.overrides == ["a.b=1", "c.d=2", "e.f=3"] and parsed.resume
    for arguments in (["train", "a.b=1", "--reusme"], ["eval", "run", "extra"]):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert "unrecognized" in capsys.readouterr().err


def test_a_used_folder_is_an_error(tmp_path, capsys):
    train(tiny_run(tmp_path), tmp_path / "run")
    arguments = ["train", "--preset", "tiny", "--out", str(tmp_path / "run"), *tiny_overrides(tmp_path)]
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err


def test_doctor_names_every_operation_and_extra(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    for words in ("torch", "tokenizers", "experts_ffn", "grouped_linear", "Triton needs a GPU"):
        assert words in output


def test_bench_lists_or_says_where_the_benchmarks_are(capsys):
    code = main(["bench"])
    output = capsys.readouterr()
    assert (code == 0 and "benchmarks:" in output.out) or (code == 2 and "source" in output.err)


def test_the_module_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "moe", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("sparse-moe ")


def test_every_command_explains_itself(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0 and COMMANDS[name].help in capsys.readouterr().out


INTERRUPTIBLE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also in background
)
START = f"{INTERRUPTIBLE}; from moe.cli import main; sys.exit(main())"


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to a whole console")
def test_ctrl_c_says_how_to_resume_and_leaves_complete_files(tmp_path):
    write_corpus(tmp_path / "text")
    command = [sys.executable, "-c", START, "train", "--preset", "tiny", "--out", str(tmp_path / "run")]
    command += tiny_overrides(tmp_path, "train.steps=2000")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step   20/"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors and "Traceback" not in errors
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
