"""How much of the rate from a local disk is left behind a web server and a line of so many milliseconds; prints one JSON object.

The server is nginx where it is installed, else one of the standard library. Server, line and reader share this machine's
processors, which they would not elsewhere: the same without the delay tells what of the loss is theirs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import zarr

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where the servers are


def write_store(path: Path, megabytes: int, columns: int, chunk_megabytes: float) -> None:
    """Write rows of numbers that compress about as real tables do, four to one."""
    rows, height = megabytes * 1_000_000 // (8 * columns), max(int(chunk_megabytes * 1e6) // (8 * columns), 1)
    rng, group = np.random.default_rng(0), zarr.open_group(path, mode="w")
    x_array = group.create_array("X", shape=(rows, columns), chunks=(height, columns), dtype="f8")
    y_array = group.create_array("y", shape=(rows,), chunks=(8 * height,), dtype="f8")
    for start in range(0, rows, 8 * height):
        x = rng.integers(0, 1000, size=(min(8 * height, rows - start), columns)) / 8
        x_array[start : start + len(x)] = x
        y_array[start : start + len(x)] = x.sum(axis=1) + rng.normal(size=len(x))


def main(
    megabytes: Annotated[int, typer.Option(help="decoded size of the store")] = 1_000,
    columns: Annotated[int, typer.Option(help="features")] = 100,
    chunk_megabytes: Annotated[float, typer.Option(help="decoded size of a chunk")] = 2.0,
    milliseconds: Annotated[float, typer.Option(help="delay of each request")] = 50.0,
    times: Annotated[int, typer.Option(help="readings of each kind, in turn")] = 5,
    descent: Annotated[bool, typer.Option(help="an epoch of mini-batches instead of an exact fit")] = False,
) -> None:
    """Fit the same store from disk, through the line, and through one without a delay, in turn; print the best rates."""
    import web

    import streamlr

    solver: Any = streamlr.Descent("minibatch", max_epochs=1) if descent else "normal"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "served").mkdir()
        write_store(place / "served/rows.zarr", megabytes, columns, chunk_megabytes)
        (place / "nginx").mkdir()
        server = web.files(place / "served") if web.NGINX is None else web.nginx(place / "served", place / "nginx")
        with (
            server as port,
            web.proxy(port, place / "slow", milliseconds / 1000) as slow,
            web.proxy(port, place / "fast", 0.0) as fast,
        ):
            sources = {"local": str(place / "served/rows.zarr")}
            sources |= {name: f"http://127.0.0.1:{line.port}/rows.zarr" for name, line in (("delayed", slow), ("prompt", fast))}
            took: dict[str, list[float]] = {name: [] for name in sources}
            found = set()
            for _ in range(times):
                for name, source in sources.items():
                    began = time.perf_counter()
                    found.add(streamlr.fit(streamlr.open_dataset(source), solver).coef.tobytes())
                    took[name].append(time.perf_counter() - began)
            requests = slow.requests()
    best = {name: min(seconds) for name, seconds in took.items()}
    figures = {
        "server": "standard library" if web.NGINX is None else "nginx",
        "megabytes_a_second": {name: round(megabytes / seconds) for name, seconds in best.items()},
        "ratio": round(best["local"] / best["delayed"], 2),
        "ratio_without_delay": round(best["local"] / best["prompt"], 2),
        "seconds": {name: [round(value, 2) for value in values] for name, values in took.items()},
        "most_requests_under_way": max(request["under_way"] for request in requests),
        "same_bits": len(found) == 1,
    }
    typer.echo(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
