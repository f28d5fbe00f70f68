"""What torch.autocast asks of the operations."""

import torch
from torch import Tensor


def cast_to_autocast(*tensors: Tensor | None) -> tuple:
    """The tensors in autocast's dtype where it is on for their device, else as they are.

    `torch.library.register_autocast` would fix one dtype when the operator is made, and cast the routing
    weights too, which stay in float32 here.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(dtype) for t in tensors)
