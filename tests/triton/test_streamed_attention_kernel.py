"""moe.streamed_attention takes the kernel where Triton works, and what it gives is what torch gives."""

import pytest
import torch
from device import DEVICE

import moe_triton
from moe import streamed_attention as module
from moe.streamed_attention import streamed_attention


@pytest.mark.parametrize("first", [None, 4])
@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "each its own"])
def test_the_kernel_is_taken_and_agrees(first, rows, monkeypatch):
    torch.manual_seed(0)
    queries = torch.randn(2, 4, 3, 16, device=DEVICE)
    keys, values = torch.randn(2, rows, 2, 7, 16, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "triton_obstacle", lambda device: "torch is asked")
        truth = streamed_attention(queries, keys, values, scale=0.3, first=first)
    calls = []
    kernel = moe_triton.attention_over_cache
    monkeypatch.setattr(module, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(
        moe_triton, "attention_over_cache", lambda *given: calls.append(given) or kernel(*given)
    )
    ours = streamed_attention(queries, keys, values, scale=0.3, first=first)
    assert len(calls) == 1
    torch.testing.assert_close(ours.out, truth.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.lse, truth.lse, rtol=1e-5, atol=1e-6)


def test_what_the_kernel_does_not_take_goes_through_torch(monkeypatch):
    monkeypatch.setattr(module, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(moe_triton, "attention_over_cache", None)  # a call would raise
    queries, keys = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 5, 8)
    assert streamed_attention(queries, keys, keys, scale=0.3).out.isfinite().all()
    double = torch.randn(1, 1, 5, 16, dtype=torch.float64)
    assert streamed_attention(double[:, :, :1], double, double, scale=0.3).out.dtype == torch.float64
