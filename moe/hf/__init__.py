"""Hugging Face models: their configs, blocks and checkpoints. Needs no transformers to be imported."""
