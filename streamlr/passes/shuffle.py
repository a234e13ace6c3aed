"""The order in which descent sees rows: as stored, or shuffled within windows, with a place to start again from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from streamlr.dataset.blocks import Block
from streamlr.dataset.checked import surely_finite
from streamlr.passes.windows import Window

Prepare = Callable[[Block], Any]


class Position(NamedTuple):
    """How far an epoch has come, and where to read from in order to go on: what a checkpoint keeps of the order.

    Attributes
    ----------
    rows : int
        Rows handed out so far.
    window : int
        The window that the next ones are in.
    before : int
        Rows handed out before that window.
    """

    rows: int = 0
    window: int = 0
    before: int = 0


START = Position()
Stretch = tuple[Any, Position]


def stretches(
    windows: Iterator[Window], prepare: Prepare, height: int, start: Position, seed: tuple[int, ...] | None
) -> Iterator[Stretch]:
    """Take the rows of windows in stretches of `height`, the last perhaps shorter, and prepare them.

    Rows are prepared when they are handed out: until then they lie as they were decoded, and afterwards they are in the cache.

    Parameters
    ----------
    windows : iterator of Window
        Filled windows, from that of `start` on; each is used until the next one is asked for.
    prepare : callable
        Makes of a block of rows, which are nobody else's and perhaps to be confirmed, what is handed out.
    height : int
        Rows of a stretch.
    start : Position
        Where to go on.
    seed : tuple of int or None
        Shuffle the rows of each window: another seed, another order, so the epoch belongs in it. None for rows as they are stored.

    Yields
    ------
    rows : what `prepare` makes of them
        Valid until the next are asked for.
    position : Position
        The place behind them.

    Raises
    ------
    NonFiniteValue
        A number is NaN or infinite, and nobody has looked for that before.
    """
    filled, position, stretch = 0, start, None
    for window in windows:
        before, at = position.before, position.rows - position.before
        stretch = stretch or window.room_for(height)
        if seed is not None:
            window.shuffle(seed)
        while at < len(window):
            count = min(len(window) - at, height - filled)
            rows = stretch.part(filled, filled + count)
            window.copy_into(at, rows)
            at, filled = at + count, filled + count
            over = at == len(window)
            position = Position(before + at, window.number + over, before + at if over else before)
            if filled == height:
                filled = 0
                yield prepare(replace(stretch, doubt=window.confirm)), position
            elif not (surely_finite(rows.x) and surely_finite(rows.y)):  # the window will not be there when they are used
                window.confirm()
    if filled and stretch is not None:
        yield prepare(stretch.part(0, filled)), position
