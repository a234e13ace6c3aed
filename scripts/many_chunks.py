"""Plan a fit of a million chunks: `python scripts/many_chunks.py` prints one JSON object; with `--read` it reads them all too.

No disk has to hold them: every chunk of the store is the same one. What a chunk costs is told beside what its decoding costs, which
threads that do nothing else need for as many.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import numpy as np
import typer
import zarr
from limits import on_threads
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

FEATURES, ROWS = 100, 82  # of a chunk of 64 KB
TARGETS = 8192  # in a chunk of 64 KB


class ManyChunks(MemoryStore):
    """A read-only store of arrays that are chunked by rows, in which chunk 0 stands for all chunks."""

    def __init__(self, kept: dict[str, Any], chunks: int) -> None:
        super().__init__(kept, read_only=True)
        self.chunks = chunks

    def _kept(self, key: str) -> str:
        """Return the key under which is kept what is at `key`."""
        array, separator, place = key.partition("/c/")
        number, *others = place.split("/")
        if not separator or not number.isdecimal() or int(number) >= self.chunks:
            return key
        return "/".join([f"{array}/c/0", *others])

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        """Return what is at a key, or None."""
        return await super().get(self._kept(key), *arguments, **options)

    def get_sync(self, key: str, **options: Any) -> Any:
        """Return what is at a key, or None, without an event loop."""
        return super().get_sync(self._kept(key), **options)

    async def exists(self, key: str) -> bool:
        """Tell whether there is something at a key."""
        return await super().exists(self._kept(key))

    async def getsize(self, key: str) -> int:
        """Return how many bytes are at a key."""
        return await super().getsize(self._kept(key))

    async def list(self) -> AsyncIterator[str]:
        """Iterate over all keys."""
        async for key in super().list():
            array, separator, place = key.partition("/c/")
            _, *others = place.split("/")
            for number in range(self.chunks if separator else 1):
                yield "/".join([f"{array}/c/{number}", *others]) if separator else key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Iterate over the keys that start with a prefix."""
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Iterate over the names in a folder."""
        async for name in super().list_dir(prefix):
            for number in range(self.chunks if prefix.rstrip("/").endswith("/c") else 1):
                yield str(number) if name == "0" else name


def many_chunks_of(count: int) -> ManyChunks:
    """Return a store with arrays X and y of `count` chunks of 64 KB."""
    kept: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(kept), mode="w")
    generator = np.random.default_rng(0)
    for name, rows, width in (("X", ROWS, (FEATURES,)), ("y", TARGETS, ())):
        array = group.create_array(name, shape=(count * ROWS, *width), chunks=(rows, *width), dtype="float64")
        first = min(rows, count * ROWS)
        array[:first] = generator.normal(size=(first, *width))
    return ManyChunks(kept, count)


def decode_alone(store: ManyChunks, count: int) -> float:
    """Return how many seconds threads, one a core, need to decode as many chunks of X into memory that each uses again."""
    import numcodecs

    stored = sync(store.get("X/c/0/0", default_buffer_prototype())).to_bytes()

    def work(following: Callable[[], int]) -> None:
        codec, room = numcodecs.Zstd(), np.empty(ROWS * FEATURES)
        while following() < count:
            codec.decode(stored, out=room)

    began = time.perf_counter()
    on_threads(work)
    return time.perf_counter() - began


def main(
    chunks: Annotated[int, typer.Option(help="chunks of X, of 64 KB each")] = 1_000_000,
    read: Annotated[bool, typer.Option("--read", help="accumulate the moments of all rows, too")] = False,
) -> None:
    """Print how many seconds opening and planning take, and what is planned."""
    import streamlr

    store = many_chunks_of(chunks)
    opening, planning = streamlr.open_dataset, streamlr.plan  # imported before the clock starts
    began = time.perf_counter()
    dataset = opening(store)
    opened = time.perf_counter()
    plan = planning(dataset)
    planned = time.perf_counter()
    outcome: dict[str, Any] = {
        "chunks": chunks,
        "rows": dataset.n_rows,
        "open": opened - began,
        "plan": planned - opened,
        "spans": plan.n_spans,
        "tasks": plan.n_tasks,
        "peak planned": plan.peak_bytes,
    }
    if read:
        outcome["rows read"] = streamlr.accumulate(dataset).n
        outcome["read"] = time.perf_counter() - planned
        outcome["decode alone"] = decode_alone(store, chunks)
        outcome["read / decode alone"] = outcome["read"] / outcome["decode alone"]
    print(json.dumps(outcome))


if __name__ == "__main__":
    typer.run(main)
