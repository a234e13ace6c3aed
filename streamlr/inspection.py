"""What a store holds, and whether every chunk of it is there and intact."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import zarr

from streamlr.dataset.blocks import format_bytes
from streamlr.dataset.codecs import chunk_codec
from streamlr.dataset.integrity import chunk_key, file_status, local_root, read_seal
from streamlr.dataset.opening import open_node
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import StreamlrError
from streamlr.passes.progress import Callback
from streamlr.passes.verify import Problem, verify_chunks

ALL_CHUNKS = 10_000  # up to so many, `inspect` looks at each; beyond, at a sample of SAMPLE
SAMPLE = 1_000


@dataclass(frozen=True, slots=True)
class ArrayFacts:
    """One array of a store.

    Attributes
    ----------
    name, shape, dtype, chunks, shards
        As zarr has them; `problem` says why an array cannot be used, if it cannot.
    n_stored : int
        Chunks (or shards) that the metadata promise.
    n_looked_at, n_missing : int
        How many of them were looked for, and how many of those are absent or empty.
    decoded_bytes : int
        Size of the array in memory.
    checksums : bool
        Whether each chunk carries a crc32c.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    n_stored: int
    n_looked_at: int
    n_missing: int
    decoded_bytes: int
    checksums: bool
    problem: str | None

    def __str__(self) -> str:
        looked = "all" if self.n_looked_at == self.n_stored else f"a sample of {self.n_looked_at:,}"
        shards = f" in shards {self.shards}" if self.shards else ""
        lines = [
            f"{self.name}: {self.shape} {self.dtype}, {format_bytes(self.decoded_bytes)} decoded, chunks {self.chunks}{shards}",
            f"  {self.n_stored:,} stored pieces, {looked} looked for, {self.n_missing:,} missing; "
            + ("each with a checksum" if self.checksums else "no checksums: an altered byte may go unseen"),
        ]
        return "\n".join(lines if self.problem is None else [*lines, f"  cannot be fitted: {self.problem}"])


def inspect_store(path: str | os.PathLike[str]) -> list[ArrayFacts]:
    """Describe every array of a store from its metadata and a look for its chunks; no chunk is read.

    Parameters
    ----------
    path : path
        A zarr array or group.

    Raises
    ------
    PathNotFound, UsageError, DataError
        As for `open_dataset`.
    """
    node = open_node(path)
    arrays = sorted(node.arrays()) if isinstance(node, zarr.Group) else [(node.basename or "X", node)]
    return [_facts(name, array) for name, array in arrays]


def verify(path: str | os.PathLike[str], *, progress: Callback | None = None) -> tuple[int, list[Problem]]:
    """Read every chunk of every array of a store, and return how many there are and what is wrong with which.

    Parameters
    ----------
    path : path
        A zarr array or group.
    progress : callable, optional
        Called with an `Event` at every chunk.

    Raises
    ------
    StoreIncomplete
        The store was never finished, or its manifest or metadata were altered.
    PathNotFound, UsageError, DataError
        As for `open_dataset`.
    """
    node = open_node(path)
    arrays = dict(sorted(node.arrays())) if isinstance(node, zarr.Group) else {node.basename or "X": node}
    sealed = read_seal(node) if isinstance(node, zarr.Group) else None
    rows = [ZarrRows(array, name, checksums=sealed.chunks.get(name) if sealed else None) for name, array in arrays.items()]
    return verify_chunks(rows, progress)


def _facts(name: str, array: zarr.Array[Any]) -> ArrayFacts:
    piece = array.shards or array.chunks
    grid = [-(-length // size) for length, size in zip(array.shape, piece, strict=True)]
    n_stored = prod(grid)
    root = local_root(array)
    chosen: list[int] = []
    if root is not None:
        generator = random.Random(0)
        chosen = list(range(n_stored)) if n_stored <= ALL_CHUNKS else [0, n_stored - 1]
        chosen += [generator.randrange(n_stored) for _ in range(SAMPLE - 2)] if n_stored > ALL_CHUNKS else []
    missing = 0
    if root is not None:
        for number in chosen:
            position = tuple(map(int, np.unravel_index(number, grid)))
            status = file_status(root / chunk_key(array, position), name)
            missing += status is None or status.st_size == 0
    problem, checksums = None, False
    try:
        codec = chunk_codec(ZarrRows(array, name).array)
        checksums = codec is not None and codec.has_checksum
    except StreamlrError as error:
        problem = str(error)
    decoded = prod(array.shape) * array.dtype.itemsize
    return ArrayFacts(
        name, array.shape, str(array.dtype), array.chunks, array.shards, n_stored, len(chosen), missing, decoded, checksums, problem
    )
