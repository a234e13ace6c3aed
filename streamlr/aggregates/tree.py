"""The fixed merge tree: the order of every addition depends on the number of rows and columns, and on nothing else.

Rows fall into tiles by position. The tree is the perfect binary tree over tile numbers: node (level, index) covers the tiles
[index 2^level, (index + 1) 2^level); a node without a right sibling is carried up. A span of rows that starts and stops anywhere
leaves a `Partial`: complete nodes, and the rows of tiles it saw only a part of. Partials join in any order, and the result is the
same to the last bit, because a sum is only ever formed of a node and its sibling, and a statistic only ever of a whole tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from streamlr.dataset.blocks import Block
from streamlr.errors import RowCountMismatch


class Summary(Protocol):
    """A small value that adds up: what a statistic leaves of some rows."""

    def __add__(self, other: Self, /) -> Self:
        """Return the value of both sets of rows, in memory of its own."""
        ...

    def absorb(self, other: Self, /) -> Self:
        """Return the sum, with the same bits, perhaps in the memory of this value: nobody may use that any more."""
        ...


S = TypeVar("S", bound=Summary)
S_co = TypeVar("S_co", bound=Summary, covariant=True)
Node = tuple[int, int]


class Statistic(Protocol[S_co]):
    """A commutative monoid over rows: `empty()` is its identity, `of(A) + of(B)` equals `of(A and B)` to rounding."""

    @property
    def nbytes(self) -> int:
        """Bytes of one value."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes that `of` makes for each row of a tile, beyond the row once more in float64."""
        ...

    @property
    def as_stored(self) -> bool:
        """Whether `of` takes features of a dtype shorter than float64 as they are stored, to promote them itself."""
        ...

    def empty(self) -> S_co:
        """Return the value of no rows."""
        ...

    def of(self, block: Block) -> S_co:
        """Return the value of the rows of `block`, in memory of its own; `confirm` the block where the value is not finite."""
        ...


@dataclass(frozen=True, slots=True)
class Tree:
    """The tree over the tiles of `n_rows` rows, `tile_rows` in each."""

    n_rows: int
    tile_rows: int

    @property
    def n_tiles(self) -> int:
        """Number of tiles; the last may be short."""
        return -(-self.n_rows // self.tile_rows)

    def tile_of(self, block: Block) -> int | None:
        """Return the number of the tile that `block` covers whole, or None when it covers only a part of one."""
        tile, within = divmod(block.start, self.tile_rows)
        return tile if within == 0 and block.stop == min((tile + 1) * self.tile_rows, self.n_rows) else None


class Partial(Generic[S]):
    """What some rows leave in the tree: complete nodes, and ragged ends kept as rows (under one tile each).

    Parameters
    ----------
    tree : Tree
        Of the whole dataset.
    statistic : Statistic
        What is made of a tile.
    """

    def __init__(self, tree: Tree, statistic: Statistic[S]) -> None:
        self.tree = tree
        self.statistic = statistic
        self.nodes: dict[Node, S] = {}
        self._shared = False  # whether another partial has some of these values
        self.ragged: dict[int, list[Block]] = {}

    def take(self, block: Block) -> None:
        """Add a block that lies within one tile.

        Raises
        ------
        RowCountMismatch
            Some of its rows are here already.
        """
        tile = self.tree.tile_of(block)
        if tile is not None:
            if tile in self.ragged:
                raise RowCountMismatch(_twice(block.start, block.stop))
            self._add((0, tile), self.statistic.of(block))
            return
        number = block.start // self.tree.tile_rows
        pieces = sorted([*self.ragged.pop(number, []), block.copy()], key=lambda piece: piece.start)
        joined = [pieces[0]]
        for piece in pieces[1:]:
            if piece.start < joined[-1].stop:
                raise RowCountMismatch(_twice(piece.start, min(piece.stop, joined[-1].stop)))
            if piece.start == joined[-1].stop:
                joined[-1] = joined[-1].followed_by(piece)
            else:
                joined.append(piece)
        if self.tree.tile_of(joined[0]) is None:
            self.ragged[number] = joined
        else:
            self._add((0, number), self.statistic.of(joined[0]))

    def join(self, others: Iterable[Partial[S]]) -> Self:
        """Take over what other partials hold, changing no value, and return this one; their rows must not be here already."""
        for other in others:
            self._shared = other._shared = True
            for node, value in other.nodes.items():
                self._add(node, value)
            for pieces in other.ragged.values():
                for piece in pieces:
                    self.take(piece)
        return self

    def result(self) -> S:
        """Return the value of all rows.

        Raises
        ------
        RowCountMismatch
            Rows are lacking.
        """
        order = sorted(self.nodes, key=lambda node: node[1] << node[0])
        tiles = sum(1 << level for level, _ in order)
        if tiles != self.tree.n_tiles or self.ragged:
            raise RowCountMismatch(
                f"a pass over {self.tree.n_rows:,} rows ended with {tiles:,} of {self.tree.n_tiles:,} tiles complete; "
                "this is a bug in streamlr or a lost task: run it again"
            )
        if not order:
            return self.statistic.empty()
        value = self.nodes[order[-1]]
        for node in reversed(order[:-1]):  # a node without a right sibling is carried up
            value = self.nodes[node] + value
        return value

    def _add(self, node: Node, value: S) -> None:
        level, index = node
        first, last = index << level, (index + 1) << level
        for other_level, other in self.nodes:
            if first < (other + 1) << other_level and other << other_level < last:
                raise RowCountMismatch(_twice(first * self.tree.tile_rows, last * self.tree.tile_rows))
        while (sibling := self.nodes.pop((level, index ^ 1), None)) is not None:
            left, right = (value, sibling) if index % 2 == 0 else (sibling, value)
            value = left + right if self._shared else left.absorb(right)
            level, index = level + 1, index // 2
        self.nodes[level, index] = value


def open_nodes(n_tiles: int) -> int:
    """Return how many nodes a run of `n_tiles` tiles can leave open at most.

    Examples
    --------
    >>> open_nodes(1), open_nodes(8), open_nodes(100)
    (1, 6, 12)
    """
    return max(2 * (n_tiles.bit_length() - 1), 1)


def _twice(start: int, stop: int) -> str:
    return f"rows {start:,} to {stop - 1:,} arrived twice; counting them again would be wrong: this is a bug in streamlr"
