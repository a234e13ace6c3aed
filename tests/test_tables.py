"""Reading tables: whatever the packing, the same rows; whatever is wrong, an error that says where."""

from __future__ import annotations

import csv
import datetime
import decimal
import errno
import gc
import gzip
import inspect
import io
import math
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamlr.dataset.tables.ahead import one_ahead
from streamlr.dataset.tables.batches import open_table, read_batches, wordy_columns
from streamlr.dataset.tables.csv_files import CACHED_BYTES, MISSING, CsvFile, is_number
from streamlr.dataset.tables.levels import collect_levels
from streamlr.errors import BadCell, DataError, PathNotFound, UnsupportedDtype, UsageError

pa = pytest.importorskip("pyarrow")
pa_csv = pytest.importorskip("pyarrow.csv")
pq = pytest.importorskip("pyarrow.parquet")

TEXT = "x,kind,y\n1,a,2\n2.5,b c,NA\n-3e2,,4\n"
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zipped(members: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return stream.getvalue()


def read(path: Path, numbers: Sequence[str] = (), texts: Sequence[str] = (), **options: Any):
    batches = list(read_batches(open_table(path), numbers=numbers, texts=texts, **options))
    columns = {name: [value for batch in batches for value in batch.numbers[name].tolist()] for name in numbers}
    return columns | {f"text {name}": [value for batch in batches for value in batch.texts[name].to_pylist()] for name in texts}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(TEXT, id="plain"),
        pytest.param(TEXT.rstrip(), id="no line end at the end"),
        pytest.param("\ufeff" + TEXT, id="byte order mark"),
        pytest.param(TEXT.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(TEXT.replace("\n", "\r"), id="CR"),
        pytest.param(TEXT.replace("\n", "\n\n"), id="empty lines"),
        pytest.param(TEXT.replace("b c", '"b c"').replace("2.5", '"2.5"'), id="quotes"),
        pytest.param(gzip.compress(TEXT.encode()), id="gzip"),
        pytest.param(gzip.compress(TEXT[:20].encode()) + gzip.compress(TEXT[20:].encode()), id="gzip in two members"),
        pytest.param(zipped({"t.csv": TEXT, "__MACOSX/._t.csv": "?", "readme.txt": "?"}), id="zip"),
    ],
)
def test_every_packing_gives_the_same_rows(tmp_path: Path, content: str | bytes):
    found = read(write(tmp_path, content, "any name"), ["x", "y"], ["kind"])
    np.testing.assert_equal(found, {"x": [1.0, 2.5, -300.0], "y": [2.0, math.nan, 4.0], "text kind": ["a", "b c", None]})


def test_a_row_longer_than_the_usual_block_loses_and_repeats_nothing(tmp_path: Path):
    length = 3 * CACHED_BYTES
    texts = [*map(str, range(300_000)), "a" * length, "b", "c" * length, *map(str, range(300_000))]
    lines = [f"{number},{text}\n" for number, text in enumerate(texts)]
    assert read(write(tmp_path, "x,kind\n" + "".join(lines)), ["x"], ["kind"]) == {"x": [*range(len(texts))], "text kind": texts}


def test_a_wrong_cell_is_found_whatever_the_size_of_the_blocks(tmp_path: Path):
    lines = ["1,2\n"] * CACHED_BYTES
    with pytest.raises(BadCell, match=f"line {len(lines) + 2}, column 'x': got 'oops'"):
        read(write(tmp_path, "x,y\n" + "".join(lines) + "oops,1\n"), ["x"])


def test_integers_may_turn_into_fractions_in_a_later_block(tmp_path: Path):
    cells = ["1"] * 5000 + ["0.5"]
    assert read(write(tmp_path, "x,z\n" + "".join(f"{cell},0\n" for cell in cells)), ["x"], block_bytes=512)["x"] == list(
        map(float, cells)
    )


def test_a_column_can_be_read_as_numbers_and_as_text(tmp_path: Path):
    assert read(write(tmp_path, "x,z\n 07 ,1\nNA,2\n"), ["x"], ["x"]) == {
        "x": [7.0, pytest.approx(math.nan, nan_ok=True)],
        "text x": [" 07 ", None],
    }


