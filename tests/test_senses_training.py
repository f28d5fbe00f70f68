"""Training on needles of every sense: its sequences, its loss, its parts, and its settings."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from senses_helpers import handwriting, senses_run  # noqa: F401  # the fixture is used by all tests
from test_resume import Killed, assert_same_run, stop_at

from moe.losses import pointer_loss
from moe.modality_config import Modality, ModalityConfig
from moe.probes.needle.needles import TEMPLATES
from moe.probes.senses.bank import build_bank
from moe.probes.senses.config import NAMES, SensesConfig
from moe.probes.senses.training import ANSWER, READING, TEXT, senses_batch
from moe.train.data import Windows
from moe.train.loop import train
from moe.train.presets import PRESETS, senses
from moe.train.settings import RunConfig
from moe.train.trainer import Trainer

WORDS = np.frombuffer(b"the expert router sends every token to two of many; " * 400, np.uint8)
CONFIG = SensesConfig(image_copies=1)


@pytest.fixture
def bank():
    return build_bank(CONFIG, ModalityConfig(), "train")


def make(bank, config=CONFIG, *, length=512, batch=3, seed=0, step=0):
    return senses_batch(WORDS, bank, config, length=length, batch=batch, seed=seed, step=step)


# Sequences


def test_every_answer_points_at_frames_that_show_it(bank):
    made = make(bank)
    seen = set()
    digit_of = {row.tobytes(): digit for row, digit in zip(bank.features, bank.digit_of_row, strict=True)}
    for row in range(3):
        for place, target, kind, pointer, width in zip(
            made.places[row],
            made.targets[row],
            made.kinds[row],
            made.pointers[row],
            made.widths[row],
            strict=True,
        ):
            if kind != ANSWER:
                assert pointer == -1
                continue
            sense = Modality(int(made.modality[row, pointer]))
            seen.add(sense)
            assert width == (1 if sense is Modality.TEXT else 3) and pointer + width <= place
            frames = range(int(pointer), int(pointer + width))
            assert {int(made.modality[row, frame]) for frame in frames} == {sense}
            if sense is Modality.TEXT:
                assert made.ids[row, pointer] == target
            else:
                shown = {digit_of[made.features[row, frame].numpy().tobytes()] for frame in frames}
                assert shown == {int(target) - ord("0")}
    assert seen == set(Modality)


def test_answers_follow_their_query_and_belong_to_its_key(bank):
    made = make(bank)
    for row in range(3):
        text = bytes(made.ids[row].tolist())
        answers = made.places[row][made.kinds[row] == ANSWER].reshape(-1, 4)
        pointers = made.pointers[row][made.kinds[row] == ANSWER].reshape(-1, 4)
        for places, pointed in zip(answers.tolist(), pointers.tolist(), strict=True):
            assert places == list(range(places[0], places[0] + 4))
            query = text[: places[0] + 1].rsplit(b"?", 1)[1]
            needle = text[: pointed[0]].rsplit(b"@", 1)[1]
            assert query == needle and query.endswith(b"=")


def test_digits_are_read_where_they_stand_and_text_where_it_comes_next(bank):
    made = make(bank)
    digit_of = {row.tobytes(): digit for row, digit in zip(bank.features, bank.digit_of_row, strict=True)}
    for kind in (TEXT, READING):
        row, column = torch.nonzero(made.kinds == kind, as_tuple=True)
        place, target = made.places[row, column], made.targets[row, column]
        if kind == TEXT:
            inside = place < made.ids.shape[1] - 1
            assert torch.equal(made.ids[row, place + 1 * inside][inside], target[inside])
            assert (made.modality[row, (place + 1).clamp(max=511)][inside] == Modality.TEXT).all()
        else:
            shown = [
                digit_of[made.features[r, p].numpy().tobytes()] + ord("0")
                for r, p in zip(row, place, strict=True)
            ]
            assert shown == target.tolist() and len(shown) > 100


def test_so_many_places_are_predicted_in_ascending_order(bank):
    for length in (120, 512, 700):
        made = make(bank, length=length)
        assert made.places.shape == (3, round(0.3 * length))
        assert (made.places.diff(dim=1) > 0).all() and made.places.max() < length
        assert ((made.kinds == ANSWER).sum(1) >= 4).all()


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (3, 7)])
def test_a_batch_is_a_function_of_seed_and_step(bank, seed, step):
    first, again = (make(bank, seed=seed, step=step) for _ in range(2))
    others = make(bank, seed=seed, step=step + 1), make(bank, seed=seed + 1, step=step)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.features, again.features)
    assert not any(torch.equal(first.ids, other.ids) for other in others)


def test_only_the_senses_asked_for_have_needles(bank):
    config = replace(CONFIG, modalities=("video",))
    made = make(bank, config)
    answers = made.kinds == ANSWER
    pointed = made.modality.gather(1, made.pointers.clamp(min=0))[answers]
    assert set(pointed.tolist()) == {Modality.VIDEO} and (made.widths[answers] == 3).all()
    assert set(made.modality.unique().tolist()) == {0, 1, 2, 3}


def test_sequences_that_are_too_short_are_refused(bank):
    least = CONFIG.least_length
    make(bank, length=least)
    with pytest.raises(ValueError, match=f"length={least - 1} must be at least {least}"):
        make(bank, length=least - 1)
    with pytest.raises(ValueError, match=r"text of 100 bytes must be longer than a sequence of 512"):
        senses_batch(WORDS[:100], bank, CONFIG, length=512, batch=1, seed=0, step=0)


# The loss


def trainer_of(root, *more) -> Trainer:
    config = senses_run(root, *more)
    return Trainer(config, Windows(WORDS, config.data.sequence_length))


@pytest.mark.parametrize("step", [0, 11], ids=["short sequences", "long sequences"])
def test_the_loss_is_that_of_answers_text_reading_and_where_attention_looks(tmp_path, step):
    trainer = trainer_of(
        tmp_path, "senses.text_loss=0.2", "senses.reading_loss=0.6", "senses.pointer_loss=0.7"
    )
    model = trainer.model.double()
    ids, modality, features, places, targets, kinds, pointers, widths, _ = trainer.task.batch(step)
    features = features.double()
    loss = trainer.task.loss(model, ids, modality, features, *trainer.task.batch(step)[3:])
    whole = model.hidden(inputs_embeds=model.embed(ids, modality, features))
    logits = model.logits(whole.states)
    parts: dict[int, list] = {ANSWER: [], TEXT: [], READING: [], 3: []}
    for row in range(len(ids)):
        for i, place in enumerate(places[row].tolist()):
            parts[int(kinds[row, i])].append(F.cross_entropy(logits[row, place], targets[row, i]))
            for head in range(2 if pointers[row, i] >= 0 else 0):
                seen = whole.attended.keys[row, 0, : place + 1] @ whole.attended.queries[row, head, place]
                frames = slice(int(pointers[row, i]), int(pointers[row, i] + widths[row, i]))
                parts[3].append(-seen.softmax(0)[frames].sum().log())
    answer, text, reading, look = (torch.stack(parts[kind]).mean() for kind in (ANSWER, TEXT, READING, 3))
    torch.testing.assert_close(loss.cross_entropy, answer, rtol=1e-9, atol=1e-9)
    expected = answer + 0.2 * text + 0.6 * reading + 0.7 * look
    torch.testing.assert_close(loss.total, expected, rtol=1e-9, atol=1e-9)


def test_one_wide_pointer_is_many_narrow_ones_together():
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 2, 3, 8).double(), torch.randn(1, 1, 10, 8).double()
    places, pointers = torch.tensor([[5, 8, 9]]), torch.tensor([[1, -1, 7]])
    together = pointer_loss(queries, keys, places, pointers, torch.tensor([[3, 1, 2]]))
    shares = []
    for head in range(2):
        for query, (first, width) in ((0, (1, 3)), (2, (7, 2))):
            seen = (keys[0, 0, : places[0, query] + 1] @ queries[0, head, query]).softmax(0)
            shares.append(-seen[first : first + width].sum().log())
    torch.testing.assert_close(together, torch.stack(shares).mean())
    ones = torch.ones(1, 3, dtype=torch.int64)
    narrow = pointer_loss(queries, keys, places, pointers)
    torch.testing.assert_close(pointer_loss(queries, keys, places, pointers, ones), narrow)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_parts_of_a_batch_add_up_to_the_gradients_of_the_whole(tmp_path, accumulation):
    found = []
    for parts in (1, accumulation):
        trainer = trainer_of(
            tmp_path, f"train.accumulation={parts}", "senses.pointer_loss=0.5", "optim.clip=0.0"
        )
        trainer.model.double()
        batch = [x.double() if x.is_floating_point() else x for x in trainer.task.batch(11)]
        for part in zip(*(x.chunk(parts) for x in batch), strict=True):
            (trainer.task.loss(trainer.model, *part).total / parts).backward()
        found.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-8)  # routers are float32


def test_every_sense_is_learnt_from(tmp_path):
    trainer = trainer_of(tmp_path)
    loss = trainer.task.loss(trainer.model, *trainer.task.batch(0))
    loss.total.backward()
    found = [name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()]
    assert [name.split(".")[-2:] for name in found if "embed_modalities" in name] == [
        ["embed_modalities", "vectors"],
        ["image_proj", "weight"],
        ["audio_proj", "weight"],
    ]


# Runs and settings


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    config = senses_run(tmp_path)
    train(config, tmp_path / "straight")
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped", log=stop_at(5))
    torch.manual_seed(99)
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    written = json.loads((tmp_path / "stopped" / "run_config.json").read_text())
    assert RunConfig.from_dict(written) == config


def test_the_preset_is_that_of_needles_with_every_sense():
    config = senses()
    assert PRESETS["senses"]() == config and config.needle is None
    assert config.model.modalities == ModalityConfig() and config.senses == SensesConfig()
    assert RunConfig.from_dict(config.to_dict()) == config
    assert set(NAMES) == {"text", "image", "video", "audio"} and "key_value" in TEMPLATES


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("senses.modalities=['text', 'taste']", "senses.modalities has no 'taste'; there are"),
        ("senses.modalities=[]", "senses.modalities is empty"),
        ("senses.needle_share=1.0", "senses.needle_share=1.0 must be between 0 and 1"),
        ("senses.reading_loss=-1.0", "senses.reading_loss=-1.0 is a weight"),
        ("senses.predicted_share=1.5", "senses.predicted_share=1.5 is a share"),
        ("senses.short_length=20", "senses.short_length=20 must be at least"),
        ("senses.speech_frames=0", "senses.speech_frames=0 must be at least 1"),
        ("data.sequence_length=30", "data.sequence_length=30 must be at least"),
        ("model.modalities=none", "model.modalities is not set, with a part senses"),
        ("senses.reading_los=1.0", "senses has no key 'reading_los'. Did you mean 'reading_loss'?"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        senses_run(tmp_path, override)
