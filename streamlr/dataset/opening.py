"""open_dataset(): from a path and names of arrays or columns to a Dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import zarr
from zarr.abc.store import Store

from streamlr.dataset.dataset import MISSING_POLICIES, Dataset, default_names
from streamlr.dataset.integrity import Seal, read_seal
from streamlr.dataset.nodes import UNLISTED, arrays_of, is_listed, open_node
from streamlr.dataset.remote import shown
from streamlr.dataset.rows import Rows
from streamlr.dataset.zarr_rows import ZarrRows, check_array
from streamlr.errors import UsageError


def open_dataset(
    source: str | os.PathLike[str] | zarr.Group | zarr.Array[Any] | Store,
    *,
    target: str | Sequence[str] | None = None,
    features: str | Sequence[str] | None = None,
    weights: str | None = None,
    missing: str = "error",
    allow_missing_chunks: bool = False,
) -> Dataset:
    """Open rows kept in zarr (v2 or v3, an array or a group) without reading them.

    Parameters
    ----------
    source : path, URL, zarr.Group, zarr.Array or zarr store
        Where the arrays are. URLs (`http://`, `https://`, `s3://`, `gs://`, `az://`) need `pip install 'streamlr[remote]'`;
        credentials come from the environment, and a URL that carries some is refused. A web server lists nothing: there the arrays
        are those of the group's consolidated metadata, else those that are named, X, y and weights.
    target : str or sequence of str, optional
        Name(s) of the target: a 1-D or 2-D array, or columns of a 2-D array. By default what the store's own attributes say, else
        an array named `y`, else none: enough to predict.
    features : str or sequence of str, optional
        A 2-D array's name, a list of 1-D array names, or columns of a 2-D array by name. By default what the store's own
        attributes say, else the array named `X`, else the only 2-D array. Columns that are targets or weights are left out.
        A 2-D array names its columns in its attribute `feature_names` or `columns`; without one they are x0, x1, ...
    weights : str, optional
        Name of the weights: a 1-D array, or a column of a 2-D array.
    missing : "error" or "drop"
        What a NaN in a row that is read does: raise, or leave the row out and count it.
    allow_missing_chunks : bool
        Read absent chunks as fill values, and count them. Only for stores whose writer leaves out such chunks.

    Returns
    -------
    Dataset

    Raises
    ------
    PathNotFound
        Nothing is at the path or URL.
    StoreUnreachable
        What is at the URL does not answer, or refuses to.
    UsageError
        An option is not one of those allowed, or a name is not in the store; the message lists those that are.
    DataError
        The store is unreadable, unfinished, or not made of real numbers.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> group = zarr.open_group(zarr.storage.MemoryStore(), mode="w")
    >>> _ = group.create_array("X", data=np.eye(3)); _ = group.create_array("y", data=np.ones(3))
    >>> open_dataset(group).target_names
    ('y',)
    """
    if missing not in MISSING_POLICIES:
        raise UsageError(f"missing is {missing!r}; allowed are 'error' and 'drop'")
    asked = [name for names in (target, features, weights) for name in ([names] if isinstance(names, str) else names or ())]
    with open_node(source) as node:
        sealed = read_seal(node) if isinstance(node, zarr.Group) else None
        catalogue = _Catalogue(node, sealed, allow_missing_chunks, asked)
    target_rows, target_names = catalogue.targets(target)
    weight_rows = catalogue.weights(weights)
    taken = {*target_names, *([weights] if weights else [])}
    feature_rows, feature_names = catalogue.features(features, taken)
    coding = {} if sealed is None else sealed.coding
    return Dataset.of_rows(feature_rows, target_rows, weight_rows, feature_names, target_names, missing=missing, coding=coding)


class _Catalogue:
    """Every array and every named column of a store, by name."""

    def __init__(self, node: zarr.Group | zarr.Array[Any], sealed: Seal | None, allow_missing: bool, asked: Sequence[str]) -> None:
        self.where = shown(node.store_path)
        self.sealed = sealed
        self.allow_missing = allow_missing
        self.grouped = isinstance(node, zarr.Group)
        self.complete = is_listed(node) or sealed is not None
        found = arrays_of(node, [*asked, *(sealed.chunks if sealed is not None else ())])
        self.arrays = found
        if not found:
            fault = (
                "is a group without arrays" if self.complete else "has none of the arrays X, y and weights, nor any that was named"
            )
            remedy = "give the path of the group or array that holds the rows"
            raise UsageError(f"{self.where} {fault}; {remedy if self.complete else UNLISTED}")
        attributes = node.attrs.asdict() if isinstance(node, zarr.Group) else {}
        self.columns: dict[str, list[tuple[str, int]]] = {}
        self.column_names: dict[str, tuple[str, ...]] = {}
        for name, array in found.items():
            if array.ndim == 2:
                self.column_names[name] = self._names(name, array, attributes)
                for position, column in enumerate(self.column_names[name]):
                    self.columns.setdefault(column, []).append((name, position))

    def _names(self, name: str, array: zarr.Array[Any], attributes: dict[str, Any]) -> tuple[str, ...]:
        width = array.shape[1]
        sealed = {"X": attributes.get("feature_names"), "y": attributes.get("target_names")}.get(name)
        for stated in (array.attrs.get("feature_names"), array.attrs.get("columns"), sealed):
            if isinstance(stated, list) and len(stated) == width == len(set(map(str, stated))):
                return tuple(map(str, stated))
        return default_names("y" if name == "y" else "x", width)

    def targets(self, wanted: str | Sequence[str] | None) -> tuple[list[Rows], list[str]]:
        if wanted is None:
            if not self.grouped or "y" not in self.arrays:
                return [], []
            rows, names = self._whole("y")
            if self.sealed is not None and self.sealed.targets:
                names = list(self.sealed.targets)
            return [rows], names
        rows_found, names_found = [], []
        for name in [wanted] if isinstance(wanted, str) else wanted:
            rows, names = self._named(name, "target")
            rows_found.append(rows)
            names_found += names
        twice = {name for name in names_found if names_found.count(name) > 1}
        if twice:
            raise UsageError(f"the target {min(twice)!r} is named twice; name each once")
        return rows_found, names_found

    def weights(self, wanted: str | None) -> Rows | None:
        if wanted is None:
            wanted = None if self.sealed is None else self.sealed.weights
        return None if wanted is None else self._named(wanted, "weights")[0]

    def features(self, wanted: str | Sequence[str] | None, taken: set[str]) -> tuple[list[Rows], list[str]]:
        if wanted is None:
            matrices = [name for name, array in self.arrays.items() if array.ndim == 2 and name not in taken]
            if "X" in matrices:
                matrices = ["X"]
            if len(matrices) != 1:
                raise UsageError(
                    f"which arrays of {self.where} are the features? {self._listing()}; name a 2-D array or several 1-D arrays"
                    " (features=, --features)"
                )
            return self._matrix(matrices[0], taken)
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        if len(names) == 1 and names[0] in self.column_names:
            return self._matrix(names[0], taken)
        clash = [name for name in names if name in taken]
        if clash:
            raise UsageError(f"{clash[0]!r} is both a feature and a target or weight; name it once")
        rows = [self._named(name, "features")[0] for name in names]
        return _joined(rows), names

    def _matrix(self, name: str, taken: set[str]) -> tuple[list[Rows], list[str]]:
        names = self.column_names[name]
        positions = [j for j, column in enumerate(names) if column not in taken]
        columns = None if len(positions) == len(names) else tuple(positions)
        return [self._rows(name, columns)], [names[j] for j in positions]

    def _named(self, name: str, role: str) -> tuple[Rows, list[str]]:
        if name in self.arrays and (role != "features" or self.arrays[name].ndim == 1):
            return self._whole(name)
        if self.sealed is not None and (name,) == self.sealed.targets and "y" in self.arrays and self.arrays["y"].ndim == 1:
            return self._rows("y", None), [name]
        places = self.columns.get(name, [])
        if len(places) > 1:
            raise UsageError(f"{role} {name!r} is a column of several arrays ({', '.join(a for a, _ in places)}); rename one")
        if not places:
            raise UsageError(f"{self.where} has no array or column {name!r} for {role}; {self._listing()}")
        array, position = places[0]
        return self._rows(array, (position,)), [name]

    def _whole(self, name: str) -> tuple[Rows, list[str]]:
        names = list(self.column_names[name]) if name in self.column_names else [name]
        return self._rows(name, None), names

    def _rows(self, name: str, columns: tuple[int, ...] | None) -> ZarrRows:
        check_array(self.arrays[name], name)
        checksums = None if self.sealed is None else self.sealed.chunks.get(name)
        return ZarrRows(self.arrays[name], name, columns, self.allow_missing, checksums)

    def _listing(self) -> str:
        arrays = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
        named = [column for names in self.column_names.values() for column in names]
        columns = f"; columns: {', '.join(named[:20])}{', ...' if len(named) > 20 else ''}" if named else ""
        return f"it has the arrays {arrays}{columns}" + ("" if self.complete else f", and perhaps others ({UNLISTED})")


def _joined(rows: list[Rows]) -> list[Rows]:
    """Join neighbouring columns of one array, so that its chunks are decoded once and not once per column."""
    joined: list[Rows] = []
    for one in rows:
        last = joined[-1] if joined else None
        if isinstance(one, ZarrRows) and isinstance(last, ZarrRows) and one.array is last.array and one.columns and last.columns:
            joined[-1] = ZarrRows(one.array, one.label, (*last.columns, *one.columns), one.allow_missing_chunks, one.checksums)
        else:
            joined.append(one)
    return joined
