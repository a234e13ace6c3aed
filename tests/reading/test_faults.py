"""Damaged, incomplete and changing stores: a named error that says where and what to do, never a number."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import pickle
import shutil
import sys
import tracemalloc
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import dask
import dask.array as da
import numcodecs
import numpy as np
import pytest
import zarr
import zstandard
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.storage import MemoryStore, WrapperStore

import streamlr
from streamlr.dataset import chunk_file, files_ahead, parts, stored_chunks, zarr_reader, zstd_stream
from streamlr.dataset.blosc_blocks import BloscBlocks
from streamlr.dataset.buffers import Buffer
from streamlr.dataset.codecs import ChunkCodec, check_memory
from streamlr.dataset.files_ahead import Files
from streamlr.dataset.integrity import seal
from streamlr.dataset.stored_chunks import StoredChunks
from streamlr.dataset.zstd_stream import ZstdStream
from streamlr.errors import (
    ChunkCorrupt,
    ChunkMissing,
    DataError,
    MemoryLimitExceeded,
    NonFiniteValue,
    PathNotFound,
    RowCountMismatch,
    StoreChanged,
    StoreIncomplete,
    StreamlrError,
    UnsupportedDtype,
    UsageError,
)
from streamlr.inspection import verify

N, P, CHUNK = 9_000, 128, 1_000  # tiles of 4,096 rows, so that a pass has three events
REMEDIES = ("restore", "open", "write it again", "write the store again", "check", "wait", "repair", "mounted")


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, P))
    y = x @ np.arange(1.0, P + 1) + rng.normal(size=N)
    return x, y, streamlr.fit(streamlr.Dataset(x, y)).coef.tobytes()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(stored_chunks, "PAUSES", (0.0, 0.0))


def fails(error: type[Exception] | tuple[type[Exception], ...], *words: str):
    """Expect a named error with its exit status, these words and a remedy."""

    class Expectation:
        def __enter__(self):
            self.raises = pytest.raises(error)
            self.caught = self.raises.__enter__()

        def __exit__(self, *exception):
            handled = self.raises.__exit__(*exception)
            found = self.caught.value
            assert isinstance(found, StreamlrError)
            assert found.exit_status == 3
            assert isinstance(found, ValueError)
            for word in words:
                assert word in str(found), f"{word!r} is not in: {found}"
            assert any(remedy in str(found) for remedy in REMEDIES), f"no remedy in: {found}"
            return handled

    return Expectation()


class StoreContract:
    """What must hold for a store, however it is laid out."""

    checked: ClassVar[bool] = False  # whether every bit of a chunk is under a checksum
    named: ClassVar[bool] = True  # whether our own reader reads, and so names the chunk
    zarr_format: ClassVar[int] = 3
    templates: ClassVar[dict[type, Path]] = {}

    def options(self, name: str) -> dict:
        return {}

    def make(self, path: Path, x: np.ndarray, y: np.ndarray) -> None:
        group = zarr.open_group(path, mode="w", zarr_format=self.zarr_format)
        for name, values in (("X", x), ("y", y)):
            chunks = (CHUNK, *values.shape[1:])
            options = {"chunks": chunks, "fill_value": 0.0, **self.options(name)}
            group.create_array(name, shape=values.shape, dtype="f8", config={"write_empty_chunks": True}, **options)[...] = values

    def open(self, path: Path) -> streamlr.Dataset:
        return streamlr.open_dataset(path)

    def file(self, path: Path, name: str, number: int) -> Path:
        return path / name / "c" / (f"{number}/0" if name == "X" else f"{number}")

    @pytest.fixture
    def store(self, rows, tmp_path_factory, tmp_path):
        if type(self) not in self.templates:
            template = tmp_path_factory.mktemp(type(self).__name__) / "store.zarr"
            self.make(template, *rows[:2])
            self.templates[type(self)] = template
        return Path(shutil.copytree(self.templates[type(self)], tmp_path / "store.zarr"))

    def words(self, name: str, number: int) -> tuple[str, ...]:
        return (f"array {name!r}", f"rows {number * CHUNK:,} to {(number + 1) * CHUNK - 1:,}") if self.named else ()

    def fit(self, dataset: streamlr.Dataset, **options) -> bytes:
        return streamlr.fit(dataset, **options).coef.tobytes()

    def test_whole(self, store, rows):
        assert self.fit(self.open(store)) == rows[2]

    @pytest.mark.parametrize("name", ["X", "y"])
    @pytest.mark.parametrize("number", [0, 3, 8])
    def test_deleted_chunk(self, store, name, number):
        dataset = self.open(store)
        self.file(store, name, number).unlink()
        with fails(ChunkMissing, f"array {name!r}", f"rows {number * CHUNK:,} to"):
            self.fit(dataset)
        with fails(ChunkMissing, f"array {name!r}"):
            self.fit(self.open(store))

    @pytest.mark.parametrize("name", ["X", "y"])
    def test_empty_chunk(self, store, name):
        self.file(store, name, 2).write_bytes(b"")
        with fails(ChunkMissing, f"array {name!r}", "rows 2,000 to", "empty"):
            self.fit(self.open(store))

    @pytest.mark.parametrize("name", ["X", "y"])
    @pytest.mark.parametrize("keep", ["half", "all but one", "one"])
    def test_truncated_chunk(self, store, name, keep):
        file = self.file(store, name, 4)
        stored = file.read_bytes()
        file.write_bytes(stored[: {"half": len(stored) // 2, "all but one": len(stored) - 1, "one": 1}[keep]])
        with fails(ChunkCorrupt if self.named else DataError, f"array {name!r}" if self.named else "X, y"):
            self.fit(self.open(store))

    @pytest.mark.parametrize("extra", [b"\0", b"\0" * 8, b"x" * 1000])
    def test_chunk_that_is_too_long(self, store, rows, extra):
        file = self.file(store, "y", 4)
        file.write_bytes(file.read_bytes() + extra)
        try:
            found = self.fit(self.open(store))
        except StreamlrError as error:
            found = f"{error.exit_status} {error}"
        assert found == rows[2] or (str(found).startswith("3 ") and "rray" in str(found))

    def test_flipped_bits(self, store):
        if not self.checked:
            pytest.skip("nothing in this layout could show it")
        file = self.file(store, "X", 5)
        stored = file.read_bytes()
        for place in (0, 1, 17, len(stored) // 2, len(stored) - 5, len(stored) - 1):
            damaged = bytearray(stored)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            with fails(ChunkCorrupt, *self.words("X", 5)):
                self.fit(self.open(store))

    def test_folder_where_a_chunk_was(self, store):
        file = self.file(store, "X", 1)
        file.unlink()
        file.mkdir()
        with fails(ChunkCorrupt, "array 'X'"):
            self.fit(self.open(store))

    def test_link_that_leads_to_itself(self, store):
        file = self.file(store, "y", 1)
        file.unlink()
        file.symlink_to(file.name)
        with fails(ChunkCorrupt, "array 'y'"):
            self.fit(self.open(store))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_chunk_that_may_not_be_read(self, store):
        self.file(store, "X", 1).chmod(0)
        with fails(ChunkCorrupt, "array 'X'", "ermission"):
            self.fit(self.open(store))

    def test_store_deleted_after_opening(self, store):
        dataset = self.open(store)
        shutil.rmtree(store)
        with fails((StoreChanged, ChunkMissing), "mounted"):
            self.fit(dataset)

    @pytest.mark.parametrize("allowed", [False, True])
    def test_store_deleted_during_the_pass(self, store, allowed):
        dataset = streamlr.open_dataset(store, allow_missing_chunks=True) if allowed else self.open(store)
        with fails(DataError, "array"):
            self.fit(dataset, progress=lambda event: shutil.rmtree(store, ignore_errors=True))

    def test_chunk_deleted_during_the_pass(self, store):
        dataset = self.open(store)
        with fails((ChunkMissing, StoreChanged), "'X'"):
            self.fit(dataset, progress=lambda event: self.file(store, "X", 8).unlink(missing_ok=True))

    def test_chunk_rewritten_during_the_pass(self, store, rows):
        other = self.file(store, "y", 2).read_bytes()

        def rewrite(event):
            if event.rows < 5_000:
                self.file(store, "y", 8).write_bytes(other)

        with fails((StoreChanged, ChunkCorrupt)):
            self.fit(self.open(store), progress=rewrite)

    def test_rows_appended_during_the_pass(self, store, rows):
        dataset = self.open(store)

        def append(event):
            if event.rows < 5_000:
                group = zarr.open_group(store, mode="r+")
                group["X"].resize((N + 10, P))
                group["y"].resize((N + 10,))

        with fails(StoreChanged, "'X'", "9010"):
            self.fit(dataset, progress=append)

    def test_chunks_changed_between_passes(self, store, rows):
        dataset = self.open(store)
        self.fit(dataset)
        file = self.file(store, "X", 0)
        file.write_bytes(self.file(store, "X", 1).read_bytes())
        with fails((StoreChanged, ChunkCorrupt)):
            self.fit(dataset)

    def test_prediction_from_a_damaged_store_leaves_nothing(self, store, rows):
        model = streamlr.fit(streamlr.Dataset(*rows[:2]))
        dataset = self.open(store)
        file = self.file(store, "X", 6)
        file.write_bytes(file.read_bytes()[:-100])
        with fails(DataError):
            streamlr.predict(model, dataset, store.parent / "out.zarr")
        assert [path.name for path in store.parent.iterdir()] == ["store.zarr"]


class TestV3(StoreContract):
    pass


class TestV2(StoreContract):
    zarr_format = 2

    def file(self, path, name, number):
        return path / name / (f"{number}.0" if name == "X" else f"{number}")


class TestV2WithFilters(TestV2):
    """Codecs that are left to zarr."""

    checked = True

    def options(self, name):
        return {"filters": [numcodecs.CRC32()], "compressors": None}


class TestBlosc(TestV2):
    """Blosc alone does not mind a chunk that lacks its last byte."""

    def options(self, name):
        return {"compressors": numcodecs.Blosc()}


class TestUncompressed(StoreContract):
    def options(self, name):
        return {"compressors": None}


class TestLargeFiles:
    """Of large files that are nothing but numbers, a pass reads the rows of a tile at a time: two from each of these."""

    n, height, tile = 1_300_000, 2**19, 2**18
    compressors: Any = None

    @pytest.fixture(scope="class")
    @classmethod
    def large(cls):
        x = np.random.default_rng(0).normal(size=(cls.n, 2))
        return x, x @ [1.0, 2.0] + 3.0

    @pytest.fixture
    def store(self, large, tmp_path):
        group = zarr.open_group(tmp_path / "s.zarr", mode="w")
        group.create_array("X", data=large[0], chunks=(self.height, 2), compressors=self.compressors, fill_value=7.0)
        group.create_array("y", data=large[1], chunks=(10_000,))
        return tmp_path / "s.zarr"

    def test_the_rows_of_a_tile_are_read_and_no_others(self, store, large, monkeypatch):
        found, expected = [], streamlr.fit(streamlr.Dataset(*large))
        read = chunk_file.read_at
        monkeypatch.setattr(chunk_file, "read_at", lambda view, *place: found.append(len(view)) or read(view, *place))
        with dask.config.set(scheduler="sync"):
            model = streamlr.fit(streamlr.open_dataset(store))
        assert model.coef.tobytes() == expected.coef.tobytes()
        assert model.cost.mse == expected.cost.mse
        assert max(found) == 16 * self.tile
        assert sum(found) == 16 * self.n

    def test_a_file_stays_open_from_tile_to_tile(self, store, large, monkeypatch):
        opened, open_file = [], Files.open

        def noted(files, key):
            opened.append((key, open_file(files, key)))
            return opened[-1][1]

        monkeypatch.setattr(Files, "open", noted)
        with dask.config.set(num_workers=1):
            streamlr.fit(streamlr.Dataset(zarr.open_group(store, mode="r")["X"], large[1]))
        assert [key for key, _ in opened] == ["X/c/0/0", "X/c/1/0", "X/c/2/0"]
        for key, file in opened:  # and none any longer
            chunk = (store / key).stat()
            with suppress(OSError):  # of a descriptor that is closed, and has become nothing else's
                assert not os.path.samestat(os.fstat(file), chunk)

    def test_few_rows_at_the_end_are_read_as_a_part_too(self, large, tmp_path, monkeypatch):
        n = self.height + 1_000
        x = zarr.create_array(str(tmp_path / "x"), data=large[0][:n], chunks=(self.height, 2), compressors=self.compressors)
        monkeypatch.setattr(StoredChunks, "get", None)
        assert streamlr.accumulate(streamlr.Dataset(x, large[1][:n])).n == n

    def test_a_system_that_gives_less_at_once(self, store, large, monkeypatch):
        expected, read, preadv = streamlr.fit(streamlr.Dataset(*large)), os.read, os.preadv
        monkeypatch.setattr(os, "read", lambda file, size: read(file, min(size, 100_001)))
        monkeypatch.setattr(os, "preadv", lambda file, views, *place: preadv(file, [views[0][:100_001]], *place))
        monkeypatch.setattr(StoredChunks, "get", None)
        model = streamlr.fit(streamlr.Dataset(zarr.open_group(store, mode="r")["X"], large[1]))
        assert model.coef.tobytes() == expected.coef.tobytes()

    def test_few_bytes_are_not_worth_a_part(self, tmp_path, monkeypatch):
        n = 300_000
        x, opened = np.random.default_rng(0).normal(size=(n, 20)), []
        y = zarr.create_array(str(tmp_path / "y.zarr"), data=x @ np.ones(20), chunks=(n,), compressors=None)
        read = files_ahead._read
        monkeypatch.setattr(files_ahead, "_read", lambda *about: opened.append(about) or read(*about))
        dataset = streamlr.Dataset(x, y)  # ten tiles
        with dask.config.set(num_workers=1):
            streamlr.fit(dataset)
            assert len(opened) == 1 < streamlr.plan(dataset).n_spans < 5  # by the thread that reads on, not by each span

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_deleted_chunk(self, store, large, number):
        (store / f"X/c/{number}/0").unlink()
        with fails(ChunkMissing, "array 'X'", f"rows {number * self.height:,} to"):
            streamlr.fit(streamlr.open_dataset(store))
        x = large[0].copy()
        x[number * self.height : (number + 1) * self.height] = 7.0
        model = streamlr.fit(streamlr.open_dataset(store, allow_missing_chunks=True))
        assert model.coef.tobytes() == streamlr.fit(streamlr.Dataset(x, large[1])).coef.tobytes()
        assert model.chunks_missing == 1

    @pytest.mark.parametrize("nbytes", [0, 1, 16 * 2**18, 16 * 2**19 - 1, 16 * 2**19 + 8], ids=str)
    def test_chunk_of_another_size(self, store, nbytes):
        file = store / "X/c/1/0"
        file.write_bytes((file.read_bytes() + bytes(8))[:nbytes])
        with fails(ChunkCorrupt if nbytes else ChunkMissing, "array 'X'", "rows 524,288 to"):
            streamlr.fit(streamlr.open_dataset(store))

    def test_folder_where_a_chunk_was(self, store):
        (store / "X/c/1/0").unlink()
        (store / "X/c/1/0").mkdir()
        with fails(ChunkCorrupt, "array 'X'"):
            streamlr.fit(streamlr.open_dataset(store))

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_reading_that_fails_for_a_moment_is_repeated(self, store, large, monkeypatch, times):
        read, failing = chunk_file.read_at, iter([True] * times)

        def fail(*about):
            found = read(*about)
            if next(failing, False):
                raise OSError(errno.EIO, "as planned")
            return found

        monkeypatch.setattr(chunk_file, "read_at", fail)
        assert streamlr.fit(streamlr.open_dataset(store)).coef.tobytes() == streamlr.fit(streamlr.Dataset(*large)).coef.tobytes()
        assert not list(failing)


class LargeFilesInParts(TestLargeFiles):
    """Of compressed ones the rows of a tile are decoded at a time, too."""

    reader: Any

    @pytest.fixture(autouse=True)
    def _in_parts(self, monkeypatch):
        monkeypatch.setattr(parts, "LARGE_BYTES", 2**21)

    def test_the_rows_of_a_tile_are_read_and_no_others(self, store, large, monkeypatch):
        decoded, filled, fill = [], [], self.reader.fill
        monkeypatch.setattr(ChunkCodec, "decode", lambda *about: decoded.append(about))  # of y, which takes no part
        monkeypatch.setattr(self.reader, "fill", lambda *about, **kw: filled.append(about[-1].nbytes) or fill(*about, **kw))
        x = zarr.open_group(store, mode="r")["X"]
        with dask.config.set(scheduler="sync"):
            model = streamlr.fit(streamlr.Dataset(x, large[1]))
        assert model.coef.tobytes() == streamlr.fit(streamlr.Dataset(*large)).coef.tobytes()
        assert not decoded
        assert max(filled) == 16 * self.tile
        assert sum(filled) == 16 * self.n

    def test_few_bytes_are_not_worth_a_part(self, tmp_path, monkeypatch):
        """But of what is compressed any are: there is no whole to hold."""
        n = 300_000
        x, opened, open_file = np.random.default_rng(0).normal(size=(n, 20)), [], Files.open
        y = zarr.create_array(str(tmp_path / "y.zarr"), data=x @ np.ones(20), chunks=(n,), compressors=self.compressors)
        monkeypatch.setattr(Files, "open", lambda *about: opened.append(about) or open_file(*about))
        dataset = streamlr.Dataset(x, y)  # ten tiles
        with dask.config.set(num_workers=1):
            streamlr.fit(dataset)
            assert len(opened) == 1 < streamlr.plan(dataset).n_spans < 5  # by the thread that reads on, not by each span

    def check_decoded_whole(self, store, large, monkeypatch):
        """Fit, and see that each chunk was decoded as a whole, once."""
        decoded, decode = [], ChunkCodec.decode
        monkeypatch.setattr(ChunkCodec, "decode", lambda *about: decoded.append(about) or decode(*about))
        x = zarr.open_group(store, mode="r")["X"]
        with dask.config.set(scheduler="sync"):
            model = streamlr.fit(streamlr.Dataset(x, large[1]))
        assert model.coef.tobytes() == streamlr.fit(streamlr.Dataset(*large)).coef.tobytes()
        assert len(decoded) == 3


class TestLargeFilesOfZstd(LargeFilesInParts):
    """They are decoded while they are read; what is wrong is named as by who reads whole chunks."""

    reader, compressors = ZstdStream, (ZstdCodec(level=1, checksum=True),)

    @pytest.fixture(autouse=True)
    def _in_pieces(self, monkeypatch):
        monkeypatch.setattr(zstd_stream, "READ_BYTES", 2**18)  # so that a chunk takes several

    @pytest.mark.parametrize("compressors", [None, (ZstdCodec(),), (BloscCodec(),)], ids=["none", "zstd", "blosc"])
    @pytest.mark.parametrize("dtype", ["float32", ">f4", "int16"])
    def test_shorter_numbers(self, tmp_path, monkeypatch, dtype, compressors):
        monkeypatch.setattr(zarr_reader, "PROMOTED_BYTES", 2**20 + 13)
        rows = np.random.default_rng(0).integers(-99, 99, size=(300_000, 12)).astype(dtype)
        y = rows @ np.arange(12.0) + np.random.default_rng(1).normal(size=len(rows))
        x = zarr.create_array(str(tmp_path / "x.zarr"), data=rows, chunks=(140_000, 12), compressors=compressors)
        expected, dataset = streamlr.Dataset(rows.astype(rows.dtype.newbyteorder("=")), y), streamlr.Dataset(x, y)
        decoded, decode = [], ChunkCodec.decode
        monkeypatch.setattr(ChunkCodec, "decode", lambda *about: decoded.append(about) or decode(*about))
        model = streamlr.fit(dataset)
        assert model.coef.tobytes() == streamlr.fit(expected).coef.tobytes()
        assert streamlr.evaluate(model, dataset).mse == streamlr.evaluate(model, expected).mse
        assert not decoded or compressors is None  # few rows at the end of a chunk are not worth opening its file
        epoch = streamlr.Descent("minibatch", max_epochs=1)
        decoded.clear()
        streamed = streamlr.fit(dataset, epoch)
        assert not decoded or compressors is None
        for name in ("LARGE_BYTES", "PART_BYTES"):
            monkeypatch.setattr(parts, name, 2**40)
        whole = streamlr.fit(dataset, epoch)
        assert len(decoded) > 5
        assert whole.coef.tobytes() == streamed.coef.tobytes()

    @pytest.mark.parametrize(("solver", "at_once"), [("normal", 2**18), ("minibatch", 2**18), ("minibatch", 2**22)])
    @pytest.mark.parametrize("number", [1, 2], ids=["whole", "at the end of the array"])
    @pytest.mark.parametrize("cut", [None, 1, 2**20, -1, -4, -5], ids=str)
    def test_chunk_of_another_size(self, store, cut, number, solver, at_once, monkeypatch):
        monkeypatch.setattr(zstd_stream, "READ_BYTES", at_once)
        file = store / f"X/c/{number}/0"
        file.write_bytes(file.read_bytes() + bytes(8) if cut is None else file.read_bytes()[:cut])
        with fails(ChunkCorrupt, "array 'X'", f"rows {number * self.height:,} to"):
            streamlr.fit(streamlr.open_dataset(store), solver)

    @pytest.mark.parametrize(("solver", "at_once"), [("normal", 2**18), ("minibatch", 2**18), ("minibatch", 2**22)])
    @pytest.mark.parametrize("number", [1, 2], ids=["whole", "at the end of the array"])
    @pytest.mark.parametrize("place", [5, 2**21, -9, -2])
    def test_damaged_bytes(self, store, place, number, solver, at_once, monkeypatch):
        monkeypatch.setattr(zstd_stream, "READ_BYTES", at_once)
        file = store / f"X/c/{number}/0"
        damaged = bytearray(file.read_bytes())
        damaged[place] ^= 64
        file.write_bytes(damaged)
        with fails(ChunkCorrupt, "array 'X'", f"rows {number * self.height:,} to"):
            streamlr.fit(streamlr.open_dataset(store), solver)

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_reading_that_fails_for_a_moment_is_repeated(self, store, large, monkeypatch, times):
        read, failing = os.read, iter([False] * 20 + [True] * times)

        def fail(file, size):
            if size == zstd_stream.READ_BYTES and next(failing, False):
                raise OSError(errno.EIO, "as planned")
            return read(file, size)

        monkeypatch.setattr(os, "read", fail)
        assert streamlr.fit(streamlr.open_dataset(store)).coef.tobytes() == streamlr.fit(streamlr.Dataset(*large)).coef.tobytes()
        assert not list(failing)

    def test_bytes_that_are_right_when_they_are_read_again_are_an_error_where_others_were_used(self, store, monkeypatch):
        read, number = os.read, itertools.count()

        def flipped(file, size):
            found = bytearray(read(file, size))
            if size == zstd_stream.READ_BYTES and next(number) == 3:
                found[1000] ^= 1
            return bytes(found)

        monkeypatch.setattr(os, "read", flipped)
        with dask.config.set(scheduler="sync"), fails(ChunkCorrupt, "array 'X'", "checksum"):
            streamlr.fit(streamlr.open_dataset(store))

    @pytest.mark.parametrize("frames", ["of a size that is not stated", "several"])
    def test_other_frames_are_decoded_once_each(self, store, large, monkeypatch, frames):
        for number in range(3):
            file = store / f"X/c/{number}/0"
            data = zstandard.ZstdDecompressor().decompress(file.read_bytes())
            if frames == "several":
                parts = [zstandard.ZstdCompressor().compress(part) for part in (data[:1000], data[1000:])]
            else:
                parts = [zstandard.ZstdCompressor(write_content_size=False).compress(data)]
            file.write_bytes(b"".join(parts))
        self.check_decoded_whole(store, large, monkeypatch)


class TestLargeFilesOfBlosc(LargeFilesInParts):
    """They are decoded some blocks at a time; what is wrong is named by who reads whole chunks."""

    reader, compressors = BloscBlocks, (BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),)

    @pytest.mark.parametrize("solver", ["normal", "minibatch"])
    @pytest.mark.parametrize("number", [1, 2], ids=["whole", "at the end of the array"])
    @pytest.mark.parametrize("cut", [None, 1, 15, 17, 2**20, -1], ids=str)
    def test_chunk_of_another_size(self, store, cut, number, solver):
        file = store / f"X/c/{number}/0"
        file.write_bytes(file.read_bytes() + bytes(8) if cut is None else file.read_bytes()[:cut])
        with fails(ChunkCorrupt, "array 'X'", f"rows {number * self.height:,} to"):
            streamlr.fit(streamlr.open_dataset(store), solver)

    @pytest.mark.parametrize("solver", ["normal", "minibatch"])
    @pytest.mark.parametrize("number", [1, 2], ids=["whole", "at the end of the array"])
    @pytest.mark.parametrize("where", ["size", "block size", "block size by one", "first block", "last block"])
    def test_damaged_bytes(self, store, where, number, solver):
        file = store / f"X/c/{number}/0"
        damaged = bytearray(file.read_bytes())
        count = -(-int.from_bytes(damaged[4:8], "little") // int.from_bytes(damaged[8:12], "little"))
        table = np.frombuffer(damaged[16 : 16 + 4 * count], "<i4")
        assert count > 4
        if where == "block size by one":
            damaged[8] += 1
        else:
            place = {"size": 4, "block size": 8, "first block": int(table[0]), "last block": int(table[-1])}[where]
            damaged[place : place + 4] = b"\xfe\xff\xff\x7f"
        file.write_bytes(damaged)
        with fails(ChunkCorrupt, "array 'X'", f"rows {number * self.height:,} to"):
            streamlr.fit(streamlr.open_dataset(store), solver)

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_reading_that_fails_for_a_moment_is_repeated(self, store, large, monkeypatch, times):
        read, failing = chunk_file.read_at, iter([False] * 3 + [True] * times)

        def fail(*about):
            if next(failing, False):
                raise OSError(errno.EIO, "as planned")
            return read(*about)

        monkeypatch.setattr(chunk_file, "read_at", fail)
        assert streamlr.fit(streamlr.open_dataset(store)).coef.tobytes() == streamlr.fit(streamlr.Dataset(*large)).coef.tobytes()
        assert not list(failing)

    def test_numbers_as_they_are_are_read_once(self, store, large, monkeypatch):
        for number in range(3):
            file = store / f"X/c/{number}/0"
            data = numcodecs.blosc.decompress(file.read_bytes())
            file.write_bytes(numcodecs.Blosc(clevel=0).encode(data))
        self.check_decoded_whole(store, large, monkeypatch)


class TestGzip(StoreContract):
    def options(self, name):
        return {"compressors": zarr.codecs.GzipCodec(level=1)}


class TestChecksums(StoreContract):
    checked = True

    def options(self, name):
        return {"compressors": [ZstdCodec(), Crc32cCodec()]}


class TestShards(StoreContract):
    """Two inner chunks in each shard of X; each file is a shard."""

    checked = True

    def options(self, name):
        inner = {"X": (500, P), "y": (250,)}[name]
        return {"chunks": inner, "shards": (CHUNK, *inner[1:]), "compressors": [ZstdCodec(), Crc32cCodec()]}

    def words(self, name, number):
        return (f"array {name!r}",)

    def test_absent_inner_chunk(self, store):
        group = zarr.open_group(store, mode="r+")
        array = group["X"].with_config({"write_empty_chunks": False})
        array[2_500:3_000] = 0.0  # which leaves the inner chunk out of its shard
        with fails(ChunkMissing, "array 'X'", "chunk 5.0", "rows 2,500 to 2,999"):
            self.fit(self.open(store))
        assert streamlr.fit(streamlr.open_dataset(store, allow_missing_chunks=True)).chunks_missing == 1


class TestSealed(StoreContract):
    """A store of ours: each chunk ends with its checksum, and a manifest knows where each belongs."""

    checked = True

    def options(self, name):
        return {"compressors": [ZstdCodec(), Crc32cCodec()]}

    def make(self, path, x, y):
        super().make(path, x, y)
        seal(path, features=[f"f{j}" for j in range(P)], targets=["price"], coding={}, counts={})

    def test_swapped_chunks(self, store):
        one, other = self.file(store, "X", 2), self.file(store, "X", 7)
        first = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(first)
        with fails(ChunkCorrupt, *self.words("X", 2), "manifest"):
            self.fit(self.open(store))

    @pytest.mark.parametrize(
        ("key", "value"),
        [("shape", [N + 1, P]), ("data_type", "int64"), ("codecs", [{"name": "bytes", "configuration": {"endian": "big"}}])],
    )
    def test_metadata_edited(self, store, key, value):
        edit_metadata(store / "X" / "zarr.json", key, value)
        with fails(StoreIncomplete, "array 'X'"):
            self.open(store)

    def test_array_lost(self, store):
        shutil.rmtree(store / "y")
        with fails(StoreIncomplete, "'y'"):
            self.open(store)

    def test_manifest_edited(self, store):
        document = json.loads((store / "zarr.json").read_text())
        document["attributes"]["streamlr"]["features"][0] = "other"
        (store / "zarr.json").write_text(json.dumps(document))
        with fails(StoreIncomplete, "manifest"):
            self.open(store)

    @pytest.mark.parametrize("state", [False, None, 1.5])
    def test_never_finished(self, store, state):
        document = json.loads((store / "zarr.json").read_text())
        document["attributes"]["streamlr"]["complete"] = state
        if state == 1.5:
            document["attributes"]["streamlr"] = "yes"
        (store / "zarr.json").write_text(json.dumps(document))
        with fails(StoreIncomplete, "never finished"):
            self.open(store)

    def test_newer_format(self, store):
        document = json.loads((store / "zarr.json").read_text())
        document["attributes"]["streamlr"]["version"] = 99
        (store / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(StoreIncomplete, match="version 99"):
            self.open(store)

    def test_names_come_from_the_seal(self, store):
        dataset = self.open(store)
        assert dataset.target_names == ("price",)
        assert dataset.feature_names[:2] == ("f0", "f1")


class TestDaskFromZarr(StoreContract):
    """A graph that the caller built: what zarr arrays it reads are found in it and looked after."""

    named = False
    inline = False

    def open(self, path):
        return streamlr.Dataset(*(da.from_zarr(str(path), component=name, inline_array=self.inline) for name in ("X", "y")))

    def test_graph_with_operations(self, store):
        x = da.from_zarr(str(store), component="X")
        dataset = streamlr.Dataset((x - x.mean(axis=0))[:, :10], da.from_zarr(str(store), component="y").rechunk(450))
        self.file(store, "X", 3).unlink()
        with fails(ChunkMissing, "array 'X'", "rows 3,000 to 3,999"):
            self.fit(dataset)


class TestDaskFromZarrInline(TestDaskFromZarr):
    inline = True


def test_seal_asks_for_checksums(rows, tmp_path):
    TestShards().make(tmp_path / "s.zarr", *rows[:2])
    with pytest.raises(StoreIncomplete, match="crc32c"):
        seal(tmp_path / "s.zarr", features=["a"] * P, targets=["y"], coding={}, counts={})


def edit_metadata(file: Path, key: str, value: object) -> None:
    document = json.loads(file.read_text())
    document[key] = value
    file.write_text(json.dumps(document))


def plain_store(path: Path, x: np.ndarray, y: np.ndarray | None = None, **options) -> Path:
    group = zarr.open_group(path, mode="w")
    group.create_array("X", data=x, **({"chunks": (100, *x.shape[1:])} | options))
    if y is not None:
        group.create_array("y", data=y, chunks=(100,))
    return path


@pytest.fixture
def store(tmp_path):
    return plain_store(tmp_path / "s.zarr", np.random.default_rng(0).normal(size=(1000, 4)), np.arange(1000.0))


class TestMetadata:
    """Documents that were cut, edited or never were what they claim."""

    @pytest.mark.parametrize("text", ["", "{", '{"zarr_format": 3', '{"zarr_format": 3, "node_type": "array"}', "null", "[]"])
    @pytest.mark.parametrize("name", ["X/zarr.json", "zarr.json"])
    def test_truncated(self, store, name, text):
        (store / name).write_text(text)
        with pytest.raises((StoreIncomplete, UsageError)) as caught:
            streamlr.open_dataset(store)
        assert "s.zarr" in str(caught.value)
        assert caught.value.exit_status in (2, 3)

    def test_unknown_codec(self, store):
        edit_metadata(store / "X/zarr.json", "codecs", [{"name": "bytes"}, {"name": "no-such-codec", "configuration": {}}])
        with fails(StoreIncomplete, "s.zarr", "no-such-codec"):
            streamlr.open_dataset(store)

    def test_shape_grown(self, store):
        edit_metadata(store / "X/zarr.json", "shape", [1100, 4])
        with pytest.raises(RowCountMismatch, match="X has 1,100, y has 1,000"):
            streamlr.open_dataset(store)
        edit_metadata(store / "y/zarr.json", "shape", [1100])
        with fails(ChunkMissing, "rows 1,000 to 1,099"):
            streamlr.fit(streamlr.open_dataset(store))

    @pytest.mark.parametrize("n", [10**15, 10**12, 10**10])
    def test_absurd_shape(self, store, n):
        for name, width in (("X", [4]), ("y", [])):
            edit_metadata(store / name / "zarr.json", "shape", [n, *width])
        with pytest.raises((StoreIncomplete, ChunkMissing), match=r"array '(y|X)'"):
            streamlr.fit(streamlr.open_dataset(store))

    def test_smaller_dtype(self, store):
        edit_metadata(store / "X/zarr.json", "data_type", "float32")
        with fails(ChunkCorrupt, "array 'X'", "chunk 0.0", "bytes"):
            streamlr.fit(streamlr.open_dataset(store))

    def test_changed_after_opening(self, store):
        dataset = streamlr.open_dataset(store)
        edit_metadata(store / "X/zarr.json", "data_type", "int64")
        with fails(StoreChanged, "array 'X'"):
            streamlr.fit(dataset)
        (store / "X/zarr.json").write_text("{")
        with fails(StoreChanged, "array 'X'"):
            streamlr.fit(dataset)

    def test_attributes_may_change(self, store):
        dataset = streamlr.open_dataset(store)
        zarr.open_group(store, mode="r+")["X"].attrs["note"] = "looked at"
        assert streamlr.fit(dataset).n_rows == 1000

    def test_stale_consolidated_metadata(self, store):
        with pytest.warns(UserWarning, match="[Cc]onsolidated"):
            zarr.consolidate_metadata(store)
        for name, width in (("X", (4,)), ("y", ())):
            zarr.open_array(store, path=name, mode="r+").resize((1200, *width))
        with fails(StoreChanged, "array 'X'"):
            streamlr.fit(streamlr.open_dataset(store))

    def test_shards_within_other_codecs(self, tmp_path):
        inner = ShardingCodec(chunk_shape=(10, 4))
        for number, codecs in enumerate(([ShardingCodec(chunk_shape=(50, 4), codecs=[inner])], [inner, ZstdCodec()])):
            path = str(tmp_path / f"{number}")
            with warnings.catch_warnings(action="ignore"):
                array = zarr.create(store=path, shape=(100, 4), chunks=(100, 4), dtype="f8", codecs=codecs, fill_value=0)
            with fails(DataError, "shards"):
                streamlr.open_dataset(array)

    def test_unequal_chunks(self, tmp_path):
        try:
            with zarr.config.set({"array.rectilinear_chunks": True}):
                array = zarr.create_array(str(tmp_path / "r"), shape=(60, 2), chunks=[[10, 20, 30], [2]], dtype="f8")
        except TypeError as error:
            pytest.skip(f"this zarr has no chunks of unequal sizes: {error}")
        with fails(DataError, "unequal"):
            streamlr.open_dataset(array)


class TestOpening:
    """Paths, names and dtypes."""

    def test_missing_path(self, tmp_path):
        with pytest.raises(PathNotFound, match=r"nowhere\.zarr.*check the path") as caught:
            streamlr.open_dataset(tmp_path / "nowhere.zarr")
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.exit_status == 2

    def test_table(self, tmp_path):
        (tmp_path / "a.csv").write_text("a,b\n1,2\n")
        with pytest.raises(UsageError, match=r"streamlr ingest a\.csv"):
            streamlr.open_dataset(tmp_path / "a.csv")

    def test_other_file(self, tmp_path):
        (tmp_path / "a.bin").write_bytes(b"\0" * 100)
        with pytest.raises(StreamlrError, match=r"a\.bin"):
            streamlr.open_dataset(tmp_path / "a.bin")

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.zarr", "s3://bucket/a.zarr", "gs://bucket/a.zarr"])
    def test_package_that_is_not_installed(self, monkeypatch, url):
        for module in ("obstore", "obstore.store"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UsageError, match=rf"{url}.*pip install 'streamlr\[remote\]'"):
            streamlr.open_dataset(url)

    def test_package_that_reads_an_unusual_url_is_not_installed(self, monkeypatch):
        pytest.importorskip("fsspec")
        monkeypatch.setitem(sys.modules, "smbclient", None)
        with pytest.raises(UsageError, match=r"smb://host/a\.zarr.*pip install smbclient"):
            streamlr.open_dataset("smb://host/a.zarr")

    def test_package_that_reads_unusual_urls_is_not_installed(self, monkeypatch):
        for module in [name for name in sys.modules if name.split(".")[0] == "fsspec"] + ["fsspec"]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UsageError, match="pip install fsspec"):
            streamlr.open_dataset("smb://host/a.zarr")

    @pytest.mark.parametrize("target", [["y", "y"], ["x1", "x0", "x1"]])
    def test_target_named_twice(self, store, target):
        with pytest.raises(UsageError, match=f"{target[-1]!r} is named twice"):
            streamlr.open_dataset(store, target=target)

    def test_columns_that_are_targets_or_weights_are_no_features(self, store):
        dataset = streamlr.open_dataset(store, target=["x1", "y"], weights="x3")
        assert (dataset.feature_names, dataset.target_names) == (("x0", "x2"), ("x1", "y"))

    def test_folder_that_is_no_store(self, tmp_path):
        with pytest.raises(UsageError, match="no zarr array or group"):
            streamlr.open_dataset(tmp_path)

    def test_group_without_arrays(self, tmp_path):
        zarr.open_group(tmp_path / "g.zarr", mode="w").create_group("inner")
        with pytest.raises(UsageError, match="without arrays"):
            streamlr.open_dataset(tmp_path / "g.zarr")

    @pytest.mark.parametrize("option", ["target", "features", "weights"])
    def test_wrong_name(self, store, option):
        with pytest.raises(UsageError, match=r"'nothing'.*X \(1000, 4\), y \(1000,\).*x0, x1") as caught:
            streamlr.open_dataset(store, **{option: "nothing"})
        assert caught.value.exit_status == 2

    def test_paths_with_spaces_and_letters(self, store):
        moved = store.rename(store.with_name("Zürich 2024 store.zarr"))
        assert streamlr.fit(streamlr.open_dataset(f"{moved}/")).n_rows == 1000

    def test_row_counts_differ(self, tmp_path):
        path = plain_store(tmp_path / "s.zarr", np.ones((1000, 4)), np.ones(999))
        with pytest.raises(RowCountMismatch, match="X has 1,000, y has 999") as caught:
            streamlr.open_dataset(path)
        assert caught.value.exit_status == 3

    @pytest.mark.parametrize("dtype", ["datetime64[s]", "timedelta64[ms]", "complex128", "U5", "S4"])
    def test_values_that_are_no_numbers(self, tmp_path, dtype):
        with warnings.catch_warnings(action="ignore"):  # zarr itself warns of some of these
            path = plain_store(tmp_path / "s.zarr", np.zeros((100, 2), dtype=dtype))
            with pytest.raises(UnsupportedDtype, match=r"'X'.*dtype") as caught:
                streamlr.open_dataset(path)
        assert isinstance(caught.value, TypeError)
        with pytest.raises(UnsupportedDtype, match="dtype"):
            streamlr.Dataset(np.zeros((100, 2), dtype=dtype))
        with pytest.raises(UnsupportedDtype, match="dtype"):
            streamlr.Dataset(da.zeros((100, 2), dtype=dtype))

    def test_objects(self):
        with pytest.raises(UnsupportedDtype, match=r"dtype object.*astype\(float\)"):
            streamlr.Dataset(np.array([["1", None]], dtype=object))

    def test_pickle_filter_runs_no_code(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        folder = tmp_path / "s.zarr"
        folder.mkdir()
        for filters in ([{"id": "pickle", "protocol": 5}], [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}]):
            for dtype in ("<f8", "|O"):
                document = {"zarr_format": 2, "shape": [10, 2], "chunks": [10, 2], "dtype": dtype, "order": "C", "fill_value": None}
                (folder / ".zarray").write_text(json.dumps({**document, "filters": filters, "compressor": None}))
                (folder / "0.0").write_bytes(pickle.dumps(Bomb()))
                with pytest.raises(StreamlrError) as caught:
                    streamlr.accumulate(streamlr.open_dataset(folder))
                assert caught.value.exit_status == 3
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("attribute", ["scale_factor", "add_offset"])
    def test_packed_integers(self, store, attribute):
        zarr.open_group(store, mode="r+")["y"].attrs[attribute] = 0.01
        with pytest.raises(DataError, match=f"'y'.*packed.*{attribute}.*unpack"):
            streamlr.open_dataset(store)

    def test_three_dimensions(self, tmp_path):
        array = zarr.create_array(str(tmp_path / "a"), data=np.zeros((3, 3, 3)))
        with pytest.raises(DataError, match="3 dimensions"):
            streamlr.Dataset(array)


class TestFillValues:
    """An absent chunk is not a chunk of NaN, and neither is a number unless the caller says so."""

    @pytest.mark.parametrize("fill", [np.nan, 0.0, 7.0])
    def test_absent_chunks(self, tmp_path, fill):
        x = np.random.default_rng(0).normal(size=(1000, 2))
        path = plain_store(tmp_path / "s.zarr", x, np.arange(1000.0), fill_value=fill)
        (path / "X/c/3/0").unlink()
        with fails(ChunkMissing, "array 'X'", "rows 300 to 399", "allow_missing_chunks=True"):
            streamlr.fit(streamlr.open_dataset(path, missing="drop"))
        lenient = {"allow_missing_chunks": True}
        if np.isnan(fill):
            with fails(NonFiniteValue, "row 300", "'x0'"):
                streamlr.fit(streamlr.open_dataset(path, **lenient))
            model = streamlr.fit(streamlr.open_dataset(path, missing="drop", **lenient))
            assert (model.n_rows, model.n_dropped) == (900, 100)
        else:
            x[300:400] = fill
            model = streamlr.fit(streamlr.open_dataset(path, **lenient))
            assert model.coef.tobytes() == streamlr.fit(streamlr.Dataset(x, np.arange(1000.0))).coef.tobytes()
        assert model.chunks_missing == 1

    def test_no_fill_value_is_zero(self, tmp_path):
        group = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=2)
        x = np.random.default_rng(0).normal(size=(300, 2))
        group.create_array("X", data=x, chunks=(100, 2), fill_value=None)
        group.create_array("y", data=np.arange(300.0))
        (tmp_path / "s.zarr/X/1.0").unlink()
        model = streamlr.fit(streamlr.open_dataset(tmp_path / "s.zarr", allow_missing_chunks=True))
        x[100:200] = 0
        assert model.coef.tobytes() == streamlr.fit(streamlr.Dataset(x, np.arange(300.0))).coef.tobytes()

    def test_honest_zeros_that_were_not_written(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(300, 2))
        x[100:200] = 0
        path = plain_store(tmp_path / "s.zarr", x, np.arange(300.0) + 1)
        with fails(ChunkMissing, "leaves out"):
            streamlr.fit(streamlr.open_dataset(path))
        assert streamlr.fit(streamlr.open_dataset(path, allow_missing_chunks=True)).chunks_missing == 1

    def test_allowing_is_not_the_default_on_any_store(self):
        group = zarr.open_group(MemoryStore(), mode="w")
        group.create_array("X", data=np.random.default_rng(0).normal(size=(300, 2)), chunks=(100, 2))
        group.create_array("y", shape=(300,), chunks=(100,), dtype="f8")
        with fails(ChunkMissing, "array 'y'"):
            streamlr.fit(streamlr.open_dataset(group))
        lazy = streamlr.Dataset(da.from_zarr(group["X"]), da.from_zarr(group["y"]))
        with fails(ChunkMissing, "array 'y'", "open_dataset"):
            streamlr.fit(lazy)


class TestSizes:
    """Chunks that do not fit, and chunks that claim less than they hold."""

    def test_chunk_larger_than_memory(self, tmp_path):
        array = zarr.create_array(str(tmp_path / "a"), shape=(10**7, 500), chunks=(10**7, 500), dtype="f8")
        with pytest.raises(MemoryLimitExceeded, match=r"\d+\.\d GB.*limit is 1\.0 GB.*smaller chunks") as caught:
            streamlr.accumulate(
                streamlr.Dataset(array, zarr.create_array(MemoryStore(), shape=(10**7,), dtype="f8")), memory_limit="1GB"
            )
        assert caught.value.exit_status == 5
        assert isinstance(caught.value, MemoryError)

    @pytest.mark.parametrize("codec", ["gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4"])
    def test_bomb(self, tmp_path, codec):
        """A few stored bytes that stand for eighty megabytes are refused, not unpacked."""
        group = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=2)
        compressor = numcodecs.get_codec({"id": codec})
        group.create_array("X", data=np.ones((100, 2)), chunks=(100, 2), compressors=compressor)
        group.create_array("y", data=np.arange(100.0))
        (tmp_path / "s.zarr/X/0.0").write_bytes(compressor.encode(bytes(80_000_000)))
        dataset = streamlr.open_dataset(tmp_path / "s.zarr")
        tracemalloc.start()
        try:
            with fails(ChunkCorrupt, "chunk 0.0", "array 'X'"):
                streamlr.fit(dataset)
            assert tracemalloc.get_traced_memory()[1] < 30_000_000
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("pack", [gzip.compress, lambda data: gzip.compress(data)[:-1], lambda data: zlib.compress(data)])
    def test_shorter_chunk(self, tmp_path, pack):
        array = zarr.create_array(str(tmp_path / "a"), data=np.ones((100, 2)), compressors=zarr.codecs.GzipCodec())
        (tmp_path / "a/c/0/0").write_bytes(pack(bytes(1592)))
        with fails(ChunkCorrupt, "chunk 0.0"):
            streamlr.accumulate(streamlr.Dataset(array, np.arange(100.0)))


class FaultyStore(WrapperStore):
    """Does something else the first times that it is asked for the n-th of the chunks, or parts of shards, that are read."""

    def __init__(self, store, at: int = -1, fault: str = "", times: int = 1) -> None:
        super().__init__(store)
        self.at, self.fault, self.times, self.asked = at, fault, times, Counter()

    async def get(self, key, prototype, byte_range=None):
        found = await self._store.get(key, prototype, byte_range)
        if "c/" not in key:
            return found
        self.asked[key, str(byte_range)] += 1
        number = list(self.asked).index((key, str(byte_range)))
        if number != self.at or self.asked[key, str(byte_range)] > self.times:
            return found
        if self.fault == "fail":
            raise OSError("the line is dead")
        if self.fault == "foreign":
            raise RuntimeError("403 from a client library")
        data = found.to_bytes()
        data = {"empty": b"", "half": data[: len(data) // 2], "short": data[:-1]}.get(self.fault)
        return None if data is None else prototype.buffer.from_bytes(data)


@pytest.fixture(scope="module", params=["plain", "sharded", "by zarr"])
def memory(request):
    x = np.random.default_rng(0).normal(size=(600, 3))
    y = x @ [1.0, 2.0, 3.0]
    group = zarr.open_group(MemoryStore(), mode="w")
    options = {"chunks": (100, 3), "compressors": None if request.param == "plain" else [ZstdCodec()]}
    if request.param == "sharded":
        options["shards"] = (300, 3)
    if request.param == "by zarr":
        options["compressors"] = [Crc32cCodec(), ZstdCodec()]
    group.create_array("X", data=x, **options)
    group.create_array("y", data=y, chunks=(150,), serializer=BytesCodec(endian="big"))
    return group.store, streamlr.fit(streamlr.Dataset(x, y)).coef.tobytes()


def fit_through(store: FaultyStore) -> bytes:
    return streamlr.fit(streamlr.open_dataset(zarr.open_group(store, mode="r+"))).coef.tobytes()


@pytest.mark.parametrize("fault", ["fail", "foreign", "gone", "empty", "half", "short"])
def test_every_reading_may_fail(memory, fault):
    store, expected = memory
    whole = FaultyStore(store)
    assert fit_through(whole) == expected
    assert len(whole.asked) >= 10
    assert set(whole.asked.values()) == {1}
    for at in range(len(whole.asked)):
        with fails((ChunkCorrupt, ChunkMissing), "array '"):
            fit_through(FaultyStore(store, at, fault, times=3))


@pytest.mark.parametrize("fault", ["fail", "foreign"])
def test_a_reading_that_fails_for_a_moment_is_repeated(memory, fault):
    store, expected = memory
    for at in range(10):
        assert fit_through(FaultyStore(store, at, fault, times=2)) == expected


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
class TestOutOfMemory:
    """Memory that runs out is no fault of the chunk: status 5, and not tried again."""

    def expect(self, path: Path) -> None:
        with pytest.raises(MemoryLimitExceeded, match=r"array 'X'.*\(1,600 bytes decoded\) did not fit.*smaller chunks") as caught:
            streamlr.fit(streamlr.open_dataset(path))
        assert caught.value.exit_status == 5
        with pytest.raises(MemoryLimitExceeded):
            verify(path)

    def store(self, path: Path, **options) -> Path:
        x = np.random.default_rng(0).normal(size=(300, 2))
        return plain_store(path / "s.zarr", x, np.arange(300.0), **options)

    def test_reading_a_file(self, tmp_path, monkeypatch, error):
        path = self.store(tmp_path)
        plain = Buffer.take

        def take(buffer, nbytes):
            if sys._getframe(1).f_globals["__name__"] == files_ahead.__name__:  # not for a tile
                raise error
            return plain(buffer, nbytes)

        monkeypatch.setattr(Buffer, "take", take)
        self.expect(path)

    def test_reading_from_a_store(self, memory, error):
        class Full(FaultyStore):
            async def get(self, key, prototype, byte_range=None):
                if "X/c/" in key:
                    self.asked[key, str(byte_range)] += 1
                    raise error
                return await super().get(key, prototype, byte_range)

        store = Full(memory[0])
        with dask.config.set(scheduler="sync"), pytest.raises(MemoryLimitExceeded, match=r"'X/c/0.*of array 'X' \(2,400 bytes"):
            fit_through(store)
        assert set(store.asked.values()) == {1}

    def test_decompressing(self, tmp_path, monkeypatch, error):
        path = self.store(tmp_path)

        def decompress(*arguments):
            raise error

        monkeypatch.setattr("streamlr.dataset.codecs._decompress", decompress)
        self.expect(path)

    def test_decoding_by_zarr(self, tmp_path, monkeypatch, error):
        group = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=2)
        group.create_array("X", data=np.ones((300, 2)), chunks=(100, 2), filters=[numcodecs.CRC32()], compressors=None)
        group.create_array("y", data=np.arange(300.0))

        def decode(*arguments, **options):
            raise error

        monkeypatch.setattr(numcodecs.CRC32, "decode", decode)
        self.expect(tmp_path / "s.zarr")


def test_memory_that_zstd_lacks_is_told_from_damage():
    with pytest.raises(MemoryLimitExceeded):
        check_memory(zstandard.ZstdError("zstd decompress error: Allocation error : not enough memory"), "chunk 0", 8)
    check_memory(zstandard.ZstdError("zstd decompress error: Data corruption detected"), "chunk 0", 8)
    check_memory(OSError(errno.EIO, "Input/output error"), "chunk 0", 8)


class TestGraphs:
    """Blocks of Dask arrays that are not what their graph promised."""

    @pytest.mark.parametrize("shape", [(1, 3), (99, 3), (101, 3), (100, 1), (100, 4), (100,), (3, 100)])
    def test_block_of_another_shape(self, shape):
        lying = da.zeros((500, 3), chunks=(100, 3)).map_blocks(lambda block: np.ones(shape), dtype="f8", chunks=((100,) * 5, (3,)))
        with pytest.raises(RowCountMismatch, match=r"'X' has the shape.*chunks"):
            streamlr.accumulate(streamlr.Dataset(lying, np.arange(500.0)))

    @pytest.mark.parametrize("dtype", ["complex128", "U3"])
    def test_block_of_another_dtype(self, dtype):
        lying = da.zeros((500, 3), chunks=(100, 3)).map_blocks(lambda block: np.zeros(block.shape, dtype), dtype="f8")
        with pytest.raises(UnsupportedDtype, match="'X'"):
            streamlr.accumulate(streamlr.Dataset(lying, np.arange(500.0)))

    def test_block_that_cannot_be_computed(self):
        def explode(block):
            raise KeyError("what a library raises")

        lazy = da.zeros((500, 3), chunks=(100, 3)).map_blocks(explode, dtype="f8", meta=np.zeros((0, 0)))
        with fails(DataError, "Dask array(s) X", "KeyError", "what a library raises"):
            streamlr.accumulate(streamlr.Dataset(lazy, np.arange(500.0)))


@pytest.mark.parametrize(
    ("dtype", "attributes", "refused"),
    [
        ("int32", {"_FillValue": -9999}, True),
        ("float64", {"missing_value": 1e20}, True),
        ("float64", {"_FillValue": "AAAAAAAA+H8="}, False),  # NaN, as xarray writes it
        ("float32", {"_FillValue": "AADAfw=="}, False),
        ("float64", {"_FillValue": "NaN"}, False),
        ("float64", {"_FillValue": "AAAAAAAA8D8="}, True),  # 1.0
    ],
)
def test_numbers_that_stand_for_missing_values_are_refused(tmp_path, dtype, attributes, refused):
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    group.create_array("X", data=np.ones((20, 2), dtype=dtype), attributes=attributes)
    if not refused:
        assert streamlr.open_dataset(group).n_rows == 20
        return
    with pytest.raises(DataError, match=r"'X' has the attribute .* stands for missing values"):
        streamlr.open_dataset(group)
