"""Files that are whole or absent: written beside the target, flushed, renamed; JSON with a digest and without NaN."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamlr.errors import BadFile, OutputExists, PathNotFound

MAX_JSON_BYTES = 256 * 2**20


@contextmanager
def publish(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder to; rename it to `target` when the block succeeds.

    Parameters
    ----------
    target : path
        Where the finished file or folder is to appear.
    overwrite : bool
        Replace what is there. Otherwise an existing target is an error, before and after the writing.

    Raises
    ------
    OutputExists
        The target exists and `overwrite` is False.
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
    target = Path(target)
    check_output(target, overwrite=overwrite)
    beside = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        yield beside
        _flush(beside)
        check_output(target, overwrite=overwrite)
        if overwrite and target.exists() and not target.is_symlink() and (target.is_dir() or beside.is_dir()):
            # a folder cannot be renamed onto another, nor onto a file
            retired = target.with_name(f".{target.name}.retired-{secrets.token_hex(4)}")
            os.rename(target, retired)
            os.rename(beside, target)
            _remove(retired)
        else:
            os.replace(beside, target)
        _flush_directory(target.parent)
    finally:
        _remove(beside)


def check_output(target: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise unless `target` may be written: its folder exists, and it is free or may be replaced."""
    target = Path(target)
    if not target.parent.is_dir():
        raise PathNotFound(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if not overwrite and (target.exists() or target.is_symlink()):
        raise OutputExists(f"{target} already exists; choose another path, or ask for overwrite to replace it")


def digest(value: Any) -> str:
    """Return the sha256, in hexadecimal, of the canonical JSON of `value`.

    Examples
    --------
    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: str | os.PathLike[str], kind: str, version: int, content: dict[str, Any], *, overwrite: bool) -> None:
    """Write `content` as a JSON file that carries its kind, format version and digest, atomically."""
    body = {"format": kind, "version": version, **content}
    text = json.dumps({**body, "digest": digest(body)}, indent=2, allow_nan=False)
    with publish(path, overwrite=overwrite) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], kind: str, version: int) -> dict[str, Any]:
    """Read what `write_json` wrote, checking size, kind, version and digest.

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
    if path.stat().st_size > MAX_JSON_BYTES:
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
