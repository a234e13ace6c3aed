"""The contestants of bench.py, each a process of its own: `python scripts/contestants.py NAME DATA` prints one JSON object.

A contestant is given the path of a store of make_data.py, or of a table of make_tables.py; it imports and opens what it needs, and
returns what is timed.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import limits
import neighbours
import numpy as np
import ours
from ours import Result, Timed


class Contestant(NamedTuple):
    """Who takes part: what it prepares, the package that it needs besides streamlr's own, and which data it does not know."""

    prepare: Callable[[Path], Timed]
    needs: str | None = None
    one_target: bool = False  # it knows no more
    unweighted: bool = False  # it knows no weights


CONTESTANTS = {
    "streamlr fit": Contestant(ours.exact_fit),
    "streamlr fit, two workers": Contestant(ours.fit_on_workers, needs="distributed"),
    "streamlr evaluate": Contestant(ours.evaluate),
    "streamlr predict": Contestant(ours.predict),
    "streamlr minibatch epoch": Contestant(ours.minibatch_epoch),
    "streamlr minibatch epoch, two streams": Contestant(ours.minibatch_epoch_in_streams),
    "streamlr sgd epoch": Contestant(ours.sgd_epoch),
    "streamlr, to a gap of 1e-3": Contestant(ours.to_gap),
    "streamlr ingest": Contestant(ours.ingest, needs="pyarrow"),
    "hand-tuned loop": Contestant(limits.hand_tuned),
    "read and decode alone": Contestant(limits.decode_alone),
    "read, decode and write": Contestant(limits.decode_and_write),
    "product alone": Contestant(limits.product_alone),
    "pyarrow.csv.open_csv": Contestant(limits.read_csv, needs="pyarrow"),
    "da.map_blocks, BLAS at 1": Contestant(neighbours.map_blocks),
    "plain NumPy loop epoch": Contestant(neighbours.numpy_loop, one_target=True, unweighted=True),
    "scikit-learn SGD epoch": Contestant(neighbours.scikit_learn_epoch, one_target=True),
    "scikit-learn, to a gap of 1e-3": Contestant(neighbours.scikit_learn_to_gap, one_target=True),
    "scikit-learn Ridge in memory": Contestant(neighbours.ridge_in_memory, unweighted=True),
    "oneDAL incremental": Contestant(neighbours.onedal, needs="sklearnex", unweighted=True),
    "dask-ml newton": Contestant(neighbours.dask_ml, needs="dask_ml", one_target=True, unweighted=True),
}


def main(name: str, path: str) -> None:
    """Run one contestant and print seconds (null: never), peak memory in bytes, some of its numbers, and the gap of a descent."""
    timed = CONTESTANTS[name].prepare(Path(path))
    began, processors = time.perf_counter(), time.process_time()
    found = timed()
    elapsed, processors = time.perf_counter() - began, time.process_time() - processors
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = found if isinstance(found, Result) else Result(found)
    seconds = elapsed if result.seconds is None else result.seconds
    outcome = {
        "seconds": seconds if math.isfinite(seconds) else None,
        "processor seconds": processors,  # of all threads and all that was run, whatever part counts
        "peak": peak,
        "coef": np.asarray(result.numbers, dtype=float).ravel()[:3].tolist(),
    }
    if result.descended is not None:  # only now, since it takes time and memory that are not the contestant's
        outcome["gap"] = ours.gap_above_optimum(Path(path), *result.descended())
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
