"""What is seen and heard in needles of every sense: images, tones, recordings, filler, haystacks."""

import hashlib
import sys
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from senses_helpers import IMAGES, handwriting, write_by_hand  # noqa: F401  # the fixture is used by all tests

from moe.mel import log_mel
from moe.modality_config import Modality, ModalityConfig
from moe.probes.senses import handwriting as written
from moe.probes.senses.bank import build_bank, draw_different
from moe.probes.senses.config import NAMES, TEMPLATE, SensesConfig
from moe.probes.senses.filler import draw_filler
from moe.probes.senses.film import load_film
from moe.probes.senses.handwriting import affine_copies, load_handwriting
from moe.probes.senses.haystack import build_senses_haystack
from moe.probes.senses.keypad import keypad_tones, other_sounds
from moe.probes.senses.recordings import load_recordings, parts_of, read_wav
from moe.probes.senses.tokens import Tokens

TEXT = np.frombuffer(b"the expert router sends every token to two of many; " * 4000, np.uint8)
CONFIG, SIZES = SensesConfig(image_copies=1), ModalityConfig()
SEEN = (Modality.IMAGE, Modality.VIDEO)
RATE = 8000


@pytest.fixture
def bank():
    return build_bank(CONFIG, SIZES, "test")


# Images


def test_the_split_depends_on_the_image_alone_and_shares_none():
    pixels = np.random.default_rng(0).integers(0, 17, (600, 8, 8)).astype(np.uint8)
    order = np.random.default_rng(1).permutation(600)
    train, test = (written.split_by_content(pixels, split) for split in ("train", "test"))
    assert len(test) == 297 and sorted([*train, *test]) == list(range(600))
    moved = written.split_by_content(pixels[order], "test")
    assert {pixels[i].tobytes() for i in test} == {pixels[order][i].tobytes() for i in moved}


def test_real_digits_are_1500_to_train_on_and_297_others():
    pytest.importorskip("sklearn")
    train, test = load_handwriting("train"), load_handwriting("test")
    assert train.images.shape == (1500, 8, 8) and test.images.shape == (297, 8, 8)
    assert train.images.min() == 0 and train.images.max() == 1
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert np.bincount(test.labels).min() >= 15  # of every digit, more than a clip shows


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"scikit-learn, which is not installed: pip install"):
        load_handwriting("train")


def test_copies_are_the_image_turned_scaled_and_moved(monkeypatch):
    image = np.zeros((1, 8, 8), np.float32)
    image[0, 2:6, 3:5] = 1  # a bar
    for name in ("ROTATION", "SCALE", "SHIFT", "NOISE"):
        monkeypatch.setattr(written, name, 0.0)
    same = affine_copies(np.random.default_rng(0), image, 3)
    np.testing.assert_allclose(same, np.broadcast_to(image, (1, 4, 8, 8)), atol=1e-6)
    monkeypatch.setattr(written, "SHIFT", 1.0)
    moved = affine_copies(np.random.default_rng(0), image, 50)[0, 1:]
    np.testing.assert_allclose(moved.sum((1, 2)), image.sum(), rtol=1e-5)  # moved whole, inside the frame
    y = (moved * np.arange(8)[:, None]).sum((1, 2)) / moved.sum((1, 2))
    assert -1 <= (y - 3.5).min() < -0.8 and 0.8 < (y - 3.5).max() <= 1
    monkeypatch.setattr(written, "SHIFT", 0.0)
    monkeypatch.setattr(written, "ROTATION", np.pi / 2 + 1e-9)
    turned = affine_copies(_Highest(), image, 1)[0, 1]
    np.testing.assert_allclose(turned, image[0].T, atol=1e-6)


