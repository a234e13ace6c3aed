"""The descent over batches: epochs, records, divergence, and a state that can be written down between any two stretches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from time import monotonic
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.cost import Cost, make_cost
from streamlr.aggregates.moments import Moments
from streamlr.descent.options import Descent
from streamlr.descent.scaling import SMALLEST, Coordinates
from streamlr.descent.steps import Iterate, Walk
from streamlr.descent.stopping import Record, spent, verdict
from streamlr.descent.updates import Average, Best
from streamlr.errors import Diverged

Array = NDArray[np.float64]
GROWN = 10.0  # times the cost of the start: by then nobody believes that it comes back
RUINED = 1e3  # within an epoch


class Stoppable(Protocol):
    """A state that says why it stopped, once it has."""

    @property
    def stopped(self) -> str:
        """Why; empty while it runs."""
        ...


S = TypeVar("S", bound=Stoppable)


class Seen(NamedTuple):
    """What the steps of the running epoch met, in units of the targets' scale and of the mean weight.

    Attributes
    ----------
    rows, steps : int
        Rows and steps of this epoch.
    weight : float
        Sum of the weights.
    centre : (k,) float64
        Mean of the first targets: squares of distances from it are not lost in those of a mean far from zero.
    sums : (4, k) float64
        Weighted sums: of sizes and squares of the residuals, of the targets' distances from the centre and of their squares.
    """

    rows: int
    steps: int
    weight: float
    centre: Array
    sums: Array

    @classmethod
    def nothing(cls, n_targets: int) -> Seen:
        """Return what is met before the first step."""
        return cls(0, 0, 0.0, np.zeros(n_targets), np.zeros((4, n_targets)))

    def of(self, residuals: Array, targets: Array, weights: Array | None, steps: int) -> Seen:
        """Return what was met with the residuals and targets (m, k) of some more rows, of weights (m, 1) or None."""
        w = np.ones(len(targets)) if weights is None else weights[:, 0]
        total = float(w.sum())
        centre = self.centre if self.weight or not total else (w @ targets) / total  # rows of no weight have no say
        away = targets - centre
        sums = [w @ np.abs(residuals), _squares(residuals, weights), w @ away, _squares(away, weights)]
        return Seen(self.rows + len(targets), self.steps + steps, self.weight + total, centre, self.sums + sums)

    @property
    def squares(self) -> tuple[float, float]:
        """Sums of squares of the residuals, and of what they were at the start."""
        _, squares, away, spread = self.sums
        with np.errstate(all="ignore"):
            return float(squares.sum()), float((spread + self.centre * (2 * away + self.centre * self.weight)).sum())

    def cost(self, coordinates: Coordinates, target_names: tuple[str, ...]) -> Cost:
        """Return the cost that was met, in the user's units."""
        sizes, squares, away, spread = self.sums
        scale, exponent = np.frexp(coordinates.target_scale)
        with np.errstate(all="ignore"):  # without weight, there is an error for it
            mean = np.ldexp(coordinates.target_mean, -exponent) + (self.centre + away / self.weight) * scale
            scatter = np.diag(np.maximum(spread - away * (away / self.weight), 0.0) * scale**2)
            of_targets = Moments(
                self.rows, self.rows, self.weight, mean, np.zeros_like(mean), scatter, exponent.astype(np.int32), (), target_names
            )
            cost = make_cost(squares * scale**2, sizes * coordinates.target_scale, of_targets)
        return replace(cost, weight_sum=self.weight * coordinates.mean_weight)


def _squares(values: Array, weights: Array | None) -> Array:
    return np.asarray(np.einsum("ij,ij->j", values, values if weights is None else weights * values))


