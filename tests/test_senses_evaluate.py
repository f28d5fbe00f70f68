"""What a run is asked about every sense, how digits are counted, what is refused, and the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from senses_helpers import handwriting, places, senses_run  # noqa: F401  # the fixture is used by all tests

from moe.cli import main
from moe.decoder import Decoder
from moe.modality_config import Modality, ModalityConfig
from moe.prefill import prefill
from moe.probes.needle.record import NeedleRecord, Tally, merge
from moe.probes.senses.bank import build_bank
from moe.probes.senses.config import NAMES, SensesConfig
from moe.probes.senses.evaluate import FoundNeedle, check_senses, count_right, evaluate_senses
from moe.probes.senses.haystack import build_senses_haystack
from moe.probes.senses.near import BEFORE, DISTANCE, answer_near
from moe.probes.senses.questions import SensesQuestions, make_senses_haystacks
from moe.probes.senses.record import SensesRecord, SensesRow, load_record, normalise
from moe.probes.senses.table import senses_table, senses_verdicts
from moe.report.senses import draw_found, found_figure
from moe.train.presets import senses
from moe.train.runs import Run, open_run
from moe.train.tokenizer import ByteTokenizer

LENGTH = 2048
SENSES = ",".join(NAMES)
TEXT = np.frombuffer(b"the expert router sends every token to two of many; " * 4000, np.uint8)


def tiny_decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(replace(senses().model, hidden_size=16, num_experts=4)).eval()
    with torch.no_grad():
        decoder.head_weight.mul_(20)  # answers that do not hang on the last bit
    return decoder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("senses")
    places(root)
    return root


@pytest.fixture
def run(root) -> Run:
    config = senses_run(root)
    config = replace(config, model=tiny_decoder().config)
    (root / "tiny").mkdir(exist_ok=True)
    return Run(root / "tiny", config, 7, tiny_decoder(), ByteTokenizer())


@pytest.fixture
def questions(root) -> SensesQuestions:
    return SensesQuestions(queries=4, haystacks=2, folder=root / "text")


# Answers


def test_answers_of_a_haystack_are_those_of_one_whole_pass(run, questions):
    few = replace(questions, haystacks=1, queries=2)
    result = evaluate_senses(run, few, LENGTH)
    assert [row.template for row in result.rows] == list(NAMES)
    haystack, _ = next(make_senses_haystacks(run, few, LENGTH))
    for row in result.rows:
        mine = [question for question in haystack.questions if question.template == row.template]
        for question, right in zip(mine, row.digits_right, strict=True):
            assert count_right(whole_pass(run.model, haystack, question), question.answer) == right


def whole_pass(model, haystack, question) -> bytes:
    """The answer without a cache: every byte from a forward pass over all that stands before it."""
    embeds = model.embed(*(x[None] for x in haystack.prompt.dense()))
    written = b""
    for _ in question.answer:
        suffix = torch.tensor([list(question.query + written)])
        states = model.hidden(inputs_embeds=torch.cat([embeds, model.embed(suffix)], 1)).states
        written += bytes([int(model.logits(states[0, -1]).argmax())])
    return written


def test_the_near_needle_is_the_same_one_64_tokens_away(root):
    bank = build_bank(SensesConfig(image_copies=1), ModalityConfig(), "test")
    haystack = build_senses_haystack(bank, TEXT, length=LENGTH, queries=2, seed=0)
    seen = []

    class Watched(Decoder):
        def hidden(self, ids=None, **options):
            if options.get("inputs_embeds") is not None:
                seen.append(options["inputs_embeds"])
            return super().hidden(ids, **options)

    decoder = tiny_decoder()
    decoder.__class__ = Watched
    answers = answer_near(decoder, bank, TEXT, haystack.questions, seed=0, batch=3)
    assert len(answers) == 8 and all(len(answer) == 4 for answer in answers)
    rows = torch.cat(seen)
    assert len(rows) == 8 and all(len(part) <= 3 for part in seen)
    size = BEFORE + DISTANCE + max(len(question.needle.tokens) for question in haystack.questions)
    for question in haystack.questions:
        needle = decoder.embed(*(x[None] for x in question.needle.tokens.interleaved(bank).dense()))[0]
        stop = size - DISTANCE
        same = [torch.equal(row[stop - len(needle) : stop], needle) for row in rows]
        assert sum(same) == 1 and rows.shape[1] == size


def test_answers_nearby_do_not_depend_on_the_batch(root):
    bank = build_bank(SensesConfig(image_copies=1), ModalityConfig(), "test")
    questions = build_senses_haystack(bank, TEXT, length=LENGTH, queries=2, seed=0).questions
    one_at_a_time = answer_near(tiny_decoder(), bank, TEXT, questions, seed=0, batch=1)
    assert answer_near(tiny_decoder(), bank, TEXT, questions, seed=0, batch=64) == one_at_a_time
    assert len(set(one_at_a_time)) > 1


def test_rows_say_what_was_asked_of_which_sense(run, questions):
    result = evaluate_senses(run, questions, LENGTH)
    for row in result.rows:
        assert (row.asked, row.haystacks, row.needles, row.length) == (4, 2, 8, LENGTH)
        assert row.digits == 4 and len(row.near_digits_right) == 4
        assert row.frames == (1 if row.template == "text" else 3)
    assert [row.source for row in result.rows] == [
        "bytes",
        "made-up digits, test",
        "made-up digits, test",
        "keypad tones with noise, synthetic",
    ]
    for one, name in zip(result.examples, NAMES, strict=True):
        assert one.source == {row.template: row.source for row in result.rows}[name]
        assert one.modality is NAMES[name] and one.value.shape == (0 if name == "text" else 12, 64)


def test_the_control_does_not_ask_nearby(run, questions):
    rows = evaluate_senses(run, replace(questions, shuffled=True), LENGTH).rows
    assert {row.variant for row in rows} == {"shuffled values"}
    assert all(row.near_digits_right == () and np.isnan(row.normalised) for row in rows)


def test_another_seed_asks_of_other_haystacks_made_of_other_tones(run, questions):
    first, other = (
        next(make_senses_haystacks(run, replace(questions, seed=seed), LENGTH))[0] for seed in (0, 1)
    )
    assert first.questions[0].query != other.questions[0].query
    sounds = [
        set(one.prompt.features[one.prompt.modality[one.prompt.modality > 0] == 3].sum(1).tolist())
        for one in (first, other)
    ]
    assert not sounds[0] & sounds[1]


def test_reading_in_pieces_is_reading_at_once(run, questions):
    haystack, _ = next(make_senses_haystacks(run, questions, LENGTH))
    whole = prefill(run.model, haystack.prompt, chunk=LENGTH)
    pieces = prefill(run.model, haystack.prompt, chunk=700)
    torch.testing.assert_close(pieces.state, whole.state, rtol=1e-4, atol=1e-4)


# Counting


def row(right: list[int], near: list[int], **changes) -> SensesRow:
    values: dict[str, Any] = {
        "run": "r",
        "step": 7,
        "total": 10,
        "active": 5,
        "variant": "",
        "length": 65536,
        "template": "image",
        "haystacks": 1,
        "needles": 8,
        "depths": tuple(i / len(right) for i in range(len(right))),
        "correct": tuple(one == 4 for one in right),
        "prefill_seconds": 1.0,
        "answer_seconds": 1.0,
        "cache_bytes": 1,
        "peak_bytes": 1,
        "path": "p",
        "dtype": "float32",
        "text": {"root": "t", "digest": "d", "files": 1, "repeated": False},
        "digits": 4,
        "digits_right": tuple(right),
        "near_digits_right": tuple(near),
        "frames": 3,
        "source": "made up",
    }
    return SensesRow(**{**values, **changes})


def test_digits_answers_and_finding_are_counted_apart():
    made = row([4, 4, 3, 0], [4, 4, 4, 2])
    assert made.per_digit == Tally(11, 16) and made.tally == Tally(2, 4) and made.near == Tally(3, 4)
    assert made.normalised == pytest.approx(2 / 3)
    assert normalise([made, row([4], [4])]) == pytest.approx(3 / 4)
    assert np.isnan(normalise([row([4], [])])) and np.isnan(normalise([row([4], [3])]))
    assert count_right(b"1239", b"1234") == 3 and count_right(b"4321", b"1234") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digits_right": (4, 4)}, "digits_right has 2 numbers and correct has 3"),
        ({"near_digits_right": (4, 4)}, "near_digits_right has 2 numbers and correct has 3"),
        ({"digits_right": (4, 5, 0)}, "digits_right has a number over digits=4"),
        ({"digits_right": (4, 3, 0)}, "digits_right and correct contradict each other"),
        ({"digits_right": (4, 4, -1)}, "digits_right=.* must be a list of whole numbers from 0"),
        ({"frames": 0}, "frames=0 must be at least 1"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        row([4, 4, 0], [4, 4, 4], **changes)


def test_a_record_comes_back_equal_and_says_what_it_is(tmp_path):
    record = SensesRecord((row([4, 3], [4, 4]),), {"device": "cpu"})
    record.save(tmp_path / "r.json")
    assert load_record(tmp_path / "r.json") == record and isinstance(
        load_record(tmp_path / "r.json"), SensesRecord
    )
    assert merge([record, record]) == record and type(merge([record])) is SensesRecord
    with pytest.raises(ValueError, match=r"r\.json is not a record.*'digits' is unknown"):
        NeedleRecord.load(tmp_path / "r.json")


def test_the_table_gives_every_share_and_its_source():
    record = SensesRecord(
        (row([4, 4, 3, 0], [4, 4, 4, 2]), row([4] * 4, [4] * 4, template="audio", source="tones")), {}
    )
    head, _, image, audio, *rest = senses_table(record)
    columns = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, image, audio)]
    cells = [dict(zip(columns[0], column, strict=True)) for column in columns[1:]]
    shares = ["recall %", "per digit %", "near %", "normalised %"]
    assert [cells[0][name] for name in shares] == ["50.0", "68.7", "75.0", "66.6"]
    assert [cells[1][name] for name in shares] == ["100.0"] * 4
    assert "image: made up, 3 tokens a digit" in rest and "audio: tones, 3 tokens a digit" in rest
    assert senses_verdicts(record)[0] == (
        "64k image: 2/4 = 50.0 % (>= 9.7 %); 11/16 digits = 68.7 %; normalised 66.6 %"
    )


# Pictures


def found(modality: Modality, written: bytes = b"1234") -> FoundNeedle:
    value = np.random.default_rng(0).random((0 if modality is Modality.TEXT else 12, 64)).astype(np.float32)
    return FoundNeedle(modality, "made up", b"?abcd=", b"1234", written, value, 500, 65536)


def test_a_found_needle_is_drawn_with_its_frames_and_the_answer(tmp_path):
    needles = [found(one) for one in Modality]
    figure = found_figure(needles)
    for axes, one in zip(figure.axes, needles, strict=True):
        assert axes.get_title(loc="left").endswith(": made up")
        assert "answered 1234  (right)" in axes.get_xlabel() and "token 500 of 65,536" in axes.get_xlabel()
        if one.modality is not Modality.TEXT:
            shape = (40, 12) if one.modality is Modality.AUDIO else (8, 96)
            assert np.asarray(axes.images[0].get_array()).shape == shape
    video = np.asarray(figure.axes[2].images[0].get_array())
    np.testing.assert_array_equal(video[:, 8:16], needles[2].value[1].reshape(8, 8))
    assert "wrong: 1234" in found_figure([found(Modality.IMAGE, b"1235")]).axes[0].get_xlabel()
    assert draw_found(needles, tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="there is no needle to draw"):
        found_figure([])


# What is refused


def test_what_cannot_be_asked_is_refused_before_anything_is_read(run, questions, root, monkeypatch):
    with pytest.raises(ValueError, match="there is no length"):
        check_senses(run, questions, [])
    with pytest.raises(ValueError, match="2 needles for 4 templates"):
        check_senses(run, questions, [512])
    text_alone = replace(run.config.model, modalities=None)
    blind = replace(run, config=replace(run.config, model=text_alone, senses=None))
    with pytest.raises(ValueError, match=r"reads text alone\. Train a run that does with: sparse-moe needle"):
        check_senses(blind, questions, [LENGTH])
    untaught = replace(run, config=replace(run.config, senses=None))
    with pytest.raises(ValueError, match="was not trained on needles of several senses"):
        check_senses(untaught, questions, [LENGTH])
    monkeypatch.setattr("moe.probes.needle.evaluate.memory_available", lambda device: 700_000_000)
    with pytest.raises(
        ValueError, match=r"length=1048576 needs .* GB of memory, and 0.7 GB are free: \d+ would fit"
    ):
        check_senses(run, questions, [2**20])
    with pytest.raises(ValueError, match="modalities has no 'smell'"):
        SensesQuestions(templates=("smell",))


# The command


def settings(root: Path) -> list[str]:
    return [
        *places(root),
        "train.steps=6",
        "train.log_every=3",
        "train.checkpoint_every=6",
        "data.sequence_length=240",
        "senses.short_length=120",
        "senses.image_copies=1",
        "train.eval_tokens=512",
        "train.final_eval_tokens=512",
        "train.tensorboard=false",
    ]


def needle(*words: object) -> int:
    try:
        return main(["needle", *map(str, words)])
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code


def test_the_command_trains_measures_and_draws(root, tmp_path, capsys):
    out = tmp_path / "run"
    assert needle("train", "--modalities", SENSES, "--out", out, *settings(root)) == 0
    assert f"sparse-moe needle eval {out} --length 64k --modalities {SENSES}" in capsys.readouterr().out
    asked = ("--folder", root / "text", "--queries", 4, "--haystacks", 1, "--modalities", "image,audio")
    assert needle("eval", out, "--length", "2k,3k", "--shuffled", *asked) == 0
    output = capsys.readouterr().out
    rows = load_record(out / "needle_eval.json").rows
    assert [(one.variant, one.length, one.template) for one in rows] == [
        (variant, length, sense)
        for variant in ("", "shuffled values")
        for length in (2048, 3072)
        for sense in ("image", "audio")
    ]
    assert "keypad tones with noise, synthetic" in output and "normalised" in output
    for name in ("needle_eval.png", "needle_eval_found.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    together = tmp_path / "all.json"
    assert (
        needle("table", out / "needle_eval.json", "--json", together, "--figure", tmp_path / "all.png") == 0
    )
    assert load_record(together) == load_record(out / "needle_eval.json")
    assert open_run(out).config.senses is not None
    text = Path(shutil.copy(out / "needle_eval.json", tmp_path / "text.json"))
    data = json.loads(text.read_text())
    own = ("digits", "digits_right", "near_digits_right", "frames", "source")
    data["rows"] = [{key: value for key, value in one.items() if key not in own} for one in data["rows"]]
    text.write_text(json.dumps(data))
    capsys.readouterr()
    assert needle("table", text, together) == 2
    assert "some records are of text alone and some of several senses" in capsys.readouterr().err


def test_mistakes_of_a_user_are_one_line(root, tmp_path, capsys):
    assert needle("train", "--modalities", "text,smell", "--out", tmp_path / "no", *settings(root)) == 2
    assert "senses.modalities has no 'smell'; there are ['text', 'image'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert needle("train", "--modalities", "text", "--variant", "smelly", "--out", tmp_path / "no") == 2
    assert "there is no variant 'smelly'" in capsys.readouterr().err
    assert needle("train", "--speech", tmp_path, "--out", tmp_path / "no") == 2
    assert "--speech is for needles of several senses: add --modalities" in capsys.readouterr().err
    of_text = ("--template", "sentence", "--length", "2k")
    assert needle("eval", tmp_path, *of_text, "--modalities", "text") == 2
    assert "--template is for needles of text alone" in capsys.readouterr().err
    speech = ("--speech", tmp_path / "nowhere")
    assert needle("train", "--modalities", "audio", *speech, "--out", tmp_path / "no", *settings(root)) == 2
    assert "nowhere' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
