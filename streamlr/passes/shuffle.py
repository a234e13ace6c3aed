"""The order in which descent sees rows: as stored, or shuffled in a buffer, with a place to start again from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Order = NDArray[np.int64]


class Piece(NamedTuple):
    """Consecutive kept rows of one unit of reading.

    Attributes
    ----------
    unit : int
        Number of the unit in the order of this epoch.
    offset : int
        Kept rows of that unit before these.
    rows : (m, width) float64
        The rows; valid until the next piece is asked for.
    """

    unit: int
    offset: int
    rows: Array


class Position(NamedTuple):
    """How far an epoch has come, and where to read from in order to go on: what a checkpoint keeps of the order.

    Attributes
    ----------
    rows : int
        Rows handed out so far.
    round : int
        The round of the buffer that has to be filled again; see `shuffled`.
    unit, offset : int
        Its first row: the unit, and the kept rows of that unit before it.
    """

    rows: int = 0
    round: int = 0
    unit: int = 0
    offset: int = 0


START = Position()
Stretch = tuple[Array, Position]


def as_stored(pieces: Iterator[Piece], height: int, width: int, start: Position) -> Iterator[Stretch]:
    """Cut rows into stretches of `height`, the last perhaps shorter, in the order in which they come.

    Parameters
    ----------
    pieces : iterator of Piece
        Rows from `start` on.
    height, width : int
        Rows of a stretch, numbers of a row.
    start : Position
        Where to go on.

    Yields
    ------
    rows : (height, width) float64
        Valid until the next are asked for.
    position : Position
        The place behind them.
    """
    out, filled, handed, behind = np.empty((height, width)), 0, start.rows, start
    for unit, offset, rows in pieces:
        first = 0
        while first < len(rows):
            count = min(len(rows) - first, height - filled)
            out[filled : filled + count] = rows[first : first + count]
            first, filled = first + count, filled + count
            if filled == height:
                handed, filled = handed + height, 0
                yield out, Position(handed, 0, unit, offset + first)
        behind = Position(0, 0, unit, offset + len(rows))
    if filled:
        yield out[:filled], behind._replace(rows=handed + filled)


def shuffled(
    pieces: Iterator[Piece], height: int, width: int, start: Position, *, capacity: int, seed: tuple[int, ...], run: int = 1
) -> Iterator[Stretch]:
    """Shuffle rows in a buffer while they pass, and cut them into stretches.

    The first `capacity` rows fill the buffer: round 0. In each round after it, every slot is visited once: it hands out its row and
    takes the next that comes in. Odd rounds visit slots in a random order of their own; even ones, which find rows where those have
    put them, go through memory as it lies. A round so hands out the rows of the one before it in random order, and after the last
    round what is left goes in random order. What the buffer holds at any time are rows of this round and the one before, so that
    reading from the start of the round before fills it again.

    Parameters
    ----------
    pieces, height, width, start
        As for `as_stored`.
    capacity : int
        Rows of the buffer.
    seed : tuple of int
        Another seed, another order; the epoch belongs in it.
    run : int
        So many rows that come in together go out together.

    Yields
    ------
    rows, position
        As for `as_stored`.

    Examples
    --------
    >>> rows = np.arange(6.0)[:, None]
    >>> stretches = shuffled(iter([Piece(0, 0, rows)]), 2, 1, Position(), capacity=4, seed=(0,))
    >>> found = [float(x) for out, _ in stretches for x in out[:, 0]]
    >>> sorted(found), found != sorted(found)
    ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], True)
    """
    buffer, out = np.empty((capacity, width)), np.empty((height, width))
    number, at, order = start.round, 0, _order(seed, start.round, capacity, run)
    handed = max(number - 1, 0) * capacity  # rows up to `start.rows` are counted again, not handed out again
    here = before = start
    for unit, offset, rows in pieces:
        first = 0
        while first < len(rows):
            if at == capacity:
                number, at = number + 1, 0
                order = _order(seed, number, capacity, run)
            if at == 0:
                before, here = here, Position(0, number, unit, offset + first)
            filled = handed % height
            count = min(len(rows) - first, capacity - at, height - filled if number else capacity)
            if number:
                _take(buffer, order, at, run, out[filled : filled + count])
                handed += count
            _put(buffer, order, at, run, rows[first : first + count])
            first, at = first + count, at + count
            if number and handed % height == 0 and handed > start.rows:
                yield out, before._replace(rows=handed)
    left, done = capacity if number else at, 0
    order = _permutation(seed, number + 1, left, run)
    while done < left:
        filled = handed % height
        count = min(left - done, height - filled)
        _take(buffer, order, done, run, out[filled : filled + count])
        done, handed = done + count, handed + count
        if (handed % height == 0 or done == left) and handed > start.rows:
            yield out[: filled + count], before._replace(rows=handed)


def _order(seed: tuple[int, ...], number: int, capacity: int, run: int) -> Order | None:
    """Return the order in which a round visits the runs of slots, from the seed and its number alone; None for that of memory."""
    return _permutation(seed, number, capacity, run) if number % 2 else None


def _permutation(seed: tuple[int, ...], number: int, length: int, run: int) -> Order:
    """Return a random order of the runs; a last one that is shorter comes last."""
    whole = length // run
    return np.append(np.random.default_rng((*seed, number)).permutation(whole), whole)


def _places(order: Order | None, at: int, stop: int, run: int) -> Iterator[tuple[int, Order | slice]]:
    """Yield where the slots are that are visited from `at` to `stop`, and how many: numbers of whole runs, or a part of one."""
    if order is None:
        yield stop - at, slice(at, stop)
        return
    while at < stop:
        number, within = divmod(at, run)
        if within == 0 and (whole := (stop - at) // run):
            count = whole * run
            yield count, order[number : number + whole]
        else:
            count, first = min(run - within, stop - at), int(order[number]) * run + within
            yield count, slice(first, first + count)
        at += count


def _take(buffer: Array, order: Order | None, at: int, run: int, out: Array) -> None:
    """Copy rows out of the slots visited from `at` on."""
    done = 0
    for count, places in _places(order, at, at + len(out), run):
        to = out[done : done + count]
        if isinstance(places, slice):
            to[:] = buffer[places]
        else:  # "raise" would copy once more
            np.take(_runs(buffer, run), places, axis=0, out=_runs(to, run), mode="clip")
        done += count


def _put(buffer: Array, order: Order | None, at: int, run: int, rows: Array) -> None:
    """Copy rows into the slots visited from `at` on."""
    done = 0
    for count, places in _places(order, at, at + len(rows), run):
        new = rows[done : done + count]
        if isinstance(places, slice):
            buffer[places] = new
        else:  # each run as one item: NumPy is slow where it has few numbers to walk along
            item = np.dtype((np.void, run * rows.itemsize * rows.shape[1]))
            np.put(_runs(buffer, run).view(item), places, _runs(new, run).view(item), mode="clip")
        done += count


def _runs(rows: Array, run: int) -> Array:
    """Return rows as one long row for each whole run: a view."""
    whole = len(rows) // run
    return rows[: whole * run].reshape(whole, run * rows.shape[1])
