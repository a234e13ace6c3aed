"""The same rows, stored and scheduled in many ways, give the same bits."""

from __future__ import annotations

import errno
import itertools
import mmap
import tempfile
from dataclasses import dataclass

import dask
import dask.array as da
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.abc.store import Store
from zarr.buffer import default_buffer_prototype
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.codecs import numcodecs as wrapped
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

import streamlr
from streamlr.aggregates.moments import MomentsOf
from streamlr.dataset import parts
from streamlr.dataset.blocks import Block, Span
from streamlr.dataset.codecs import ChunkCodec
from streamlr.dataset.tally import Tally
from streamlr.errors import ChunkCorrupt, MemoryLimitExceeded
from streamlr.passes.planning import plan_pass

WIDE = 300  # columns: tiles of 2,048 rows, and spans of whole tiles
pytestmark = pytest.mark.filterwarnings(
    "ignore:Numcodecs codecs are not in the Zarr version 3 specification:UserWarning",
)


def make_rows(n: int, p: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) * np.logspace(-2, 2, p) + np.linspace(-50, 1000, p)
    return x, x @ rng.normal(size=p) + rng.normal(size=n)


def results(dataset: streamlr.Dataset, x: np.ndarray) -> list[bytes]:
    """Every number that must not depend on the layout, as bytes."""
    moments = streamlr.accumulate(dataset)
    model = streamlr.solve(moments)
    fitted = streamlr.fit(dataset)
    cost = streamlr.evaluate(fitted, dataset)
    assert fitted.coef.tobytes() == model.coef.tobytes()
    numbers = [moments.mean, moments.scatter, fitted.coef, fitted.intercept, cost.mse, cost.mae, cost.r2, fitted.predict(x[:50])]
    return [np.asarray(number).tobytes() for number in numbers]


@pytest.fixture(scope="module")
def narrow():
    """20,000 rows of 15 columns: three tiles of 8,192 rows, cut anywhere."""
    x, y = make_rows(20_000, 15)
    return x, y, results(streamlr.Dataset(x, y), x)


@pytest.fixture(scope="module")
def wide():
    """7,000 rows of 300 columns: four tiles of 2,048 rows; spans of whole tiles."""
    x, y = make_rows(7_000, WIDE)
    return x, y, results(streamlr.Dataset(x, y), x)


def group_of(x, y, *, store=None, zarr_format=3, x_options=None, y_options=None):
    group = zarr.open_group(store or MemoryStore(), mode="w", zarr_format=zarr_format)
    for name, values, options in (("X", x, x_options), ("y", y, y_options)):
        options = {"chunks": (1000, *values.shape[1:]), **(options or {})}
        array = group.create_array(name, shape=values.shape, dtype=options.pop("dtype", values.dtype), **options)
        array[...] = values
    return group


def check(stored: tuple[np.ndarray, np.ndarray, list[bytes]], **layout) -> None:
    x, y, expected = stored
    assert results(streamlr.open_dataset(group_of(x, y, **layout)), x) == expected


