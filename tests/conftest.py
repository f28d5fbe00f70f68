"""What every test shares: one thread, fixed seeds, hypothesis profiles, gpu skips, poisoned memory."""

import os
import random
import sys
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

# The folder tests/triton is on the path: where the package is missing, the folder would pass for it.
if (_triton := find_spec("triton")) is not None and _triton.origin is None:
    sys.modules["triton"] = None  # type: ignore[assignment]


class _TorchRandom:
    """Torch's generator as hypothesis wants to see it, so that replaying an example replays its tensors."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(_TORCH_RANDOM)

_SLOW_IS_FINE = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile(
    "local", deadline=None, max_examples=50, suppress_health_check=_SLOW_IS_FINE
)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, database=None, suppress_health_check=_SLOW_IS_FINE
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(allocate)
    def allocate_and_poison(*args, **kwargs) -> Tensor:
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return allocate_and_poison


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or the largest integer: an element that nobody writes cannot pass by luck."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
