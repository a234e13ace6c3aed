"""Where the time of an exact fit goes: `python scripts/phases.py STORE` prints one JSON object, seconds of all threads by phase.

The library knows nothing of this: its functions are wrapped from outside. Each moment of a thread counts for the innermost phase
that it is in, waiting for the disk and for Python's lock included. The timers cost some microseconds a call: compare `seconds` with
those of an untimed fit, above all where chunks are small.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ours import opened

PHASES = {
    "look through the store": (
        "streamlr.dataset.zarr_rows:ZarrRows.check_current",
        "streamlr.dataset.zarr_rows:ZarrRows.fingerprint",
    ),
    "read": (
        "streamlr.dataset.stored_chunks:StoredChunks.get",
        "streamlr.dataset.stored_chunks:StoredChunks.open",
        "streamlr.dataset.zstd_stream:_File.read",
        "streamlr.dataset.chunk_file:ChunkFile.read",
    ),
    "decode": (
        "streamlr.dataset.codecs:ChunkCodec.decode",
        "streamlr.dataset.codecs:ZarrCodec.decode",
        "streamlr.dataset.zstd_stream:ZstdStream.fill",
        "streamlr.dataset.blosc_blocks:BloscBlocks.fill",
    ),
    "check and copy rows": ("streamlr.dataset.checked:DatasetReader.blocks",),
    "centre": ("streamlr.aggregates.moments:MomentsOf.of",),  # all of it but the product of the features
    # of few columns, centring too
    "product": ("streamlr.aggregates.centred:_write_square", "streamlr.aggregates.centred:_products_of_columns"),
    "merge": ("streamlr.aggregates.moments:Moments._merged",),
    "solve": ("streamlr.api:_solved",),
}
REST = "other, wait"


class Clock(threading.local):
    """Seconds of one thread by phase."""

    everyone: list[dict[str, float]] = []  # noqa: RUF012  # shared by all threads

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside: list[str] = []
        self.since = 0.0
        self.everyone.append(self.seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens within for a phase, and not for the one around it."""
        self._turn()
        self.inside.append(name)
        try:
            yield
        finally:
            self._turn()
            self.inside.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self.inside:
            self.seconds[self.inside[-1]] += now - self.since
        self.since = now


CLOCK = Clock()


def wrap(where: str, phase: str) -> None:
    """Time a function, or every step of a generator."""
    module, _, path = where.partition(":")
    *outer, name = path.split(".")
    try:
        owner = functools.reduce(getattr, outer, importlib.import_module(module))
        function = vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise SystemExit(
            f"{where} is gone ({error!r}); say in PHASES of {Path(__file__).name} where {phase!r} happens now"
        ) from None

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        with CLOCK.phase(phase):
            return function(*arguments, **options)

    @functools.wraps(function)
    def timed_steps(*arguments: Any, **options: Any) -> Iterator[Any]:
        steps = function(*arguments, **options)
        while True:
            with CLOCK.phase(phase):
                item = next(steps, steps)
            if item is steps:
                return
            yield item

    setattr(owner, name, timed_steps if inspect.isgeneratorfunction(function) else timed)


def main(path: str) -> None:
    """Fit once, timed, and print the seconds of the fit, its threads, and their seconds by phase."""
    for phase, places in PHASES.items():
        for where in places:
            wrap(where, phase)

    import streamlr

    dataset = opened(Path(path))
    threads = streamlr.plan(dataset).tasks_at_once
    for seconds in CLOCK.everyone:
        seconds.clear()
    began = time.perf_counter()
    streamlr.fit(dataset)
    elapsed = time.perf_counter() - began
    spent = {phase: sum(seconds.get(phase, 0.0) for seconds in CLOCK.everyone) for phase in PHASES}
    if not (spent["product"] and spent["centre"] and spent["read"]):
        raise SystemExit(f"a fit of {path} met no product, statistic or reading that is timed; bring PHASES up to date")
    spent[REST] = threads * elapsed - sum(spent.values())
    print(json.dumps({"seconds": elapsed, "threads": threads, "phases": spent}))


if __name__ == "__main__":
    main(*sys.argv[1:])
