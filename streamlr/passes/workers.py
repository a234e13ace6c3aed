"""The workers of a cluster: what they have, and whether they are fit to take part in a pass."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import MemoryStore

from streamlr.dataset.blocks import format_bytes
from streamlr.dataset.dask_rows import DaskRows
from streamlr.dataset.integrity import chunk_keys, local_root
from streamlr.dataset.rows import MemoryRows, Rows
from streamlr.dataset.zarr_rows import ZarrRows
from streamlr.errors import ClusterError, UsageError
from streamlr.passes import cluster
from streamlr.passes.memory import SHARE, parse_bytes

WORKER_BYTES = 220_000_000  # a worker with the imports of a fit, as measured
SENT_BYTES = 100_000_000  # of NumPy rows that are sent to workers, at most
MUST_AGREE = ("streamlr", "numpy", "zarr", "numcodecs", "dask")
COMPARED, TAIL = 8, 4096  # chunks of an array by which copies of a store are told apart, and bytes of each

Look = tuple[str, str, tuple[str, ...]]  # a file or folder as given, in full, and files in it that are compared


@dataclass(frozen=True, slots=True)
class Workers:
    """What the workers of a cluster have.

    Attributes
    ----------
    threads, together : int
        Tasks that all of them run at once, and that one of them does at most.
    memory_bytes, used_bytes : int or None, int
        The least memory limit of a worker, if there is one, and the most that a worker uses already.
    least : str
        The address of the worker with that limit.
    """

    threads: int
    together: int
    memory_bytes: int | None
    used_bytes: int
    least: str

    def memory_limit(self, asked: int | str | None) -> tuple[int, str]:
        """Return the limit, in bytes, that a plan must keep on each worker, and where it comes from."""
        if asked is not None:
            return parse_bytes(asked), "as asked, for each worker"
        if self.memory_bytes is None:
            return sys.maxsize, "workers without a memory limit"
        return int(SHARE * self.memory_bytes), f"{SHARE:.0%} of the {format_bytes(self.memory_bytes)} of worker {self.least}"


def workers_of(client: Any) -> Workers:
    """Return what a cluster's workers have, after waiting a while for the first of them.

    Raises
    ------
    ClusterError
        There is none that runs tasks, or the scheduler does not answer.
    """
    with cluster.translated(client):
        found = cluster.running(client)
        if not found:
            wanted = client.submit(os.getpid, pure=False)  # a cluster that adapts starts a worker when there is something to do
            with suppress(TimeoutError):
                wanted.result(timeout=cluster.PATIENCE)
            wanted.cancel()
            found = cluster.running(client)
    if not found:
        raise cluster.no_workers(client)
    limits = {address: facts["memory_limit"] for address, facts in found.items() if facts["memory_limit"]}
    least = min(limits, key=lambda address: limits[address]) if limits else next(iter(found))
    return Workers(
        threads=sum(facts["nthreads"] for facts in found.values()),
        together=max(facts["nthreads"] for facts in found.values()),
        memory_bytes=limits.get(least),
        used_bytes=max(WORKER_BYTES, *(int(facts.get("metrics", {}).get("memory", 0)) for facts in found.values())),
        least=least,
    )


class Vetted:
    """Workers that have our versions of what computes and see the stores: each is asked once, whenever it comes.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    looks : sequence of (str, str, tuple of str)
        What they must see, from `stores_of` or `seen_by_workers`.
    packages : sequence of str
        What they must have in our versions, besides what every pass needs.
    """

    def __init__(self, client: Any, looks: Sequence[Look], packages: Sequence[str] = ()) -> None:
        self._client, self._looks, self._packages = client, list(looks), (*MUST_AGREE, *packages)
        self._own = _look_around(self._looks, self._packages)
        self._vetted: set[str] = set()

    def check(self, addresses: Iterable[str]) -> None:
        """Ask those of some workers that were not asked before.

        Raises
        ------
        ClusterError
            One has other versions, or does not see a store, or sees a copy of it that differs.
        NoAnswer
            One cannot be asked: it died just now, and others do its work; or it is to be asked again.
        """
        there = set(addresses)
        self._vetted &= there  # who comes again may be another
        if new := sorted(there - self._vetted):
            patience = cluster.PATIENCE / 2
            answers = cluster.run(self._client, patience, _look_around, self._looks, self._packages, workers=new)
            silent = {address for address, seen in answers.items() if isinstance(seen, OSError)}
            for address in answers.keys() - silent:
                self._judge(address, answers[address])
                self._vetted.add(address)
            if silent:
                raise cluster.NoAnswer(f"worker {min(silent)}")

    def _judge(self, address: str, seen: Any) -> None:
        if isinstance(seen, ModuleNotFoundError):
            raise ClusterError(f"worker {address} cannot import {seen.name!r}; install streamlr {self._own['streamlr']} there")
        if isinstance(seen, Exception):
            raise ClusterError(f"worker {address} does not answer ({type(seen).__name__}: {seen}); look at its log")
        for name in ("Python", *self._packages):
            if seen[name] != self._own[name]:
                raise ClusterError(
                    f"worker {address} has {name} {seen[name]}, and here is {self._own[name]}: results could have other bits; "
                    "install the same on all machines"
                )
        for place, digest in self._own["places"].items():
            if seen["places"][place] != digest:
                fault = "sees another copy of" if seen["places"][place] else "does not see"
                raise ClusterError(
                    f"worker {address} on {seen['host']} {fault} {place}; put it on a disk that all workers share, under the same "
                    "path, or in object storage"
                )


def stores_of(arrays: Sequence[Rows]) -> list[Look]:
    """Return the stores that workers must see in order to read some arrays.

    Raises
    ------
    UsageError
        Rows are in this process's memory, where no worker sees them, and are too many to send.
    """
    sent = sum(rows.array.nbytes for rows in arrays if isinstance(rows, MemoryRows))
    if sent > SENT_BYTES:
        raise UsageError(
            f"NumPy arrays of {format_bytes(sent)} would be sent to the workers, and allowed are {format_bytes(SENT_BYTES)}; write "
            "them to a zarr store that the workers see and open it, or make Dask arrays where the data are"
        )
    stores = []
    for label, array in [pair for rows in arrays for pair in _stored_arrays(rows)]:
        store = array.store
        while hasattr(store, "_store"):  # a zarr.storage.WrapperStore, which documents this attribute
            store = store._store
        if isinstance(store, MemoryStore):
            raise UsageError(f"array {label!r} is in this process's memory, where no worker sees it; write it to a disk they share")
        if root := local_root(array):
            stores.append(seen_by_workers(root, *_compared(array)))
    return stores


def seen_by_workers(place: Path, *names: str) -> Look:
    """Return a folder that workers must see, and files in it that must be the same there; or a file, without names."""
    return str(place), os.path.abspath(place), names or ("",)


def _stored_arrays(rows: Rows) -> list[tuple[str, Any]]:
    if isinstance(rows, ZarrRows):
        return [(rows.label, rows.array)]
    return rows.zarr_sources() if isinstance(rows, DaskRows) else []


def _compared(array: zarr.Array[Any]) -> tuple[str, ...]:
    """Return files of an array by which copies of its store are told apart: its metadata, and chunks from all over it."""
    height = (array.shards or array.chunks)[0]
    last, key, rest = (array.shape[0] - 1) // height, chunk_keys(array), (0,) * (array.ndim - 1)
    places = sorted({last * i // (COMPARED - 1) for i in range(COMPARED)})
    prefix = f"{array.path}/" if array.path else ""
    return (f"{prefix}zarr.json", f"{prefix}.zarray", *(key((place, *rest)) for place in places))


def _look_around(looks: list[Look], packages: Sequence[str]) -> dict[str, Any]:
    """Task: tell what is installed here, and what some places look like: nothing for those that are not there or lie elsewhere."""
    found: dict[str, Any] = {"Python": ".".join(platform.python_version_tuple()[:2]), "host": platform.node(), "places": {}}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "(not installed)"
    for given, full, names in looks:
        there = False
        with suppress(OSError):  # a relative path from a folder that is gone leads nowhere
            there = os.path.abspath(given) == full and os.path.exists(given)
        found["places"][given] = found["places"].get(given, "") + _digest(Path(given), names) if there else ""
    return found


def _digest(place: Path, names: Sequence[str]) -> str:
    """Return a digest of the sizes and the ends of some files; nothing where there are none."""
    digest, found = hashlib.sha256(), False
    for name in names:
        digest.update(name.encode())
        with suppress(OSError), (place / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL, 0))
            digest.update(size.to_bytes(8, "big") + file.read())
            found = True
    return digest.hexdigest() if found else ""