@shared_folder
@given(
    rows=st.lists(
        st.tuples(st.floats(allow_nan=False), st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8))
    ),
    block_bytes=st.integers(200, 2000),
)
def test_any_block_size_gives_the_cells_that_were_written(tmp_path: Path, rows: list[Any], block_bytes: int):
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("x", "kind"), *((repr(x), kind) for x, kind in rows)])
    found = read(path, ["x"], ["kind"], block_bytes=block_bytes)
    assert found == {"x": [x for x, _ in rows], "text kind": [None if kind in MISSING else kind for _, kind in rows]}


@settings(shared_folder, max_examples=300)
@given(cell=st.text("0123456789+-.eE xnaifNA\t_", max_size=6))
def test_the_standard_library_and_arrow_agree_on_what_a_number_is(tmp_path: Path, cell: str):
    path = write(tmp_path, f"x,z\n{cell},1\n")
    if cell in MISSING or is_number(cell):
        assert len(read(path, ["x"])["x"]) == 1
    else:
        with pytest.raises(BadCell, match="line 2, column 'x'"):
            read(path, ["x"])


@pytest.mark.parametrize(
    ("content", "where"),
    [
        pytest.param("x,y\n1,2\n3,oops\n", "line 3, column 'y': got 'oops'", id="text among numbers"),
        pytest.param('x,y\n1,"1,5"\n', "line 2, column 'y': got '1,5'", id="decimal comma"),
        pytest.param("x,y\r\n1,2\r\n\r\n3,0x10\r\n", "line 4, column 'y': got '0x10'", id="CRLF and an empty line before"),
        pytest.param('x,y,z\n1,2,"a\nb"\n3,?,c\n', "line 4, column 'y': got '?'", id="a line end within a cell before"),
        pytest.param("x,y\n1,2\n3\n", "line 3, column 'y' is not there: got 1 cells, but the header has 2", id="short row"),
        pytest.param("x,y\n1,2\n3,4,5\n", "line 3: got 3 cells, but the header has 2", id="long row"),
        pytest.param('x,y,z\n1,2,a\n3,4,"b\n5,6,c\n', "line 3: not CSV", id="a quote that is never closed"),
        pytest.param("x,y\n" + "1,2\n" * 9000 + "1,true\n", "line 9002, column 'y': got 'true'", id="far down"),
    ],
)
def test_a_wrong_cell_is_named_by_file_line_and_column(tmp_path: Path, content: str | bytes, where: str):
    path = write(tmp_path, content)
    with pytest.raises(BadCell) as error:
        read(path, ["x", "y"], block_bytes=4096)
    assert str(error.value).startswith(f"{path}, {where}")


def test_the_place_of_a_row_counts_lines_within_cells(tmp_path: Path):
    table = open_table(write(tmp_path, 'x,z\n1,"a\n\nb"\n\n2,c\n'))
    (batch,) = read_batches(table, numbers=["x"])
    assert batch.keep(np.array([False, True])).place(0, "x").endswith("t.csv, line 6, column 'x'")


