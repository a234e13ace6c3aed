"""Completeness, checksums, manifest and fingerprint: how a store proves that it holds what was written.

A store of ours carries crc32c at the end of every chunk. Its manifest repeats that checksum for every chunk *position*, so a
chunk that is intact but stands in the wrong place is found as well, at the price of comparing four bytes.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import zarr
from zarr.buffer import default_buffer_prototype
from zarr.codecs import Crc32cCodec
from zarr.core.sync import sync  # stores are bound to zarr's own event loop, and this is the way in
from zarr.storage import FsspecStore, LocalStore

from streamlr.dataset.nodes import arrays_of
from streamlr.dataset.remote import shown
from streamlr.errors import ChunkCorrupt, ChunkMissing, StoreChanged, StoreIncomplete, StoreUnreachable
from streamlr.files import check_open_files, digest

ATTRIBUTE = "streamlr"
FORMAT = "streamlr rows"
VERSION = 1
CHECKSUM_BYTES = 4
LOOKING = 8  # threads that look at files
BATCH = 500  # files that one of them looks at before it hands over
WAITING = 5e-5  # seconds for a file: ten times what it takes where nothing waits for a disk
Batch = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Seal:
    """What a store of ours says of itself: names, coding of categories, and the checksum of every chunk.

    Attributes
    ----------
    features, targets : tuple of str
        Names of the columns of X and of y.
    weights : str or None
        Name of the array of weights.
    chunks : mapping of str to bytes
        For each array, four bytes for each of its chunks, in C order: the crc32c that the chunk ends with.
    coding : mapping
        How tables were turned into columns (formula, levels); empty where no table was.
    """

    features: tuple[str, ...]
    targets: tuple[str, ...]
    weights: str | None
    chunks: Mapping[str, bytes]
    coding: Mapping[str, Any]


def seal(
    path: str | os.PathLike[str], *, features: list[str], targets: list[str], coding: Mapping[str, Any], counts: Mapping[str, Any]
) -> None:
    """Write the manifest and the success marker of a finished store: the last thing that its writer does.

    Parameters
    ----------
    path : path
        A zarr v3 group with `X` and `y` and perhaps `weights`, every chunk written and ended by crc32c.
    features, targets : list of str
        Names of the columns of `X` and of `y`.
    coding, counts : mapping
        JSON values to keep: how tables were coded, and how many rows were read and dropped.
    """
    group = zarr.open_group(str(path), mode="r+")
    arrays = dict(sorted(group.arrays()))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "features": features,
        "targets": targets,
        "weights": "weights" if "weights" in arrays else None,
        "metadata": {name: _metadata_digest(array) for name, array in arrays.items()},
        "chunks": {name: b"".join(_stored_checksums(array)).hex() for name, array in arrays.items()},
        "coding": dict(coding),
        "counts": dict(counts),
    }
    attributes: dict[str, Any] = {"feature_names": features, "target_names": targets}
    attributes[ATTRIBUTE] = {**content, "digest": digest(content), "complete": True}
    group.attrs.update(attributes)


def read_seal(group: zarr.Group) -> Seal | None:
    """Return what the group's seal says, or None for a store that others wrote.

    Raises
    ------
    StoreIncomplete
        The store is ours but was never finished, or it was altered after it was sealed.
    """
    stated = group.attrs.asdict().get(ATTRIBUTE)
    if stated is None:
        return None
    where = f"the store {shown(group.store_path)}"
    if not isinstance(stated, dict) or not stated.get("complete"):
        raise StoreIncomplete(f"{where} was never finished: its writer was interrupted; delete it and write it again")
    content = {key: value for key, value in stated.items() if key not in ("digest", "complete")}
    if content.get("format") != FORMAT or not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise StoreIncomplete(f"{where} has format version {content.get('version')}; this release reads up to {VERSION}")
    if stated.get("digest") != digest(content):
        raise StoreIncomplete(f"the manifest of {where} was altered after it was written; write the store again")
    arrays = arrays_of(group, content["metadata"])
    for name, expected in content["metadata"].items():
        if name not in arrays:
            raise StoreIncomplete(f"{where} has lost its array {name!r}; write the store again")
        if digest(_document(arrays[name])) != expected:
            raise StoreIncomplete(
                f"the metadata of array {name!r} in {where} (shape, dtype, chunks or codecs) were altered after it was written; "
                "restore its zarr.json or write the store again"
            )
    return Seal(
        tuple(content["features"]),
        tuple(content["targets"]),
        content["weights"],
        {name: bytes.fromhex(text) for name, text in content["chunks"].items()},
        content["coding"],
    )


def chunk_positions(array: zarr.Array[Any]) -> Iterator[tuple[int, ...]]:
    """Iterate, in C order, over the positions of the pieces that the store holds: chunks, or shards where there are any."""
    piece = array.shards or array.chunks
    grid = [range(-(-length // size)) for length, size in zip(array.shape, piece, strict=True)]
    for first in grid[0]:  # one range by itself, since `product` makes tuples of all of them before it begins
        for others in itertools.product(*grid[1:]):
            yield (first, *others)


def chunk_key(array: zarr.Array[Any], position: tuple[int, ...]) -> str:
    """Return the key, within the store, of the chunk or shard at `position`."""
    return chunk_keys(array)(position)


def chunk_keys(array: zarr.Array[Any]) -> Callable[[tuple[int, ...]], str]:
    """Return the function from position to key: for many chunks, since zarr goes a long way for each."""
    encode, prefix = array.metadata.encode_chunk_key, f"{array.path}/" if array.path else ""
    first, probe = encode((0,) * array.ndim), tuple(range(10, 10 + array.ndim))  # c/0/0, or c.0.0, 0.0, 0/0
    head, join = first[: 1 - 2 * array.ndim], first[-2:-1].join
    if encode(probe) != head + join(map(str, probe)):  # an encoding of somebody's own
        return lambda position: prefix + encode(position)
    head = prefix + head
    return lambda position: head + join(map(str, position))


def describe_chunk(array: zarr.Array[Any], label: str, position: tuple[int, ...], *, shard: bool = False) -> str:
    """Name a chunk, or a shard, and the rows that it holds."""
    height = (array.shards if shard and array.shards else array.chunks)[0]
    first = position[0] * height
    rows = f"rows {first:,} to {min(first + height, array.shape[0]) - 1:,}"
    return f"{'shard' if shard else 'chunk'} {'.'.join(map(str, position))} of array {label!r} ({rows})"


def local_root(array: zarr.Array[Any]) -> Path | None:
    """Return the folder of the store of `array` when it is one on a local disk, else None."""
    store = array.store
    while hasattr(store, "_store"):  # a zarr.storage.WrapperStore, which documents this attribute
        store = store._store
    if isinstance(store, LocalStore):
        return Path(store.root)
    if isinstance(store, FsspecStore) and "file" in (store.fs.protocol, *store.fs.protocol):  # what da.from_zarr(path) makes
        return Path(store.path)
    return None


def file_status(path: str | Path, label: str) -> os.stat_result | None:
    """Return the status of a chunk's file, None where there is none.

    Raises
    ------
    ChunkCorrupt
        Something is there, or may be, but it is no file that can be read: that is not the same as an absent chunk.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ChunkCorrupt(f"{path} of array {label!r} cannot be read: {error}; check disk and permissions") from error
    if stat.S_ISDIR(status.st_mode):
        raise ChunkCorrupt(f"{path} of array {label!r} cannot be read: it is a folder; restore the chunk from its source")
    return status


