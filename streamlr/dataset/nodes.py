"""What is at a path, a URL or in a store: a zarr array, or a group and the arrays in it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr
import zarr.api.asynchronous
from zarr.abc.store import Store
from zarr.core.sync import sync  # stores are bound to zarr's own event loop, and this is the way in
from zarr.errors import NodeTypeValidationError

from streamlr.dataset.remote import METADATA, SCHEMES, RemoteStore, check_url, is_url, shown
from streamlr.errors import DataError, PathNotFound, StoreIncomplete, StoreUnreachable, StreamlrError, UsageError
from streamlr.files import check_open_files

TABLES = (".csv", ".csv.gz", ".csv.zip", ".parquet", ".tsv")
USUAL = ("X", "y", "weights")  # looked for where arrays cannot be listed
UNLISTED = (
    "a web server does not list the arrays of a group: name them (features=, target=), or write their names beside the data, with "
    "`zarr.consolidate_metadata(path)` where the store is on disk"
)


@contextmanager
def open_node(source: Any) -> Iterator[zarr.Group | zarr.Array[Any]]:
    """Open a zarr array or group for reading, or raise an error that names the path.

    While the block runs, each document of a URL's metadata is asked for once, and those of the usual arrays with the first.
    """
    if isinstance(source, zarr.Group | zarr.Array):
        yield source
        return
    if not isinstance(source, str | os.PathLike | Store):
        raise UsageError(
            f"the data are a {type(source).__name__}; allowed are a path, a URL, a zarr array, group or store (or use Dataset)"
        )
    if is_url(source):
        check_url(str(source))
    elif not isinstance(source, Store):
        _check_path(Path(source))
    if is_url(source) and str(source).split("://")[0].lower() in SCHEMES:
        store = RemoteStore(str(source))
        with store.asked_once([*METADATA, *(f"{name}/zarr.json" for name in USUAL)]):
            yield _opened(store, shown(source))
    else:
        yield _opened(source if isinstance(source, Store) or is_url(source) else str(Path(source)), shown(source))


def _opened(place: Any, where: str) -> zarr.Group | zarr.Array[Any]:
    try:
        return zarr.open(place, mode="r")
    except StreamlrError:
        raise
    except FileNotFoundError as error:
        if isinstance(place, RemoteStore):
            raise PathNotFound(f"nothing is at {where}, or no zarr array or group: there is no zarr.json; check the URL") from error
        raise UsageError(f"{where} is no zarr array or group: it holds no zarr.json, .zarray or .zgroup") from error
    except (ConnectionError, PermissionError) as error:
        if not isinstance(place, RemoteStore):
            raise DataError(f"{where} cannot be read: {error}") from error
        remedy = (
            "check the URL and the credentials in the environment"
            if isinstance(error, PermissionError)
            else "check the URL and the network, and try again"
        )
        raise StoreUnreachable(f"{where} cannot be read: {error}; {remedy}") from error
    except OSError as error:
        check_open_files(error, where)
        raise DataError(f"{where} cannot be read: {error}") from error
    except ImportError as error:  # fsspec's own, which says less than the one that it wraps
        package = (error.name or getattr(error.__cause__, "name", None) or "fsspec").split(".")[0]
        raise UsageError(f"reading {where} needs a package that is not installed ({error}); pip install {package}") from error
    except Exception as error:  # metadata that do not parse raise whatever their parser raises
        raise StoreIncomplete(f"the metadata of {where} cannot be understood ({error}); restore its zarr.json") from error


def is_listed(node: zarr.Group | zarr.Array[Any]) -> bool:
    """Whether all arrays of a group can be known: its store lists them, or its metadata do."""
    return not isinstance(node, zarr.Group) or node.store.supports_listing or node.metadata.consolidated_metadata is not None


def arrays_of(node: zarr.Group | zarr.Array[Any], asked: Iterable[str] = ()) -> dict[str, zarr.Array[Any]]:
    """Return the arrays of a group by name; an array by itself is one too.

    Parameters
    ----------
    node : zarr.Group or zarr.Array
        What `open_node` returned.
    asked : iterable of str
        Names to look for, beside the usual ones, where arrays are not listed; they may be none of arrays.

    Raises
    ------
    StoreIncomplete
        The metadata of an array do not parse.
    StoreUnreachable
        The store does not answer.
    """
    if not isinstance(node, zarr.Group):
        return {node.basename or "X": node}
    try:
        if is_listed(node):
            return dict(sorted(node.arrays()))
        return sync(_named(node, sorted({*USUAL, *asked})))
    except (ConnectionError, PermissionError) as error:
        raise StoreUnreachable(f"the arrays of {shown(node.store_path)} cannot be read: {error}; try again") from error
    except Exception as error:  # as in open_node
        raise StoreIncomplete(
            f"the metadata of an array in {shown(node.store_path)} cannot be understood ({error}); restore its zarr.json"
        ) from error


async def _named(group: zarr.Group, names: list[str]) -> dict[str, zarr.Array[Any]]:
    async def opened(name: str) -> zarr.Array[Any] | None:
        try:
            found = await zarr.api.asynchronous.open_array(
                store=group.store_path / name, zarr_format=group.metadata.zarr_format, mode="r"
            )
        except (FileNotFoundError, NodeTypeValidationError):  # nothing, or a group
            return None
        return zarr.Array(found)

    found = zip(names, await asyncio.gather(*map(opened, names)), strict=True)
    return {name: array for name, array in found if array is not None}


def _check_path(path: Path) -> None:
    if not path.exists():
        raise PathNotFound(f"nothing is at {path}; check the path")
    if path.name.lower().endswith(TABLES):
        raise UsageError(f"{path} is a table, not a zarr store; make one of it with `streamlr ingest {path.name} DEST.zarr`")
