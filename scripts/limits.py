"""The contestants of bench.py that are limits of the machine: the same work by hand, or a part of it alone."""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from ours import Timed

THREADS = 2
PIECE_BYTES = 2**21  # of rows that are multiplied at once
ARRAYS = ("X", "y", "weights")
Following = Callable[[], int]


def decoded(path: Path, following: Following, names: tuple[str, ...] = ARRAYS) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Decode the chunks of a store, each into memory that is used again: number, and rows of those of the arrays that exist."""
    import numcodecs

    group = zarr.open_group(path, mode="r")
    arrays = {name: group[name] for name in names if name in group}
    buffers = {name: np.empty(array.chunks, dtype=array.dtype) for name, array in arrays.items()}
    compressors = arrays["X"].compressors
    kind = type(compressors[0]).__name__ if compressors else "none"
    codec = {"ZstdCodec": numcodecs.Zstd, "BloscCodec": numcodecs.Blosc, "GzipCodec": numcodecs.GZip, "none": lambda: None}[kind]()
    n, chunk = arrays["X"].shape[0], arrays["X"].chunks[0]
    stored = bytearray(max(buffer.nbytes + buffer.nbytes // 64 for buffer in buffers.values()) + 2**16)  # what does not compress
    while (number := following()) * chunk < n:
        for name, array in arrays.items():
            if codec is None:
                read_chunk(path / name / "c", array, number, memoryview(buffers[name]).cast("B"))
            else:
                codec.decode(read_chunk(path / name / "c", array, number, memoryview(stored)), out=buffers[name])
        yield number, [buffer[: n - number * chunk] for buffer in buffers.values()]


def read_chunk(folder: Path, array: zarr.Array[Any], number: int, room: memoryview) -> memoryview:
    """Read the stored bytes of a chunk into some room, out of its shard where there are shards."""
    tail = ("0",) * (array.ndim - 1)
    if array.shards is None:
        with folder.joinpath(str(number), *tail).open("rb", buffering=0) as file:
            return room[: file.readinto(room)]
    inner = array.shards[0] // array.chunks[0]
    with folder.joinpath(str(number // inner), *tail).open("rb", buffering=0) as file:
        file.seek(-(16 * inner + 4), 2)  # the index, and its checksum
        offset, length = np.frombuffer(file.read(16 * inner), dtype="<u8").reshape(-1, 2)[number % inner].tolist()
        file.seek(offset)
        return room[: file.readinto(room[:length])]


def on_threads(work: Callable[[Following], None]) -> None:
    """Run `work` on as many threads as there are cores, BLAS at one each; they share a counter of chunks."""
    from threadpoolctl import threadpool_limits

    numbers, lock = itertools.count(), threading.Lock()

    def following() -> int:
        with lock:
            return next(numbers)

    with threadpool_limits(1, user_api="blas"):
        threads = [threading.Thread(target=work, args=(following,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def hand_tuned(path: Path) -> Timed:
    """Decode, multiply in pieces that the cache holds, solve: no intercept, no check, no error that would be found."""
    group = zarr.open_group(path, mode="r")
    p, k = group["X"].shape[1], 1 if group["y"].ndim == 1 else group["y"].shape[1]
    total, lock = np.zeros((p, p + k)), threading.Lock()
    step = max(PIECE_BYTES // (8 * p), 4096)

    def work(following: Following) -> None:
        own = np.zeros((p, p + k))
        for _, (x, y, *weights) in decoded(path, following):
            for a in range(0, len(x), step):
                rows, target = x[a : a + step].astype(np.float64, copy=False), y[a : a + step].reshape(-1, k)
                for w in weights:
                    root = np.sqrt(w[a : a + step])[:, None]
                    rows, target = rows * root, target * root
                own[:, :p] += rows.T.dot(rows)  # `@` lets no other thread run where results are few
                own[:, p:] += rows.T.dot(target)
        with lock:
            total[...] += own

    def run() -> Any:
        on_threads(work)
        return np.linalg.solve(total[:, :p], total[:, p:])

    return run


def decode_alone(path: Path) -> Timed:
    def work(following: Following) -> None:
        for _ in decoded(path, following):
            pass

    def run() -> Any:
        on_threads(work)
        return 0.0

    return run


def decode_and_write(path: Path) -> Timed:
    """Read and decode X, and write an array like `predict`'s through zarr, of numbers that are ready."""
    from zarr.codecs import Crc32cCodec, ZstdCodec

    group = zarr.open_group(path, mode="r")
    X, targets = group["X"], group["y"].shape[1:]
    n, height = X.shape[0], (X.shards or X.chunks)[0]
    per_piece = height // X.chunks[0]
    ready = np.random.default_rng(0).normal(size=(min(height, n), *targets))
    folder = tempfile.TemporaryDirectory()  # removed when the process ends

    def run() -> Any:
        array = zarr.open_group(Path(folder.name) / "out.zarr", mode="w").create_array(
            "prediction",
            shape=(n, *targets),
            chunks=ready.shape,
            dtype="float64",
            compressors=[ZstdCodec(level=0), Crc32cCodec()],
            config={"write_empty_chunks": True},
        )

        def work(following: Following) -> None:
            for number, _ in decoded(path, following, names=("X",)):
                if number % per_piece == 0:
                    start = number * X.chunks[0]
                    array[start : start + height] = ready[: n - start]

        on_threads(work)
        return float(n)

    return run


def product_alone(path: Path) -> Timed:
    group = zarr.open_group(path, mode="r")
    (n, p), chunk = group["X"].shape, group["X"].chunks[0]
    step = min(max(PIECE_BYTES // (8 * p), 4096), n)
    rows = np.ascontiguousarray(group["X"][:step], dtype=np.float64)

    def work(following: Following) -> None:
        while following() < -(-n // step):
            rows.T.dot(rows)

    def run() -> Any:
        on_threads(work)
        return float(chunk)

    return run


def read_csv(path: Path) -> Timed:
    """Parse a table by Arrow, batch by batch, and keep nothing."""
    import pyarrow.csv

    def run() -> Any:
        with pyarrow.csv.open_csv(path) as reader:
            return sum(batch.num_rows for batch in reader)

    return run
