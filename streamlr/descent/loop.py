"""The descent over epochs: records, divergence, and a state that can be written down. How an epoch goes, its subclasses know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.cost import Cost
from streamlr.descent.options import Descent
from streamlr.descent.scaling import SMALLEST
from streamlr.descent.seen import Seen
from streamlr.descent.steps import Iterate, Walk
from streamlr.descent.stopping import Record, verdict
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


@dataclass(frozen=True, slots=True)
class Loop(ABC):
    """A descent over epochs.

    Attributes
    ----------
    options : Descent
        When to record and when to stop.
    walk : Walk
        How steps are taken.
    validate : callable or None
        (coef, intercept) -> Cost on held-out rows.
    record : callable
        Called with each record.
    save : callable
        Called with states that may be kept; it decides which, but for the last before an interruption, which comes with now=True.
    """

    options: Descent
    walk: Walk
    validate: Callable[[Array, Array], Cost] | None
    record: Callable[[Record], None]
    save: Callable[..., None]

    def start(self) -> State:
        """Return the state before the first step."""
        here = self.walk.start()
        return State(here, Best(here.b, np.inf), 0, 0, (), Seen.nothing(here.b.shape[1]), 0.0, 0.0, (), "")

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

    @abstractmethod
    def _through_epoch(self, state: State) -> Generator[State, None, None]:
        """Yield the states that can be gone on from; the last is that of the ended epoch."""

    def _begun(self, state: State) -> Iterate:
        """Return where a state stands, with the average started anew where it is the beginning of an epoch that does."""
        here = state.here
        return here if state.position or not restarts(state.epoch) else here._replace(average=Average(here.b, 0.0))

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
            seen=Seen.nothing(state.here.b.shape[1]),
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
            cost=state.seen.cost(coordinates),
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
