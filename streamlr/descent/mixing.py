"""An epoch as several streams side by side, each from the same place, and the mean of where they lead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.descent.loop import GROWN, Loop, State
from streamlr.descent.scaling import Prepared
from streamlr.descent.seen import Seen
from streamlr.descent.sequential import stepped
from streamlr.descent.steps import Iterate, Walk
from streamlr.descent.updates import Average

Array = NDArray[np.float64]
Met = tuple[Iterate, Seen]


@dataclass(frozen=True, slots=True)
class Stream:
    """What one of the streams does with its rows, on whatever machine.

    Attributes
    ----------
    walk : Walk
        How steps are taken.
    start : Iterate
        Where all streams of an epoch begin.
    """

    walk: Walk
    start: Iterate

    def __call__(self, stretches: Iterator[Prepared]) -> Met:
        """Take the steps of prepared rows, and return where they lead and what they met."""
        here = self.start._replace(average=Average(self.start.b, 0.0))
        seen = Seen.nothing(here.b.shape[1])
        for rows in stretches:
            here, seen = stepped(self.walk, rows, here, seen)
        return here, seen


@dataclass(frozen=True, slots=True)
class MixedLoop(Loop):
    """A descent by parameter mixing: streams whose coefficients are averaged after each epoch.

    Attributes
    ----------
    streams : callable
        (number, use) -> what `use` made of the rows of each stream of that epoch, in the order of the streams.
    """

    streams: Callable[[int, Callable[[Iterator[Prepared]], Met]], Sequence[Met]]

    def _through_epoch(self, state: State) -> Generator[State, None, None]:
        """Yield the state of the ended epoch: within it, there is none to go on from."""
        began = monotonic() - state.seconds
        start = self._begun(state)
        parts = self.streams(state.epoch, Stream(self.walk, start))
        with np.errstate(all="ignore"):  # what left the range of float64 is found below
            here, seen = mixed(start, parts)
        state = state._replace(here=here, rows=state.rows + seen.rows, seen=seen, seconds=monotonic() - began)
        self._check(state, GROWN)
        yield self._ended(state)


def mixed(start: Iterate, parts: Sequence[Met]) -> Met:
    r"""Return the mean of where streams lead, by their rows, and all that they met.

    .. math:: b = b_0 + \sum_s \frac{n_s}{n} (b_s - b_0)

    What the update rule remembers, and a transform that was shortened, are averaged alike. Steps are those of the longest stream,
    since that is how far the learning rate has come.

    Parameters
    ----------
    start : Iterate
        Where all streams began.
    parts : sequence of (Iterate, Seen)
        Where each led, and what it met.

    References
    ----------
    McDonald, Hall and Mann (2010), Distributed training strategies for the structured perceptron, figure 3; Zinkevich, Weimer,
    Smola and Li (2010), Parallelized stochastic gradient descent, algorithm 3.
    """
    seen = Seen.nothing(start.b.shape[1])
    for _, met in parts:
        seen = seen.joined(met)
    if not seen.rows:
        return start, seen
    ends, shares = [end for end, _ in parts], [met.rows / seen.rows for _, met in parts]

    def mean(before: Array, after: Sequence[Array]) -> Array:
        return before + sum(share * (one - before) for share, one in zip(shares, after, strict=True))

    transform = start.transform
    if transform is not None:
        transform = mean(transform, [end.transform for end in ends if end.transform is not None])
    remembered: dict[str, Any] = {
        name: mean(getattr(start.memory, name), [getattr(end.memory, name) for end in ends]) for name in start.memory._fields
    }
    here = Iterate(
        b=mean(start.b, [end.b for end in ends]),
        transform=transform,
        memory=start.memory._replace(**remembered),
        average=start.average.of(mean(start.b, [end.average.b for end in ends]), seen.rows),
        gradients=sum((end.gradients - start.gradients for end in ends), start.gradients),
        step=max(end.step for end in ends),
    )
    return here, seen
