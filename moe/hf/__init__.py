"""Hugging Face models: their configs, blocks and checkpoints. Needs no transformers to be imported."""

from .layers import Replaced, record_routings, replace_moe_layers
from .routers import moe_settings

__all__ = ["Replaced", "moe_settings", "record_routings", "replace_moe_layers"]
