"""The order in which descent sees rows: as stored, or shuffled within windows, with a place to start again from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.checked import surely_finite
from streamlr.passes.windows import Window

Array = NDArray[np.float64]
Prepare = Callable[[Array, Array, Array | None, Array], None]


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
Stretch = tuple[Array, Position]


def stretches(
    windows: Iterator[Window], prepare: Prepare, height: int, width: int, start: Position, seed: tuple[int, ...] | None
) -> Iterator[Stretch]:
    """Prepare the rows of windows, and cut them into stretches of `height`, the last perhaps shorter.

    Rows are prepared when they are handed out: until then they lie as they were decoded, and afterwards they are in the cache.

    Parameters
    ----------
    windows : iterator of Window
        Filled windows, from that of `start` on; each is used until the next one is asked for.
    prepare : callable
        Writes rows x (m, p) and y (m, k), with their weights (m,) or None, into `out` (m, width).
    height, width : int
        Rows of a stretch, numbers of a prepared row.
    start : Position
        Where to go on.
    seed : tuple of int or None
        Shuffle the rows of each window: another seed, another order, so the epoch belongs in it. None for rows as they are stored.

    Yields
    ------
    rows : (height, width) float64
        Valid until the next are asked for.
    position : Position
        The place behind them.

    Raises
    ------
    NonFiniteValue
        A number is NaN or infinite, and nobody has looked for that before.
    """
    out, filled, position, drawn = np.empty((height, width)), 0, start, None
    for window in windows:
        before, at = position.before, position.rows - position.before
        if seed is not None:
            window.shuffle(seed)
            drawn = drawn or window.drawer(height)
        while at < len(window):
            count = min(len(window) - at, height - filled)
            for part in window.rows(at, count, drawn):
                rows = out[filled : filled + len(part.x)]
                with np.errstate(all="ignore"):  # what leaves the range of float64 shows in the descent
                    prepare(part.x, part.y, part.weights, rows)
                if not surely_finite(rows):
                    window.confirm()
                filled += len(rows)
            at += count
            over = at == len(window)
            position = Position(before + at, window.number + over, before + at if over else before)
            if filled == height:
                filled = 0
                yield out, position
    if filled:
        yield out[:filled], position
