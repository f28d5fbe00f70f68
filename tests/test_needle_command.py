"""The command `sparse-moe needle`: from training to a table, and every user's error in one line."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from needle_helpers import Oracle, oracle_run, write_text
from train_helpers import write_corpus

from moe.cli import main, parse
from moe.cli_needle_arguments import length_of, lengths_of
from moe.cli_progress import Watch, progress_bar
from moe.probes.needle import evaluate
from moe.probes.needle.ask import answer, ask
from moe.probes.needle.evaluate_several import SeveralResult
from moe.probes.needle.positions import ContextLoss, PositionsResult
from moe.probes.needle.questions import Questions, make_haystacks
from moe.probes.needle.record import NeedleRecord
from moe.probes.needle.variants import VARIANTS
from moe.train.run_folder import RunFolder
from moe.train.runs import Run, open_run

FEW = ("--queries", "12", "--haystacks", "2")


def settings(root: Path, *more: str) -> list[str]:
    """Overrides that keep training short, and its text and cache under `root`."""
    return [
        f'data.folder="{root / "trained"}"',
        f'data.cache="{root / "cache"}"',
        "data.sequence_length=512",
        "needle.short_fraction=0.0",
        "train.tensorboard=false",
        "train.eval_tokens=512",
        "train.final_eval_tokens=512",
        *more,
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with text to train on, and other text for haystacks."""
    root = tmp_path_factory.mktemp("needle")
    write_corpus(root / "trained")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def trained(root) -> Path:
    """A run that finds most needles: the preset, for a few of its steps on a sixth of its length."""
    out = root / "tiny"
    steps = ("train.steps=100", "train.log_every=50", "train.checkpoint_every=50")
    assert main(["needle", "train", "--out", str(out), "--device", "cpu", *settings(root, *steps)]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "tiny"))


def needle(*words: object) -> int:
    """The exit code of the command, also where the parser refuses."""
    try:
        return main(["needle", *map(str, words)])
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Measuring


def test_a_trained_run_finds_needles_and_the_control_does_not(root, run, capsys):
    assert needle("eval", run, "--length", "2k,4k", "--shuffled", "--folder", root / "text", *FEW) == 0
    output = capsys.readouterr().out
    rows = NeedleRecord.load(run / "needle_eval.json").rows
    assert [(row.variant, row.length, row.template, row.asked) for row in rows] == [
        (variant, length, template, 12)
        for variant in ("", "shuffled values")
        for length in (2048, 4096)
        for template in ("key_value", "sentence")
    ]
    assert sum(row.right for row in rows[:4]) >= 24 and sum(row.right for row in rows[4:]) <= 1
    assert (run / "needle_eval.png").read_bytes().startswith(b"\x89PNG")
    for words in ("tiny, 2k, haystack 1: ", "tiny, 4k, shuffled values, haystack", "| tiny ", "written: "):
        assert words in output
    environment = NeedleRecord.load(run / "needle_eval.json").environment
    assert "cpu" in environment["device"] and environment["date"] in output