class State(NamedTuple):
    """Everything that a descent needs in order to go on; what a checkpoint holds.

    Attributes
    ----------
    here : Iterate
        Coefficients, the rule's memory, the average.
    best : Best
        The best coefficients so far, by the watched cost at the end of an epoch.
    epoch : int
        Epochs finished.
    rows : int
        Rows used.
    position : tuple of int
        How far the running epoch has come, for whoever provides the rows; empty at its start.
    seen : Seen
        What was met in it.
    first_norm : float
        Norm of the mean gradient of the first epoch.
    seconds : float
        Time used.
    history : tuple of Record
        What was recorded.
    stopped : str
        Why it ended; empty while it runs.
    """

    here: Iterate
    best: Best
    epoch: int
    rows: int
    position: tuple[int, ...]
    seen: Seen
    first_norm: float
    seconds: float
    history: tuple[Record, ...]
    stopped: str


Epoch = Callable[[int, tuple[int, ...]], Iterator[tuple[Array, tuple[int, ...]]]]


@dataclass(frozen=True, slots=True)
class Loop:
    """A descent over epochs of batches.

    Attributes
    ----------
    options : Descent
        When to record and when to stop.
    walk : Walk
        How steps are taken.
    target_names : tuple of str
        Names of the k targets.
    epoch : callable
        (number, position) -> iterator of prepared rows, in whole batches, and the position behind them.
    validate : callable or None
        (coef, intercept) -> Cost on held-out rows.
    record : callable
        Called with each record.
    save : callable
        Called with states that may be kept; it decides which, but for the last before an interruption, which comes with now=True.
    """

    options: Descent
    walk: Walk
    target_names: tuple[str, ...]
    epoch: Epoch
    validate: Callable[[Array, Array], Cost] | None
    record: Callable[[Record], None]
    save: Callable[..., None]

    def start(self) -> State:
        """Return the state before the first step."""
        here = self.walk.start()
        return State(here, Best(here.b, np.inf), 0, 0, (), Seen.nothing(len(self.target_names)), 0.0, 0.0, (), "")

    def run(self, state: State) -> State:
        """Go down from a state until a rule says why to stop.

        Raises
        ------
        Diverged
            The coefficients left the range of float64, or the cost grew tenfold.
        """
        return followed(state, self._through_epoch, self.save)

    def result(self, state: State) -> Array:
        """Return the coefficients that a state stands for: the best by held-out rows, else the average, else the last."""
        return state.best.b if self.validate and state.best.cost < np.inf else self._candidate(state.here)

    def _through_epoch(self, state: State) -> Generator[State, None, None]:
        """Yield the states that can be gone on from, one a stretch; the last is that of the ended epoch."""
        options = self.options
        began = monotonic() - state.seconds
        here, rows, seen = state.here, state.rows, state.seen
        if not state.position and restarts(state.epoch):
            here = here._replace(average=Average(here.b, 0.0))
        for stretch, position in self.epoch(state.epoch, state.position):
            for part, logs in self._parts(stretch, rows):
                with np.errstate(all="ignore"):  # what leaves the range of float64 is found below
                    before = here.step
                    here, residuals = self.walk.over(part, here)
                    _, targets, weights = self.walk.objective.coordinates.parts(part)
                    seen = seen.of(residuals, targets, weights, here.step - before)
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

    def _parts(self, stretch: Array, rows: int) -> Iterator[tuple[Array, bool]]:
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

    def _ended(self, state: State) -> State:
        """Close an epoch: record it, remember the best coefficients, ask the rules."""
        state = self._recorded(state, complete=True)
        record = state.history[-1]
        hold = self.walk.hold
        now, start = state.seen.squares  # the cost was met on the way here: where it went up, so will what it led to
        counts = record.steps > hold if self.validate else now < start  # while the rate is high, low costs are luck
        state = state._replace(
            best=state.best.of(self._candidate(state.here), record.watched if counts else np.inf),
            first_norm=state.first_norm or record.gradient_norm,
            here=state.here._replace(gradients=np.zeros_like(state.here.gradients)),
            epoch=state.epoch + 1,
            position=(),
            seen=Seen.nothing(len(self.target_names)),
        )
        return state._replace(stopped=verdict(state.history, state.first_norm, self.options, hold))

    def _check(self, state: State, growth: float) -> None:
        """Raise where the descent goes up."""
        now, start = state.seen.squares
        if what := grown(now if np.isfinite(state.here.b).all() else np.inf, start, growth):
            raise diverged(self.walk, state.here.step, state.best.b, state.history, what)

    def _candidate(self, here: Iterate) -> Array:
        return here.average.b if self.walk.average and here.average.rows else here.b

    def _recorded(self, state: State, *, complete: bool) -> State:
        if not complete and state.seen.weight == 0:  # of no weight so far: there is no cost to record
            return state
        record = self._record(state, complete=complete)
        self.record(record)
        return state._replace(history=(*state.history, record))

    def _record(self, state: State, *, complete: bool) -> Record:
        here, coordinates = state.here, self.walk.objective.coordinates
        validation = None
        if complete and self.validate is not None:
            validation = self.validate(*coordinates.to_user(self._candidate(here)))
        return Record(
            epoch=state.epoch + 1,
            steps=here.step,
            rows=state.rows,
            learning_rate=float(self.walk.schedule(max(here.step - 1, 0))),
            cost=state.seen.cost(coordinates, self.target_names),
            validation=validation,
            gradient_norm=float(np.linalg.norm(here.gradients) / max(state.seen.steps, 1)),
            gap=None,
            scale=self.walk.scale,
            seconds=state.seconds,
            complete=complete,
        )


