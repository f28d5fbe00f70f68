"""Whether torch.autocast is on, for devices that it knows and for those it does not."""

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives to products on this device; None where it is off or does not exist."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
