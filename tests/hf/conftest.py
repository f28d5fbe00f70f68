"""Tests of the bridge to transformers: skipped without it, and without its advice on the terminal."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("transformers") else ["test_*.py"]


def pytest_configure() -> None:
    if find_spec("transformers"):
        from transformers.utils import logging

        logging.set_verbosity_error()
