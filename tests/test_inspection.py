"""What a store is said to hold, and what reading every chunk of it finds."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

import streamlr
from streamlr.dataset.ingest import ingest
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import ChunkMissing, DataError, MemoryLimitExceeded, StoreIncomplete, UnsupportedDtype, UsageError
from streamlr.inspection import inspect_store, verify
from streamlr.passes import verify as passes_verify
from streamlr.passes.memory import memory_in_use


@pytest.fixture
def store(tmp_path: Path) -> Path:
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    x = np.random.default_rng(0).normal(size=(1000, 4))
    group.create_array("X", data=x, chunks=(100, 2))
    group.create_array("y", data=x[:, 0], chunks=(100,))
    return tmp_path / "s.zarr"


def add_others(store: Path) -> None:
    group = zarr.open_group(store)
    group.create_array("cube", data=np.zeros((3, 3, 3)))
    group.create_array("scalar", data=np.float64(1.0))
    with warnings.catch_warnings(action="ignore"):  # zarr has no final specification of text
        group.create_array("words", data=np.array(["a", "b"], dtype="U1"))


def test_arrays_that_hold_no_rows_of_numbers_are_reported_and_the_others_checked(store):
    add_others(store)
    (store / "X/c/3/1").unlink()
    found = verify(store)
    assert found.n_chunks == 30
    assert [(problem.array, problem.chunk, problem.kind) for problem in found.problems] == [("X", "3.1", "ChunkMissing")]
    assert set(found.not_checked) == {"cube", "scalar", "words"}
    assert "dtype" in found.not_checked["words"]
    assert "30 chunks read, 1 missing or damaged" in str(found)
    assert all(name in str(found) for name in ("'cube'", "'scalar'", "'words'"))


def test_a_store_of_which_nothing_can_be_checked_is_refused(store, tmp_path):
    add_others(store)
    with pytest.raises(DataError, match="3 dimensions"):
        verify(store / "cube")
    with warnings.catch_warnings(action="ignore"), pytest.raises(UnsupportedDtype):
        verify(store / "words")
    zarr.open_group(tmp_path / "none.zarr", mode="w")
    with pytest.raises(UsageError, match="without arrays"):
        verify(tmp_path / "none.zarr")


def test_metadata_that_were_altered_are_not_taken_for_an_array_of_another_kind(store):
    document = (store / "y/zarr.json").read_text()
    (store / "y/zarr.json").write_text(document.replace("1000", "900000000000000"))
    with pytest.raises(StoreIncomplete, match="altered"):
        verify(store)


def test_any_number_of_arrays_is_verified(store, monkeypatch):
    monkeypatch.setattr(passes_verify, "MAX_SPANS", 1)
    assert verify(store).n_chunks == 30


def test_verify_runs_as_many_tasks_as_fit_into_memory(store, monkeypatch):
    used: list[int] = []
    compute = passes_verify.compute

    def noting(root, arrays, key, tasks_at_once):
        used.append(tasks_at_once)
        return compute(root, arrays, key, tasks_at_once)

    monkeypatch.setattr(passes_verify, "compute", noting)
    monkeypatch.setattr(passes_verify, "worker_count", lambda: 8)
    monkeypatch.setattr(passes_verify, "memory_in_use", lambda source: 1_000_000)
    each = ZarrRows(zarr.open_array(store / "X"), "X").reader_bytes
    for count in (1, 3, 8, 100):
        verify(store, memory_limit=1_000_000 + each * count)
    assert used == [1, 3, 8, 8]
    with pytest.raises(MemoryLimitExceeded, match=r"array 'X'.*--memory-limit"):
        verify(store, memory_limit=1_000_000 + each - 1)


def test_a_store_that_does_not_fit_is_refused_before_it_is_read(tmp_path):
    zarr.create_array(str(tmp_path / "a"), shape=(10**7, 500), chunks=(10**7, 500), dtype="f8")
    with pytest.raises(MemoryLimitExceeded) as caught:
        verify(tmp_path / "a", memory_limit=memory_in_use("") + 10**9)
    assert caught.value.exit_status == 5


def test_only_what_a_fit_would_read_counts(store):
    zarr.open_group(store).create_array("log", shape=(100,), chunks=(10,), dtype="f8")
    found = inspect_store(store)
    assert [(array.name, array.n_missing) for array in found.arrays] == [("X", 0), ("log", 10), ("y", 0)]
    assert (found.n_missing, found.exit_status) == (0, 0)
    (store / "y/c/3").unlink()
    found = inspect_store(store)
    assert (found.n_missing, found.exit_status) == (1, 3)


def test_a_store_that_does_not_say_its_features_is_no_failure(store):
    zarr.open_group(store).create_array("Z", data=np.ones((1000, 2)))
    (store / "X").rename(store / "W")
    found = inspect_store(store)
    assert (found.plan, found.exit_status) == (None, 0)
    assert "no plan: which arrays" in str(found)
    (store / "Z/c/0/0").unlink()
    assert inspect_store(store).exit_status == 3  # any of them may be what is to be fitted


def test_the_status_is_that_of_what_stands_in_the_way_of_a_plan(store):
    assert inspect_store(store, memory_limit="1MB").exit_status == 5
    zarr.open_group(store)["y"].resize((990,))
    assert inspect_store(store).exit_status == 3
    zarr.open_group(store).attrs["streamlr"] = {"complete": False}
    found = inspect_store(store)
    assert found.exit_status == 3
    assert "never finished" in found.to_dict()["no_plan"]
    with pytest.raises(UsageError, match="lots"):
        inspect_store(store, memory_limit="lots")


def test_a_folder_where_a_chunk_was_counts_as_missing(store):
    (store / "y/c/3").unlink()
    (store / "y/c/3").mkdir()
    assert inspect_store(store).n_missing == 1


def test_every_kind_of_array_is_described(store):
    add_others(store)
    problems = {array.name: array.problem for array in inspect_store(store).arrays}
    assert problems["X"] is None
    assert "3 dimensions" in problems["cube"]
    assert "0 dimensions" in problems["scalar"]
    assert "dtype" in problems["words"]


def test_intact_is_only_said_where_checksums_show_it(store, tmp_path):
    found = verify(store)
    assert found.no_checksums == ["X", "y"]
    assert "intact" not in str(found)
    assert "no checksums in X, y: altered bytes and swapped chunks may go unseen" in str(found)
    table = tmp_path / "t.csv"
    table.write_text("y,a\n" + "".join(f"{i},{i % 7}\n" for i in range(50)))
    ingest([table], tmp_path / "own.zarr", target="y")
    assert verify(tmp_path / "own.zarr").no_checksums == []
    assert str(verify(tmp_path / "own.zarr")).endswith("all intact")


def test_a_chunk_that_the_manifest_lists_is_never_taken_for_fill_values(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("y,a\n" + "".join(f"{i},{i % 7}\n" for i in range(5000)))
    ingest([table], tmp_path / "own.zarr", target="y", rows_per_chunk=1024)
    (tmp_path / "own.zarr/X/c/2/0").unlink()
    dataset = streamlr.open_dataset(tmp_path / "own.zarr", missing="drop", allow_missing_chunks=True)
    with pytest.raises(ChunkMissing, match=r"chunk 2\.0 of array 'X'"):
        streamlr.fit(dataset)


def test_a_dataset_says_what_it_is(store):
    dataset = streamlr.open_dataset(store)
    assert repr(dataset) == "<streamlr.Dataset of 1,000 rows x 4 features, target y>"
    assert repr(dataset.split(0.5)[0]) == "<streamlr.Dataset of a part of 1,000 rows x 4 features, target y>"
