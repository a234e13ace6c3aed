"""train(): a dataset, gone down: rows from `passes`, steps from `descent`, a model at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.cost import Cost, ResidualsOf, cost_of_moments
from streamlr.aggregates.moments import Moments, MomentsOf
from streamlr.dataset.blocks import Block, Plan
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.rows import MemoryRows
from streamlr.dataset.tally import warn_rounded
from streamlr.descent.automatic import sample_bytes, sample_rows, walk_of
from streamlr.descent.checkpoint import Checkpoint
from streamlr.descent.full import FullLoop, Quadratic, Slope, SumsOf, penalised
from streamlr.descent.loop import Loop
from streamlr.descent.mixing import MixedLoop
from streamlr.descent.options import Descent
from streamlr.descent.scaling import Prepared, plain_coordinates
from streamlr.descent.sequential import SequentialLoop
from streamlr.descent.steps import Walk, working_bytes
from streamlr.descent.stopping import Record, chosen
from streamlr.direct.normal import solve_bytes, solve_normal
from streamlr.direct.routes import Direct
from streamlr.errors import UsageError
from streamlr.files import held
from streamlr.model import FittedModel
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.order import Order, most_rows, unit_spans
from streamlr.passes.planning import draft_pass, plan_pass
from streamlr.passes.progress import Callback, Event
from streamlr.passes.reduce import Reduced, reduce
from streamlr.passes.shuffle import Position
from streamlr.passes.stream import SAMPLED, RowStream, plan_stream, sampling_bytes, side_by_side
from streamlr.passes.streams import ParallelStreams
from streamlr.passes.write import check_apart

Array = NDArray[np.float64]
SAMPLE_READ = 256 * 2**20  # bytes of the units that a sample is chosen from, but for the fewest
FEWEST_UNITS, MOST_UNITS = 8, 32
ITERATES = 12  # arrays of coefficients that a descent holds
SHOWN_EVERY = 0.5  # seconds between records that are shown


@dataclass(frozen=True, slots=True)
class Training:
    """A descent over a dataset.

    Attributes
    ----------
    dataset : Dataset
        All rows.
    options : Descent
        What was asked for.
    fit_intercept, ridge, memory_limit
        As for `fit`.
    progress : callable or None
        Called with events.
    origin : tuple of (p, k) and (k,) float64, or None
        Coefficients and intercepts to start from; None for zero.
    """

    dataset: Dataset
    options: Descent
    fit_intercept: bool = True
    ridge: float = 0.0
    memory_limit: int | str | None = None
    progress: Callback | None = None
    origin: tuple[Array, Array] | None = None

    def plan(self) -> Plan:
        """Return what a descent would take.

        Raises
        ------
        MemoryLimitExceeded
            It does not fit.
        UsageError
            A batch is larger than the data.
        """
        return self._planned(self._parts()[0])[0]

    def _planned(self, rows: Dataset) -> tuple[Plan, bool]:
        """Return the plan, and whether a full-batch descent goes by moments: decided once, before a sample takes memory."""
        plan, by_moments = self._descent_planned(rows)
        statistic = ResidualsOf(np.zeros((rows.n_features, rows.n_targets)), np.zeros(rows.n_targets))
        cost, _ = plan_pass(rows, statistic, task="cost", memory=self.memory_limit)  # it comes after all, and is refused before
        if plan.limit_source == cost.limit_source:  # else it is made by workers
            later = max(plan.solution_bytes, cost.peak_bytes - cost.base_bytes)
            plan = replace(plan, solution_bytes=later, peak_bytes=max(plan.peak_bytes, plan.base_bytes + later))
        return plan, by_moments

    def _descent_planned(self, rows: Dataset) -> tuple[Plan, bool]:
        if self.options.mode == "gd":
            moments = self._draft_moments(rows)
            return (moments, True) if moments.fits else (self._plan_slopes(rows), False)
        order, width = self._order(rows), rows.n_columns + self.fit_intercept
        plan = plan_stream(
            rows,
            order,
            task=self.options.mode,
            sample_bytes=self._sample_bytes(rows),
            state_bytes=ITERATES * 8 * width * rows.n_targets + working_bytes(order.stretch_rows(rows), width, order.batch_rows),
            passes=self.options.max_epochs or 1,
            memory=self.memory_limit,
        )
        return plan, False

    def run(self, checkpoint: str | os.PathLike[str] | None) -> FittedModel:
        """Go down, from a checkpoint where there is one, and return the model with its cost on the rows it was trained on.

        Raises
        ------
        Diverged
            The cost goes up.
        MemoryLimitExceeded, DataError, UsageError
            As for `fit`.
        """
        if checkpoint is None and self.options.checkpoint_every is not None:
            raise UsageError("checkpoint_every is how often a checkpoint is written, and there is none: name one with checkpoint=")
        rows, held_out = self._parts()
        if checkpoint is not None:
            check_apart(self.dataset, checkpoint)
        plan, by_moments = self._planned(rows)
        with nullcontext() if checkpoint is None else held(checkpoint), one_blas_thread():
            kept = None if checkpoint is None else Checkpoint(checkpoint, self._identity(rows), self.options.checkpoint_every)
            full = self.options.mode == "gd"
            at_once = 1 if full else plan.tasks_at_once
            walk = self._walk(rows, self._sample_readers(rows) if self.options.streams > 1 else at_once)
            loop = self._full_loop(rows, held_out, walk, kept, by_moments) if full else self._loop(rows, held_out, walk, kept, plan)
            begun: Any = loop.start() if kept is None else kept.load(loop.start())
            state: Any = loop.run(begun)
            if self.progress is not None and not begun.stopped:
                self._show(rows, state.history[-1])
            coef, intercept = walk.objective.coordinates.to_user(loop.result(state))
            del loop  # and the memory that it keeps from epoch to epoch
            reduced = self._residuals(rows, coef, intercept)
        warn_rounded(reduced.tally, stacklevel=3)
        return FittedModel.of_descent(
            self.dataset,
            coef,
            intercept,
            reduced.value.cost(),
            reduced.tally,
            route=self.options.mode,
            fingerprint=self.dataset.fingerprint,
            fit_intercept=self.fit_intercept,
            ridge=self.ridge,
            history=state.history,
            stopped=state.stopped,
            validation=found.validation if (found := chosen(state.history, walk.hold)) else None,
        )

    def _parts(self) -> tuple[Dataset, Dataset | None]:
        """Return the rows to train on, and those held out."""
        share = self.options.validation
        if not share:
            return self.dataset, None
        rows, held_out = self.dataset.split(share, seed=self.options.seed)
        count = self.dataset.n_rows - rows.n_rows
        if not (count and rows.n_rows):
            raise UsageError(
                f"of {self.dataset.n_rows:,} rows, validation={share:g} holds out {count:,}; give more rows, or another share"
            )
        return rows, held_out

    def _order(self, rows: Dataset) -> Order:
        options = self.options
        batch_rows = options.batch_rows(rows.n_rows, rows.n_features)
        return Order(batch_rows, options.seed, bool(options.shuffle), options.buffer_rows, options.streams)

    def _sample_readers(self, rows: Dataset) -> int:
        """Return how many threads of this process may read the sample, whoever reads the rest."""
        order, needed = Order(1, self.options.seed, shuffle=False), self._sample_bytes(rows)
        return plan_stream(rows, order, task="sample", sample_bytes=needed, passes=1, memory=self.memory_limit).tasks_at_once

    def _walk(self, rows: Dataset, readers: int) -> Walk:
        """Look at a sample, and return how to go down."""
        order, readers = Order(1, self.options.seed, shuffle=False), min(readers, SAMPLED - 1)
        stream = RowStream(rows, order, side_by_side, readers=readers, task="sample", progress=self.progress)
        unit = most_rows(unit_spans(rows)) * rows.row_bytes
        units = min(max(SAMPLE_READ // unit, FEWEST_UNITS), MOST_UNITS)
        sample = stream.sample(sample_rows(rows.n_columns), units)
        share = 1 - stream.tally.dropped / max(stream.tally.rows * rows.n_rows / rows.stored_rows, 1)
        walk = walk_of(
            sample,
            self.options,
            n_features=rows.n_features,
            n_targets=rows.n_targets,
            weighted=rows.weights is not None,
            fit_intercept=self.fit_intercept,
            ridge=self.ridge,
            n_rows=rows.n_rows,
            n_kept=max(round(share * rows.n_rows), 1),
        )
        if rows.weights is not None and self.ridge and self.options.mode != "gd":  # the mean weight a sample does not tell exactly
            coordinates = replace(walk.objective.coordinates, mean_weight=self._mean_weight(rows) or 1.0)
            walk = replace(walk, objective=replace(walk.objective, coordinates=coordinates))
        return replace(walk, origin=self.origin)

    def _mean_weight(self, rows: Dataset) -> float:
        """Return the mean weight of the rows that are kept: in a pass over weights alone, unless others tell which these are."""
        assert rows.weights is not None
        if rows.missing == "drop":
            zeros = np.zeros((rows.n_features, rows.n_targets))
            spread = self._residuals(rows, zeros, zeros[0], task="weights").value.spread
            return float(spread.weight_sum / max(spread.n, 1))
        alone = Dataset.of_rows((rows.weights,), (), None, ("weight",), (), missing=rows.missing)
        alone.subsets = rows.subsets
        moments = self._moments(alone, task="weights")
        return float(np.ldexp(moments.mean[0], moments.units[0]))

    def _loop(self, rows: Dataset, held_out: Dataset | None, walk: Walk, kept: Checkpoint | None, plan: Plan) -> Loop:
        order, prepare = self._order(rows), walk.objective.preparation()
        reading: dict[str, Any] = {"task": self.options.mode, "progress": self.progress}
        save = _nothing if kept is None else kept.save
        common = (self.options, walk, self._validation(held_out), self._record(rows), save)
        at_once = plan.tasks_at_once
        if order.streams > 1:
            streams = ParallelStreams(rows, order, prepare, tasks_at_once=at_once, **reading)
            return MixedLoop(*common, streams.epoch)
        stream = RowStream(rows, order, prepare, readers=at_once, keep=held_out is None, **reading)

        def epoch(number: int, position: tuple[int, ...]) -> Iterator[tuple[Prepared, tuple[int, ...]]]:
            return stream.epoch(number, Position(*position))

        return SequentialLoop(*common, epoch)

    def _full_loop(
        self, rows: Dataset, held_out: Dataset | None, walk: Walk, kept: Checkpoint | None, by_moments: bool
    ) -> FullLoop:
        """Return the descent by moments where p^2 numbers fit the plan, else by a pass for each step."""
        optimum, slope, validate = None, self._slope_by_data(rows, walk), self._validation(held_out)
        if by_moments:
            moments = self._moments(rows)
            solution = solve_normal(moments, Direct(), fit_intercept=self.fit_intercept, ridge=self.ridge)
            optimum = penalised(cost_of_moments(moments, solution.coef, solution.intercept), solution.coef, self.ridge)
            slope = Quadratic(moments, walk.objective.coordinates, self.ridge).slope
            if held_out is not None:
                unseen = self._moments(held_out)

                def validate(coef: Array, intercept: Array) -> Cost:
                    return cost_of_moments(unseen, coef, intercept)

        save = _nothing if kept is None else kept.save
        return FullLoop(self.options, walk, slope, optimum, validate, self._record(rows), save)

    def _sample_bytes(self, rows: Dataset) -> int:
        whitens = self.options.mode != "gd" or self.options.scale == "whiten"
        return sample_bytes(rows.n_columns + self.fit_intercept, rows.n_rows, whitens=whitens)

    def _draft_moments(self, rows: Dataset) -> Plan:
        """Return the plan of a full-batch descent by moments, whether it fits or not."""
        statistic = MomentsOf(rows.feature_names, rows.target_names)
        solving = 2 * statistic.nbytes + solve_bytes(rows.n_features, rows.n_targets)
        needed = max(solving, self._sample_bytes(rows) + sampling_bytes(rows))
        return draft_pass(rows, statistic, task="gd", memory=self.memory_limit, solution_bytes=needed)[0]

    def _plan_slopes(self, rows: Dataset) -> Plan:
        """Return the plan of a full-batch descent by a pass for each step."""
        coordinates = plain_coordinates(None, rows.n_features, rows.n_targets, intercept=self.fit_intercept)
        statistic = SumsOf(coordinates, coordinates.start())
        needed = self._sample_bytes(rows) + sampling_bytes(rows) + ITERATES * statistic.b.nbytes
        plan, _ = plan_pass(rows, statistic, task="gd", memory=self.memory_limit, solution_bytes=needed)
        return replace(plan, passes=self.options.max_epochs or 1)

    def _moments(self, rows: Dataset, task: str = "moments") -> Moments:
        statistic = MomentsOf(rows.feature_names, rows.target_names)
        return reduce(rows, statistic, task=task, memory_limit=self.memory_limit, progress=self.progress).value

    def _slope_by_data(self, rows: Dataset, walk: Walk) -> Callable[[Array], Slope]:
        def slope(b: Array) -> Slope:
            statistic = SumsOf(walk.objective.coordinates, b)
            reduced = reduce(rows, statistic, task="gradient", memory_limit=self.memory_limit, progress=self.progress)
            return statistic.slope(reduced.value, self.ridge)

        return slope

    def _validation(self, held_out: Dataset | None) -> Callable[[Array, Array], Cost] | None:
        if held_out is None:
            return None
        return lambda coef, intercept: self._residuals(held_out, coef, intercept).value.cost()

    def _residuals(self, rows: Dataset, coef: Array, intercept: Array, task: str = "cost") -> Reduced[Any]:
        statistic = ResidualsOf(coef, intercept)
        return reduce(rows, statistic, task=task, memory_limit=self.memory_limit, progress=self.progress)

    def _record(self, rows: Dataset) -> Callable[[Record], None]:
        """Return what shows records: the first, and then as often as eyes can follow."""
        shown = [float("-inf")]

        def record(seen: Record) -> None:
            if self.progress is not None and monotonic() - shown[0] >= SHOWN_EVERY:
                shown[0] = monotonic()
                self._show(rows, seen)

        return record

    def _show(self, rows: Dataset, record: Record) -> None:
        assert self.progress is not None
        total, size = rows.stored_rows, rows.stored_rows * rows.row_bytes
        self.progress(Event(self.options.mode, total, total, size, size, record.seconds, str(record)))

    def _identity(self, rows: Dataset) -> dict[str, Any]:
        """Return what a checkpoint of a descent over these rows belongs to."""
        options = self.options.to_dict()
        del options["checkpoint_every"]  # when it is written changes nothing in it
        order = self._order(rows)
        return {
            "fingerprint": self.dataset.fingerprint,
            "options": options,
            "fit_intercept": self.fit_intercept,
            "ridge": self.ridge,
            "stretch_rows": order.stretch_rows(rows),  # positions count in these, and another release may choose others
            "shuffled": [order.window_units(rows) * most_rows(unit_spans(rows, order.streams)), order.run],
        }


def stretches_of(dataset: Dataset, batch_rows: int) -> Iterator[Array]:
    """Yield rows [x y w], of weight 1 where there are no weights, in their order, in whole batches but for the last."""
    arrays, width, order = dataset.arrays, dataset.n_features + dataset.n_targets + 1, Order(batch_rows, 0, shuffle=False)
    if not all(isinstance(rows, MemoryRows) for rows in arrays):
        plan = plan_stream(dataset, order, task="stream", sample_bytes=2 * sample_bytes(width), passes=1, memory=None)
        stream = RowStream(dataset, order, _weighted, readers=plan.tasks_at_once, task="stream", progress=None)
        yield from (rows for rows, _ in stream.epoch(0))
        return
    height = order.stretch_rows(dataset)
    for start in range(0, dataset.n_rows, height):  # what is in memory needs no threads, which take longer than a small batch
        out = np.ones((min(height, dataset.n_rows - start), width))
        first = 0
        for rows in arrays:
            rows.reader().read_into(out[:, first : first + rows.n_columns], start)
            first += rows.n_columns
        yield out


def _weighted(rows: Block) -> Array:
    return side_by_side(replace(rows, weights=np.ones(len(rows.x)) if rows.weights is None else rows.weights))


def _nothing(_: Any, *, now: bool = False) -> None:
    """Keep nothing."""
