"""Files that are whole or absent: written beside the target, flushed, renamed; JSON with a digest and without NaN."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from math import isfinite
from pathlib import Path
from typing import Any

from streamlr.errors import BadFile, OutputExists, PathNotFound, ResourceError, UsageError

MAX_JSON_BYTES = 256 * 2**20
STORE_MARKS = ("zarr.json", ".zgroup", ".zarray")  # one of these makes a folder a zarr store
FILE, STORE, EMPTY = "a file", "a zarr store", "an empty folder"
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)  # what a rename or link onto something ends with
NO_LINKS = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS)  # and a link on a file system without hard links
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # and a lock on one without locks


@contextmanager
def publish(target: str | os.PathLike[str], *, overwrite: bool = False, folder: bool = False) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder to; give it the name `target` when the block succeeds.

    A file takes the place of another in one step. A folder needs two, which are undone when they are interrupted in between; a
    process that is killed there leaves the old folder beside, under a name with "retired".

    Parameters
    ----------
    target : path
        Where the finished file or folder is to appear. A symbolic link stays: what it leads to is replaced.
    overwrite : bool
        Replace a thing of the same kind. Otherwise an existing target is an error, before and after the writing.
    folder : bool
        What is written is a zarr store, a folder, and may replace another one; otherwise it is a file.

    Raises
    ------
    OutputExists
        The target exists, and `overwrite` is False or it is of another kind.
    PathNotFound
        The folder that should hold the target does not exist.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> target = Path(folder.name) / "greeting.txt"
    >>> with publish(target) as beside:
    ...     _ = beside.write_text("hello")
    >>> target.read_text()
    'hello'
    >>> folder.cleanup()
    """
    check_output(target, overwrite=overwrite, folder=folder)
    place = Path(os.path.realpath(target))
    beside = _neighbour(place, "partial")
    try:
        yield beside
        _flush(beside)
        check_output(target, overwrite=overwrite, folder=folder)
        try:
            (_place_folder if folder else _place_file)(beside, place, overwrite)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            raise OutputExists(f"{target} was written by somebody else meanwhile; choose another path, or run it again") from error
        _flush_directory(place.parent)
    finally:
        _remove(beside)


def check_output(target: str | os.PathLike[str], *, overwrite: bool, folder: bool = False) -> None:
    """Raise unless `target` may be written: its folder exists, and it is free or something of the same kind to be replaced."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(target)):  # one slash is left of two in a Path
        raise UsageError(f"cannot write {str(target).split(':')[0]}:// URLs; write to a local disk and copy")
    place = Path(os.path.realpath(target))
    if not place.parent.is_dir():
        raise PathNotFound(f"cannot write {target}: there is no folder {place.parent}; create it first")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputExists(f"{target} already exists; choose another path, or ask for overwrite to replace it")
    found, replaced = _kind(place), (STORE, EMPTY) if folder else (FILE,)
    if found is not None and found not in replaced:
        raise OutputExists(f"{target} is {found}, and overwrite replaces only {' or '.join(replaced)}; choose another path")


def check_open_files(error: Exception, what: str) -> None:
    """Raise `ResourceError` if `error` says that no more files can be opened, which is no fault of the file in question."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise ResourceError(
            f"{what} cannot be read: {error}; allow more open files (ulimit -n), or run fewer tasks at once (--threads)"
        ) from error


