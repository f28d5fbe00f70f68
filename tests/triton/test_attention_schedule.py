"""How attention over a cache is laid over a device: arithmetic that needs none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.launches import TARGETS
from moe_triton.attention_schedule import (
    PASS_KEYS,
    WORKSPACE,
    Schedule,
    choose_schedule,
    override,
    tiles_of,
)

HALF, MILLION = torch.bfloat16, 1 << 20
H100 = TARGETS["sm_90"]


@given(keys=st.integers(1, 5000), splits=st.integers(1, 70), step=st.sampled_from([16, 64]))
def test_the_parts_are_all_keys_and_none_is_empty(keys, splits, step):
    schedule = Schedule(16, step, 4, 1, splits=splits)
    size, parts = schedule.part_keys(keys), schedule.parts(keys)
    assert size % step == 0
    assert 1 <= parts <= splits
    assert (parts - 1) * size < keys <= parts * size


@pytest.mark.parametrize("channels", [64, 128, 256])
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_rows_fill_the_device(name, channels):
    """One query of one head over a million keys: as many parts as there are programs at once."""
    target = TARGETS[name]
    schedule = choose_schedule(target, HALF, 1, 1, MILLION, channels)
    assert schedule.splits == target.units * schedule.programs


@pytest.mark.parametrize("channels", [64, 128, 256])
@pytest.mark.parametrize("name", TARGETS)
def test_a_long_prompt_walks_over_all_keys(name, channels):
    schedule = choose_schedule(TARGETS[name], HALF, 16 * 16_384, 2, MILLION, channels)
    assert schedule.splits == 1
    assert schedule.rows == tiles_of(TARGETS[name], HALF, channels)[-1].rows


@given(rows=st.integers(1, 200_000), heads=st.integers(1, 32), keys=st.integers(1, 40 * MILLION))
def test_parts_take_a_bounded_workspace_and_are_worth_a_start(rows, heads, keys):
    schedule = choose_schedule(H100, HALF, rows, heads, keys, 64)
    if schedule.splits > 1:
        assert schedule.splits * rows * heads * 64 * 4 <= WORKSPACE
        assert schedule.part_keys(keys) >= 2 * schedule.keys


@given(rows=st.integers(1, 100_000), heads=st.integers(1, 8))
def test_over_a_long_cache_most_of_the_device_works(rows, heads):
    """Whole waves of programs, or many waves; unless the workspace forbids the parts."""
    schedule = choose_schedule(H100, HALF, rows, heads, MILLION, 64)
    programs = -(-rows // schedule.rows) * heads * schedule.splits
    at_once = H100.units * schedule.programs
    waves = -(-programs // at_once)
    assert programs / (waves * at_once) >= 0.75


def test_rows_take_the_lowest_tile_that_has_a_place_for_them():
    for rows, height in ((1, 64), (64, 64), (65, 128), (1000, 128)):
        assert choose_schedule(H100, HALF, rows, 1, MILLION, 64).rows == height
    assert choose_schedule(TARGETS["sm_80"], HALF, 1, 1, MILLION, 64).rows == 16


def test_float32_and_unaligned_caches_have_tiles_of_their_own():
    assert tiles_of(H100, torch.float32, 128) != tiles_of(H100, HALF, 128)
    assert tiles_of(H100, HALF, 128, aligned=False) != tiles_of(H100, HALF, 128)
    assert tiles_of(H100, HALF, 96) == tiles_of(H100, HALF, 128)


def test_an_override_lasts_as_long_as_its_block():
    inner, outer = Schedule(16, 16, 4, 1), Schedule(32, 16, 4, 1)
    own = choose_schedule(H100, HALF, 1, 1, MILLION, 64)
    with override(outer):
        with override(inner):
            assert choose_schedule(H100, HALF, 1, 1, MILLION, 64) is inner
        assert choose_schedule(H100, HALF, 1, 1, MILLION, 64) is outer
    assert choose_schedule(H100, HALF, 1, 1, MILLION, 64) == own


@pytest.mark.parametrize(
    "changes", [{"rows": 8}, {"keys": 48}, {"splits": 0}, {"pass_keys": 16}, {"pass_keys": 40}], ids=str
)
def test_a_schedule_that_cannot_run_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Schedule(
            **{"rows": 16, "keys": 32, "num_warps": 4, "num_stages": 1, "pass_keys": PASS_KEYS} | changes
        )
