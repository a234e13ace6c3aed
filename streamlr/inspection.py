"""What a store holds, and whether every chunk of it is there and intact."""

from __future__ import annotations

import os
import random
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import zarr

from streamlr.api import plan
from streamlr.dataset.blocks import Plan, format_bytes
from streamlr.dataset.codecs import chunk_codec
from streamlr.dataset.integrity import Seal, chunk_key, file_status, local_root, read_seal
from streamlr.dataset.nodes import UNLISTED, arrays_of, is_listed, open_node
from streamlr.dataset.opening import open_dataset
from streamlr.dataset.remote import RemoteStore, absent, shown
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import ChunkCorrupt, DataError, StoreIncomplete, StreamlrError, UsageError
from streamlr.passes.memory import parse_bytes
from streamlr.passes.progress import Callback
from streamlr.passes.verify import Problem, verify_chunks

ALL_CHUNKS = 10_000  # up to so many, `inspect` looks at each; beyond, and at a URL, at a sample of SAMPLE
SAMPLE = 1_000


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """A store: its arrays, and what a fit would make of them.

    Attributes
    ----------
    arrays : list of ArrayFacts
        All that the store holds.
    plan : Plan or None
        Of a fit by the recommended solver; None where there can be none.
    no_plan : StreamlrError or None
        Why there is none.
    n_missing : int
        Chunks that a fit would look for and that are absent or empty; without a plan, those of every array.
    """

    arrays: list[ArrayFacts]
    plan: Plan | None
    no_plan: StreamlrError | None
    n_missing: int

    @property
    def exit_status(self) -> int:
        """What the command line returns: a store that does not say which arrays are the features is no failure."""
        if self.n_missing:
            return DataError.exit_status
        return 0 if self.no_plan is None or isinstance(self.no_plan, UsageError) else self.no_plan.exit_status

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        facts: dict[str, Any] = {"arrays": [asdict(array) for array in self.arrays], "n_missing": self.n_missing}
        if self.plan is None:
            return {**facts, "plan": None, "recommended_solver": None, "no_plan": str(self.no_plan)}
        return {**facts, "plan": asdict(self.plan), "recommended_solver": self.plan.solver}

    def __str__(self) -> str:
        lines = [str(array) for array in self.arrays]
        if self.plan is not None:
            lines += ["", f"recommended solver: {self.plan.solver}", str(self.plan)]
        return "\n".join(lines if self.no_plan is None else [*lines, "", f"no plan: {self.no_plan}"])


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found.

    Attributes
    ----------
    n_chunks : int
        Chunks read.
    problems : list of Problem
        Those that are missing or damaged.
    not_checked : dict of str to str
        Arrays that are not made of rows of numbers, and so were not read, with the reason.
    no_checksums : list of str
        Arrays whose chunks carry no checksum: bytes that were altered, or chunks that were swapped, may go unseen.
    """

    n_chunks: int
    problems: list[Problem]
    not_checked: dict[str, str]
    no_checksums: list[str]

    def __str__(self) -> str:
        lines = [f"{problem.kind}: {problem.message}" for problem in self.problems]
        lines += [f"not checked: {reason}" for reason in self.not_checked.values()]
        found = f"{self.n_chunks:,} chunks read, {len(self.problems):,} missing or damaged"
        if self.no_checksums:
            lines.append(f"no checksums in {', '.join(self.no_checksums)}: altered bytes and swapped chunks may go unseen")
            return "\n".join([*lines, found if self.problems else f"{found}: all there, and of the right size"])
        return "\n".join([*lines, found if self.problems else f"{found}: all intact"])


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
        looked = "all" if self.n_looked_at == self.n_stored else f"a sample of {self.n_looked_at:,}" if self.n_looked_at else "none"
        shards = f" in shards {self.shards}" if self.shards else ""
        lines = [
            f"{self.name}: {self.shape} {self.dtype}, {format_bytes(self.decoded_bytes)} decoded, chunks {self.chunks}{shards}",
            f"  {self.n_stored:,} stored pieces, {looked} looked for, {self.n_missing:,} missing; "
            + ("each with a checksum" if self.checksums else "no checksums: an altered byte may go unseen"),
        ]
        return "\n".join(lines if self.problem is None else [*lines, f"  cannot be fitted: {self.problem}"])


def inspect_store(path: str | os.PathLike[str], *, memory_limit: int | str | None = None) -> StoreFacts:
    """Describe a store from its metadata and a look for its chunks, and plan a fit; no chunk is read.

    Parameters
    ----------
    path : path
        A zarr array or group.
    memory_limit : int, str or None
        What the plan has to keep.

    Raises
    ------
    PathNotFound, UsageError, DataError
        Nothing there can be opened, or the memory limit is no size.
    """
    if memory_limit is not None:
        parse_bytes(memory_limit)  # a mistake of the caller, not of the store
    with open_node(path) as node:
        sealed = read_seal(node) if isinstance(node, zarr.Group) and not is_listed(node) else None
        found = _arrays(node, sealed)
    arrays = [_facts(name, array) for name, array in found.items()]
    read, planned, no_plan = {array.name for array in arrays}, None, None
    try:
        dataset = open_dataset(path)
        read = {rows.label for rows in dataset.arrays}
        planned = plan(dataset, memory_limit=memory_limit)
    except StreamlrError as error:
        no_plan = error
    return StoreFacts(arrays, planned, no_plan, sum(array.n_missing for array in arrays if array.name in read))


def verify(path: str | os.PathLike[str], *, memory_limit: int | str | None = None, progress: Callback | None = None) -> Verified:
    """Read every chunk of every array of numbers in a store.

    Parameters
    ----------
    path : path
        A zarr array or group.
    memory_limit : int, str or None
        Bytes, or a text such as "2GB"; None for most of what this process may use.
    progress : callable, optional
        Called with an `Event` at every row of chunks.

    Raises
    ------
    StoreIncomplete
        The store was never finished, or its manifest or metadata were altered.
    MemoryLimitExceeded
        A row of chunks does not fit.
    PathNotFound, UsageError, DataError
        As for `open_dataset`; also where no array at all can be checked.
    """
    with open_node(path) as node:
        sealed = read_seal(node) if isinstance(node, zarr.Group) else None
        found = _arrays(node, sealed)
    rows, refused = [], {}
    for name, array in found.items():
        try:
            rows.append(ZarrRows(array, name, checksums=sealed.chunks.get(name) if sealed else None))
        except StoreIncomplete:
            raise
        except DataError as error:
            refused[name] = error
    if not rows:
        raise next(iter(refused.values()), UsageError(f"{path} is a group without arrays; give the path of one that has some"))
    count, problems = verify_chunks(rows, progress, memory_limit)
    unchecked = [one.label for one in rows if (codec := chunk_codec(one.array)) is None or not codec.has_checksum]
    return Verified(count, problems, {name: str(error) for name, error in refused.items()}, unchecked)


def _arrays(node: zarr.Group | zarr.Array[Any], sealed: Seal | None) -> dict[str, zarr.Array[Any]]:
    if sealed is None and not is_listed(node):
        raise UsageError(f"not all arrays of {shown(node.store_path)} can be found: {UNLISTED}; or give the URL of one array")
    return arrays_of(node, sealed.chunks if sealed is not None else ())


def _facts(name: str, array: zarr.Array[Any]) -> ArrayFacts:
    piece = array.shards or array.chunks
    grid = [-(-length // size) for length, size in zip(array.shape, piece, strict=True)]
    n_stored = prod(grid)
    chosen: list[int] = []
    if local_root(array) is not None or isinstance(array.store, RemoteStore):
        generator, most = random.Random(0), ALL_CHUNKS if local_root(array) is not None else SAMPLE
        chosen = list(range(n_stored)) if n_stored <= most else [0, n_stored - 1]
        chosen += [generator.randrange(n_stored) for _ in range(SAMPLE - 2)] if n_stored > most else []
    missing = _n_missing(array, name, [tuple(map(int, np.unravel_index(number, grid))) for number in chosen])
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


def _n_missing(array: zarr.Array[Any], name: str, positions: list[tuple[int, ...]]) -> int:
    if isinstance(array.store, RemoteStore):
        return absent(array.store, [chunk_key(array, position) for position in positions])
    root, missing = local_root(array), 0
    if root is None:
        return 0
    for position in positions:
        try:
            status = file_status(root / chunk_key(array, position), name)
        except ChunkCorrupt:  # something else stands where the chunk should be
            status = None
        missing += status is None or status.st_size == 0
    return missing
