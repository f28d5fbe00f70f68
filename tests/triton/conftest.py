"""Decides for this whole folder where the kernels run, or why they cannot; see device.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from device import INTERPRETED, why_kernels_cannot_run


class UnreadFile(pytest.File):
    """Stands for a file of tests that is not imported: it imports the kernels, which may fail here."""

    def collect(self) -> Iterator[pytest.Item]:
        yield UnreadTests.from_parent(self, name="all")


class UnreadTests(pytest.Item):
    """All tests of such a file."""

    def runtest(self) -> None:
        raise AssertionError("pytest_runtest_setup skips it")

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File:
    """Tests of this folder need a GPU, unless the kernels are interpreted."""
    kind = pytest.Module if why_kernels_cannot_run() is None else UnreadFile
    file = kind.from_parent(parent, path=module_path)
    if INTERPRETED:  # rows that nobody owns may hold anything, and numpy would tell of inf * 0 there
        file.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        # Triton 3.6 takes the bounds of loops from arrays of one number.
        file.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))
    else:
        file.add_marker(pytest.mark.gpu)
        # The first product of a backward pass runs in a thread of autograd's, which torch itself sets up.
        file.add_marker(pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"))
    return file


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if (reason := why_kernels_cannot_run()) is not None:
        pytest.skip(reason)
    if INTERPRETED and item.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device, and kernels that are compiled")
    from moe_triton import replay  # where the kernels can run

    replay.forget()  # tests replace constants that a launch follows from