CHUNKINGS = {
    "one chunk": ((20_000, 15), (20_000,)),
    "larger than the array": ((50_000, 20), (70_000,)),
    "last chunk partial": ((3_000, 15), (3_000,)),
    "odd": ((1_237, 15), (1_237,)),
    "X and y apart": ((1_000, 15), (700,)),
    "X and y far apart": ((997, 15), (1_009,)),
    "columns too": ((2_000, 4), (2_000,)),
    "columns too, one each": ((5_000, 1), (333,)),
    "tiles": ((16_384, 15), (16_384,)),
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
def test_chunks(narrow, chunks, zarr_format):
    check(narrow, zarr_format=zarr_format, x_options={"chunks": chunks[0]}, y_options={"chunks": chunks[1]})


@pytest.mark.parametrize("chunks", [((1_000, 300), (700,)), ((7_000, 300), (1,)), ((999, 77), (7_000,)), ((2_048, 300), (2_048,))])
def test_chunks_of_many_columns(wide, chunks):
    y_chunks = (100,) if chunks[1] == (1,) else chunks[1]
    check(wide, x_options={"chunks": chunks[0]}, y_options={"chunks": y_chunks})


def test_spans_of_whole_tiles():
    """Enough columns that open nodes would be large: spans are cut at powers of two of tiles."""
    p = 900
    x, y = make_rows(19_000, p)  # tiles of 8,192 rows
    expected = None
    for chunks in ((19_000, p), (1_400, p), (3_800, 450)):
        dataset = streamlr.open_dataset(group_of(x, y, x_options={"chunks": chunks, "compressors": None}))
        assert streamlr.plan(dataset).tile_rows == 8192
        cut = plan_pass(dataset, MomentsOf(dataset.feature_names, ("y",)), task="t", memory=None)[1]
        assert len(cut) > 1
        assert all(span.stop % 8192 == 0 for span in cut[:-1])
        found = results(dataset, x)
        expected = expected or found
        assert found == expected


def test_one_row_a_chunk():
    x, y = make_rows(150, 3)
    expected = results(streamlr.Dataset(x, y), x)
    check((x, y, expected), x_options={"chunks": (1, 3)}, y_options={"chunks": (1,)})
    check((x, y, expected), x_options={"chunks": (1, 1)}, y_options={"chunks": (150,)})


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("shards", [((4_000, 15), (500, 15)), ((20_000, 15), (1_000, 5)), ((3_000, 30), (1_500, 3))])
def test_shards(narrow, shards, location):
    x_codec = ShardingCodec(chunk_shape=shards[1], codecs=[BytesCodec(), ZstdCodec()], index_location=location)
    x, y, expected = narrow
    group = zarr.open_group(MemoryStore(), mode="w")
    array = zarr.create(
        store=group.store, path="X", shape=x.shape, chunks=shards[0], dtype="f8", codecs=[x_codec], zarr_format=3, fill_value=0.0
    )
    array[...] = x
    group.create_array("y", data=y, chunks=(700,), shards=(2_100,))
    assert results(streamlr.open_dataset(group), x) == expected


def test_shards_whose_inner_codecs_are_left_to_zarr(narrow):
    x, y, expected = narrow
    codec = ShardingCodec(chunk_shape=(500, 5), codecs=[TransposeCodec(order=(1, 0)), BytesCodec(), GzipCodec(), Crc32cCodec()])
    group = zarr.open_group(MemoryStore(), mode="w")
    array = zarr.create(store=group.store, path="X", shape=x.shape, chunks=(2_000, 15), dtype="f8", codecs=[codec], fill_value=0.0)
    array[...] = x
    group.create_array("y", data=y, chunks=(700,))
    assert results(streamlr.open_dataset(group), x) == expected


def test_an_index_without_checksum(narrow):
    x, y, expected = narrow
    codec = ShardingCodec(chunk_shape=(500, 15), index_codecs=[BytesCodec()])
    group = zarr.open_group(MemoryStore(), mode="w")
    array = zarr.create(store=group.store, path="X", shape=x.shape, chunks=(2_000, 15), dtype="f8", codecs=[codec], fill_value=0.0)
    array[...] = x
    group.create_array("y", data=y)
    assert results(streamlr.open_dataset(group), x) == expected


V3_CODECS = {
    "bytes": [],
    **{
        f"blosc {name} {shuffle}": [BloscCodec(cname=name, shuffle=shuffle)]
        for name in ("lz4", "lz4hc", "blosclz", "snappy", "zlib", "zstd")
        for shuffle in ("noshuffle", "shuffle", "bitshuffle")
    },
    "gzip": [GzipCodec(level=1)],
    "zstd": [ZstdCodec()],
    "zstd with checksum": [ZstdCodec(level=1, checksum=True)],
    "crc32c": [Crc32cCodec()],
    "zstd, crc32c": [ZstdCodec(), Crc32cCodec()],
    "crc32c, zstd": [Crc32cCodec(), ZstdCodec()],
    "blosc, zstd": [BloscCodec(), ZstdCodec()],
    "gzip, zstd, crc32c": [GzipCodec(), ZstdCodec(), Crc32cCodec()],
    "crc32c twice": [Crc32cCodec(), Crc32cCodec()],
}
WRAPPED = (
    "BZ2",
    "CRC32",
    "CRC32C",
    "LZ4",
    "LZMA",
    "Adler32",
    "Blosc",
    "Fletcher32",
    "GZip",
    "JenkinsLookup3",
    "Zlib",
    "Zstd",
    "Shuffle",
)


@pytest.mark.parametrize("codecs", V3_CODECS.values(), ids=V3_CODECS)
def test_codecs_of_v3(small, codecs):
    cname = getattr(codecs[0], "cname", None) if codecs else None
    if getattr(cname, "value", cname) == "snappy" and "snappy" not in numcodecs.blosc.list_compressors():
        pytest.skip("numcodecs is built without snappy")
    compressed = {"compressors": codecs or None}
    check(small, x_options={**compressed, "chunks": (1_500, 4)}, y_options={**compressed, "chunks": (1_500,)})


@pytest.mark.parametrize("name", WRAPPED)
def test_codecs_of_numcodecs_in_v3(small, name):
    codec = getattr(wrapped, name)(**({"elementsize": 8} if name == "Shuffle" else {}))
    check(small, x_options={"compressors": [codec], "chunks": (1_500, 4)}, y_options={"compressors": [codec, ZstdCodec()]})


@pytest.fixture(scope="module")
def small():
    x, y = make_rows(9_000, 7)
    x[:, 2] = np.round(x[:, 2])
    return x, y, results(streamlr.Dataset(x, y), x)


def test_array_codecs_of_v3(small):
    transposed = {"filters": [TransposeCodec(order=(1, 0))], "chunks": (1_300, 4)}
    check(small, x_options=transposed)
    check(small, x_options={**transposed, "compressors": [ZstdCodec(), Crc32cCodec()]})
    check(small, x_options={"serializer": BytesCodec(endian="big"), "chunks": (1_300, 7)}, y_options={"compressors": None})


def test_differences_of_whole_numbers(small):
    """The codec delta loses nothing where differences are exact."""
    whole = np.round(small[0] * 1000), np.round(small[1])
    whole = (*whole, results(streamlr.Dataset(*whole), whole[0]))
    check(whole, x_options={"filters": [wrapped.Delta(dtype="<f8")]})
    check(whole, zarr_format=2, x_options={"filters": [numcodecs.Delta(dtype="<f8")], "compressors": numcodecs.LZ4()})


@pytest.mark.skipif(not hasattr(numcodecs, "PCodec"), reason="pcodec is not installed")
def test_pcodec_of_v3(small):
    check(small, x_options={"serializer": wrapped.PCodec(), "compressors": None})


@pytest.mark.skipif(not hasattr(numcodecs, "ZFPY"), reason="zfpy is not installed")
def test_zfpy_of_v3(small, tmp_path):
    """Through numcodecs zfpy only rounds (its reversible mode cannot be chosen), so what is stored is what counts."""
    x, y, _ = small
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    stored = group.create_array(
        "X", shape=x.shape, chunks=(1_300, 7), dtype="f8", serializer=wrapped.ZFPY(mode=4, tolerance=1e-3), compressors=None
    )
    stored[:] = x
    group.create_array("y", data=y, chunks=(700,))
    found, expected = streamlr.fit(streamlr.open_dataset(group)), streamlr.fit(streamlr.Dataset(stored[:], y))
    assert found.coef.tobytes() == expected.coef.tobytes()
    assert found.intercept == expected.intercept


V2_COMPRESSORS = {
    "none": None,
    **{
        f"blosc {name} {shuffle}": numcodecs.Blosc(cname=name, shuffle=shuffle)
        for name, shuffle in itertools.product(numcodecs.blosc.list_compressors(), (0, 1, 2))
    },
    "blosc without compression": numcodecs.Blosc(clevel=0),
    "zstd": numcodecs.Zstd(),
    "zstd with checksum": numcodecs.Zstd(checksum=True),
    "lz4": numcodecs.LZ4(),
    "gzip": numcodecs.GZip(level=1),
    "zlib": numcodecs.Zlib(level=1),
    "bz2": numcodecs.BZ2(level=1),
    "lzma": numcodecs.LZMA(preset=0),
    "lzma raw": numcodecs.LZMA(format=3, filters=[{"id": 0x21, "preset": 0}]),
}
V2_FILTERS = {
    "shuffle": [numcodecs.Shuffle(elementsize=8)],
    "crc32": [numcodecs.CRC32()],
    "crc32c": [numcodecs.CRC32C()],
    "adler32": [numcodecs.Adler32()],
    "fletcher32": [numcodecs.Fletcher32()],
    "jenkins": [numcodecs.JenkinsLookup3()],
    "shuffle, crc32": [numcodecs.Shuffle(elementsize=8), numcodecs.CRC32()],
    "zlib": [numcodecs.Zlib()],
}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressor", V2_COMPRESSORS.values(), ids=V2_COMPRESSORS)
def test_compressors_of_v2(small, compressor, order):
    check(small, zarr_format=2, x_options={"compressors": compressor, "order": order, "chunks": (1_500, 4)})


@pytest.mark.parametrize("filters", V2_FILTERS.values(), ids=V2_FILTERS)
def test_filters_of_v2(small, filters):
    check(small, zarr_format=2, x_options={"filters": filters, "chunks": (1_500, 4)}, y_options={"filters": filters})


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_byte_order(small, zarr_format):
    options = {"dtype": ">f8"} if zarr_format == 2 else {"serializer": BytesCodec(endian="big")}
    check(small, zarr_format=zarr_format, x_options=options, y_options=options)


def test_slash_between_chunk_numbers_of_v2(small):
    from zarr.core.chunk_key_encodings import V2ChunkKeyEncoding

    check(small, zarr_format=2, x_options={"chunk_key_encoding": V2ChunkKeyEncoding(separator="/"), "chunks": (1_500, 4)})


def test_chunks_named_as_somebody_likes(small):
    """zarr takes encodings of chunk keys that it did not come with."""
    encodings = pytest.importorskip("zarr.core.chunk_key_encodings")
    if not hasattr(zarr.registry, "register_chunk_key_encoding"):
        pytest.skip("this zarr takes no encoding of chunk keys but its own")

    @dataclass(frozen=True)
    class Backwards(encodings.ChunkKeyEncoding):
        name = "tests.backwards"

        def to_dict(self):
            return {"name": self.name, "configuration": {}}

        def encode_chunk_key(self, chunk_coords):
            return "-".join(str(number)[::-1] for number in reversed(chunk_coords)) + "-chunk"

    zarr.registry.register_chunk_key_encoding(Backwards.name, Backwards)
    check(small, x_options={"chunk_key_encoding": Backwards(), "chunks": (100, 2)})


def test_chunks_within_a_tile_are_decoded_where_their_rows_are_wanted(small, monkeypatch):
    x, y, _ = small
    places = []
    decode = ChunkCodec.decode

    def note(codec, stored, out, *rest):
        places.append(out)
        return decode(codec, stored, out, *rest)

    monkeypatch.setattr(ChunkCodec, "decode", note)
    dataset = streamlr.open_dataset(group_of(x, y, x_options={"chunks": (100, x.shape[1])}, y_options={"chunks": (len(y),)}))
    for block in dataset.reader().blocks(Span(0, dataset.n_rows), lambda tally: None):
        within = sum(np.shares_memory(place, block.x) for place in places)
        whole = block.stop // 100 - -(-block.start // 100)
        assert within == whole >= 2
        assert (block.x == x[block.start : block.stop]).all()
        places.clear()


def test_columns_as_separate_arrays(narrow, tmp_path):
    x, y, expected = narrow
    group = zarr.open_group(tmp_path / "columns.zarr", mode="w")
    for j in range(x.shape[1]):
        group.create_array(f"c{j:02}", data=x[:, j], chunks=(500 + 100 * j,))
    group.create_array("y", data=y, chunks=(700,))
    dataset = streamlr.open_dataset(tmp_path / "columns.zarr", features=[f"c{j:02}" for j in range(15)], target="y")
    assert results(dataset, x) == expected


def test_target_and_features_as_columns_of_one_array(narrow):
    x, y, expected = narrow
    table = np.column_stack([x[:, :5], y, x[:, 5:]])
    names = [f"a{j}" for j in range(5)] + ["price"] + [f"a{j}" for j in range(5, 15)]
    group = zarr.open_group(MemoryStore(), mode="w")
    group.create_array("table", data=table, chunks=(900, 4), attributes={"columns": names})
    assert results(streamlr.open_dataset(group, target="price"), x) == expected
    chosen = [name for name in names if name != "price"]
    assert results(streamlr.open_dataset(group, target="price", features=chosen), x) == expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16", "uint8", "bool", "int64", "uint32", ">i4"])
def test_other_dtypes_equal_their_float64_copy(dtype):
    rng = np.random.default_rng(3)
    x = (rng.integers(0, 2, size=(20_000, 9)) if dtype == "bool" else rng.integers(0, 200, size=(20_000, 9))).astype(dtype)
    y = x.astype(float) @ rng.normal(size=9) + rng.normal(size=20_000)
    copy = x.astype(np.float64)
    expected = results(streamlr.Dataset(copy, y), copy)
    assert results(streamlr.Dataset(x, y), copy) == expected
    assert results(streamlr.Dataset(da.from_array(x, chunks=(777, 4)), y), copy) == expected
    for zarr_format in (2, 3):
        plain = x.astype(x.dtype.newbyteorder("=")) if zarr_format == 3 else x
        group = group_of(plain, y, zarr_format=zarr_format, x_options={"chunks": (900, 9)})
        assert results(streamlr.open_dataset(group), copy) == expected


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_other_dtypes_of_many_columns(dtype):
    """Their cost is made of them as they are stored: to the last bit it is that of the dtype, whatever the layout."""
    p = 12
    rng = np.random.default_rng(3)
    x = rng.integers(-200, 200, size=(20_000, p)).astype(dtype)
    y = x.astype(float) @ rng.normal(size=p) + rng.normal(size=20_000)
    copy, expected = x.astype(np.float64), results(streamlr.Dataset(x, y), x)
    of_copy = streamlr.evaluate(streamlr.fit(streamlr.Dataset(copy, y)), streamlr.Dataset(copy, y))
    cost = streamlr.evaluate(streamlr.fit(streamlr.Dataset(x, y)), streamlr.Dataset(x, y))
    assert (cost.mse, cost.mae) == (pytest.approx(of_copy.mse, rel=1e-13), pytest.approx(of_copy.mae, rel=1e-13))
    assert results(streamlr.Dataset(np.asfortranarray(x), y), x) == expected
    for chunks in ((900, p), (20_000, 5), (8_192, p), (30_000, p)):
        for options in ({}, {"compressors": None}):
            group = group_of(x, y, x_options={"chunks": chunks, **options})
            assert results(streamlr.open_dataset(group), x) == expected
    of_dask = results(streamlr.Dataset(copy, y), copy)  # whose blocks need not be of the dtype that they should be
    lying = da.from_array(x, chunks=(777, 4)).map_blocks(lambda block: block.astype(np.float64), dtype=dtype)
    for array in (da.from_array(x, chunks=(777, 4)), da.from_array(x, chunks=(20_000, p)), lying):
        assert results(streamlr.Dataset(array, y), copy) == of_dask


NUMPY_LAYOUTS = {
    "F": np.asfortranarray,
    "rows of a larger array": lambda x: np.repeat(x, 2, axis=0)[::2],
    "columns of a larger array": lambda x: np.repeat(x, 3, axis=1)[:, ::3],
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "big-endian": lambda x: x.astype(">f8"),
    "read-only": lambda x: np.frombuffer(x.tobytes()).reshape(x.shape),
}


@pytest.mark.parametrize("layout", NUMPY_LAYOUTS.values(), ids=NUMPY_LAYOUTS)
def test_numpy_arrays(narrow, layout):
    x, y, expected = narrow
    assert results(streamlr.Dataset(layout(x), y[:, None]), x) == expected
    model = streamlr.fit(streamlr.Dataset(layout(x), y))
    assert model.predict(layout(x)).tobytes() == model.predict(x).tobytes()


DASK_CHUNKS = [(20_000, 15), (1_000, 15), (999, 4), (((5_000, 1, 0, 14_999), (1, 14))), (8_192, -1), (((100,) * 200), 15)]


@pytest.mark.parametrize("chunks", DASK_CHUNKS, ids=lambda chunks: str(chunks)[:40])
def test_dask_arrays(narrow, chunks):
    x, y, expected = narrow
    dataset = streamlr.Dataset(da.from_array(x, chunks=chunks), da.from_array(y, chunks=(3_000,)))
    assert results(dataset, x) == expected


def test_dask_beside_numpy_and_zarr(narrow):
    x, y, expected = narrow
    lazy = da.from_array(x, chunks=(1_100, 8))
    stored = zarr.open_group(MemoryStore(), mode="w").create_array("y", data=y, chunks=(450,))
    assert results(streamlr.Dataset(lazy, y), x) == expected
    assert results(streamlr.Dataset(lazy, stored), x) == expected
    assert results(streamlr.Dataset(x, da.from_array(y, chunks=123)), x) == expected


def test_dask_from_zarr(narrow, tmp_path):
    x, y, expected = narrow
    group_of(x, y, store=str(tmp_path / "s.zarr"))
    arrays = [da.from_zarr(str(tmp_path / "s.zarr"), component=name) for name in ("X", "y")]
    assert results(streamlr.Dataset(*arrays), x) == expected
    assert results(streamlr.Dataset(2 * arrays[0] / 2, arrays[1].rechunk(777)), x) == expected


@pytest.mark.parametrize(
    "settings",
    [{"num_workers": 1}, {"num_workers": 2}, {"num_workers": 7}, {"scheduler": "synchronous"}, {"scheduler": "threads"}],
    ids=str,
)
def test_schedulers(wide, settings):
    x, y, expected = wide
    with dask.config.set(settings):
        check(wide, x_options={"chunks": (300, 300)})
        assert results(streamlr.Dataset(da.from_array(x, chunks=(900, 100)), y), x) == expected


def test_processes(narrow, tmp_path):
    x, y, expected = narrow
    group_of(x, y, store=str(tmp_path / "s.zarr"))
    dataset = streamlr.open_dataset(tmp_path / "s.zarr")
    with dask.config.set(scheduler="processes", num_workers=2):
        moments = streamlr.accumulate(dataset)
        model = streamlr.solve(moments)
        streamlr.predict(model, dataset, tmp_path / "out.zarr")
    assert [moments.mean.tobytes(), moments.scatter.tobytes(), model.coef.tobytes()] == expected[:3]
    assert zarr.open_group(tmp_path / "out.zarr", mode="r")["prediction"][:].tobytes() == model.predict(x).tobytes()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_layouts(small, data):
    x, y, expected = small
    draw = data.draw
    options = {}
    for name, shape in (("X", x.shape), ("y", y.shape)):
        chunks = tuple(draw(st.integers(max(size // 40, 1), size + 10)) for size in shape)
        shards = None
        if draw(st.booleans()):
            shards = tuple(size * draw(st.integers(1, 4)) for size in chunks)
        compressors = draw(st.sampled_from([None, [ZstdCodec()], [BloscCodec()], [GzipCodec(level=1), Crc32cCodec()]]))
        options[name] = {"chunks": chunks, "shards": shards, "compressors": compressors}
    dataset = streamlr.open_dataset(group_of(x, y, x_options=options["X"], y_options=options["y"]))
    with dask.config.set(num_workers=draw(st.integers(1, 4))):
        assert results(dataset, x) == expected


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 8_999), max_size=12), columns=st.sets(st.integers(1, 6)))
def test_random_dask_chunks(small, cuts, columns):
    x, y, expected = small
    chunks = tuple(tuple(np.diff([0, *sorted(edges), end]).tolist()) for edges, end in ((cuts, 9_000), (columns, 7)))
    assert results(streamlr.Dataset(da.from_array(x, chunks=chunks), y), x) == expected


class TestTilesOfSeveralChunks:
    """Rows that begin in one chunk and end in another are used where those were decoded, each behind the one before it."""

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_any_tiles_of_any_chunks(self, data):
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            for name in ("PART_BYTES", "LARGE_BYTES"):
                patch.setattr(parts, name, data.draw(st.sampled_from([0, getattr(parts, name)])))
            self.read(data, data.draw(st.sampled_from([MemoryStore(), LocalStore(folder)])))

    def read(self, data: st.DataObject, store: Store) -> None:
        n, height, tile = (data.draw(st.integers(1, most)) for most in (150, 60, 60))
        dtype = data.draw(st.sampled_from(["f8", "f4", ">f4", ">f8", "i2"]))
        x, y = np.arange(3 * n).reshape(n, 3).astype(dtype), np.arange(1.0, n + 1)
        as_stored = data.draw(st.booleans())
        compressors = data.draw(st.sampled_from([None, [ZstdCodec()], [BloscCodec()], [GzipCodec(level=1), Crc32cCodec()]]))
        options = {"chunks": (height, 3), "compressors": compressors, "fill_value": -1.0}
        group = group_of(x, y, store=store, x_options=options, y_options={"chunks": (height,)})
        absent = data.draw(st.sets(st.integers(0, (n - 1) // height)))
        for chunk in absent:
            sync(group.store.delete(f"X/c/{chunk}/0"))
            x[chunk * height : (chunk + 1) * height] = -1.0
        reader = streamlr.open_dataset(group, allow_missing_chunks=True).reader()
        found, edges = [], sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))})
        tally = Tally()

        def note(some: Tally) -> None:
            nonlocal tally
            tally = tally + some

        for start, stop in itertools.pairwise(edges):
            for block in reader.blocks(Span(start, stop), note, tile, as_stored=as_stored):
                assert block.x.dtype == (np.float64 if not as_stored or x.itemsize == 8 else x.dtype.newbyteorder("="))
                np.testing.assert_array_equal(block.x, x[block.start : block.stop])
                np.testing.assert_array_equal(block.y[:, 0], y[block.start : block.stop])
                assert block.x.flags.c_contiguous
                found.append((block.start, block.stop))
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
        assert tally.chunks_missing == len(absent)
        start, stop = sorted(data.draw(st.integers(0, n)) for _ in range(2))
        kept = reader.fill(Span(start, stop), note, Block(0, n, np.empty((n, 3)), np.empty((n, 1))))
        np.testing.assert_array_equal(kept.x, x[start:stop])
        np.testing.assert_array_equal(kept.y[:, 0], y[start:stop])

    @pytest.mark.parametrize("height", [7, 40, 100])
    @pytest.mark.parametrize("compressors", [None, [ZstdCodec()]], ids=["none", "zstd"])
    def test_chunks_are_decoded_into_one_piece_of_memory_and_nothing_but_what_is_left_is_moved(self, height, compressors):
        x, y = np.random.default_rng(0).normal(size=(300, 5)), np.ones(300)
        group = group_of(x, y, x_options={"chunks": (height, 5), "compressors": compressors}, y_options={"chunks": (100,)})
        reader = streamlr.open_dataset(group).reader()
        memory, moved, before = set(), 0, None
        for block in reader.blocks(Span(0, 300), lambda tally: None, 64):
            first = block.x.__array_interface__["data"][0] - 40 * block.start  # where row 0 would be
            owner = block.x
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            memory.add((owner.__array_interface__["data"][0], owner.nbytes))
            if before not in (None, first):
                moved += -block.start % height  # rows that were decoded with the block before it
            before = first
        ((_, nbytes),) = memory
        assert 40 * (64 + height) <= nbytes <= 40 * (64 + height) * 1.04
        assert moved < 300 * min(height, 64) / 64  # less than half a chunk for each tile

    def test_rows_that_there_is_no_memory_for_are_read_anew_later(self, monkeypatch):
        x, y = np.random.default_rng(0).normal(size=(200, 5)), np.ones(200)
        group = group_of(x, y, x_options={"chunks": (50, 5), "compressors": [ZstdCodec()]}, y_options={"chunks": (50,)})
        reader = streamlr.open_dataset(group).reader()
        list(reader.blocks(Span(0, 50), lambda tally: None, 50))

        def refuse(*args, **kwargs):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        for _ in range(2):
            with monkeypatch.context() as short:
                short.setattr(mmap, "mmap", refuse)
                with pytest.raises(MemoryLimitExceeded, match=r"chunk .* of array 'X'"):
                    list(reader.blocks(Span(30, 200), lambda tally: None, 200))
        (block,) = reader.blocks(Span(30, 200), lambda tally: None, 200)
        np.testing.assert_array_equal(block.x, x[30:])

    def test_a_second_chunk_that_is_damaged_leaves_the_first(self):
        x, y = np.random.default_rng(0).normal(size=(200, 5)), np.ones(200)
        group = group_of(x, y, x_options={"chunks": (100, 5), "compressors": [ZstdCodec(checksum=True)]})
        stored = bytearray(sync(group.store.get("X/c/1/0", default_buffer_prototype())).to_bytes())
        stored[-1] ^= 1
        sync(group.store.set("X/c/1/0", default_buffer_prototype().buffer.from_bytes(bytes(stored))))
        reader = streamlr.open_dataset(group).reader()
        for _ in range(2):
            with pytest.raises(ChunkCorrupt, match=r"chunk 1.0 of array 'X' \(rows 100 to 199\)"):
                list(reader.blocks(Span(0, 200), lambda tally: None, 64))
            for block in reader.blocks(Span(0, 100), lambda tally: None, 64):
                np.testing.assert_array_equal(block.x, x[block.start : block.stop])
