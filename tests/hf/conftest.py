"""Tests of the bridge to transformers: skipped without it, and without its advice on the terminal."""

import os
from importlib.util import find_spec

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
collect_ignore_glob = [] if find_spec("transformers") else ["test_*.py"]