def file_statuses(array: zarr.Array[Any], label: str, root: Path) -> Iterator[tuple[Batch, list[os.stat_result | None]]]:
    """Yield positions and the statuses of their files (None where there is none), many at a time, in order.

    Once they do not come from memory, several threads look them up: a disk answers several questions as fast as one. What is in
    memory one thread finds faster, since it hands over to no other.
    """
    encode, folder = chunk_keys(array), f"{root}/"

    def look(batch: Batch) -> tuple[Batch, list[os.stat_result | None]]:
        return batch, [file_status(folder + encode(position), label) for position in batch]

    positions = chunk_positions(array)
    batches = iter(lambda: list(itertools.islice(positions, BATCH)), [])
    for batch in batches:
        began = time.perf_counter()
        found = look(batch)
        waited = time.perf_counter() - began > WAITING * len(batch)
        yield found
        if waited:
            break
    pool = ThreadPoolExecutor(LOOKING)
    try:
        under_way = deque(pool.submit(look, batch) for batch in itertools.islice(batches, LOOKING))
        while under_way:
            yield under_way.popleft().result()
            under_way.extend(pool.submit(look, batch) for batch in itertools.islice(batches, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def check_current(array: zarr.Array[Any], label: str) -> None:
    """Raise `StoreChanged` unless the metadata of `array` are what they were when it was opened."""
    where = shown(array.store_path)
    try:
        stored = zarr.open_array(array.store_path, zarr_format=array.metadata.zarr_format)
    except (ConnectionError, TimeoutError) as error:
        raise StoreUnreachable(
            f"the metadata of array {label!r} at {where} cannot be read any more: {error}; check network and server, and try again"
        ) from error
    except Exception as error:  # metadata that are gone or do not parse raise whatever the store or the parser raises
        check_open_files(error, f"the metadata of array {label!r}")
        raise StoreChanged(
            f"the metadata of array {label!r} at {where} cannot be read any more ({error}); is the store still mounted? "
            "open it again"
        ) from error
    if _canonical(stored) != _canonical(array):
        raise StoreChanged(
            f"array {label!r} at {where} is not what it was when it was opened (shape {array.shape}, now "
            f"{stored.shape}, or dtype, chunks, codecs): a writer changed it; wait until the writer has finished, and open it again"
        )


def array_fingerprint(array: zarr.Array[Any], label: str, checksums: bytes | None, remedy: str | None = None) -> str:
    """Return the sha256 of an array's metadata and, for each chunk, its checksum in the manifest, else its size and time of change.

    A chunk that is absent counts as such; but with a `remedy` to tell of, every chunk (or shard) must be there and, where that can
    be told, not be empty. The files are looked through once for both, and no chunk is read. On stores that are not local only the
    metadata are available at this price, and the chunks by name.

    Raises
    ------
    ChunkMissing
        There is a remedy, and need of it.
    """
    metadata, root = _metadata_digest(array), local_root(array)
    if root is None and remedy is not None:
        _check_listed(array, label, remedy)
    if root is None or (checksums is not None and remedy is None):
        return digest([metadata] if checksums is None else [metadata, checksums.hex()])
    facts = sha256(f'["{metadata}"'.encode())  # the digest of a list, of which only a part is in memory
    for batch, statuses in file_statuses(array, label, root):
        if remedy is not None:
            for position, status in zip(batch, statuses, strict=True):
                if status is None or not status.st_size:
                    raise _missing(array, label, position, remedy)
        facts.update("".join([f",[{one.st_size},{one.st_mtime_ns}]" if one else ",null" for one in statuses]).encode())
    facts.update(b"]")
    return facts.hexdigest() if checksums is None else digest([metadata, checksums.hex()])


def _check_listed(array: zarr.Array[Any], label: str, remedy: str) -> None:
    listed = sync(_list_keys(array)) if array.store.supports_listing else None
    key = chunk_keys(array)
    for position in chunk_positions(array):
        if not (key(position) in listed if listed is not None else sync(array.store.exists(key(position)))):
            raise _missing(array, label, position, remedy)


async def _list_keys(array: zarr.Array[Any]) -> set[str]:
    return {key async for key in array.store.list_prefix(f"{array.path}/" if array.path else "")}


def _missing(array: zarr.Array[Any], label: str, position: tuple[int, ...], remedy: str) -> ChunkMissing:
    root = local_root(array)
    if root is not None and not (root / array.path).is_dir():
        return ChunkMissing(f"the store {root} of array {label!r} is gone; is it still mounted?")
    return ChunkMissing(
        f"{describe_chunk(array, label, position, shard=array.shards is not None)} is missing from {shown(array.store_path)}, "
        f"or empty; restore it, {remedy}"
    )


def _canonical(array: zarr.Array[Any]) -> dict[str, Any]:
    """Return the metadata document as zarr writes it, without the attributes."""
    name = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
    document: dict[str, Any] = json.loads(array.metadata.to_buffer_dict(default_buffer_prototype())[name].to_bytes())
    document.pop("attributes", None)
    return document


def _metadata_digest(array: zarr.Array[Any]) -> str:
    """Digest the metadata document: as it is on a local disk; elsewhere, where it takes a while to arrive, as when opened."""
    return digest(_canonical(array) if local_root(array) is None else _document(array))


def _document(array: zarr.Array[Any]) -> dict[str, Any]:
    """Return the metadata document as stored, so that an edit of it shows even where zarr would not mind, without attributes."""
    root, name = local_root(array), "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
    if root is not None:
        stored = (root / array.path / name).read_bytes()
    elif (found := sync((array.store_path / name).get())) is not None:
        stored = found.to_bytes()
    else:
        raise StoreIncomplete(f"the metadata of array {array.name!r} are gone from {shown(array.store_path)}; restore its {name}")
    document: dict[str, Any] = json.loads(stored)
    document.pop("attributes", None)
    return document


def _stored_checksums(array: zarr.Array[Any]) -> Iterator[bytes]:
    root = local_root(array)
    if root is None:
        raise StoreIncomplete(f"the store {array.store} is not on a local disk; write it there and copy it")
    metadata: Any = array.metadata
    if array.shards is not None or not isinstance(metadata.codecs[-1], Crc32cCodec):
        raise StoreIncomplete(
            f"the chunks of array {array.name!r} do not end with a crc32c; write it unsharded, with that codec last"
        )
    key = chunk_keys(array)
    for position in chunk_positions(array):
        path = root / key(position)
        try:
            with path.open("rb") as file:
                file.seek(-CHECKSUM_BYTES, os.SEEK_END)
                yield file.read(CHECKSUM_BYTES)
        except OSError as error:
            raise StoreIncomplete(f"chunk {path} was not written ({error}); write the store again") from error
