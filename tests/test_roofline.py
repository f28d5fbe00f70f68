"""The floors are those that one computes by hand, and grow with the work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.roofline import (
    ALL_SHAPES,
    BACKWARD,
    FORWARD,
    GPUS,
    datasheet_of,
    floor_s,
    layer_floor_s,
    main,
    moved_bytes,
    works,
)
from benchmarks.shapes import SHAPES, SONIC_SHAPES, Shape, experts_flops, sonic_tokens

QWEN3 = SHAPES["qwen3_30b"]
ROOF, BANDWIDTH = 700e12, 3.35e12
shapes = st.builds(
    Shape,
    d=st.integers(1, 64).map(lambda n: 16 * n),
    h=st.integers(1, 64).map(lambda n: 16 * n),
    e=st.integers(4, 64),
    k=st.integers(1, 4),
)


def test_qwen3_at_8192_tokens_has_the_floors_computed_by_hand():
    """p = 65536, d = 2048, h = 768: up is 4 p d h = 412 GFLOP at 700 TFLOP/s; combine 302 MB at 3.35 TB/s."""
    floors = {name: 1e6 * work.floor_s(ROOF, BANDWIDTH) for name, work in works(QWEN3, 8192).items()}
    by_hand = {
        "up": 589, "down": 295, "combine": 90, "grad_pre": 295, "grad_down": 295, "grad_rows": 589,
        "reduce": 90, "grad_up": 589,
    }  # fmt: skip
    assert {name: round(floors[name]) for name in by_hand} == pytest.approx(by_hand, abs=1)
    assert floors["routing"] < 1
    totals = {names: sum(floors[name] for name in names) for names in (FORWARD, BACKWARD)}
    assert totals[FORWARD] == pytest.approx(974, abs=1) and totals[BACKWARD] == pytest.approx(1857, abs=1)


def test_intensities_at_8192_tokens_are_those_computed_by_hand():
    """FLOP/byte; the fused backward of the activation sits at the ridge of an H100."""
    by_hand = {"up": 361, "down": 267, "grad_pre": 219, "grad_down": 384, "grad_rows": 323, "grad_up": 396}
    passes = works(QWEN3, 8192)
    assert {n: round(passes[n].flops / passes[n].bytes) for n in by_hand} == by_hand


@pytest.mark.parametrize(
    ("name", "tokens", "forward_us", "backward_us"),
    [
        ("olmoe", 128, 246, 490),
        ("olmoe", 8192, 1268, 2446),
        ("mixtral", 4096, 4153, 8276),
        ("qwen3_30b", 128, 365, 729),
        ("qwen3_30b", 4096, 515, 998),
        ("deepseek_v3", 1024, 6850, 13650),
        ("gpt_oss_20b", 8192, 2400, 4730),
    ],
)
def test_layers_of_published_models_have_the_floors_computed_by_hand(name, tokens, forward_us, backward_us):
    passes = works(SHAPES[name], tokens)
    for names, expected in ((FORWARD, forward_us), (BACKWARD, backward_us)):
        measured = 1e6 * floor_s((passes[n] for n in names), ROOF, BANDWIDTH)
        assert measured == pytest.approx(expected, rel=0.01)


def test_one_token_reads_the_weights_of_its_own_experts_only():
    weights = 2 * QWEN3.k * QWEN3.expert_numbers
    assert weights < moved_bytes(QWEN3, 1) < 1.01 * weights
    assert moved_bytes(QWEN3, 1, active=1) < moved_bytes(QWEN3, 1)


def test_gradients_of_weights_are_written_for_every_expert():
    assert works(QWEN3, 1)["grad_up"].bytes > 2 * QWEN3.e * 2 * QWEN3.d * QWEN3.h


def test_inference_writes_no_pre_activation():
    keeping, inference = works(QWEN3, 8192)["up"], works(QWEN3, 8192, keep=False)["up"]
    assert keeping.bytes - inference.bytes == 2 * 65536 * 2 * QWEN3.h
    assert keeping.flops == inference.flops


@given(shapes, st.integers(1, 500))
def test_the_products_of_all_passes_are_the_operations_of_the_layer(shape, tokens):
    passes = works(shape, tokens)
    for names, backward in ((FORWARD, False), (FORWARD + BACKWARD, True)):
        sums = [passes[name].flops for name in names if name not in ("combine", "reduce")]
        assert sum(sums) == experts_flops(tokens * shape.k, shape.d, shape.h, backward=backward)


@given(shapes, st.integers(1, 500), st.booleans())
def test_more_tokens_never_have_a_lower_floor(shape, tokens, backward):
    fewer, more = (layer_floor_s(shape, t, ROOF, BANDWIDTH, backward=backward) for t in (tokens, tokens + 1))
    assert fewer < more


@given(shapes, st.integers(1, 500))
def test_a_faster_gpu_never_has_a_higher_floor(shape, tokens):
    slow, fast = (layer_floor_s(shape, tokens, ROOF, b, backward=True) for b in (BANDWIDTH, 2 * BANDWIDTH))
    assert fast <= slow


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_device_is_known_by_its_name(device, name):
    found = datasheet_of(device)
    assert found is not None and found.name == name


def test_an_unknown_device_has_no_datasheet():
    assert datasheet_of("AMD EPYC, 2 cores") is None


def test_every_gpu_names_its_source_and_every_sonic_shape_its_tokens():
    assert all(gpu.source for gpu in GPUS.values())
    assert [sonic_tokens(name) for name in SONIC_SHAPES] == [40960] * 3 + [24576] * 3 + [32768] * 6
    assert len(ALL_SHAPES) == len(SHAPES) + 12


def test_the_table_shows_every_pass_and_the_totals(capsys):
    assert main(["--shape", "qwen3_30b", "--tokens", "8192", "--gpu", "h100", "--dense-tflops", "700"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in printed.splitlines() if line.startswith("|")}
    assert set(FORWARD + BACKWARD) | {"forward", "backward", "both"} <= set(rows)
    assert "655" in rows["both"] and "memory" in rows["combine"] and "compute" in rows["up"]


def test_the_table_of_inference_is_the_forward_only(capsys):
    assert main(["--inference", "--tokens", "128"]) == 0
    printed = capsys.readouterr().out
    assert "364.3" in printed and "grad_pre" not in printed and "backward" not in printed
