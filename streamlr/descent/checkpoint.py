"""Checkpoints: the state of a descent as a file, with the data and the options that it belongs to."""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import numpy as np

from streamlr.descent.stopping import Record
from streamlr.errors import BadFile, UsageError
from streamlr.files import MAX_JSON_BYTES, read_json, to_json, write_json

S = TypeVar("S")
FORMAT = "streamlr checkpoint"
VERSION = 2
SECONDS = 15.0


class Checkpoint:
    """A file that holds the state of one descent, and is replaced as it goes on: whole, or as it was.

    Parameters
    ----------
    path : path
        The file.
    identity : mapping
        The data and all options, as JSON values: what must be the same for the state to be worth anything.
    every : int or None
        Rows after which it is written; None for every 15 seconds.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any], every: int | None) -> None:
        self.path, self.identity, self.every = Path(path), to_json(identity), every
        self._rows, self._time = 0, monotonic()

    def load(self, start: S) -> S:
        """Return the state in the file, of the form of `start`; `start` itself where there is no file.

        Raises
        ------
        UsageError
            It belongs to other data or options, or is of another kind of descent; the message names the difference.
        BadFile
            It is damaged, or no checkpoint.
        """
        if not os.path.exists(self.path):  # or a link to where it is to be
            return start
        try:
            most = MAX_JSON_BYTES + len(json.dumps(_plain(start)))  # the history has room, and arrays as many numbers as they have
            content = read_json(self.path, FORMAT, VERSION, most=most)
        except BadFile as error:
            raise BadFile(f"{error}; or choose another path, or delete it to start anew") from error
        found = content.get("identity", {})
        for name in sorted({*self.identity, *found}):
            ours, theirs = self.identity.get(name), found.get(name)
            if ours != theirs:
                raise UsageError(f"{self.path} is a checkpoint of another descent: {_difference(name, theirs, ours)}; {REMEDY}")
        try:
            state: S = _like(start, content["state"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"{self.path} lacks what a checkpoint needs ({error!r}); delete it to start anew") from error
        self._rows = _rows(state)
        return state

    def save(self, state: Any, *, now: bool = False) -> None:
        """Write a state, if it is time to, or asked for `now`; the last one always.

        Raises
        ------
        OSError
            There is no room for it; what was written before is still there.
        """
        rows = _rows(state)
        due = rows - self._rows >= self.every if self.every else monotonic() - self._time >= SECONDS
        if due or now or state.stopped:
            content = {"identity": self.identity, "state": _plain(state)}
            try:
                write_json(self.path, FORMAT, VERSION, content, overwrite=True)
            except OSError as error:
                if error.errno is None:  # one of ours, which says it all
                    raise
                raise OSError(
                    error.errno,
                    f"{error.strerror}: {self.path} cannot be written, and stays as it was; make room, and run it again to go on",
                ) from error
            self._rows, self._time = rows, monotonic()


REMEDY = "give the same data and options to go on with it, or another path, or delete it to start anew"


def _rows(state: Any) -> int:
    """Return the rows that a descent has used: a full-batch one after whole epochs only, which are all in its history."""
    return state.rows if hasattr(state, "rows") else state.history[-1].rows if state.history else 0


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted({*theirs, *ours}, key=lambda key: (key != "mode", key))  # another mode has other defaults
        inner = next(key for key in keys if theirs.get(key) != ours.get(key))
        return f"{inner} was {theirs.get(inner)!r} and is {ours.get(inner)!r}"
    if name == "fingerprint":
        return "the data are others, or have changed since"
    return f"{name} was {theirs!r} and is {ours!r}"


def _plain(value: Any) -> Any:
    """Return a state as JSON values: what has named fields becomes an object."""
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: _plain(getattr(value, name)) for name in value._fields}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):  # p^2 numbers, perhaps: exact, and quickly written
        return {"dtype": value.dtype.str, "shape": value.shape, "base64": b64encode(value.tobytes()).decode()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return to_json(value)


def _like(form: Any, value: Any) -> Any:
    """Return JSON values in the form of another state."""
    if isinstance(form, tuple) and hasattr(form, "_fields"):
        names = form._fields
        return type(form)(
            **{name: _history(value) if name == "history" else _like(getattr(form, name), value[name]) for name in names}
        )
    if is_dataclass(form) and not isinstance(form, type):
        return type(form)(**{field.name: _like(getattr(form, field.name), value[field.name]) for field in fields(form)})
    if isinstance(form, np.ndarray):
        found = np.frombuffer(b64decode(value["base64"], validate=True), dtype=np.dtype(value["dtype"])).reshape(value["shape"])
        if found.dtype != form.dtype or found.shape != form.shape:
            raise ValueError(f"an array of shape {found.shape} where {form.shape} belongs")
        return found.copy()
    if isinstance(form, float):
        return np.inf if value is None else float(value)
    if form is None:
        return None
    return tuple(value) if isinstance(form, tuple) else type(form)(value)


def _history(state: Mapping[str, Any]) -> tuple[Record, ...]:
    return tuple(Record.of_dict(record) for record in state["history"])
