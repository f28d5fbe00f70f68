"""Where the kernels run in this process: in Triton's interpreter on the CPU, or compiled on a CUDA device.

The kernels are decorated when they are imported, so the environment of the process chooses, once for all.
"""

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
COMPILER = "aot_eager" if INTERPRETED else "inductor"
torch_may_warn = pytest.mark.filterwarnings(r"ignore:::torch\.", "ignore:TensorFloat32")  # inductor does


def why_kernels_cannot_run() -> str | None:
    """None where they can."""
    if find_spec("triton") is None:
        return "the kernels need the triton package"
    if not INTERPRETED and not torch.cuda.is_available():
        return "the kernels need a CUDA device, or TRITON_INTERPRET=1 (make test sets it)"
    return None
