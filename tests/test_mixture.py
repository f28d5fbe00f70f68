"""Several tasks in one run: which step is of which, and that the loss is that task's own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.train.task import Mixture


class Says:
    """A task whose batches and losses say its name."""

    def __init__(self, name: int) -> None:
        self.name = name

    def batch(self, step: int):
        return torch.full((self.name + 1, 2), 100 * self.name + step), torch.arange(self.name + 1)

    def loss(self, model, *batch):
        return model, self.name, batch


SHARES = st.lists(st.integers(1, 20), min_size=1, max_size=5)


@given(shares=SHARES, first=st.integers(0, 10**6))
def test_any_run_of_steps_is_shared_as_asked(shares, first):
    """Also in the middle of a run: no task waits long for its turn. Within 3 steps of its share of 200."""
    mixture = Mixture([Says(i) for i in range(len(shares))], shares)
    turns = np.bincount([mixture.number(first + i) for i in range(200)], minlength=len(shares))
    expected = 200 * np.array(shares) / sum(shares)
    assert np.abs(turns - expected).max() <= 3


@given(shares=SHARES, step=st.integers(0, 10**6))
def test_a_step_is_its_tasks_own_batch_and_loss(shares, step):
    """In whole and in parts, as accumulation cuts it."""
    tasks = [Says(i) for i in range(len(shares))]
    mixture = Mixture(tasks, shares)
    task = tasks[mixture.number(step)]
    numbers, *rest = mixture.batch(step)
    for own, mixed in zip(task.batch(step), rest, strict=True):
        torch.testing.assert_close(own, mixed)
    for row in range(task.name + 1):
        part = [tensor[row : row + 1] for tensor in (numbers, *rest)]
        model, name, seen = mixture.loss("model", *part)
        assert (model, name) == ("model", task.name)
        for given_, own in zip(seen, part[1:], strict=True):
            torch.testing.assert_close(given_, own)


@pytest.mark.parametrize("shares", [[1.0], [0.1] * 10, [1e-6, 1.0]])
def test_every_step_is_of_a_task(shares):
    """Sums of shares that are not exact leave no gap at the end."""
    mixture = Mixture([Says(i) for i in range(len(shares))], shares)
    assert {mixture.number(step) for step in range(3000)} <= set(range(len(shares)))
