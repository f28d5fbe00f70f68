"""The bridge to Hugging Face transformers (extra `[hf]`). Importing it imports no transformers."""

from moe.hf.register import Replaced, register, use

__all__ = ["Replaced", "register", "use"]
