"""Ingestion on a cluster of real processes: the same store, byte by byte, however rows are shared out among files and workers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from streamlr.dataset.ingest import ingest
from streamlr.errors import (
    BadCell,
    Cancelled,
    ClusterError,
    DataError,
    MemoryLimitExceeded,
    NoRows,
    StoreChanged,
    UnknownLevel,
)
from streamlr.inspection import verify
from streamlr.passes.ingestion import OnWorkers, active_reading

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
HEADER = "y,a,b,kind,w\n"
FORMULA = "y ~ a + b + C(kind) + a:b"


@pytest.fixture(scope="module")
def client():
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "memory_limit": "1GB"}
    with (
        warnings.catch_warnings(action="ignore"),
        distributed.LocalCluster(**settings) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def lines(count: int, seed: int = 0, missing: float = 0.0) -> list[str]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        cells = [f"{value:.6g}" for value in rng.normal(size=3)] + [str(rng.choice(["red", "green", "blue", "grey"]))]
        if rng.random() < missing:
            cells[int(rng.integers(4))] = "NA"
        found.append(",".join([*cells, str(int(rng.integers(5)))]) + "\n")
    return found


def written(folder: Path, rows: list[str], sizes: list[int]) -> list[Path]:
    """Write rows to files of so many each."""
    folder.mkdir(exist_ok=True)
    paths, start = [], 0
    for number, size in enumerate(sizes):
        paths.append(folder / f"part-{number:03}.csv")
        paths[-1].write_text(HEADER + "".join(rows[start : start + size]))
        start += size
    assert start == len(rows)
    return paths


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def both(paths: list[Any], folder: Path, client: Any, **options: Any) -> tuple[Any, Any]:
    """Ingest here and there, and compare everything but the path."""
    reports = []
    for name, reading in (("here", None), ("there", OnWorkers(client))):
        reports.append(ingest(paths, folder / f"{name}.zarr", reading=reading, overwrite=True, **options))
    here, there = reports
    assert contents(there.path) == contents(here.path)
    assert (there.n_rows, there.n_dropped, there.dropped_by_column) == (here.n_rows, here.n_dropped, here.dropped_by_column)
    assert (there.features, there.rows_per_chunk, there.coding) == (here.features, here.rows_per_chunk, here.coding)
    assert not verify(there.path).problems
    return here, there


@pytest.mark.parametrize("rows_per_chunk", [None, 1, 7, 100, 1_000])
@pytest.mark.parametrize("seed", range(3))
def test_the_store_is_the_same_however_rows_are_shared_out(client, tmp_path, seed, rows_per_chunk):
    rng = np.random.default_rng(seed)
    count = 120 if rows_per_chunk == 1 else 900
    cuts = sorted(rng.integers(0, count + 1, size=int(rng.integers(1, 9))))
    sizes = np.diff([0, *cuts, cuts[-1], count]).tolist()  # with a file that has none
    paths = written(tmp_path, lines(count, seed, missing=0.2), sizes)
    both(paths, tmp_path, client, formula=FORMULA, missing="drop", rows_per_chunk=rows_per_chunk, weights="w")


@pytest.mark.parametrize(
    "options",
    [
        {"formula": FORMULA},
        {"formula": "y + a ~ b", "weights": "w"},
        {"target": "y", "features": ["a", "b"]},
        {"target": ["y", "a"], "features": "b", "rows_per_chunk": 64},
    ],
)
def test_every_way_to_say_what_is_wanted(client, tmp_path, options):
    both(written(tmp_path, lines(500), [100, 0, 300, 100]), tmp_path, client, **options)


def test_one_reading_serves_again(client, tmp_path):
    """What it has counted in some files says nothing of others."""
    reading = OnWorkers(client)
    for name, sizes in (("a", [100, 300]), ("b", [50, 20, 130])):
        paths = written(tmp_path / name, lines(sum(sizes)), sizes)
        for formula in (FORMULA, "y ~ a"):
            report = ingest(paths, tmp_path / "out.zarr", formula=formula, reading=reading, overwrite=True)
            assert report.n_rows == sum(sizes)


def test_like_a_store_and_without_its_targets(client, tmp_path):
    first = ingest(written(tmp_path / "a", lines(300), [300]), tmp_path / "first.zarr", formula=FORMULA)
    paths = written(tmp_path, lines(400, seed=1), [150, 250])
    both(paths, tmp_path, client, like=first.path)
    for path in paths:
        path.write_text("\n".join(line.partition(",")[2] for line in path.read_text().splitlines()) + "\n")
    _, there = both(paths, tmp_path, client, like=first.path)
    assert there.targets == ()


def test_parquet_and_csv_together(client, tmp_path):
    paths: list[Path] = written(tmp_path, lines(200), [120, 80])
    pq.write_table(csv.read_csv(paths[0]), tmp_path / "part.parquet")
    both([tmp_path / "part.parquet", paths[1]], tmp_path, client, formula=FORMULA, rows_per_chunk=50)


def test_the_first_error_in_order_of_files_is_the_one(client, tmp_path):
    paths = written(tmp_path, lines(400), [100, 100, 100, 100])
    for number in (1, 3):
        rows = paths[number].read_text().splitlines(keepends=True)
        rows[51] = "1,word,2,red,1\n"
        paths[number].write_text("".join(rows))
    for options in ({"formula": "y ~ a"}, {"formula": "y ~ a", "missing": "drop"}, {"target": "y", "features": "a"}):
        with pytest.raises(BadCell, match=r"part-001\.csv, line 52, column 'a'"):
            ingest(paths, tmp_path / "out.zarr", reading=OnWorkers(client), **options)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_errors_of_all_files_together(client, tmp_path):
    first = ingest(written(tmp_path / "a", lines(300), [300]), tmp_path / "first.zarr", formula=FORMULA)
    paths = written(tmp_path, lines(200), [100, 100])
    paths[1].write_text(paths[1].read_text().replace("red", "mauve"))
    with pytest.raises(UnknownLevel, match=r"part-001\.csv.*mauve"):
        ingest(paths, tmp_path / "out.zarr", reading=OnWorkers(client), like=first.path)
    for path in paths:
        path.write_text(HEADER + "NA,1,2,red,1\n")
    with pytest.raises(NoRows, match="all 2 rows miss a cell"):
        ingest(paths, tmp_path / "out.zarr", reading=OnWorkers(client), formula=FORMULA, missing="drop")
    for number, path in enumerate(paths):
        path.write_text(HEADER + "".join(f"1,1,2,level{number}x{i},1\n" for i in range(6_000)))
    with pytest.raises(DataError, match=r"part-001\.csv.*more than 10,000 levels"):
        ingest(paths, tmp_path / "out.zarr", reading=OnWorkers(client), formula=FORMULA)


@pytest.mark.parametrize("change", ["more", "fewer", "some where none were"])
def test_files_that_change_meanwhile_are_found_out(client, tmp_path, change):
    """Between the two readings, whichever file it is, and whoever reads it."""
    paths = written(tmp_path, lines(300), [100, 0, 100, 100])
    chosen = paths[1] if change == "some where none were" else random.Random(change).choice([paths[0], *paths[2:]])

    def progress(stage: str, rows: int) -> None: ...

    class Late(OnWorkers):
        def write(self, *arguments: Any) -> Any:
            rows = chosen.read_text().splitlines(keepends=True)
            chosen.write_text("".join(rows[:-1] if change == "fewer" else [*rows, "1,2,3,red,1\n"]))
            return super().write(*arguments)

    with pytest.raises(StoreChanged, match=f"{chosen.name} had"):
        ingest(paths, tmp_path / "out.zarr", reading=Late(client), formula=FORMULA, rows_per_chunk=50, progress=progress)


def test_progress_and_who_reads(client, tmp_path):
    paths, told = written(tmp_path, lines(3_000), [1_000, 1_000, 1_000]), []
    ingest(paths, tmp_path / "out.zarr", reading=OnWorkers(client), formula=FORMULA, progress=lambda *event: told.append(event))
    assert ("levels", 3_000) in told
    assert ("rows", 3_000) in told
    assert active_reading() is None
    with client.as_current():
        assert isinstance(active_reading(), OnWorkers)


def test_a_worker_that_dies_changes_nothing(client, tmp_path):
    paths = written(tmp_path, lines(60_000), [3_000] * 20)
    expected = contents(ingest(paths, tmp_path / "here.zarr", formula=FORMULA, rows_per_chunk=1_000).path)
    died_within = 0
    for seed in range(3):
        rng = random.Random(seed)
        victim = rng.choice(sorted(client.run(os.getpid, on_error="ignore").values()))
        timer = threading.Timer(rng.uniform(0.1, 1.5), os.kill, (victim, signal.SIGKILL))
        timer.start()
        report = ingest(paths, tmp_path / f"{seed}.zarr", reading=OnWorkers(client), formula=FORMULA, rows_per_chunk=1_000)
        died_within += timer.finished.is_set()  # before it was joined
        timer.join()
        assert contents(report.path) == expected
        time.sleep(0.5)  # until its scheduler knows
        client.wait_for_workers(2, timeout=30)
    assert died_within


def test_a_chunk_that_was_begun_is_written_anew_and_the_beginning_is_gone(client, tmp_path):
    paths = written(tmp_path, lines(300), [100, 200])

    class Interrupted(OnWorkers):
        def _on_each(self, stage: str, *arguments: Any) -> Any:
            if stage == "rows":
                chunk = arguments[-1] / "X" / "c" / "0"
                chunk.mkdir(parents=True)
                (chunk / "0").write_bytes(b"half")
                (chunk / ".0.12345678").write_bytes(b"ha")
            return super()._on_each(stage, *arguments)

    there = ingest(paths, tmp_path / "there.zarr", reading=Interrupted(client), formula=FORMULA)
    assert contents(there.path) == contents(ingest(paths, tmp_path / "here.zarr", formula=FORMULA).path)


def test_a_file_that_workers_do_not_see(client, tmp_path, monkeypatch):
    paths = written(tmp_path, lines(300), [100, 200])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match=r"does not see /proc/self/cwd/part-000\.csv; put it on a disk"):
        ingest([f"/proc/self/cwd/{path.name}" for path in paths], "/tmp/never.zarr", reading=OnWorkers(client), formula=FORMULA)


def test_chunks_that_are_too_much_for_a_worker_are_refused(client, tmp_path):
    paths = written(tmp_path, lines(300), [100, 200])
    with pytest.raises(MemoryLimitExceeded, match=r"chunks of 1\.\d GB.*800\.0 MB.*--rows-per-chunk"):
        ingest(paths, tmp_path / "out.zarr", reading=OnWorkers(client), target="y", features="a", rows_per_chunk=80_000_000)


def test_what_was_given_up_does_not_come_again(client, tmp_path):
    """A worker that hears too late writes nothing where the store was."""
    paths = written(tmp_path, lines(300), [100, 200])

    class Removed(OnWorkers):
        def _on_each(self, stage: str, *arguments: Any) -> Any:
            if stage == "rows":
                shutil.rmtree(arguments[-1] / "X")
            return super()._on_each(stage, *arguments)

    with pytest.raises(Cancelled, match="was removed while it was written"):
        ingest(paths, tmp_path / "out.zarr", reading=Removed(client), formula=FORMULA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-000.csv", "part-001.csv"]


def test_command_line(tmp_path):
    paths = written(tmp_path, lines(300), [100, 200])
    command = [sys.executable, "-m", "streamlr.cli", "ingest", *map(str, paths), str(tmp_path / "out.zarr"), "--formula", FORMULA]
    done = subprocess.run([*command, "--workers", "2", "--json"], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_rows"] == 300
    assert contents(tmp_path / "out.zarr") == contents(ingest(paths, tmp_path / "here.zarr", formula=FORMULA).path)
