"""Hugging Face models: their configs, blocks and checkpoints. Needs no transformers to be imported."""

from .routers import moe_settings

__all__ = ["moe_settings"]
