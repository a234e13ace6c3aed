"""Dataset: features, targets, weights and names of rows wherever they live; lazy and picklable."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block, Span, tile_rows
from streamlr.dataset.checked import DatasetReader
from streamlr.dataset.dask_rows import DaskRows, as_rows
from streamlr.dataset.rows import Rows
from streamlr.dataset.subset import Subset
from streamlr.dataset.tally import Tally
from streamlr.errors import NoRows, RowCountMismatch, UsageError
from streamlr.files import digest

MISSING_POLICIES = ("error", "drop")


class Dataset:
    """Rows of features, and perhaps targets and weights, of Dask, zarr or NumPy arrays; nothing is read until a pass.

    Parameters
    ----------
    X : array, (n, p) or (n,)
        Features, real numbers of any dtype: a NumPy, Dask or zarr array; each tile of rows is promoted to float64 by itself.
    y : array, (n,) or (n, k), optional
        Target or targets. None where only predictions are wanted.
    weights : array, (n,), optional
        Non-negative weights w_i in the cost (1/W) sum w_i (y_i - yhat_i)^2.
    feature_names : sequence of p str, optional
        Names of the features; by default those of a data frame's columns, else x0, x1, ...

    Raises
    ------
    RowCountMismatch
        X, y and weights do not have the same number of rows.
    UnsupportedDtype
        An array is not of real numbers.
    NoRows
        There are no rows.
    UsageError
        There are no columns, or names that do not fit, or a Dask array with chunks of unknown size.

    Examples
    --------
    >>> import numpy as np
    >>> ds = Dataset(np.arange(6.0).reshape(3, 2), np.array([1.0, 2.0, 3.0]))
    >>> ds.n_rows, ds.n_features, ds.feature_names, ds.target_names
    (3, 2, ('x0', 'x1'), ('y',))
    """

    def __init__(self, X: Any, y: Any = None, weights: Any = None, feature_names: Sequence[str] | None = None) -> None:
        features = as_rows(X, "X")
        targets = () if y is None else (as_rows(y, "y"),)
        weight_rows = None if weights is None else as_rows(weights, "weights")
        if feature_names is None:
            feature_names = getattr(X, "columns", None)
        names = default_names("x", features.n_columns) if feature_names is None else tuple(map(str, feature_names))
        k = sum(rows.n_columns for rows in targets)
        self._settle((features,), targets, weight_rows, names, ("y",) if k == 1 else default_names("y", k))

    @classmethod
    def of_rows(
        cls,
        features: Sequence[Rows],
        targets: Sequence[Rows],
        weights: Rows | None,
        feature_names: Sequence[str],
        target_names: Sequence[str],
        *,
        missing: str = "error",
        coding: Mapping[str, Any] | None = None,
    ) -> Dataset:
        """Join `Rows` of several arrays into a dataset; what `open_dataset` ends with."""
        dataset = cls.__new__(cls)
        dataset._settle(tuple(features), tuple(targets), weights, tuple(feature_names), tuple(target_names))
        dataset.missing = missing
        dataset.coding = dict(coding or {})
        return dataset

    def _settle(
        self,
        features: tuple[Rows, ...],
        targets: tuple[Rows, ...],
        weights: Rows | None,
        feature_names: tuple[str, ...],
        target_names: tuple[str, ...],
    ) -> None:
        self.features, self.targets, self.weights = features, targets, weights
        self.feature_names, self.target_names = feature_names, target_names
        self.missing = "error"
        self.coding: Mapping[str, Any] = {}
        self.subsets: tuple[Subset, ...] = ()
        width = sum(rows.n_columns for rows in features)
        if width == 0:
            raise UsageError("X has no columns: found 0 feature(s) where a minimum of 1 is required")
        if len(feature_names) != width or len(set(feature_names)) != width:
            raise UsageError(f"feature_names has {len(set(feature_names))} different names for {width} columns; give one each")
        counts = {rows.label: rows.n_rows for rows in self.arrays}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{label} has {count:,}" for label, count in counts.items())
            raise RowCountMismatch(f"the arrays have different numbers of rows: {listed}; all must describe the same rows")
        if weights is not None and weights.n_columns != 1:
            raise UsageError(f"weights has {weights.n_columns} columns; allowed is one weight per row, shape (n,)")
        self.stored_rows = features[0].n_rows
        if self.stored_rows == 0:
            raise NoRows("X has no rows: found array with 0 sample(s) while a minimum of 1 is required")

    def __repr__(self) -> str:
        rows = f"{'a part of ' if self.subsets else ''}{self.stored_rows:,} rows x {self.n_features} features"
        weights = "" if self.weights is None else f", weights {self.weights.label}"
        return f"<streamlr.Dataset of {rows}, target {', '.join(self.target_names) or 'none'}{weights}>"

    @property
    def arrays(self) -> tuple[Rows, ...]:
        """Features, targets and weights, as far as there are any."""
        return (*self.features, *self.targets, *(() if self.weights is None else (self.weights,)))

    @property
    def lazy(self) -> list[DaskRows]:
        """Those of the arrays that are Dask's, computed a block at a time."""
        return [rows for rows in self.arrays if isinstance(rows, DaskRows)]

    @cached_property
    def n_rows(self) -> int:
        """Number of rows; for a part of a split, of that part."""
        if not self.subsets:
            return self.stored_rows
        step = 2**20
        return sum(int(self.chosen(a, min(a + step, self.stored_rows)).sum()) for a in range(0, self.stored_rows, step))

    @property
    def n_features(self) -> int:
        """Number of features, p."""
        return len(self.feature_names)

    @property
    def n_targets(self) -> int:
        """Number of targets, k; 0 where there are none."""
        return len(self.target_names)

    @property
    def tile_rows(self) -> int:
        """Rows of a tile that leaves moments, from the number of columns alone; no other tile has more."""
        return tile_rows(self.n_features + self.n_targets)

    @property
    def n_columns(self) -> int:
        """Columns that are read: features, targets and weights."""
        return sum(rows.n_columns for rows in self.arrays)

    @property
    def row_bytes(self) -> int:
        """Bytes to decode for one row."""
        return sum(rows.row_bytes for rows in self.arrays)

    def reader_bytes(self, tile_rows: int) -> int:
        """Return the most bytes of a task that reads such tiles: decoded chunks, a tile, its chosen and kept rows, masks."""
        tile = self.tile_bytes(tile_rows)
        return sum(rows.reader_bytes for rows in self.arrays) + (2 + bool(self.subsets)) * tile + tile // 2

    def tile_bytes(self, tile_rows: int) -> int:
        """Return the bytes of a tile as it is computed with: of no more rows than there are, in float64."""
        return min(tile_rows, self.stored_rows) * (self.n_features + self.n_targets + 2) * 8

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of canonical metadata and, per chunk, its checksum in the manifest, else its size and time of change.

        For Dask and NumPy arrays it is made from their tokens.
        """
        return self.current_fingerprint()

    def current_fingerprint(self, *, complete: bool = False) -> str:
        """Return the fingerprint of the rows as they are now; raise, if they must be `complete`, when a chunk is absent."""
        return digest(
            {
                "arrays": [rows.fingerprint(complete=complete) for rows in self.arrays],
                "names": [self.feature_names, self.target_names],
                "columns": [getattr(rows, "columns", None) for rows in self.arrays],
                "missing": self.missing,
                "subsets": [[subset.fraction, subset.seed, subset.depth, subset.complement] for subset in self.subsets],
            }
        )

    def split(self, fraction: float, *, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Return (train, test), where a row's place depends on its position and the seed alone.

        Parameters
        ----------
        fraction : float
            Expected share of rows in the second part, between 0 and 1.
        seed : int
            Another seed, another split.

        Raises
        ------
        UsageError
            The fraction is not between 0 and 1, or the seed is negative.

        Examples
        --------
        >>> import numpy as np
        >>> train, test = Dataset(np.zeros((1000, 1))).split(0.1, seed=0)
        >>> train.n_rows + test.n_rows
        1000
        """
        if not 0 < fraction < 1:
            raise UsageError(f"the fraction is {fraction}; allowed are numbers between 0 and 1, for example 0.1")
        given: Any = seed
        if not isinstance(given, numbers.Integral) or seed < 0:
            raise UsageError(f"the seed is {seed!r}; allowed are integers from 0 on")
        parts = []
        for complement in (True, False):
            part = copy.copy(self)
            part.__dict__.pop("n_rows", None)
            part.__dict__.pop("fingerprint", None)
            part.subsets = (*self.subsets, Subset(fraction, int(seed), len(self.subsets), complement))
            parts.append(part)
        return parts[0], parts[1]

    def without_targets(self) -> Dataset:
        """Return the same rows to predict from: no targets, no weights."""
        part = copy.copy(self)
        part.__dict__.pop("fingerprint", None)
        part.targets, part.weights, part.target_names = (), None, ()
        return part

    def keeping_places(self) -> Dataset:
        """Return the dataset with rows that lack a value left in, as NaN, but counted as before."""
        part = copy.copy(self)
        part.missing = "keep"
        return part

    def with_rows(self, blocks: Sequence[Rows]) -> Dataset:
        """Return the dataset with each array replaced by the computed rows of a task, in the order of `arrays`."""
        part = copy.copy(self)
        p, k = len(self.features), len(self.targets)
        part.features, part.targets = tuple(blocks[:p]), tuple(blocks[p : p + k])
        part.weights = None if self.weights is None else blocks[-1]
        return part

    def reader(self) -> DatasetReader:
        """Return a reader of these rows, which keeps the memory of its chunks for the next span."""
        return DatasetReader(self)

    def blocks(self, span: Span, report: Callable[[Tally], None], tile: int | None = None) -> Iterator[Block]:
        """Read the rows of one span; see `DatasetReader.blocks`."""
        return self.reader().blocks(span, report, tile)

    def chosen(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return, for each of the rows [start, stop), whether it belongs to this part of the splits that were made."""
        chosen = np.ones(stop - start, dtype=np.bool_)
        for subset in self.subsets:
            chosen &= subset.holds(start, stop)
        return chosen


def default_names(stem: str, count: int) -> tuple[str, ...]:
    """Return the names of columns that have none.

    Examples
    --------
    >>> default_names("x", 3)
    ('x0', 'x1', 'x2')
    """
    return tuple(f"{stem}{number}" for number in range(count))


def check_dataset(dataset: Any) -> None:
    """Raise `UsageError` unless this is a Dataset."""
    if not isinstance(dataset, Dataset):
        raise UsageError(
            f"the data are a {type(dataset).__name__}; give a Dataset: streamlr.open_dataset(path), or streamlr.Dataset(X, y)"
        )


def check_target(dataset: Any) -> None:
    """Raise `UsageError` unless this is a Dataset with a target."""
    check_dataset(dataset)
    if dataset.n_targets == 0:
        raise UsageError("the data have no target: name one with target= (--target), or give y")
