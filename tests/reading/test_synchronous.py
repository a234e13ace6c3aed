"""Stores that answer at once are read in the reader's own thread, with the bits and the checks of any other."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import streamlr
from streamlr.dataset.synchronous import answers_at_once
from streamlr.errors import ChunkMissing


class Asked(MemoryStore):
    """Counts how often it is asked for chunks, with and without the event loop."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.on_loop = self.at_once = 0

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        self.on_loop += "/c/" in key
        return await super().get(key, *arguments, **options)

    def get_sync(self, key: str, **options: Any) -> Any:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        self.at_once += "/c/" in key
        return super().get_sync(key, **options)


class OnlyGet(LocalStore):
    """Changes `get` alone: what it does must not be passed by."""

    async def get(self, *arguments: Any, **options: Any) -> Any:
        return await super().get(*arguments, **options)


def filled(store: Any, shards: tuple[int, ...] | None) -> zarr.Group:
    group = zarr.open_group(store, mode="w")
    generator = np.random.default_rng(7)
    X = generator.normal(size=(400, 3))
    group.create_array("X", data=X, chunks=(20, 3), shards=shards)
    group.create_array("y", data=X @ [1.0, 2.0, 3.0] + generator.normal(size=400), chunks=(50,))
    return group


@pytest.mark.parametrize("shards", [None, (100, 3)], ids=["chunks", "shards"])
def test_the_bits_are_those_of_a_store_behind_the_loop(shards: tuple[int, ...] | None) -> None:
    store = Asked()
    group = filled(store, shards)
    store.on_loop = 0
    at_once = streamlr.fit(streamlr.open_dataset(group))
    assert store.at_once >= (28 if shards is None else 12)  # those of y, and of X
    assert store.on_loop == 0
    behind = streamlr.fit(streamlr.open_dataset(zarr.open_group(WrapperStore(store), mode="r")))
    assert at_once.coef.tobytes() == behind.coef.tobytes()


def test_an_absent_chunk_is_named() -> None:
    store = Asked()
    group = filled(store, None)
    asyncio.run(store.delete("X/c/3/0"))
    with pytest.raises(ChunkMissing, match=r"chunk 3\.0 of array 'X' \(rows 60 to 79\)"):
        streamlr.fit(streamlr.open_dataset(group))


def test_a_subclass_that_changes_get_alone_is_asked_by_it(tmp_path: Any) -> None:
    assert answers_at_once(MemoryStore())
    assert answers_at_once(Asked())
    assert not answers_at_once(OnlyGet(tmp_path))