class _Highest(np.random.Generator):
    """A generator that always draws the highest number."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def uniform(self, low=0.0, high=1.0, size=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return np.full(size or (), high)

    def normal(self, loc=0.0, scale=1.0, size=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return np.full(size or (), loc)


# Sound


def test_a_tone_is_heard_at_its_two_frequencies():
    rng = np.random.default_rng(0)
    for digit, (low, high) in {0: (941, 1336), 1: (697, 1209), 5: (770, 1336), 9: (852, 1477)}.items():
        (sound,) = keypad_tones(rng, np.array([digit]), samples=8000, rate=RATE)
        spectrum = np.abs(np.fft.rfft(sound))
        loudest = spectrum[:1100].argmax(), 1100 + spectrum[1100:].argmax()
        np.testing.assert_allclose(loudest, [low, high], rtol=0.011)
        in_tones = sum((spectrum[peak - 9 : peak + 10] ** 2).sum() for peak in loudest)
        decibels = 10 * np.log10(in_tones / ((spectrum**2).sum() - in_tones))
        assert 9 < decibels < 10.5  # some of a tone leaks further


def test_other_sounds_have_one_tone_or_none():
    sounds = other_sounds(np.random.default_rng(0), 40, samples=2048, rate=RATE)
    flat = []
    for sound in sounds:
        power = np.abs(np.fft.rfft(sound)) ** 2
        peak = int(power.argmax())
        flat.append(power[max(peak - 2, 0) : peak + 3].sum() / power.sum())
    assert min(flat[:20]) > 0.8 and max(flat[20:]) < 0.1


def wav(path: Path, samples: np.ndarray, *, rate: int = RATE, width: int = 2, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        data = samples * 32767 if width == 2 else samples * 127 + 128
        file.writeframes(data.astype("<i2" if width == 2 else "u1").tobytes())
    return path


@pytest.mark.parametrize(("width", "tolerance"), [(1, 0.02), (2, 1e-4)])
def test_a_wav_file_is_read_as_it_was_written(tmp_path, width, tolerance):
    samples = np.sin(np.arange(500) / 5)
    stereo = np.stack([samples, 0.5 * samples], 1)
    mono = read_wav(wav(tmp_path / "a.wav", samples, width=width), rate=RATE)
    np.testing.assert_allclose(mono, samples, atol=tolerance)
    both = read_wav(wav(tmp_path / "b.wav", stereo, width=width, channels=2), rate=RATE)
    np.testing.assert_allclose(both, 0.75 * samples, atol=tolerance)


def test_what_is_no_plain_wav_is_refused(tmp_path):
    samples = np.zeros(10)
    with pytest.raises(ValueError, match=r"has 16000 samples a second and the model reads 8000"):
        read_wav(wav(tmp_path / "fast.wav", samples, rate=16000), rate=RATE)
    with pytest.raises(ValueError, match=r"empty\.wav has no sample"):
        read_wav(wav(tmp_path / "empty.wav", samples[:0]), rate=RATE)
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.wav is no WAV file of plain samples"):
        read_wav(tmp_path / "text.wav", rate=RATE)


def speech(folder: Path, *, each: int = 40) -> Path:
    """Recordings of which the pitch says the digit, with silence before and after."""
    folder.mkdir()
    for digit in range(10):
        for number in range(each):
            voice = np.sin(2 * np.pi * (300 + 200 * digit) * np.arange(1600 + 40 * number) / RATE)
            wav(
                folder / f"{digit}_someone_{number}.wav",
                np.concatenate([np.zeros(800), 0.5 * voice, np.zeros(400)]),
            )
    return folder


def test_recordings_belong_to_one_split_and_lose_their_silence(tmp_path):
    folder = speech(tmp_path / "speech")
    (train, words), (test, others) = (
        load_recordings(folder, split, rate=RATE) for split in ("train", "test")
    )
    assert len(train) + len(test) == 400 and 20 <= len(test) <= 60
    assert "to train on (speech)" in words and "held out (speech)" in others
    assert {one.digit for one in train} == {one.digit for one in test} == set(range(10))
    lengths = sorted(len(one.samples) for one in (*train, *test))
    assert lengths[0] > 1500 and lengths[-1] < 1600 + 40 * 40
    sounds = [hashlib.sha256(one.samples.tobytes()).digest() for one in (*train, *test)]
    assert len(set(sounds)) == 400


def test_too_few_recordings_are_refused(tmp_path):
    folder = speech(tmp_path / "speech", each=1)
    with pytest.raises(
        ValueError, match=r"10 recordings, \d+ of them for split 'test', and none of the digits"
    ):
        load_recordings(folder, "test", rate=RATE)
    with pytest.raises(FileNotFoundError, match=r"folder of spoken digits '.*nowhere' does not exist"):
        load_recordings(tmp_path / "nowhere", "test", rate=RATE)


@given(st.integers(1, 40), st.integers(1, 9))
def test_parts_of_a_recording_are_means_in_its_order(frames, parts):
    rows = np.arange(frames, dtype=np.float32)[:, None]
    made = parts_of(rows, parts)
    assert made.shape == (parts, 1) and (np.diff(made[:, 0]) >= 0).all()
    assert made[0] <= frames / parts and made[-1] >= frames - 1 - frames / parts
    if frames % parts == 0:
        np.testing.assert_allclose(made, rows.reshape(parts, -1).mean(1)[:, None])


def test_spoken_digits_keep_the_order_of_their_frames(tmp_path):
    folder = speech(tmp_path / "speech")
    config = replace(CONFIG, speech_folder=str(folder), speech_frames=5)
    bank = build_bank(config, SIZES, "train")
    audio = bank.digits[Modality.AUDIO]
    assert audio.frames == config.frames(Modality.AUDIO) == 5
    (clip,) = audio.draw(np.random.default_rng(0), np.array([7]))
    assert clip.tolist() == list(range(clip[0], clip[0] + 5)) and (bank.digit_of_row[clip] == 7).all()
    recordings, _ = load_recordings(folder, "train", rate=RATE)
    frames = [
        parts_of(log_mel(torch.from_numpy(one.samples), SIZES).numpy(), 5)
        for one in recordings
        if one.digit == 7
    ]
    heard = bank.features[clip][:, :40]
    assert any(np.array_equal(heard, one) for one in frames)
    assert "5 frames a digit" in bank.sources[Modality.AUDIO]


# The bank


def test_the_two_splits_share_no_row():
    train, test = (build_bank(CONFIG, SIZES, split) for split in ("train", "test"))
    assert not {row.tobytes() for row in train.features} & {row.tobytes() for row in test.features}
    assert len(train.digits[Modality.IMAGE].entries) == 2 * len(write_by_hand("train").images)
    assert len(test.digits[Modality.IMAGE].entries) == len(write_by_hand("test").images)  # no copies


def test_sounds_of_the_two_splits_differ_even_where_as_much_is_drawn(monkeypatch):
    monkeypatch.setitem(IMAGES, "train", IMAGES["test"])
    train, test = (build_bank(replace(CONFIG, image_copies=0), SIZES, split) for split in ("train", "test"))
    assert train.features.shape == test.features.shape
    assert not {row.tobytes() for row in train.features} & {row.tobytes() for row in test.features}


def test_rows_show_the_digit_that_they_are_said_to_show(bank):
    images = {image.tobytes(): label for image, label in zip(*_made_up(), strict=True)}
    for modality in SEEN:
        for digit in range(10):
            clip = bank.digits[modality].draw(np.random.default_rng(digit), np.array([digit]))[0]
            assert len(set(clip)) == 3
            assert [images[bank.features[row].tobytes()] for row in clip] == [digit] * 3
    audio = bank.digits[Modality.AUDIO].draw(np.random.default_rng(0), np.repeat(np.arange(10), 4))
    assert (bank.digit_of_row[audio] == np.repeat(np.arange(10), 4)[:, None]).all()
    means = np.stack([bank.features[rows][:, :40].mean(0) for rows in audio.reshape(10, -1)])
    nearest = ((bank.features[audio][:, :, None, :40] - means) ** 2).sum(-1).argmin(-1)
    assert (nearest == np.repeat(np.arange(10), 4)[:, None]).mean() > 0.95
    assert (bank.features[audio][..., 40:] == 0).all()
    for modality, rows in bank.others.items():
        assert (bank.digit_of_row[rows] == -1).all(), modality


def _made_up():
    made = write_by_hand("test")
    return made.images, made.labels


@given(st.lists(st.integers(3, 9), min_size=1, max_size=20), st.integers(1, 3), st.integers(0, 99))
def test_different_numbers_are_different_and_in_range(counts, size, seed):
    drawn = draw_different(np.random.default_rng(seed), np.array(counts), size)
    for count, row in zip(counts, drawn.tolist(), strict=True):
        assert len(set(row)) == size and 0 <= min(row) <= max(row) < count


def test_every_choice_of_different_numbers_is_equally_likely():
    drawn = draw_different(np.random.default_rng(0), np.full(60_000, 4), 3)
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 24 and abs(counts / 2500 - 1).max() < 0.1


def test_patches_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"patch_size=4.*Set patch_size=8 and num_channels=1"):
        build_bank(CONFIG, ModalityConfig(patch_size=4), "test")


# Filler


def test_filler_has_runs_of_all_senses_in_their_shares(bank):
    filler, starts = draw_filler(np.random.default_rng(0), bank, TEXT, 120_000)
    assert len(filler) == 120_000 and starts[0] == 0
    lengths = np.diff(np.append(starts, 120_000))
    assert lengths[:-1].min() == 8 and lengths.max() == 64
    assert all(len(set(filler.modality[start : start + 8])) == 1 for start in starts[:-1])
    shares = np.bincount(filler.modality) / len(filler)
    np.testing.assert_allclose(shares, [0.6, 0.1, 0.1, 0.2], atol=0.02)
    text = filler.ids[filler.modality == Modality.TEXT].tobytes()
    assert text in TEXT.tobytes() and (filler.ids[filler.modality != Modality.TEXT] == 0).all()
    shown = bank.digit_of_row[filler.rows]
    for sense in bank.digits:
        assert abs((shown[filler.modality == sense] >= 0).mean() - 0.5) < 0.06


def test_look_alikes_show_a_digit_in_as_many_frames_as_a_needle(bank):
    filler, starts = draw_filler(np.random.default_rng(0), bank, TEXT, 20_000)
    seen = 0
    for start, stop in zip(starts, [*starts[1:], 20_000], strict=True):
        digits = bank.digit_of_row[filler.rows[start:stop]]
        if filler.modality[start] != Modality.TEXT and digits[0] >= 0:
            whole = digits[: len(digits) // 3 * 3].reshape(-1, 3)
            assert (whole == whole[:, :1]).all()
            seen += len(set(whole[:, 0])) > 1
    assert seen > 20


def test_a_film_is_shown_in_its_own_order(bank, monkeypatch):
    film = np.arange(50, dtype=np.float32)[:, None, None] / 50 + np.zeros((50, 8, 8), np.float32)
    monkeypatch.setattr("moe.probes.senses.bank.load_film", lambda path, side: film)
    with_film = build_bank(CONFIG, SIZES, "test", film=Path("a.mp4"))
    assert "filler also of a.mp4" in with_film.sources[Modality.VIDEO]
    filler, starts = draw_filler(np.random.default_rng(0), with_film, TEXT, 20_000)
    runs = 0
    for start, stop in zip(starts, [*starts[1:], 20_000], strict=True):
        if filler.modality[start] == Modality.VIDEO and with_film.digit_of_row[filler.rows[start]] < 0:
            frames = filler.rows[start:stop] - with_film.film[0]
            assert (np.diff(frames) % 50 == 1).all() and frames.min() >= 0 and frames.max() < 50
            runs += 1
    assert runs > 10


def test_a_video_file_is_decoded_to_grey_frames(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for level in (0, 60, 120, 180):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    film = load_film(path, side=8)
    assert film.shape == (4, 8, 8) and film.dtype == np.float32
    np.testing.assert_allclose(film.mean((1, 2)), np.array([0, 60, 120, 180]) / 255, atol=0.03)
    assert len(load_film(path, side=8, most=2)) == 2
    (tmp_path / "no.mp4").write_text("hello")
    with pytest.raises(ValueError, match=r"no\.mp4 is no video that PyAV can decode"):
        load_film(tmp_path / "no.mp4", side=8)


def test_without_a_decoder_or_a_file_a_video_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no video file .*gone\.mp4"):
        load_film(tmp_path / "gone.mp4", side=8)
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"needs PyAV, which is not installed: pip install av"):
        load_film(tmp_path / "a.mp4", side=8)


# Haystacks


def read_back(bank, tokens: Tokens) -> bytes:
    """A needle as text: every clip as its digit."""
    shown = bank.digit_of_row[tokens.rows]
    letters = np.where(tokens.rows < 0, tokens.ids, shown + ord("0")).astype(np.uint8)
    clips = tokens.rows >= 0
    first = np.flatnonzero(clips)[:1]
    keep = ~clips | ((np.arange(len(tokens)) - (first[0] if len(first) else 0)) % 3 == 0)
    return letters[keep].tobytes()


def test_a_haystack_holds_its_needles_where_it_says(bank):
    haystack = build_senses_haystack(bank, TEXT, length=16_384, queries=10, seed=0)
    ids, modality, features = (x.numpy() for x in haystack.prompt.dense())
    assert len(ids) == 16_384 and len(haystack.needles) == 64
    for needle in haystack.needles:
        stop = needle.place + len(needle.tokens)
        assert read_back(bank, needle.tokens) == TEMPLATE.write(needle.fact)
        np.testing.assert_array_equal(ids[needle.place : stop], needle.tokens.ids)
        np.testing.assert_array_equal(modality[needle.place : stop], needle.tokens.modality)
        shown = needle.tokens.rows >= 0
        assert set(needle.tokens.modality[shown]) <= {needle.modality}
        np.testing.assert_array_equal(
            features[needle.place : stop][shown], bank.features[needle.tokens.rows[shown]]
        )
    assert len({needle.fact.key for needle in haystack.needles}) == 64
    assert haystack.prompt.features.shape[0] == (modality != 0).sum()


def test_questions_are_as_many_of_each_sense_and_depth(bank):
    haystack = build_senses_haystack(bank, TEXT, length=65_536, queries=25, seed=0)
    for name, sense in NAMES.items():
        mine = [question for question in haystack.questions if question.template == name]
        assert [sum(one.quintile == part for one in mine) for part in range(5)] == [5] * 5
        for question in mine:
            assert question.needle.modality is sense and question.place == question.needle.place
            assert question.query == TEMPLATE.ask(question.needle.fact.key)
            assert question.answer == question.needle.fact.value and len(question.answer) == 4


def test_with_shuffled_values_no_needle_has_the_answer(bank):
    plain, shuffled = (
        build_senses_haystack(bank, TEXT, length=16_384, queries=16, seed=3, shuffle_values=one)
        for one in (False, True)
    )
    assert {(q.query, q.answer) for q in plain.questions} == {(q.query, q.answer) for q in shuffled.questions}
    assert all(question.needle.fact.value != question.answer for question in shuffled.questions)


def test_only_the_senses_asked_for_have_needles(bank):
    haystack = build_senses_haystack(
        bank, TEXT, length=8192, queries=5, seed=0, modalities=("image", "audio")
    )
    assert {needle.modality for needle in haystack.needles} == {Modality.IMAGE, Modality.AUDIO}
    assert set(haystack.prompt.modality.tolist()) == {0, 1, 2, 3}  # the filler has them all


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"queries": 9}, "4 modalities, but a haystack of 8192 tokens with 32 needles has 8 of each"),
        ({"modalities": ("text", "smell")}, "modalities has no 'smell'; there are"),
        ({"modalities": ("text", "text")}, "names one twice"),
        ({"modalities": ()}, "modalities is empty"),
        ({"needles": 900}, "900 needles have 18.* tokens and the haystack only 8192"),
        ({"needles": 350}, "350 needles for .* runs of filler"),
    ],
)
def test_a_haystack_that_cannot_be_is_refused(bank, changes, message):
    with pytest.raises(ValueError, match=message):
        build_senses_haystack(bank, TEXT, **{"length": 8192, "queries": 2, "seed": 0, **changes})


def test_too_little_text_is_refused(bank):
    with pytest.raises(ValueError, match=r"bytes of text are needed, and there are 500"):
        build_senses_haystack(bank, TEXT[:500], length=8192, queries=2, seed=0)