def digest(value: Any) -> str:
    """Return the sha256, in hexadecimal, of the canonical JSON of `value`.

    Examples
    --------
    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_json(value: Any) -> Any:
    """Return `value` as JSON values: arrays and tuples as lists, numbers that are not finite as null.

    Examples
    --------
    >>> to_json({"a": (1, float("nan"))})
    {'a': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if hasattr(value, "tolist"):  # a NumPy array or number
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def write_json(path: str | os.PathLike[str], kind: str, version: int, content: dict[str, Any], *, overwrite: bool) -> None:
    """Write `content` as a JSON file that carries its kind, format version and digest, atomically."""
    body = {"format": kind, "version": version, **content}
    text = json.dumps({**body, "digest": digest(body)}, indent=2, allow_nan=False)
    with publish(path, overwrite=overwrite) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], kind: str, version: int, *, most: int | None = None) -> dict[str, Any]:
    """Read what `write_json` wrote, checking size (at most `most` bytes, by default 256 MiB), kind, version and digest.

    Raises
    ------
    PathNotFound
        No such file.
    BadFile
        The file is not JSON, of another kind, of a newer version, or altered since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise PathNotFound(f"no file at {path}; check the path")
    if path.stat().st_size > (MAX_JSON_BYTES if most is None else most):
        raise BadFile(f"{path} has {path.stat().st_size:,} bytes, more than any {kind} file; is it the right file?")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} is not a {kind} file: {error}; write it again") from error
    if not isinstance(body, dict) or body.get("format") != kind:
        raise BadFile(f"{path} is not a {kind} file (its format is not {kind!r})")
    found = body.get("version")
    if type(found) is not int or not 1 <= found <= version:
        raise BadFile(f"{path} has format version {found}; this release reads up to {version}: upgrade streamlr")
    stated = body.pop("digest", None)
    try:
        actual = digest(body)
    except ValueError as error:
        raise BadFile(f"{path} holds a number that is not finite: {error}; write it again") from error
    if stated != actual:
        raise BadFile(f"{path} was altered or damaged after it was written (its digest differs); write it again")
    return body


@contextmanager
def held(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs from holding the same path while the block runs; the system lets go of it when this process dies.

    What such a process left half written beside the path is removed. A file system that has no locks holds nothing: files are
    replaced whole all the same, so that of two runs the later has its way.

    Raises
    ------
    UsageError
        Another run holds it.
    PathNotFound
        The folder of the path does not exist.
    OutputExists
        The path is no file.
    """
    import fcntl

    check_output(path, overwrite=True)
    place = Path(os.path.realpath(path))
    lock = place.with_name(f".{place.name}.lock")
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {path} cannot be written there; choose another path") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _leads_to(lock, descriptor):
                for left in place.parent.glob(f".{escape(place.name)}.partial-*"):
                    _remove(left)
                break
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(f"{path} is being written by another run; wait until it has ended, or choose another path") from error
        except OSError as error:
            if error.errno in NO_LOCKS:
                break
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has removed it since
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _leads_to(path: Path, descriptor: int) -> bool:
    """Whether a path is still the name of an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _kind(place: Path) -> str | None:
    """Say what is at a path that is no link; None where there is nothing, or nothing any more."""
    try:
        mode = os.lstat(place).st_mode
        if not stat.S_ISDIR(mode):
            return FILE if stat.S_ISREG(mode) else "neither a file nor a folder"
        if any((place / mark).is_file() for mark in STORE_MARKS):
            return STORE
        with os.scandir(place) as entries:
            return EMPTY if next(entries, None) is None else "a folder with other files"
    except FileNotFoundError:
        return None


def _neighbour(place: Path, role: str) -> Path:
    return place.with_name(f".{place.name}.{role}-{secrets.token_hex(4)}")


def _place_file(beside: Path, place: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(beside, place)
        return
    try:
        os.link(beside, place)  # unlike a rename, it fails when there is something by now
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # take the name before the file comes
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(beside, place)


def _place_folder(beside: Path, place: Path, overwrite: bool) -> None:
    retired = _neighbour(place, "retired")
    try:
        if overwrite:
            with suppress(FileNotFoundError):  # nothing is there to be replaced
                os.rename(place, retired)
        os.rename(beside, place)
    finally:  # also on Ctrl-C: the old folder goes back, which the system refuses when the new one, or another's, is there
        try:
            os.rename(retired, place)
        except OSError as error:
            if error.errno in TAKEN:
                _remove(retired)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Force a file, or every file below a folder, to the disk."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
