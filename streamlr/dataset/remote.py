"""Stores at URLs: read by obstore, with what gives access to them taken from the environment, and never shown."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import urlsplit

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync  # stores are bound to zarr's own event loop, and this is the way in
from zarr.storage import ObjectStore

from streamlr.errors import StoreUnreachable, UsageError

WEB = ("http", "https")  # which list nothing
SCHEMES = (*WEB, "s3", "s3a", "gs", "az", "abfs", "abfss", "adl", "azure")
METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
SILENCE = timedelta(seconds=10)  # without a byte, and a request is made again
TRIES = 3  # more of them, with pauses that double from a tenth of a second, unless
PATIENCE = timedelta(seconds=15)  # have gone by. Whoever reads chunks tries again on top of it, see `stored_chunks`
QUESTIONS = 64  # for sizes, under way at once
LONGEST = timedelta(minutes=10)  # for a request that does make progress


class RemoteStore(ObjectStore[Any]):
    """A zarr store at a URL, for reading.

    What cannot be read raises a builtin: `PermissionError` where the server refuses, `ConnectionError` for all that may pass. A
    body that ends before its time is never taken for the whole: it is asked for again, by obstore from where it was cut where the
    server tells of an ETag, else by who reads chunks, and here for metadata.

    Pickled, it is its URL: on a worker it is opened with that worker's environment, once for each process.

    Parameters
    ----------
    url : str
        One that `check_url` lets pass.
    """

    def __init__(self, url: str) -> None:
        super(ObjectStore, self).__init__(read_only=True)  # past the constructor that wants obstore imported and the client made
        self.url = url.rstrip("/")
        self._likely: tuple[str, ...] = ()
        self._documents: dict[str, asyncio.Task[Buffer | Exception | None]] | None = None

    @cached_property
    def store(self) -> Any:  # made where it is first needed: a worker's errors then are a task's
        """The client.

        Raises
        ------
        UsageError
            obstore is not installed, or cannot make sense of the URL or of the environment.
        """
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise UsageError(f"reading {self.url} needs a package that is not installed; pip install 'streamlr[remote]'") from error
        plain = self.url.startswith("http:") or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http:")
        try:
            return from_url(
                self.url,
                client_options={"allow_http": plain, "read_timeout": SILENCE, "timeout": LONGEST},
                retry_config={"max_retries": TRIES, "retry_timeout": PATIENCE},
            )
        except Exception as error:  # obstore's own, for which its module has no common base but Exception
            raise UsageError(f"{self.url} is no URL of a store: {_reason(error)}") from error

    @property
    def supports_listing(self) -> bool:
        """Whether the arrays of a group can be found without their names."""
        return urlsplit(self.url).scheme not in WEB

    def with_read_only(self, read_only: bool = False) -> RemoteStore:
        """Return the store: it is for reading."""
        if not read_only:
            raise UsageError(f"{self.url} is opened for reading; write to a local disk and copy")
        return self

    @contextmanager
    def asked_once(self, likely: Iterable[str]) -> Iterator[None]:
        """Ask for each document of metadata once while the block runs, and for the `likely` ones together with the first.

        A group and its arrays are three questions or more, each asked when the one before was answered; and several are the same.
        """
        self._likely, self._documents = tuple(likely), {}
        try:
            yield
        finally:
            sync(self._asked_enough())

    async def _asked_enough(self) -> None:
        """Drop what was asked for in vain, and wait until that has ended: the loop may end before it would."""
        tasks, self._documents = list((self._documents or {}).values()), None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return what is at a key, or a part of it; None when nothing is."""
        documents = self._documents
        if documents is None or byte_range is not None or not key.endswith(METADATA):
            return await self._get(key, prototype, byte_range)
        for wanted in {key, *self._likely} - documents.keys():
            documents[wanted] = asyncio.create_task(self._document(wanted, prototype))
        found = await asyncio.shield(documents[key])
        if isinstance(found, Exception):
            raise found
        return found

    async def _document(self, key: str, prototype: BufferPrototype) -> Buffer | Exception | None:
        try:
            return await self._get(key, prototype, None)
        except Exception as error:  # it is raised where the document is wanted
            return error

    async def _get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        try:
            with self._asking():
                return await super().get(key, prototype, byte_range)
        except ConnectionError:  # also of a body that was cut, where obstore tries again only if the server tells of an ETag
            if not key.endswith(METADATA):
                raise  # whoever reads chunks tries again
        with self._asking():
            return await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        """Whether there is something at a key."""
        with self._asking():
            return await super().exists(key)

    async def getsize(self, key: str) -> int:
        """Return the size of what is at a key."""
        with self._asking():
            return await super().getsize(key)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Let the client's errors be builtins; and say that there is none, before zarr does."""
        _ = self.store
        try:
            yield
        except Exception as error:
            if not type(error).__module__.startswith("obstore"):
                raise
            refused = type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
            kind = PermissionError if refused else ConnectionError
            raise kind(_reason(error)) from None

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and self.url == other.url

    __hash__ = None  # type: ignore[assignment]  # as of every zarr store that compares itself

    def __reduce__(self) -> tuple[Any, ...]:
        return _shared_store, (self.url,)


@lru_cache(maxsize=16)
def _shared_store(url: str) -> RemoteStore:
    """Return one store, and so one pool of connections, for all tasks of a worker."""
    return RemoteStore(url)


def absent(store: RemoteStore, keys: Sequence[str]) -> int:
    """Return how many of some keys have nothing, or something empty: asked for by size alone, many at once.

    Raises
    ------
    StoreUnreachable
        The store does not answer.
    """
    try:
        return sync(_absent(store, keys))
    except OSError as error:
        raise StoreUnreachable(f"{store} does not tell what it holds: {error}; check network and credentials") from error


async def _absent(store: RemoteStore, keys: Sequence[str]) -> int:
    room = asyncio.Semaphore(QUESTIONS)

    async def lacks(key: str) -> bool:
        async with room:
            try:
                return await store.getsize(key) == 0
            except FileNotFoundError:
                return True

    return sum(await asyncio.gather(*map(lacks, keys)))


def is_url(source: Any) -> bool:
    """Whether this is a URL and no path.

    Examples
    --------
    >>> is_url("s3://bucket/rows.zarr"), is_url("/data/rows.zarr")
    (True, False)
    """
    return isinstance(source, str) and "://" in source


def check_url(url: str) -> None:
    """Raise `UsageError` when a URL carries what should not be shown, or what no store has: a user, a password, a query.

    Examples
    --------
    >>> check_url("https://example.org/rows.zarr")
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"{shown(url)} was given with a user, a password, a query or a fragment; give the plain URL and put credentials into "
            "the environment (AWS_ACCESS_KEY_ID, ...), or open a zarr store of your own that has them and give that"
        )


def shown(place: Any) -> str:
    """Return the text of a store or URL, for messages: without user, password, query and fragment.

    Examples
    --------
    >>> shown("https://me:secret@example.org/rows.zarr?signature=1#here")
    'https://example.org/rows.zarr'
    """
    return re.sub(r"(\w://[^\s?#]*)[?#][^\s)>]*", r"\1", re.sub(r"(?<=://)[^/\s]*@", "", str(place)))


def _reason(error: Exception) -> str:
    """Return what a person needs of an error of obstore's: its texts go on for pages."""
    first, _, rest = str(error).partition("\n")
    first = re.sub(r"Error performing .*? - |Generic \w+ error: ", "", first).strip().rstrip(":")
    cause = re.search(r'(?:message|error): "([^"]+)"', rest)
    return shown(first if cause is None or cause[1] in first else f"{first} ({cause[1]})")
