"""An epoch's rows as several streams, each a task of its own, wherever tasks run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import count, cycle, islice
from typing import Any, TypeVar

from dask.delayed import delayed

from streamlr.dataset.blocks import Span
from streamlr.dataset.dataset import Dataset
from streamlr.dataset.tally import Tally
from streamlr.passes.memory import one_blas_thread
from streamlr.passes.order import Order, Picked, most_rows, unit_spans
from streamlr.passes.progress import Callback, Share, running_pass, share_of_pass
from streamlr.passes.shuffle import Prepare
from streamlr.passes.tasks import begin, compute, end, errors_of_graphs, one_at_a_time, tasks_of
from streamlr.passes.windows import Window, read_units

R = TypeVar("R")
Use = Callable[[Iterator[Any]], R]


class ParallelStreams:
    """Epochs of a dataset's rows in streams: the units, in the order of the epoch, are dealt to them in turn.

    Which rows a stream has, and in which order, depends on the order and the number of streams, and not on who reads them.

    Parameters
    ----------
    dataset : Dataset
        The rows.
    order : Order
        In which order units come, and rows in each of how many streams.
    prepare : callable
        Makes of a block of rows, which are nobody else's and perhaps to be confirmed, what is handed out.
    tasks_at_once : int
        How many of them this machine runs at once, if it is this machine.
    task : str
        What the pass is called in events.
    progress : callable, optional
        Called with an `Event` at every unit, or tile.

    Raises
    ------
    DataError
        A chunk is missing, or the store is not what it was when it was opened.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        prepare: Prepare,
        *,
        tasks_at_once: int,
        task: str,
        progress: Callback | None,
    ) -> None:
        self.dataset, self.order, self.prepare = dataset, order, prepare
        self.tasks_at_once, self.task, self.progress = tasks_at_once, task, progress
        self._before = begin(dataset)

    def epoch(self, number: int, use: Use[R]) -> list[R]:
        """Return what `use` made of the stretches of each stream, and check that every row was seen and none has changed."""
        dataset = self.dataset
        with running_pass(self.task, dataset.stored_rows, dataset.row_bytes, self.progress) as key:
            common = (dataset, key, self.order, self.prepare, number, use)
            parts = tasks_of(zip(range(self.order.streams)), f"epoch {number + 1}", key, read_stream, common)
            with errors_of_graphs(dataset):
                found = compute(delayed(gather)(*parts, dask_key_name=f"gather-{key}"), dataset.arrays, key, self.tasks_at_once)
        end(dataset, self._before, sum((tally for _, tally in found), Tally()))
        return [value for value, _ in found]


def read_stream(
    dataset: Dataset, key: str, order: Order, prepare: Prepare, number: int, use: Use[R], stream: int
) -> tuple[R, Tally]:
    """Task: give the stretches of one stream of an epoch to `use`."""
    units = order.units(dataset, number)
    own = Picked(units, range(stream, len(units), order.streams))
    with (
        one_at_a_time(dataset),
        share_of_pass(key) as share,
        one_blas_thread(),
        closing(_windows(dataset, own, order, share)) as windows,
    ):
        value = use(stretch for stretch, _ in order.stretches(dataset, windows, prepare, (number, stream)))
    return value, share.tally


def gather(*parts: tuple[R, Tally]) -> list[tuple[R, Tally]]:
    """Task: put together what the streams have become."""
    return list(parts)


def _windows(dataset: Dataset, units: Sequence[Span], order: Order, share: Share) -> Generator[Window, None, None]:
    """Read units into one window, again and again."""
    places = order.window_units(dataset)
    window = Window(dataset, places, most_rows(unit_spans(dataset, order.streams)), order.run)
    rooms = map(window.room, cycle(range(places)))
    with closing(read_units(dataset, units, share.note, rooms)) as found:
        for number in count():
            if not (blocks := list(islice(found, places))):
                return
            window.fill(number, blocks)
            yield window
