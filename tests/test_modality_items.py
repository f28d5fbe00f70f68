"""Text, images, video and sound as tokens: what each becomes, where it stands, and what is refused."""

import cmath
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.modalities import (
    Audio,
    Image,
    Interleaved,
    Modality,
    ModalityConfig,
    Text,
    Video,
    collate,
    interleave,
    log_mel,
    patches,
)
from moe.modality_config import hertz_to_mel, mel_to_hertz

SIZES = ModalityConfig(patch_size=3, num_channels=2, n_fft=32, hop_length=12, num_mel_bins=5)
GREY = ModalityConfig(patch_size=3, n_fft=32, hop_length=12, num_mel_bins=5)


# Sound


def log_mel_by_loops(wave: list[float], config: ModalityConfig) -> list[list[float]]:
    """The definition in moe.mel, sample by sample, in Python's own floats."""
    size, hop, bands = config.n_fft, config.hop_length, config.num_mel_bins
    window = [0.5 - 0.5 * math.cos(2 * math.pi * j / size) for j in range(size)]
    top = hertz_to_mel(config.sampling_rate / 2)
    edges = [mel_to_hertz(top * i / (bands + 1)) for i in range(bands + 2)]
    rows = []
    for t in range(1 + len(wave) // hop):
        power = []
        for k in range(size // 2 + 1):
            total = 0j
            for j in range(size):
                place = t * hop + j - size // 2
                sample = wave[place] if 0 <= place < len(wave) else 0.0
                total += window[j] * sample * cmath.exp(-2j * math.pi * j * k / size)
            power.append(abs(total) ** 2 / sum(window) ** 2)
        row = []
        for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
            energy = 0.0
            for k, p in enumerate(power):
                f = k * config.sampling_rate / size
                if low < f < high:
                    energy += p * ((f - low) / (middle - low) if f < middle else (high - f) / (high - middle))
            row.append((math.log(energy + 1e-7) + 12) / 4)
        rows.append(row)
    return rows


@pytest.mark.parametrize("samples", [1, 5, 12, 40, 131])
@pytest.mark.parametrize("sizes", [SIZES, ModalityConfig(n_fft=33, hop_length=33, num_mel_bins=4)], ids=str)
def test_log_mel_is_its_definition(samples, sizes):
    wave = torch.rand(samples, dtype=torch.float64) * 2 - 1
    truth = torch.tensor(log_mel_by_loops(wave.tolist(), sizes), dtype=torch.float64)
    assert truth.shape == (1 + samples // sizes.hop_length, sizes.num_mel_bins)
    torch.testing.assert_close(log_mel(wave, sizes), truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_mel(wave.float(), sizes).double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("hertz", "mel"), [(0, 0), (200, 3), (1000, 15), (6400, 42)], ids=lambda value: str(value)
)
def test_slaneys_scale_has_its_known_points(hertz, mel):
    assert hertz_to_mel(hertz) == pytest.approx(mel)
    assert mel_to_hertz(mel) == pytest.approx(hertz)


def test_a_tone_is_loudest_in_its_band_and_silence_is_flat():
    sizes = ModalityConfig()
    time = torch.arange(4000) / sizes.sampling_rate
    for hertz in (300.0, 941.0, 1477.0, 3000.0):
        frames = log_mel(torch.sin(2 * torch.pi * hertz * time), sizes)[2:-2]
        (band,) = set(frames.argmax(1).tolist())
        assert sizes.mel_edges[band] < hertz < sizes.mel_edges[band + 2]
        assert 2 < frames.max() < 2.76
    silence = log_mel(torch.zeros(1000), sizes)
    assert torch.allclose(silence, torch.tensor((math.log(1e-7) + 12) / 4))


def test_a_frame_does_not_depend_on_what_comes_later():
    wave = torch.rand(400, dtype=torch.float64)
    whole, start = log_mel(wave, SIZES), log_mel(wave[:200], SIZES)
    known = (200 - SIZES.n_fft // 2) // SIZES.hop_length
    torch.testing.assert_close(whole[:known], start[:known])


def test_audio_of_any_dtype_is_the_same_sound():
    whole = torch.randint(-32768, 32768, (200,), dtype=torch.int16)
    expected = interleave([Audio(whole.double() / 32768, 8000)], SIZES).features
    assert expected.abs().max() > 0.1
    for waveform in (whole, whole.numpy(), whole.float() / 32768, (whole.double() / 32768).tolist()):
        assert torch.allclose(interleave([Audio(waveform, 8000)], SIZES).features, expected, atol=1e-5)


@pytest.mark.parametrize("wave", [torch.zeros(0), torch.zeros(2, 3), torch.zeros(4, dtype=torch.int16)])
def test_log_mel_takes_samples_of_one_channel(wave):
    with pytest.raises(ValueError, match=r"a waveform is \(n\) floating-point samples"):
        log_mel(wave, SIZES)


# Images and video


@pytest.mark.parametrize(("h", "w"), [(3, 3), (1, 1), (6, 9), (7, 4), (2, 10)])
def test_patches_are_read_row_by_row_and_filled_up_with_zeros(h, w):
    frames = torch.rand(2, h, w, 2)
    p, rows = SIZES.patch_size, []
    for frame in frames.tolist():
        for top in range(0, h, p):
            for left in range(0, w, p):
                places = [(y, x) for y in range(top, top + p) for x in range(left, left + p)]
                pixels = [frame[y][x] if y < h and x < w else [0.0, 0.0] for y, x in places]
                rows.append([number for pixel in pixels for number in pixel])
    assert torch.equal(patches(frames, SIZES), torch.tensor(rows))


def test_pixels_of_any_dtype_are_the_same_image():
    whole = torch.randint(0, 256, (5, 7, 2), dtype=torch.uint8)
    expected = interleave([Image(whole)], SIZES)
    assert expected.features.shape == (6, 18)
    assert torch.equal(expected.features, patches(whole[None].float() / 255, SIZES))
    read_only = np.frombuffer(whole.numpy().tobytes(), np.uint8).reshape(5, 7, 2)
    for pixels in (read_only, whole.float() / 255, (whole.double() / 255).tolist()):
        assert torch.allclose(interleave([Image(pixels)], SIZES).features, expected.features)


def test_one_channel_needs_no_axis():
    image, video = torch.rand(4, 5), torch.rand(3, 4, 5)
    for with_axis, without in (
        (Image(image[..., None]), Image(image)),
        (Video(video[..., None]), Video(video)),
    ):
        assert torch.equal(interleave([with_axis], GREY).features, interleave([without], GREY).features)


def test_a_video_is_its_frames_one_after_another():
    video = torch.rand(4, 5, 7, 2)
    sequence = interleave([Video(video)], SIZES)
    frames = interleave([Image(frame) for frame in video], SIZES)
    assert torch.equal(sequence.features, frames.features)
    assert sequence.modality.tolist() == [Modality.VIDEO] * 24
    assert frames.modality.tolist() == [Modality.IMAGE] * 24


@pytest.mark.parametrize(
    ("own", "asked", "kept"),
    [
        (24.0, None, [0, 1, 2, 3, 4, 5, 6]),
        (None, None, [0, 1, 2, 3, 4, 5, 6]),
        (3.0, 1.0, [0, 3, 6]),
        (5.0, 2.0, [0, 2, 5]),
        (2.0, 2.0, [0, 1, 2, 3, 4, 5, 6]),
        (1.0, 2.0, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_frames_are_sampled_at_the_rate_of_the_config(own, asked, kept):
    sizes = ModalityConfig(patch_size=1, fps=asked)
    video = torch.arange(7)[:, None, None] / 10
    rows = interleave([Video(video, fps=own)], sizes).features[:, 0]
    assert torch.allclose(rows, torch.tensor(kept) / 10)


# One sequence


def test_items_become_tokens_where_they_stand():
    image, wave = torch.rand(3, 6, 2), torch.rand(13)
    items = [Text("é!"), Image(image), Text(b"\x00\xff"), Audio(wave, 8000), Text([7]), Video(image[None])]
    sequence = interleave(items, SIZES)
    assert sequence.modality.tolist() == [0, 0, 0, 1, 1, 0, 0, 3, 3, 0, 2, 2]
    assert sequence.ids.tolist() == [195, 169, 33, 0, 0, 0, 255, 0, 0, 7, 0, 0]
    assert sequence.ids.dtype == torch.uint8
    expected = [*patches(image[None], SIZES), *log_mel(wave, SIZES), *patches(image[None], SIZES)]
    for row, numbers in zip(sequence.features, expected, strict=True):
        assert torch.equal(row[: len(numbers)], numbers) and not row[len(numbers) :].any()


@pytest.mark.parametrize(
    "ids", [[300, 2], np.array([300, 2], np.uint32), torch.tensor([300, 2], dtype=torch.int16)], ids=type
)
def test_a_tokenizer_encodes_text_and_ids_are_taken_as_they_are(ids):
    sequence = interleave([Text("word"), Text(ids)], SIZES, lambda text: [1000 + byte for byte in text])
    assert sequence.ids.tolist() == [1119, 1111, 1114, 1100, 300, 2]
    assert sequence.ids.dtype == torch.int64


@st.composite
def sequences(draw) -> Interleaved:
    length = draw(st.integers(0, 12))
    modality = torch.tensor(
        draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)), dtype=torch.uint8
    )
    dtype = draw(st.sampled_from([torch.uint8, torch.int64]))
    ids = torch.randint(0, 200, (length,)).where(modality == 0, 0).to(dtype)
    return Interleaved(ids, modality, torch.randn(int((modality != 0).sum()), 4))


def assert_equal(ours: Interleaved, truth: Interleaved) -> None:
    for x, y in zip(ours.dense(), truth.dense(), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(ours.features, truth.features)


@given(sequences(), st.lists(st.integers(0, 12), max_size=4), st.integers(1, 13))
def test_slices_and_pieces_put_together_are_the_sequence(sequence, cuts, size):
    ends = sorted({min(cut, len(sequence)) for cut in cuts} | {0, len(sequence)})
    slices = [sequence[a:b] for a, b in pairwise(ends)]
    assert_equal(Interleaved.concatenate([sequence[:0], *slices]), sequence)
    pieces = list(sequence.pieces(size))
    assert [len(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
    assert_equal(Interleaved.concatenate([*pieces, sequence[len(sequence) :]]), sequence)


@given(st.lists(sequences(), min_size=1, max_size=4))
def test_dense_forms_of_parts_put_together_are_that_of_the_whole(parts):
    whole = Interleaved.concatenate(parts)
    assert len(whole) == sum(map(len, parts))
    for i, x in enumerate(whole.dense()):
        assert torch.equal(x, torch.cat([part.dense()[i] for part in parts]))


@given(sequences(), st.integers(-14, 14), st.integers(-14, 14))
def test_a_slice_is_that_of_every_column(sequence, a, b):
    for x, y in zip(sequence[a:b].dense(), sequence.dense(), strict=True):
        assert torch.equal(x, y[a:b])


def test_a_slice_shares_memory_and_text_takes_two_bytes():
    sequence = interleave([Text(b"x" * 1000), Image(torch.rand(3, 3, 2)), Text("end")], SIZES)
    assert sequence.ids.nbytes + sequence.modality.nbytes == 2 * 1004
    assert sequence.features.shape == (1, 18)
    assert sequence[500:].features.data_ptr() == sequence.features.data_ptr()
    assert sequence[500:].ids.data_ptr() == sequence.ids.data_ptr() + 500


# Refusals

NAN = torch.full((3, 3, 2), math.nan)
BAD = {
    "empty text": (Text(""), r"text is \(n\) ids, at least one"),
    "no ids": (Text([]), r"text is \(n\) ids, at least one"),
    "ids in rows": (Text([[1, 2]]), r"text is \(n\) ids"),
    "fractions as ids": (Text(torch.tensor([0.5])), "whole numbers, got torch.float32"),
    "truth values as ids": (Text(torch.tensor([True])), "whole numbers, got torch.bool"),
    "negative ids": (Text([4, -1]), "id -1 must not be negative"),
    "ids outside the vocabulary": (Text([256]), "id 256 is outside the vocabulary: ids go from 0 to 255"),
    "an image without pixels": (Image(torch.zeros(0, 3, 2)), "an image must not be empty"),
    "an image of another rank": (
        Image(torch.zeros(1, 3, 3, 2)),
        r"an image is \(h w c\).*got \(1, 3, 3, 2\)",
    ),
    "channels first": (Image(torch.zeros(2, 3, 3)), r"num_channels=2 last, got \(2, 3, 3\). Move its"),
    "no channels where there are two": (Image(torch.zeros(3, 3)), r"\(h w c\) with num_channels=2 last"),
    "an image with NaN": (Image(NAN), "an image holds NaN or infinity, 18 times"),
    "an image with infinity": (Image(NAN.nan_to_num(math.inf)), "NaN or infinity"),
    "bytes as floats": (Image(torch.full((3, 3, 2), 255.0)), r"floating-point in 0..1, got 255..255"),
    "a negative pixel": (Image(torch.full((3, 3, 2), -0.1)), r"got -0.1..-0.1"),
    "an image of whole numbers": (Image(torch.zeros(3, 3, 2, dtype=torch.int64)), "uint8.*got torch.int64"),
    "an image of truth values": (Image(np.zeros((3, 3, 2), bool)), "got torch.bool"),
    "a complex image": (Image(torch.zeros(3, 3, 2, dtype=torch.complex64)), "got torch.complex64"),
    "the name of an image": (Image("cat.png"), "an image must be an array of numbers, got str"),
    "ragged rows": (Image([[0.1], [0.2, 0.3]]), "an image must be an array of numbers, got list"),
    "a video without frames": (Video(torch.zeros(0, 3, 3, 2)), "a video must not be empty"),
    "an image as a video": (Video(torch.zeros(3, 3, 2)), r"a video is \(t h w c\)"),
    "a video with NaN": (Video(NAN[None]), "a video holds NaN"),
    "a video of no speed": (Video(torch.zeros(1, 3, 3, 2), fps=0.0), "fps=0.0 must be a positive number"),
    "a video of infinite speed": (Video(torch.zeros(1, 3, 3, 2), fps=math.inf), "fps=inf must be"),
    "another rate": (
        Audio(torch.zeros(9), 16000),
        "rate=16000 must be the model's sampling_rate=8000. Resample",
    ),
    "no samples": (Audio(torch.zeros(0), 8000), "a waveform must not be empty"),
    "two channels": (Audio(torch.zeros(2, 9), 8000), r"samples of one channel, got \(2, 9\)"),
    "a waveform with NaN": (Audio(torch.tensor([0.0, math.nan]), 8000), "holds NaN or infinity, 1 times"),
    "a waveform that is too loud": (
        Audio(torch.tensor([0.0, -1.5]), 8000),
        r"in -1..1, or int16, got -1.5..0",
    ),
    "a waveform of bytes": (Audio(torch.zeros(9, dtype=torch.uint8), 8000), "got torch.uint8"),
    "a waveform of truth values": (Audio(torch.zeros(9, dtype=torch.bool), 8000), "got torch.bool"),
    "a complex waveform": (Audio(torch.zeros(9, dtype=torch.complex64), 8000), "got torch.complex64"),
    "no item": ("text", "items are Text, Image, Video and Audio; wrap it"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_item_that_makes_no_sense_is_refused_with_its_index(name):
    item, words = BAD[name]
    with pytest.raises(ValueError, match=rf"^item 2 \({type(item).__name__}\): .*{words}"):
        interleave([Text("a"), Audio(torch.zeros(9), 8000), item, Text("b")], SIZES, vocab_size=256)


def test_a_video_of_unknown_speed_cannot_be_sampled():
    with pytest.raises(ValueError, match=r"item 0 \(Video\): frames are sampled 2.0 times a second"):
        interleave([Video(torch.zeros(2, 3, 3))], ModalityConfig(fps=2.0))


def test_a_sequence_needs_an_item():
    with pytest.raises(ValueError, match="at least one item"):
        interleave([], SIZES)


def test_sequences_that_do_not_fit_together_are_refused():
    one, other = interleave([Text("a")], SIZES), interleave([Text("a")], ModalityConfig())
    for put_together in (Interleaved.concatenate, collate):
        with pytest.raises(ValueError, match=r"\[18, 64\] features a token"):
            put_together([one, other])
        with pytest.raises(ValueError, match="at least one"):
            put_together([])
    with pytest.raises(ValueError, match="leave empty ones out"):
        collate([one, one[:0]])
    with pytest.raises(ValueError, match='padding_side=\'middle\' must be "right" or "left"'):
        collate([one], padding_side="middle")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="has no step, got 2"):
        one[::2]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            (torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.uint8), torch.zeros(0, 4)),
            "ids must be",
        ),
        ((torch.zeros(2, 1), torch.zeros(2, dtype=torch.uint8), torch.zeros(0, 4)), "ids must be"),
        (
            (torch.zeros(2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), torch.zeros(0, 4)),
            "modality",
        ),
        ((torch.zeros(2, dtype=torch.uint8), torch.zeros(2), torch.zeros(0, 4)), "modality must be uint8"),
        (
            (torch.zeros(2, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8), torch.zeros(1, 4)),
            "1 rows, but 2",
        ),
        (
            (torch.zeros(2, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8), torch.zeros(2)),
            "features must be",
        ),
        (
            (torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8), torch.zeros(1, 4).double()),
            "features must be",
        ),
    ],
)
def test_columns_of_a_sequence_must_fit_each_other(columns, words):
    with pytest.raises(ValueError, match=words):
        Interleaved(*columns)
