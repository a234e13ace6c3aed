"""The merge tree: any cut of the rows and any order of joining leave the same bits; a row twice or never is an error."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Array, cuts, row_weights, same_bits

from streamlr.aggregates.cost import ResidualsOf
from streamlr.aggregates.moments import Moments, MomentsOf
from streamlr.aggregates.tree import Partial, Statistic, Tree, open_nodes
from streamlr.dataset.blocks import Block, tile_edges
from streamlr.errors import RowCountMismatch

TILE = 8
NAMES = (("x0", "x1"), ("y0",))


@dataclass(frozen=True)
class Rows:
    """Rows, of which some are dropped when they are read."""

    columns: Array
    weights: Array | None
    kept: np.ndarray

    def block(self, start: int, stop: int) -> Block:
        """The rows from start to stop, less those that are dropped, in memory that is used again."""
        keep = self.kept[start:stop]
        weights = None if self.weights is None else self.weights[start:stop][keep]
        x, y = (part[start:stop][keep] for part in (self.columns[:, :2].copy(), self.columns[:, 2:].copy()))
        return Block(start, stop, x, y, weights)

    def partial(self, start: int, stop: int, statistic: Statistic[Moments]) -> Partial[Moments]:
        """What a span leaves."""
        partial = Partial(Tree(len(self.columns), TILE), statistic)
        for piece in tile_edges(start, stop, TILE):
            block = self.block(piece.start, piece.stop)
            partial.take(block)
            block.x[:] = block.y[:] = np.nan  # the reader uses its memory again: nothing may still point there
        return partial


@st.composite
def tables(draw: st.DrawFn, max_rows: int = 90) -> Rows:
    n = draw(st.integers(1, max_rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns = rng.standard_normal((n, 3)) * draw(st.sampled_from([1.0, 1e200])) + draw(st.sampled_from([0.0, 1e6]))
    kept = rng.random(n) >= draw(st.sampled_from([0.0, 0.1, 1.0]))
    return Rows(columns, draw(row_weights(n)), kept)


@given(st.data())
def test_any_cut_and_any_order_leave_the_same_bits(data: st.DataObject):
    rows = data.draw(tables())
    n = len(rows.columns)
    statistics: list[Statistic] = [MomentsOf(*NAMES), ResidualsOf(np.ones((2, 1)), np.zeros(1))]
    for statistic in statistics:
        whole = rows.partial(0, n, statistic).result()
        edges = data.draw(cuts(n))
        spans = data.draw(st.permutations(list(itertools.pairwise(edges))))
        parts = [rows.partial(start, stop, statistic) for start, stop in spans]
        while len(parts) > 1:  # join them two, three or four at a time, as tasks do
            count = data.draw(st.integers(2, 4))
            group, parts = parts[:count], parts[count:]
            parts.append(Partial(group[0].tree, statistic).join(group))
        assert same_bits(parts[0].result(), whole)


@given(tables())
def test_the_tree_is_the_one_that_is_written_down(rows: Rows):
    statistic, n = MomentsOf(*NAMES), len(rows.columns)
    tiles = [statistic.of(rows.block(at, min(at + TILE, n))) for at in range(0, n, TILE)]

    def value(level: int, index: int) -> Moments | None:
        """Of node (level, index) of the perfect binary tree, where tiles beyond the last do not exist."""
        if index << level >= len(tiles):
            return None
        if level == 0:
            return tiles[index]
        left, right = value(level - 1, 2 * index), value(level - 1, 2 * index + 1)
        return left if right is None or left is None else left + right

    expected = value((len(tiles) - 1).bit_length(), 0)
    assert same_bits(rows.partial(0, n, statistic).result(), expected)


@given(tables(), st.data())
def test_rows_that_arrive_twice_are_an_error(rows: Rows, data: st.DataObject):
    n, statistic = len(rows.columns), MomentsOf(*NAMES)
    again = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(again + 1, n))
    with pytest.raises(RowCountMismatch, match=r"arrived twice|lost task"):
        rows.partial(0, n, statistic).join([rows.partial(again, stop, statistic)]).result()


@given(tables(), st.data())
def test_rows_that_never_arrive_are_an_error(rows: Rows, data: st.DataObject):
    n, statistic = len(rows.columns), MomentsOf(*NAMES)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    partial = Partial(Tree(n, TILE), statistic)
    if start:
        partial.join([rows.partial(0, start, statistic)])
    if stop < n:
        partial.join([rows.partial(stop, n, statistic)])
    with pytest.raises(RowCountMismatch, match="lost task"):
        partial.result()


def test_a_whole_tile_twice_is_named_by_its_rows():
    rows = Rows(np.ones((32, 3)), None, np.ones(32, dtype=bool))
    with pytest.raises(RowCountMismatch, match="rows 8 to 15 arrived twice"):
        rows.partial(0, 32, MomentsOf(*NAMES)).join([rows.partial(8, 16, MomentsOf(*NAMES))])


def test_what_was_joined_may_go_on_and_change_nothing_elsewhere():
    rows = Rows(np.random.default_rng(0).standard_normal((4 * TILE, 3)), None, np.ones(4 * TILE, dtype=bool))
    for statistic in (MomentsOf(*NAMES), ResidualsOf(np.ones((2, 1)), np.zeros(1))):
        first = rows.partial(0, TILE, statistic)
        joined = Partial(first.tree, statistic).join([first, rows.partial(2 * TILE, 4 * TILE, statistic)])
        expected = rows.partial(0, TILE, statistic).join([rows.partial(2 * TILE, 4 * TILE, statistic)])
        first.take(rows.block(TILE, 2 * TILE))
        assert joined.nodes.keys() == expected.nodes.keys()
        assert all(same_bits(value, expected.nodes[node]) for node, value in joined.nodes.items())


def test_joining_leaves_the_joined_as_they_were():
    rows = Rows(np.random.default_rng(0).standard_normal((50, 3)), None, np.ones(50, dtype=bool))
    statistic = MomentsOf(*NAMES)
    parts = [rows.partial(0, 13, statistic), rows.partial(13, 50, statistic)]
    for part in parts:
        part_nodes = {node: value.copy() for node, value in part.nodes.items()}
        pieces = {tile: [np.hstack([piece.x, piece.y]) for piece in held] for tile, held in part.ragged.items()}
        Partial(part.tree, statistic).join(parts)
        assert all(same_bits(part.nodes[node], value) for node, value in part_nodes.items())
        assert part.nodes.keys() == part_nodes.keys()
        for tile, held in pieces.items():
            assert all((np.hstack([one.x, one.y]) == other).all() for one, other in zip(part.ragged[tile], held, strict=True))


@given(st.integers(1, 2000), st.data())
def test_open_nodes_are_as_few_as_planned(n_tiles: int, data: st.DataObject):
    first = data.draw(st.integers(0, n_tiles - 1))
    last = data.draw(st.integers(first + 1, n_tiles))
    tree = Tree(n_tiles, 1)

    class Count(int):
        def __add__(self, other: int) -> Count:
            return Count(int(self) + int(other))

        absorb = __add__

    class Counting:
        nbytes = 8

        def empty(self) -> Count:
            return Count(0)

        def of(self, block: Block) -> Count:
            return Count(block.stop - block.start)

    partial = Partial(tree, Counting())
    for row in range(first, last):
        partial.take(Block(row, row + 1, np.empty((1, 1)), np.empty((1, 0))))
    assert len(partial.nodes) <= open_nodes(last - first)
    assert sum(partial.nodes.values()) == last - first
