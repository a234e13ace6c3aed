"""The order of rows as a law: every row once, whole stretches, the same rest from any place, and a good mixture."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import pairwise

import numpy as np
import pytest
import strategies  # noqa: F401  # the profile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import streamlr
from streamlr.dataset.blocks import Block
from streamlr.passes.shuffle import Position, stretches
from streamlr.passes.windows import Window

ONE_ROW = streamlr.Dataset(np.ones((1, 1)), np.ones(1), weights=np.ones(1))


def as_read(rows: Block) -> NDArray[np.float64]:
    return np.column_stack((rows.x, rows.y, rows.weights))


class Epoch:
    """Rows 0, 1, 2, ... in units of some sizes, of which so many make a window; `shuffle` or not."""

    def __init__(
        self, sizes: list[int], height: int, places: int, seed: tuple[int, ...] = (3,), run: int = 1, *, shuffle: bool = True
    ) -> None:
        self.sizes, self.height, self.places, self.run = sizes, height, places, run
        self.seed = seed if shuffle else None

    def windows(self, start: Position) -> Iterator[Window]:
        window = Window(ONE_ROW, self.places, max(self.sizes), self.run)
        for number in range(start.window, -(-len(self.sizes) // self.places)):
            blocks = []
            for place, unit in enumerate(range(len(self.sizes))[number * self.places :][: self.places]):
                block = window.room(place).part(0, self.sizes[unit])
                block.x[:, 0] = sum(self.sizes[:unit]) + np.arange(self.sizes[unit])
                block.y[:], block.weights[:] = -block.x, block.x[:, 0] / 2
                blocks.append(block)
            window.fill(number, blocks)
            yield window
            for place in range(self.places):
                window.room(place).x[:] = -1.0  # used again

    def stretches(self, start: Position = Position()) -> list[tuple[list[float], Position]]:  # noqa: B008
        found = []
        for rows, position in stretches(self.windows(start), as_read, self.height, start, self.seed):
            np.testing.assert_array_equal(rows, rows[:, :1] * [1, -1, 0.5])
            found.append((rows[:, 0].tolist(), position))
        return found

    def rows(self) -> list[float]:
        return [row for rows, _ in self.stretches() for row in rows]

    def sizes_of_windows(self) -> list[int]:
        return [sum(self.sizes[at : at + self.places]) for at in range(0, len(self.sizes), self.places)]


@st.composite
def epochs(draw: st.DrawFn) -> Epoch:
    sizes = draw(st.lists(st.integers(0, 14), min_size=1, max_size=8))
    places, run = draw(st.integers(1, 9)), draw(st.sampled_from([1, 1, 2, 3, 300]))
    return Epoch(sizes, draw(st.integers(1, 9)), places, run=run, shuffle=draw(st.booleans()))


@given(epochs())
def test_every_row_once_in_whole_stretches(epoch):
    found = epoch.stretches()
    n = sum(epoch.sizes)
    assert sorted(epoch.rows()) == list(range(n))
    whole, rest = divmod(n, epoch.height)
    assert [len(rows) for rows, _ in found] == [epoch.height] * whole + [rest] * (rest > 0)
    assert [position.rows for _, position in found] == np.cumsum([len(rows) for rows, _ in found]).tolist()


@given(epochs())
def test_the_rest_is_the_same_from_any_place(epoch):
    """Also when it is interrupted twice."""
    found = epoch.stretches()
    for number, (_, position) in enumerate(found):
        rest = epoch.stretches(position)
        assert rest == found[number + 1 :]
        for rows, later in rest[:1]:
            assert epoch.stretches(later) == rest[1:], rows


@given(epochs(), st.integers(1, 9))
def test_the_order_does_not_depend_on_the_stretches(epoch, height):
    again = copy(epoch)
    again.height = height
    assert again.rows() == epoch.rows()


@given(epochs())
def test_windows_come_one_after_the_other_each_shuffled(epoch):
    rows, ends = epoch.rows(), np.cumsum([0, *epoch.sizes_of_windows()])
    for first, last in pairwise(ends):
        assert sorted(rows[first:last]) == list(range(first, last))


@given(st.lists(st.integers(0, 14), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 3))
def test_as_stored_keeps_the_order(sizes, height, places):
    assert Epoch(sizes, height, places, shuffle=False).rows() == list(range(sum(sizes)))


@pytest.mark.parametrize("places", [1, 4, 10])
def test_another_seed_or_epoch_is_another_order(places):
    orders = [tuple(Epoch([100] * 10, 10, places, seed=seed).rows()) for seed in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(orders)) == 4


def test_sorted_rows_end_up_mixed():
    """Every window is a fair shuffle: in any part of it, rows from all over it, and neighbours in no order."""
    n, c = 40_000, 4_000
    order = np.array(Epoch([1_000] * 40, 100, 4).rows())
    for start in range(0, n, c):
        whole = order[start : start + c]
        assert abs(np.corrcoef(np.arange(c), whole)[0, 1]) < 0.06
        assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.06
        for part in whole.reshape(20, -1):
            counts = np.histogram(part, bins=4, range=(start, start + c))[0]
            assert counts.min() > 25, "of 50 expected"


def test_windows_are_shuffled_in_different_ways():
    order = np.array(Epoch([1_000] * 10, 100, 1).rows()).reshape(10, -1) % 1_000
    assert abs(np.corrcoef(order) - np.eye(10)).max() < 0.15


@pytest.mark.parametrize("size", [1_000, 1_003])
def test_runs_stay_together_and_are_mixed_as_rows_are(size):
    run, places = 4, 4
    order = np.array(Epoch([size] * 12, 100, places, run=run).rows())
    for window in order.reshape(3, -1):
        whole = size // run * places  # what is left at the ends of units comes last
        runs = window[: whole * run].reshape(-1, run)
        assert (np.diff(runs) == 1).all()
        assert (runs[:, 0] % size % run == 0).all()
        first = runs[:, 0]
        assert abs(np.corrcoef(np.arange(len(first)), first)[0, 1]) < 0.12
        assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.12