def followed(state: S, states: Callable[[S], Generator[S, None, None]], save: Callable[..., None]) -> S:
    """Go from state to state until one says why it stopped, saving each; an interruption saves the last one, due or not."""
    try:
        while not state.stopped:
            with closing(states(state)) as following:
                for state in following:  # the last one is where the next begins
                    save(state)
    except BaseException as error:
        if not isinstance(error, Exception):  # Ctrl-C
            save(state, now=True)
        raise
    return state


def restarts(epoch: int) -> bool:
    """Whether the average starts anew before this epoch, counted from 0: at the first and at every power of two.

    It so covers the last third to the last half of the epochs, without being told how many there will be.

    Examples
    --------
    >>> [epoch for epoch in range(20) if restarts(epoch)]
    [0, 1, 2, 4, 8, 16]
    """
    return epoch & (epoch - 1) == 0


def grown(now: float, start: float, growth: float) -> str:
    """Say how a cost went up, where it is not finite or more than `growth` times what it was at the start; else nothing.

    Examples
    --------
    >>> grown(2.0, 1.0, 10.0)
    ''
    >>> grown(20.0, 1.0, 10.0)
    'the cost has grown to 20 times that of the start'
    """
    if not np.isfinite(now):
        return "the coefficients left float64's range"
    times = float(now) / max(float(start), SMALLEST)
    return f"the cost has grown to {times:.3g} times that of the start" if times > growth else ""


def diverged(walk: Walk, step: int, b: Array, history: tuple[Record, ...], what: str, rate: float | None = None) -> Diverged:
    """Return the error of a descent that goes up, with the best coefficients so far and what to do next."""
    coef, intercept = walk.objective.coordinates.to_user(b)
    rate = float(walk.schedule(max(step - 1, 0))) if rate is None else rate
    remedies = ["a lower one", "learning_rate='auto'"] if walk.promised is None else []
    if walk.scale == "none":
        remedies.append("scale='auto'")
    remedy = ", or ".join(remedies) or "solver='normal', which is exact"
    message = (
        f"diverged: {what} after {step:,} steps with a learning rate of {rate:.3g}; choose {remedy}"
        f"{' (`coef` and `intercept` hold the best coefficients before that)' if history else ''}"
    )
    one = len(intercept) == 1
    return Diverged(message, coef[:, 0] if one else coef, float(intercept[0]) if one else intercept, list(history))
