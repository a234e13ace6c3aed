"""An epoch in the textbook's order: batch after batch, with a state that can be written down between any two stretches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from time import monotonic

import numpy as np

from streamlr.descent.loop import GROWN, RUINED, Loop, State
from streamlr.descent.scaling import Prepared
from streamlr.descent.seen import Seen
from streamlr.descent.steps import Iterate, Walk
from streamlr.descent.stopping import spent

Epoch = Callable[[int, tuple[int, ...]], Iterator[tuple[Prepared, tuple[int, ...]]]]


@dataclass(frozen=True, slots=True)
class SequentialLoop(Loop):
    """A descent over batches, one after another.

    Attributes
    ----------
    epoch : callable
        (number, position) -> iterator of prepared rows, in whole batches, and the position behind them.
    """

    epoch: Epoch

    def _through_epoch(self, state: State) -> Generator[State, None, None]:
        """Yield the states that can be gone on from, one a stretch; the last is that of the ended epoch."""
        options = self.options
        began = monotonic() - state.seconds
        here, rows, seen = self._begun(state), state.rows, state.seen
        for stretch, position in self.epoch(state.epoch, state.position):
            for part, logs in self._parts(stretch, rows):
                here, seen = stepped(self.walk, part, here, seen)
                rows += len(part)
                state = state._replace(here=here, rows=rows, seen=seen, seconds=monotonic() - began)
                self._check(state, RUINED)
                if logs:
                    state = self._recorded(state, complete=False)
            state = state._replace(position=tuple(position))
            if stopped := spent(state.epoch, state.seconds, options):
                if not logs:
                    state = self._recorded(state, complete=False)
                yield state._replace(stopped=stopped)
                return
            yield state
        self._check(state, GROWN)
        yield self._ended(state)

    def _parts(self, stretch: Prepared, rows: int) -> Iterator[tuple[Prepared, bool]]:
        """Cut rows, which come after so many others, behind the batches that a record is due after; say where it is."""
        every, size, first = self.options.log_every, self.walk.objective.batch_rows, 0
        while every is not None and first < len(stretch):
            due = every - (rows + first) % every
            if due > len(stretch) - first:
                break
            stop = min(first + -(-due // size) * size, len(stretch))
            yield stretch[first:stop], True
            first = stop
        if first < len(stretch):
            yield stretch[first:], False


def stepped(walk: Walk, rows: Prepared, here: Iterate, seen: Seen) -> tuple[Iterate, Seen]:
    """Take the steps of some prepared rows, and note what they meet; what leaves the range of float64 shows in both."""
    with np.errstate(all="ignore"):
        after, residuals = walk.over(rows, here)
        seen = seen.of(residuals, rows.y, rows.w, after.step - here.step)
    # what coefficients of zero hide from the residuals shows in the gradient
    if rows.doubt is not None and not (np.isfinite(seen.sums).all() and np.isfinite(after.b).all()):
        rows.doubt()  # the rows may be to blame, which is an error of another kind
    return after, seen
