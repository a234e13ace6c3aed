"""The descent over a stream whose rows come by and by and whose length nobody knows: a state in, a state out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.cost import Residuals, residual_sums
from streamlr.dataset.blocks import Block
from streamlr.descent.automatic import HOLD, SAMPLE_ROWS, Automatic, sample_rows, walk_of
from streamlr.descent.loop import RUINED, diverged, grown, restarts
from streamlr.descent.objective import column_squares
from streamlr.descent.options import Descent
from streamlr.descent.scaling import Coordinates
from streamlr.descent.schedules import InverseScaling
from streamlr.descent.steps import Iterate, Walk
from streamlr.descent.stopping import Record
from streamlr.descent.updates import AdamState, PlainState

Array = NDArray[np.float64]
WINDOW_ROWS = 8_192  # of costs that are compared
STRETCH_BYTES = 2**20  # about a core's cache


class Standing(NamedTuple):
    """Everything that a stream needs in order to go on; nothing in it is ever changed in place.

    Attributes
    ----------
    walk, here : Walk, Iterate, or None
        How steps are taken, and where they led; None before the first row.
    sample : tuple of (m, p + k + 1) float64
        All rows [x y w] so far while the coordinates are still looked for; empty afterwards.
    known : int
        Rows that the coordinates were made of.
    first_step, rows : int
        Steps that led to the start, and rows learned from since.
    seen, total : Residuals
        Of this window, and of the windows before it, each row before the step that it led to.
    squares : (2,) float64
        Sums of squares of the residuals, and of what they were with coefficients of zero, in units of the targets' scale.
    watched : tuple of (k,) float64
        Mean squared errors of the last windows, behind the best of those before them.
    history : tuple of Record
        One after 1, 2, 4, 8, ... windows.
    stopped : str
        Why nothing more is learned; empty while something is.
    """

    walk: Walk | None
    here: Iterate | None
    sample: tuple[Array, ...]
    known: int
    first_step: int
    rows: int
    seen: Residuals
    total: Residuals
    squares: Array
    watched: tuple[Array, ...]
    history: tuple[Record, ...]
    stopped: str


@dataclass(frozen=True, slots=True)
class Online:
    r"""How a stream is learned from.

    Coordinates come from the rows so far, and again whenever those have doubled, until there are as many as a sample has; the model
    in the user's units does not change by it. Where they are whitened, the automatic rate is

    .. math:: \alpha_t = \min(\alpha_0, \frac{1}{2 (t - h)}), \quad h = 5 / (2 \alpha_0)

    under which, the Hessian being twice the identity, the last iterate is the mean of what each batch alone would say: every row
    counts alike, however many will come. Otherwise it is alpha_0 / sqrt(1 + t / h), with the mean of late iterates as the result.

    Attributes
    ----------
    options : Descent
        Of a stochastic mode; those of epochs do not matter.
    n_features, n_targets : int
        p and k.
    fit_intercept, ridge
        As for `fit`.

    References
    ----------
    Bach and Moulines (2011), Non-asymptotic analysis of stochastic approximation algorithms for machine learning, theorem 3, for
    the falling rate with a mean; Dawid (1984), Statistical theory: the prequential approach, for costs of rows before they are
    learned from.
    """

    options: Descent
    n_features: int
    n_targets: int
    fit_intercept: bool
    ridge: float

    @property
    def batch_rows(self) -> int:
        """Rows of a batch."""
        return self.options.batch_rows(self._nominal_rows, self.n_features)

    @property
    def _nominal_rows(self) -> int:
        return max(SAMPLE_ROWS, self.options.batch_size or 1)

    def start(self) -> Standing:
        """Return the state before the first row."""
        none = Residuals.empty(self.n_targets)
        return Standing(None, None, (), 0, 0, 0, none, none, np.zeros(2), (), (), "")

    def over(
        self, rows: Array, state: Standing, origin: tuple[Array, Array] | None, steps: int, patience: int | None, tol: float
    ) -> Standing:
        """Learn from some more rows.

        Parameters
        ----------
        rows : (m, p + k + 1) float64
            Rows [x y w].
        state : Standing
            Where to start from; not changed.
        origin, steps
            For the first rows: coefficients (p, k) and intercepts (k,) to start from, or None, and the steps that led there.
        patience : int or None
            Windows without an improvement after which nothing more is learned; None for never.
        tol : float
            The least improvement, as a share.

        Raises
        ------
        Diverged
            The coefficients left the range of float64, or under a given rate the cost grew a thousandfold.
        """
        done = 0
        while done < len(rows) and not (state.stopped and patience):
            height = self._height(state, len(rows) - done)
            state = self._learned(rows[done : done + height], state, origin, steps)
            done += height
            if state.seen.spread.n >= WINDOW_ROWS:
                state = self._window_closed(state, patience, tol)
        return state

    def coefficients(self, state: Standing) -> tuple[Array, Array]:
        """Return coefficients (p, k) and intercepts (k,) in the user's units."""
        assert state.walk is not None
        assert state.here is not None
        return state.walk.objective.coordinates.to_user(state.here.average.b if state.walk.average else state.here.b)

    def _height(self, state: Standing, available: int) -> int:
        """Return how many of the next rows are learned from together: whole batches, to where something else is due."""
        size = self.batch_rows
        left = WINDOW_ROWS - state.seen.spread.n
        width = self.n_features + self.n_targets + 1
        heights = [available, -(-left // size) * size, max(STRETCH_BYTES // (8 * width * size), 1) * size]
        if due := self._due(state):
            heights.append((due - 1 - state.rows) // size * size or size)
        return min(heights)

    def _due(self, state: Standing) -> int:
        """Return the rows at which coordinates are made anew; 0 for never more."""
        most = max(sample_rows(self.n_features + self.n_targets + 1), self.batch_rows)
        return min(max(2 * state.known, 1), most) if state.known < most else 0

    def _learned(self, rows: Array, state: Standing, origin: tuple[Array, Array] | None, steps: int) -> Standing:
        total = state.rows + len(rows)
        if due := self._due(state):
            state = state._replace(sample=(*state.sample, rows.copy()))
            if total >= due:
                state = self._moved(state, origin, steps)
                state = state._replace(known=total, sample=state.sample if self._due(state._replace(known=total)) else ())
        walk, before = state.walk, state.here
        assert walk is not None
        assert before is not None
        coordinates, q = walk.objective.coordinates, self.n_features + self.n_targets
        block = Block(0, len(rows), rows[:, : self.n_features], rows[:, self.n_features : q], rows[:, q])
        prepared = coordinates.prepared(block)
        with np.errstate(all="ignore"):  # what leaves the range of float64 is found below
            # the rate falls with rows, so that calls with less than a batch, which count for as much less, make it fall no sooner
            here, residuals = walk.over(prepared, before._replace(step=state.first_step + state.rows // self.batch_rows))
            squares = state.squares + [column_squares(values, prepared.w).sum() for values in (residuals, prepared.y)]
        finite = np.isfinite(squares).all() and np.isfinite(here.b).all()
        growth = np.inf if self.options.learning_rate == "auto" else RUINED
        if what := grown(squares[0] if finite else np.inf, squares[1], growth):
            raise diverged(walk, here.step, before.b, state.history, what)
        seen = residual_sums(replace(block, x=residuals * coordinates.target_scale))
        return state._replace(here=here, rows=total, seen=state.seen + seen, squares=squares)

    def _moved(self, state: Standing, origin: tuple[Array, Array] | None, steps: int) -> Standing:
        """Return the state in coordinates made of the sample."""
        walk = walk_of(
            np.concatenate(state.sample),
            self.options,
            n_features=self.n_features,
            n_targets=self.n_targets,
            weighted=True,
            fit_intercept=self.fit_intercept,
            ridge=self.ridge,
            n_rows=self._nominal_rows,
        )
        if isinstance(walk.schedule, Automatic):
            walk = endless(walk, walk.schedule)
        if state.walk is not None and state.here is not None:
            return state._replace(walk=walk, here=carried(state.here, state.walk, walk))
        return state._replace(walk=walk, here=replace(walk, origin=origin).start(), first_step=steps)

    def _window_closed(self, state: Standing, patience: int | None, tol: float) -> Standing:
        """Compare the cost of a window with those before it, and record it if its number is a power of two."""
        walk, here = state.walk, state.here
        assert walk is not None
        assert here is not None
        number = state.rows // WINDOW_ROWS
        total = state.total + state.seen
        if state.seen.spread.weight_sum == 0:
            return state._replace(seen=self.start().seen, total=total)
        cost, history, average = state.seen.cost(), state.history, here.average
        watched = (*state.watched, np.atleast_1d(np.asarray(cost.mse)))
        stopped = ""
        if patience:
            variance = walk.objective.coordinates.target_scale**2
            costs = [float(np.mean(mse / variance)) for mse in watched]
            if len(costs) > patience and min(costs[-patience:]) > (1 - tol) * min(costs[:-patience]):
                what = f"has not improved by more than {tol:g} of itself for {patience} windows of {WINDOW_ROWS:,} rows"
                stopped = f"the cost of rows not yet learned from {what}"
            best = min(range(max(len(costs) - patience, 1)), key=lambda i: costs[i])
            watched = (watched[best], *watched[max(len(costs) - patience, 1) :])
        else:
            watched = ()
        if restarts(number):
            history = (*history, self._record(state, cost, number))
            average = average._replace(rows=average.rows / 2)  # what is long past counts less and less
        here = here._replace(gradients=np.zeros_like(here.gradients), average=average)
        return state._replace(here=here, seen=self.start().seen, total=total, watched=watched, history=history, stopped=stopped)

    def _record(self, state: Standing, cost: Any, number: int) -> Record:
        walk, here = state.walk, state.here
        assert walk is not None
        assert here is not None
        steps = -(-state.seen.spread.n // self.batch_rows)
        rate, norm = float(walk.schedule(max(here.step - 1, 0))), float(np.linalg.norm(here.gradients)) / steps
        return Record(1, here.step, state.rows, rate, cost, None, norm, None, walk.scale, 0.0, complete=False)


def endless(walk: Walk, schedule: Automatic) -> Walk:
    """Return a walk whose automatic rate knows of no end.

    It holds until the start is forgotten: by the steps, and by a rule that remembers them, whose oscillations fade in 2 gain steps.
    """
    rate, gain = schedule.rate, walk.rule.gain
    forgets = 1 / rate if np.isnan(gain) else 1 / (2 * rate * gain) + 2 * (gain - 1)  # Adam goes a unit in 1 / rate steps
    hold = int(np.ceil(HOLD * forgets))
    if walk.transform is None:
        return replace(walk, schedule=InverseScaling(rate, 0.5, hold), average=True)
    return replace(walk, schedule=Automatic(rate, hold, schedule.share / 2))


def carried(here: Iterate, old: Walk, new: Walk) -> Iterate:
    """Return where a descent stands, in the coordinates of another walk: the same coefficients in the user's units.

    The average and what the rule remembers go along, as what they are: a velocity moves like coefficients, a gradient so that its
    product with a velocity stays. Adam's squares cannot: they are taken for the variances of gradients that are uncorrelated.
    """
    a, b = old.objective.coordinates, new.objective.coordinates
    linear = moved_linearly(np.eye(a.n_trained), a, b)  # (d, d): b' = linear b, but for the targets' units
    before = linear if here.transform is None else linear @ here.transform
    change = before if new.transform is None else np.linalg.solve(new.transform, before)
    unit = a.target_scale / b.target_scale
    memory = here.memory
    if isinstance(memory, AdamState):
        back = np.linalg.inv(change).T
        memory = memory._replace(mean=back @ memory.mean * unit, square=back**2 @ memory.square * unit**2)
    elif not isinstance(memory, PlainState):
        memory = memory._replace(velocity=change @ memory.velocity * unit)
    average = here.average._replace(b=moved(here.average.b, a, b))
    return Iterate(moved(here.b, a, b), new.transform, memory, average, np.zeros_like(here.b), here.step)


def moved(coefficients: Array, a: Coordinates, b: Coordinates) -> Array:
    """Return coefficients (d, k) of coordinates `a` in coordinates `b`: the same model, and no large numbers in between."""
    out = moved_linearly(coefficients, a, b) * (a.target_scale / b.target_scale)
    if a.intercept:
        out[-1] += (a.target_mean - b.target_mean) / b.target_scale
    return out


def moved_linearly(coefficients: Array, a: Coordinates, b: Coordinates) -> Array:
    """Return the same of differences of coefficients, with targets measured as in `a`."""
    p = a.n_features
    out = np.array(coefficients)
    out[:p] *= (b.scale / a.scale)[:, None]
    if a.intercept:
        out[p] += ((b.mean - a.mean) / a.scale) @ coefficients[:p]
    return out
