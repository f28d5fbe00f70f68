"""Hugging Face models: configs, experts, blocks and checkpoints. Importing it needs no transformers."""

from .layers import ReplacedLayers, record_routings, replace_moe_layers
from .register import ReplacedExperts, register, use
from .routers import moe_settings

__all__ = [
    "ReplacedExperts",
    "ReplacedLayers",
    "moe_settings",
    "record_routings",
    "register",
    "replace_moe_layers",
    "use",
]
