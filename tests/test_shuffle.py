"""The order of rows as a law: every row once, whole stretches, the same rest from any place, and a good mixture."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import numpy as np
import pytest
import strategies  # noqa: F401  # the profile
from hypothesis import given
from hypothesis import strategies as st

from streamlr.passes.shuffle import Piece, Position, as_stored, shuffled


class Epoch:
    """Rows 0, 1, 2, ... in units, read in pieces that a seed decides, and put in order."""

    def __init__(
        self, sizes: list[int], height: int, capacity: int, cuts: int = 0, seed: tuple[int, ...] = (3,), run: int = 1
    ) -> None:
        self.edges = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self.height, self.capacity, self.cuts, self.seed, self.run = height, capacity, cuts, seed, run

    def pieces(self, start: Position) -> Iterator[Piece]:
        rng = np.random.default_rng(self.cuts)
        for unit in range(start.unit, len(self.edges) - 1):
            rows = np.arange(self.edges[unit], self.edges[unit + 1], dtype=float)[:, None]
            offset = start.offset if unit == start.unit else 0
            while offset < len(rows):
                count = int(rng.integers(1, 6))
                memory = rows[offset : offset + count].copy()
                yield Piece(unit, offset, memory)
                memory[:] = -1.0  # used again, as the memory of a reader is
                offset += count

    def stretches(self, start: Position = Position()) -> list[tuple[list[float], Position]]:  # noqa: B008
        if self.capacity:
            found = shuffled(self.pieces(start), self.height, 1, start, capacity=self.capacity, seed=self.seed, run=self.run)
        else:
            found = as_stored(self.pieces(start), self.height, 1, start)
        return [(rows[:, 0].tolist(), position) for rows, position in found]

    def cut_otherwise(self, cuts: int) -> Epoch:
        again = copy(self)
        again.cuts = cuts
        return again

    def rows(self) -> list[float]:
        return [row for rows, _ in self.stretches() for row in rows]


@st.composite
def epochs(draw: st.DrawFn) -> Epoch:
    sizes = draw(st.lists(st.integers(0, 14), min_size=1, max_size=8))
    capacity, run = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 13, 21, 200])), draw(st.sampled_from([1, 1, 2, 3, 300]))
    return Epoch(sizes, draw(st.integers(1, 9)), capacity, draw(st.integers(0, 99)), run=run)


@given(epochs())
def test_every_row_once_in_whole_stretches(epoch):
    stretches = epoch.stretches()
    n = int(epoch.edges[-1])
    assert sorted(epoch.rows()) == list(range(n))
    whole, rest = divmod(n, epoch.height)
    assert [len(rows) for rows, _ in stretches] == [epoch.height] * whole + [rest] * (rest > 0)
    assert [position.rows for _, position in stretches] == np.cumsum([len(rows) for rows, _ in stretches]).tolist()


@given(epochs())
def test_the_rest_is_the_same_from_any_place(epoch):
    """Also when it is interrupted twice, and when rows come in other pieces the second time."""
    stretches = epoch.stretches()
    again = epoch.cut_otherwise(epoch.cuts + 1)
    for number, (_, position) in enumerate(stretches):
        rest = again.stretches(position)
        assert [rows for rows, _ in rest] == [rows for rows, _ in stretches[number + 1 :]]
        for rows, later in rest[:1]:
            assert again.stretches(later) == rest[1:], rows


@given(epochs(), st.integers(100, 200))
def test_the_order_does_not_depend_on_the_pieces(epoch, cuts):
    again = epoch.cut_otherwise(cuts)
    assert again.stretches() == epoch.stretches()


@given(epochs(), st.integers(1, 9))
def test_the_order_does_not_depend_on_the_stretches(epoch, height):
    again = copy(epoch)
    again.height = height
    assert again.rows() == epoch.rows()


@given(st.lists(st.integers(0, 14), min_size=1, max_size=8), st.integers(1, 9))
def test_as_stored_keeps_the_order(sizes, height):
    assert Epoch(sizes, height, 0).rows() == list(range(sum(sizes)))


@pytest.mark.parametrize("capacity", [100, 1_000, 5_000])
def test_another_seed_or_epoch_is_another_order(capacity):
    orders = [tuple(Epoch([1_000], 10, capacity, seed=seed).rows()) for seed in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(orders)) == 4


@given(epochs())
def test_a_round_hands_out_the_rows_of_the_one_before(epoch):
    c, rows = epoch.capacity, epoch.rows()
    for start in range(0, (len(rows) // c - 1) * c if c else 0, c or 1):
        assert sorted(rows[start : start + c]) == list(range(start, start + c))


def test_sorted_rows_end_up_mixed():
    """Every bufferful is a fair shuffle: in any part of it, rows from all over it, and neighbours in no order."""
    n, c = 40_000, 4_000
    order = np.array(Epoch([1_000] * 40, 100, c).rows())
    for start in range(0, n, c):
        whole = order[start : start + c]
        assert abs(np.corrcoef(np.arange(c), whole)[0, 1]) < 0.06
        assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.06
        for part in whole.reshape(20, -1):
            counts = np.histogram(part, bins=4, range=(start, start + c))[0]
            assert counts.min() > 25, "of 50 expected"


def test_rounds_are_shuffled_in_different_ways():
    order = np.array(Epoch([1_000] * 10, 100, 1_000).rows()).reshape(10, -1) % 1_000
    assert abs(np.corrcoef(order) - np.eye(10)).max() < 0.15


@pytest.mark.parametrize("n", [4_000, 40_000, 41_234])
def test_runs_stay_together_and_are_mixed_as_rows_are(n):
    run, c = 4, 4_000
    order = np.array(Epoch([1_000] * (n // 1_000) + [n % 1_000], 100, c, run=run).rows())
    whole = n if n % c == 0 else n - n % c - c  # a last round that ends early may end within a run
    runs = order[:whole].reshape(-1, run)
    assert (np.diff(runs) == 1).all()
    assert (runs[:, 0] % run == 0).all()
    for start in range(0, len(runs), c // run):
        first = runs[start : start + c // run, 0]
        assert abs(np.corrcoef(np.arange(len(first)), first)[0, 1]) < 0.12
        assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.12