def test_batches_and_the_order_of_runs_change_no_answer(root, run, trained):
    opened = open_run(trained)
    questions = Questions(queries=8, haystacks=1, folder=root / "text")
    haystack, _ = next(make_haystacks(opened, questions, 4096))
    alone = ask(opened.model, haystack, batch=1)
    assert answer(opened.model, alone.prefill.cache, haystack.questions, batch=64) == alone.answers
    other = Path(shutil.copytree(run, run.parent / "other"))
    arguments = ("--length", "2k", "--folder", root / "text", *FEW, "--seed", 3)
    assert needle("eval", run, other, *arguments, "--json", run.parent / "both.json") == 0
    assert needle("eval", other, *arguments) == 0
    both = NeedleRecord.load(run.parent / "both.json").rows
    again = NeedleRecord.load(other / "needle_eval.json").rows
    assert [row.run for row in both] == ["tiny", "tiny", "other", "other"]
    for first, second in zip(both[:2], both[2:], strict=True):
        assert first.questions[1:] == second.questions[1:] and first.correct == second.correct
    assert [row.correct for row in again] == [row.correct for row in both[2:]]
    assert [row.text for row in again] == [row.text for row in both[2:]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_cache_of_a_trained_run_may_be_kept_in_16_bits(root, run, dtype):
    arguments = ("eval", run, "--length", "2k", "--folder", root / "text", *FEW, "--dtype", dtype)
    assert needle(*arguments, "--template", "key_value") == 0
    (row,) = NeedleRecord.load(run / "needle_eval.json").rows
    assert (row.template, row.dtype) == ("key_value", dtype) and row.right >= 8


def test_grid_has_lengths_of_its_own_and_a_file_of_its_own(root, run, tmp_path):
    assert parse(["needle", "grid", "run"]).length == [2**14, 2**16, 2**18, 2**20]
    arguments = ("grid", run, "--lengths", "2k,3k", "--folder", root / "text", *FEW, "--needles", "8")
    assert needle(*arguments) == 0
    rows = NeedleRecord.load(run / "needle_grid.json").rows
    assert [row.length for row in rows] == [2048, 2048, 3072, 3072] and {row.needles for row in rows} == {8}
    assert (run / "needle_grid.png").exists()


def test_losses_by_context_are_measured_and_drawn_for_every_run(root, run, capsys):
    other = Path(shutil.copytree(run, run.parent / "other"))
    arguments = ("positions", run, other, "--length", "600", "--spots", "2", "--folder", root / "text")
    assert needle(*arguments) == 0
    data = json.loads((run / "needle_positions.json").read_text())
    losses = [[ContextLoss(**loss) for loss in one.pop("losses")] for one in data["results"]]
    results = [
        PositionsResult(**one, losses=tuple(two)) for one, two in zip(data["results"], losses, strict=True)
    ]
    assert [result.run for result in results] == ["tiny", "other"]
    assert [loss.context for loss in results[0].losses] == [0, 512, 600]
    assert results[0].losses == results[1].losses
    assert (run / "needle_positions.png").exists() and "bytes before" in capsys.readouterr().out


def knowing(root: Path, monkeypatch) -> Run:
    """Every run that is opened is one that knows, also where functions are defined."""
    run = oracle_run(root, 'needle.templates=["key_value", "sentence", "definition"]')
    monkeypatch.setattr("moe.train.runs.open_run", lambda folder, **_: replace(run, folder=folder))
    return run


def test_several_needles_are_asked_for_by_a_command(root, tmp_path, monkeypatch, capsys):
    run = knowing(tmp_path, monkeypatch)
    arguments = ("several", run.folder, "--length", "8k", "--queries", "8", "--haystacks", "1")
    assert needle(*arguments, "--folder", root / "text") == 0
    data = json.loads((run.folder / "needle_several.json").read_text())
    results = [SeveralResult(**one) for one in data["results"]]
    assert [(one.task, one.right, one.asked, one.run) for one in results] == [
        ("multi-query", 8, 8, "oracle"),
        ("multi-value", 8, 8, "oracle"),
        ("hundred", 100, 100, "oracle"),
    ]
    assert data["environment"]["versions"]["torch"]
    output = capsys.readouterr().out
    assert "oracle, 8k, haystack 1, hundred: 100/100 right" in output and "| multi-query |" in output


def test_functions_of_a_package_are_asked_for_by_a_command(tmp_path, monkeypatch, capsys):
    run = knowing(tmp_path, monkeypatch)
    (tmp_path / "pack").mkdir()
    for name in ("a", "b"):
        (tmp_path / "pack" / f"{name}.py").write_text("".join(f"def {name}{i}(): ...\n" for i in range(5)))
    assert needle("code", run.folder, "--package", tmp_path / "pack", "--queries", "10") == 0
    (row,) = NeedleRecord.load(run.folder / "needle_code.json").rows
    assert (row.template, row.right, row.asked) == ("definition", 10, 10)
    assert "definition: 10/10 = 100.0 %" in capsys.readouterr().out


def test_records_become_one_table_record_and_figure(root, tmp_path, monkeypatch, capsys):
    run = knowing(tmp_path, monkeypatch)
    for name, length in (("a", "16k"), ("b", "20k")):
        arguments = ("--length", length, "--folder", root / "text", *FEW)
        assert needle("eval", run.folder, *arguments, "--json", tmp_path / f"{name}.json") == 0
    capsys.readouterr()
    names = [tmp_path / name for name in ("a.json", "b.json")]
    assert needle("table", *names, "--json", tmp_path / "c.json", "--figure", tmp_path / "c.png") == 0
    output = capsys.readouterr().out
    assert output.count("| oracle |") == 4 and "16k key_value: 12/12" in output and "20k sentence" in output
    rows = [row for name in names for row in NeedleRecord.load(name).rows]
    assert NeedleRecord.load(tmp_path / "c.json").rows == tuple(rows) and (tmp_path / "c.png").exists()


def test_without_matplotlib_there_is_no_figure_and_no_error(root, tmp_path, monkeypatch, capsys):
    run = knowing(tmp_path, monkeypatch)
    monkeypatch.setattr("moe.cli_runs.find_spec", lambda name: None)
    assert needle("eval", run.folder, "--length", "16k", "--folder", root / "text", *FEW) == 0
    assert "matplotlib is missing" in capsys.readouterr().out
    assert [path.name for path in run.folder.iterdir()] == ["needle_eval.json"]


# Training


def test_a_variant_changes_one_thing_and_has_a_folder_of_its_own(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = settings(root, "train.steps=2", "train.log_every=1", "train.checkpoint_every=1")
    assert needle("train", "--variant", "no pointer loss", *arguments) == 0
    config = RunFolder(tmp_path / "runs" / "needle-no-pointer-loss").read_config()
    assert config.needle is not None and config.needle.pointer_loss == 0
    output = capsys.readouterr().out
    assert "needle.pointer_loss=0.0 (was 0.5)" in output
    assert "sparse-moe needle eval runs/needle-no-pointer-loss --length 64k" in output
    assert needle("train", "--out", "runs/needle-no-pointer-loss", "--resume", "train.steps=3") == 0
    assert "settings: the run in runs/needle-no-pointer-loss with train.steps=3" in capsys.readouterr().out


def test_an_unknown_variant_is_refused_with_all_that_there_are(tmp_path, capsys):
    assert needle("train", "--variant", "32-expert", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "there is no variant '32-expert'. Did you mean '32-experts'?" in error
    needle("train", "--help")
    words = "".join(capsys.readouterr().out.split())
    for variant in VARIANTS:
        name = variant.replace(",", "").replace(" ", "-")
        assert name in error and name in words
    assert not list(tmp_path.iterdir())


# Refusals


def test_lengths_are_bytes_with_k_and_m():
    assert [length_of(text) for text in ("5000", "64k", "1M", "9m", "10M", "128M")] == [
        5000,
        2**16,
        2**20,
        9 * 2**20,
        10**7,
        128 * 10**6,
    ]
    assert lengths_of("1k,2K") == [1024, 2048]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--length 12x", "'12x' is no length"),
        ("--length 0", "'0' is no length"),
        ("--length -5k", "'-5k' is no length"),
        ("--length 1.5M", "'1.5M' is no length"),
        ("--length 2k,,4k", "'' is no length"),
        ("--length 2k,1000M", "1000000000"),  # refused before the first length is measured
        ("--length 2k --queries 0", "queries=0 must be at least 1"),
        ("--length 2k --queries -3", "queries=-3 must be at least 1"),
        ("--length 2k --haystacks 0", "haystacks=0 must be at least 1"),
        ("--length 2k --haystacks -1", "haystacks=-1 must be at least 1"),
        ("--length 2k --queries 2", "queries=2 must be at least haystacks=3"),
        ("--length 2k --seed -1", "seed=-1"),
        ("--length 300", "1 needles for 2 templates"),
        ("--length 2k --needles 300", "300 needles have"),
        ("--length 2k --dtype int8", "invalid choice: 'int8'"),
        ("--length 2k --template needle", "invalid choice: 'needle'"),
        ("--length 2k --folder nowhere", "the haystack folder 'nowhere' does not exist"),
        ("--length 2k --json nowhere/a.json", "a folder that does not exist"),
        ("--length 2k --json a.txt", "must end in .json"),
        ("--length 2k --checkpoint step_00000001", "no checkpoint 'step_00000001'"),
        ("--length 2k --device gpu9", "is no device"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_writes_nothing(root, run, monkeypatch, capsys, words, message):
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("moe.probes.needle.ask.prefill", None)
    before = files(run.parent)
    folder = [] if "--folder" in words else ["--folder", root / "text"]
    assert needle("eval", run, *folder, *words.replace(" -5k", "=-5k").split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert files(run.parent) == before


def test_a_length_beyond_memory_says_what_would_fit_before_anything_is_read(run, root, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "memory_available", lambda device: evaluate.BESIDE_CACHE + 2**20)
    monkeypatch.setattr("moe.probes.needle.ask.prefill", None)
    before = files(run)
    for action in ("eval", "several", "positions"):
        assert needle(action, run, "--length", "64k", "--folder", root / "text") == 2
        assert "length=6" in (error := capsys.readouterr().err) and f": {2**20 // 515} would fit" in error
    assert files(run) == before


def test_a_text_that_is_too_short_is_refused_unless_it_may_be_repeated(run, tmp_path, capsys):
    folder = write_text(tmp_path / "short", files=1, lines=20)
    before = files(run)
    for action in ("eval", "several", "positions"):
        assert needle(action, run, "--length", "4k", "--folder", folder) == 2
        assert "repeat" in capsys.readouterr().err
    assert files(run) == before
    assert needle("eval", run, "--length", "4k", "--folder", folder, *FEW, "--repeat") == 0
    assert "REPEATED text" in capsys.readouterr().out
    assert NeedleRecord.load(run / "needle_eval.json").rows[0].text["repeated"]


def test_runs_that_cannot_be_asked_are_refused(root, run, tmp_path, capsys):
    cases = [
        (("eval", tmp_path, "--length", "2k"), "holds no run"),
        (("eval", run, tmp_path, "--length", "2k"), "holds no run"),
        (("eval", run, run, "--length", "2k"), "2 runs are called 'tiny'"),
        (("code", run, "--package", root), "sparse-moe needle train --variant code"),
        (("code", run, "--package", "no_such_package"), "'no_such_package' is no installed package"),
    ]
    before = files(tmp_path)
    for words, message in cases:
        assert needle(*words) == 2
        assert message in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_run_of_other_tokens_is_refused_by_every_action(root, tmp_path, monkeypatch, capsys):
    run = knowing(tmp_path, monkeypatch)
    data, model = replace(run.config.data, tokenizer="bpe"), replace(run.config.model, vocab_size=300)
    other = replace(run, config=replace(run.config, data=data, model=model, needle=None))
    monkeypatch.setattr("moe.train.runs.open_run", lambda folder, **_: other)
    for action in ("eval", "grid", "several", "positions", "code"):
        length = ("--package", root) if action == "code" else ("--length", "2k", "--folder", root / "text")
        assert needle(action, run.folder, *length) == 2
        assert "needles are bytes" in capsys.readouterr().err
    assert not list(run.folder.iterdir())


def test_damaged_records_are_refused_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "other.json").write_text('{"environment": {}, "results": []}')
    for name, message in (("text", "not valid JSON"), ("other", "is not a record"), ("none", "No such file")):
        out = ("--json", tmp_path / "out.json", "--figure", tmp_path / "out.png")
        assert needle("table", tmp_path / f"{name}.json", *out) == 2
        assert message in capsys.readouterr().err
    assert needle("table", tmp_path / "text.json", "--figure", tmp_path / "out.pngg") == 2
    assert "must end in .png" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"text.json", "other.json"}


# Progress and Ctrl-C


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_over_itself_and_only_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((100, 24)))
    bar = progress_bar("tiny, 64k: read", "bytes")
    bar(16_384, 65_536, 2.0)
    bar(65_536, 65_536, 8.0)
    first, last = terminal.getvalue().split("\r")[1:]
    assert first.rstrip() == (
        "tiny, 64k: read [#######-----------------------] 16,384/65,536 bytes, 8,192/s, 6 s left"
    )
    assert last.endswith("\n") and "#" * 30 in last and "0 s left" in last
    for columns, width in ((100, 30), (70, 17), (50, 5), (10, 0)):  # figures before the bar, and all else
        monkeypatch.setattr(
            shutil, "get_terminal_size", lambda columns=columns: os.terminal_size((columns, 9))
        )
        bar(1, 65_536, 1.0)
        line = terminal.getvalue().split("\r")[-1]
        assert len(line) == columns - 1 and line.count("-") == width
    monkeypatch.setattr(sys, "stderr", plain := io.StringIO())
    bar(1, 65_536, 1.0)
    assert plain.getvalue() == ""


def test_bars_and_lines_say_what_they_are_about(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    lines = []
    watch = Watch("tiny", 65_536, "", show=lines.append)
    watch.answering(2, 4, 1.0)
    watch.spots(2, 4, 1.0)
    watch.log("haystack 1")
    assert "tiny, 64k: answered [" in terminal.getvalue() and "2/4 questions, 2/s" in terminal.getvalue()
    assert "2/4 spots" in terminal.getvalue() and lines == ["tiny, 64k, haystack 1"]


def test_ctrl_c_while_answering_leaves_the_last_record_as_it_was(root, tmp_path, monkeypatch, capsys):
    run = knowing(tmp_path, monkeypatch)
    arguments = ("eval", run.folder, "--length", "16k", "--folder", root / "text", *FEW)
    assert needle(*arguments) == 0
    before = files(run.folder)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Oracle, "generate", stop)
    assert needle(*arguments) == 130
    error = capsys.readouterr().err
    assert "interrupted; all files are complete" in error and "continue with" not in error
    assert files(run.folder) == before


def test_ctrl_c_before_training_began_gives_no_wrong_hint(root, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe.train.loop.load_tokens", stop)
    (tmp_path / "run").mkdir()
    for action in ("needle", "train"):
        words = ["needle", "train"] if action == "needle" else ["train", "--preset", "tiny"]
        assert main([*words, "--out", str(tmp_path / "run")]) == 130
        assert "continue with" not in capsys.readouterr().err


START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from moe.cli import main; sys.exit(main())"
)


@pytest.mark.skipif(os.name == "nt", reason="needs a terminal as POSIX has them")
def test_ctrl_c_during_a_long_prefill_ends_at_once_and_writes_nothing(root, run):
    words = ["needle", "eval", run, "--length", "1M", "--folder", root / "text", "--repeat"]
    words += ["--needles", "16", "--queries", "2", "--haystacks", "1", "--dtype", "bfloat16"]
    before = files(run)
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=end,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    os.close(end)
    try:
        shown = read_until(terminal, b" s left")
        process.send_signal(signal.SIGINT)
        shown += read_until(terminal, b"interrupted")
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert b"1,048,576 bytes" in shown and b"Traceback" not in shown and b"continue with" not in shown
    assert files(run) == before


def read_until(terminal: int, words: bytes) -> bytes:
    """What a process writes until it has written these words, or has ended."""
    shown = b""
    while words not in shown:
        try:
            shown += os.read(terminal, 1000)
        except OSError:  # how Linux says that nobody holds the other end any more
            break
    assert words in shown, shown.decode(errors="replace")
    return shown


def test_every_action_explains_itself(capsys):
    for action in ("train", "eval", "grid", "several", "positions", "code", "table"):
        assert needle(action, "--help") == 0
        output = capsys.readouterr().out
        assert "%(" not in output and "None" not in output and f"sparse-moe needle {action}" in output
    assert torch.is_grad_enabled()
