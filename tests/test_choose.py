"""Which backend runs where, and what is said when the one that was asked for cannot."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.doctor import EXTRAS
from moe.ops import choose
from moe.ops.choose import OPERATIONS, Ops, choose_ops, describe


@pytest.fixture
def installed(monkeypatch):
    """Pretends that the triton package has this version, which may be None, or that it is missing."""

    def pretend(version: str | None, *, missing: bool = False) -> None:
        monkeypatch.setattr(choose, "find_spec", lambda name: None if missing else object())
        monkeypatch.setattr(choose, "_triton_version", lambda: version)
        monkeypatch.setattr(choose, "PACKAGE_OBSTACLE", choose.package_obstacle())

    return pretend


def test_the_operations_are_those_of_the_protocol():
    methods = [name for name, _ in inspect.getmembers(Ops, inspect.isfunction) if not name.startswith("_")]
    assert sorted(OPERATIONS) == sorted(methods)


def test_without_triton_the_request_is_refused_and_auto_falls_back(installed):
    installed(None, missing=True)
    with pytest.raises(RuntimeError, match=r"(?s)triton.*cuda.*pip install triton.*auto"):
        choose_ops("cuda", "triton")
    assert choose_ops("cuda", "auto") is choose_ops("cuda", "torch")
    rows = describe("cuda")
    assert [name for name, _, _ in rows] == list(OPERATIONS)
    assert all(backend == "torch" and "pip install triton" in why for _, backend, why in rows)


@pytest.mark.parametrize("version", ["2.3.1", "3.1.0", "3.5.1+git1234"])
def test_an_old_triton_is_refused_with_its_version(installed, version):
    installed(version)
    with pytest.raises(RuntimeError, match=rf"{version[:5]}.*pip install 'triton>=3.6'"):
        choose_ops("cuda", "triton")
    assert choose_ops("cuda", "auto") is choose_ops("cuda", "torch")


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0", "3.7.0+git1234", None])
def test_a_triton_that_is_new_or_of_unknown_version_is_taken(installed, version):
    installed(version)
    assert choose.triton_obstacle(torch.device("cuda")) is None
    assert {backend for _, backend, _ in describe("cuda")} == {"triton"}


def test_a_cpu_needs_a_gpu_and_not_a_package(installed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    installed(None, missing=True)
    with pytest.raises(RuntimeError, match=r"(?s)cpu.*needs a GPU.*auto"):
        choose_ops("cpu", "triton")


def test_the_interpreter_runs_kernels_on_a_cpu_only_when_asked(installed, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    installed(None, missing=True)
    with pytest.raises(RuntimeError, match="pip install triton"):
        choose_ops("cpu", "triton")
    installed("3.6.0")
    assert choose_ops("cpu", "auto") is choose_ops("cpu", "torch")
    assert {backend for _, backend, _ in describe("cpu")} == {"torch"}


def test_auto_leaves_float64_to_torch_and_a_request_stays_a_request(installed):
    installed("3.9.0")
    assert choose_ops("cuda", "auto", torch.float64) is choose_ops("cuda", "torch")
    assert choose_ops("cuda", "auto", torch.bfloat16) is choose_ops("cuda", "triton", torch.float64)


def test_a_gpu_older_than_ampere_is_refused_by_name(installed, monkeypatch):
    installed("3.9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose_ops("cuda", "auto") is choose_ops("cuda", "torch")
    with pytest.raises(RuntimeError, match=r"(?s)sm_80.*sm_75.*auto"):
        choose_ops("cuda", "triton")


def test_doctor_says_how_to_install_triton():
    assert "pip install triton" in EXTRAS["triton"]


@given(st.text())
def test_any_other_name_is_no_backend(name):
    if name not in ("auto", "reference", "torch", "triton"):
        with pytest.raises(ValueError, match=r"(?s)must be one of.*triton"):
            choose_ops("cpu", name)