def test_no_line_is_looked_for_where_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file is read from its start to find one: of many blocks, that would be again for each."""
    monkeypatch.setattr(CsvFile, "line", lambda table, row: pytest.fail(f"row {row} of {table.path} was looked for"))
    table = open_table(write(tmp_path, "x,kind\n" + "1,a\n2,b\n" * 300_000))
    assert len(list(read_batches(table, texts=["kind"]))) > 1, "several blocks"
    assert collect_levels([table], ["kind"], ["x"], "error") == ({"kind": ["a", "b"]}, 600_000)


def test_an_empty_line_is_a_missing_value_where_there_is_one_column(tmp_path: Path):
    table = open_table(write(tmp_path, "x\n1\n\n3\n"))
    (batch,) = read_batches(table, numbers=["x"])
    assert np.isnan(batch.numbers["x"]).tolist() == [False, True, False]
    assert "line 4" in batch.place(2, "x")


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path):
    with pytest.raises(BadCell, match=r"line 3, column 'kind'.*not UTF-8"):
        read(write(tmp_path, b"x,kind\n1,a\n2,\xe9t\xe9\n"), [], ["kind"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "is empty", id="empty"),
        pytest.param("x,y,x\n1,2,3\n", "several columns named 'x'", id="repeated name"),
        pytest.param("b'x,y\\r\\n1,2\\r\\n'", "printed Python bytes", id="bytes dump"),
        pytest.param("x,y\n1,2\n".encode("utf-16"), "UTF-16", id="UTF-16"),
        pytest.param("x;y\n1,5;2\n", "separated by ';'", id="semicolons"),
        pytest.param(b"x,\xe9\n1,2\n", "header is not UTF-8", id="Latin-1 header"),
        pytest.param(zipped({"a.csv": TEXT, "b.csv": TEXT}), "it holds 2", id="two files in a zip"),
        pytest.param(zipped({"a.csv": TEXT})[:-30], "is damaged", id="truncated zip"),
        pytest.param(b"PAR1" + b"\0" * 40, "cannot be read as Parquet", id="truncated Parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, content: str | bytes, message: str):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as error:
        open_table(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_gzip_is_an_error(tmp_path: Path, damage: str):
    rng = np.random.default_rng(0)
    packed = bytearray(gzip.compress(("x,y\n" + "".join(f"{a},{b}\n" for a, b in rng.normal(size=(5000, 2)))).encode()))
    packed = packed[: len(packed) // 2] if damage == "truncated" else packed[:-8] + b"????" + packed[-4:]
    path = write(tmp_path, bytes(packed))
    with pytest.raises(DataError, match="is damaged"):
        read(path, ["x", "y"])


def test_paths_that_lead_nowhere_or_to_a_folder(tmp_path: Path):
    with pytest.raises(PathNotFound, match="no file at"):
        open_table(tmp_path / "no.csv")
    with pytest.raises(UsageError, match="is a folder"):
        open_table(tmp_path)


def test_parquet_types_that_are_numbers_or_categories(tmp_path: Path):
    columns = {
        "integer": pa.array([1, None, 3], pa.int16()),
        "float": pa.array([0.5, math.nan, None], pa.float32()),
        "flag": pa.array([True, False, None]),
        "decimal": pa.array([decimal.Decimal("1.25"), None, None]),
        "nothing": pa.nulls(3),
        "word": pa.array(["a", None, "NA"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=2)
    found = read(
        tmp_path / "t.parquet", ["integer", "float", "flag", "decimal", "nothing"], ["word", "integer", "flag"], block_bytes=100
    )
    nan = math.nan
    expected = {
        "integer": [1, nan, 3],
        "float": [0.5, nan, nan],
        "flag": [1, 0, nan],
        "decimal": [1.25, nan, nan],
        "nothing": [nan] * 3,
    }
    expected |= {"text word": ["a", None, "NA"], "text integer": ["1", None, "3"], "text flag": ["true", "false", None]}
    np.testing.assert_equal(found, expected)


def test_parquet_types_that_are_refused(tmp_path: Path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"day": pa.array([datetime.date(2020, 1, 1)]), "word": ["a"], "x": [0.5]}), path)
    for name in ("day", "word"):
        with pytest.raises(UnsupportedDtype, match=f"column '{name}' is of type"):
            read(path, [name])
    for name in ("day", "x"):
        with pytest.raises(UnsupportedDtype, match=f"column '{name}' is of type"):
            read(path, [], [name])
    assert wordy_columns(open_table(path), ["day", "word", "x"]) == ["day", "word"]


def test_an_integer_that_float64_cannot_hold_is_an_error_with_its_row(tmp_path: Path):
    pq.write_table(pa.table({"x": [1, None, 2**53, -(2**53) - 1]}), tmp_path / "t.parquet")
    with pytest.raises(BadCell, match=r"row 4, column 'x': got -9007199254740993"):
        read(tmp_path / "t.parquet", ["x"])


@pytest.mark.parametrize("block_bytes", [64, 2**20])
@pytest.mark.parametrize("cell", ["9007199254740993", "-9007199254740993", " +12345678901234567", "9" * 5000, "9" * 400])
def test_an_integer_that_a_csv_file_would_have_rounded_is_an_error_with_its_line(tmp_path: Path, cell: str, block_bytes: int):
    path = write(tmp_path, 'x,z,k\n9007199254740992,1e300,a\n,2,"b\n"\n' + "1,2,c\n" * 20 + f"{cell},2,d\n")
    with pytest.raises(BadCell, match=r"t.csv, line 25, column 'x': got '.*beyond 2\*\*53"):
        read(path, ["z", "x"], ["x"], block_bytes=max(block_bytes, len(cell) + 64))


def test_large_numbers_that_lose_nothing_or_are_no_integers_are_read(tmp_path: Path):
    cells = ["9007199254740992", "-1152921504606846976", "100000000000000000000", "9007199254740993.0", "1e23", "0" * 20 + "1"]
    assert read(write(tmp_path, "x,z\n" + "".join(f"{cell},0\n" for cell in cells)), ["x"])["x"] == list(map(float, cells))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, TEXT)

    def refuse(*_: Any):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=f"{path} may not be read: Permission denied"):
        open_table(path)


def test_the_cells_that_stand_for_no_value(tmp_path: Path):
    path = write(tmp_path, 'x,kind\n,""\nNA,NA\nNaN,NaN\nnan,nan\nnull,null\n"NULL",NULL\n')
    found = read(path, ["x"], ["kind"])
    assert np.isnan(found["x"]).all()
    assert found["text kind"] == [None] * 6


def test_wordy_columns_hold_words_and_no_number(tmp_path: Path):
    path = write(tmp_path, "a,b,c,d\n1,NA,x,x\n2,,y,3\n")
    assert wordy_columns(open_table(path), ["a", "b", "c", "d"]) == ["c"]


def test_importing_does_not_import_what_tables_need():
    code = "import sys, streamlr.dataset.ingest; print([m for m in ('pyarrow', 'pandas', 'formulaic', 'dask') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r'pip install "streamlr\[ingest\]"'):
        read(write(tmp_path, TEXT), ["x"])


def test_reading_ahead_keeps_the_order_and_makes_at_most_one_item_too_many():
    made: list[int] = []

    def items():
        for number in range(5):
            made.append(number)
            yield number

    source = items()
    ahead = one_ahead(source)
    for number in range(4):
        assert next(ahead) == number
        time.sleep(0.01)  # for whoever would go on
        assert made in (list(range(number + 1)), list(range(number + 2)))
    ahead.close()
    assert inspect.getgeneratorstate(source) == inspect.GEN_CLOSED


def test_an_error_while_reading_ahead_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise OSError("gone")

    ahead = one_ahead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(ahead)


def test_no_thread_stays_when_reading_ends_early(tmp_path: Path):
    before = set(threading.enumerate())
    batches = read_batches(open_table(write(tmp_path, "x,z\n" + "1,2\n" * 5000)), numbers=["x"], block_bytes=512)
    next(batches)
    assert any(thread.name.startswith("streamlr-read-ahead") for thread in set(threading.enumerate()) - before)
    batches.close()
    assert not any(thread.name.startswith("streamlr-read-ahead") for thread in set(threading.enumerate()) - before)


@pytest.mark.parametrize(
    ("end", "error"),
    [
        pytest.param("3,oops\n", BadCell, id="wrong cell"),
        pytest.param('3,"4\n', BadCell, id="open quote"),
        pytest.param("", KeyboardInterrupt, id="interrupt"),
    ],
)
def test_no_reader_of_arrow_outlives_the_reading_not_even_in_a_traceback(tmp_path: Path, end: str, error: type[BaseException]):
    gc.collect()  # what earlier tests left in cycles
    table = open_table(write(tmp_path, "x,y\n" + "1,2\n" * 9000 + end))
    batches = read_batches(table, numbers=["x", "y"], block_bytes=4096)
    next(batches)
    with pytest.raises(error) as kept:
        batches.throw(KeyboardInterrupt) if error is KeyboardInterrupt else list(batches)
    assert kept.traceback
    assert not [thing for thing in gc.get_objects() if isinstance(thing, pa_csv.CSVStreamingReader)]
