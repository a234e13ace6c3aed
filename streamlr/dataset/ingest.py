"""CSV and Parquet files into a store that can be checked: streamed in little memory, written aside, published when whole."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamlr.dataset.table_rows import OneAfterAnother, Reading, TableRows
from streamlr.dataset.tables.batches import Table, open_table, read_batches, wordy_columns
from streamlr.dataset.tables.coding import Coding, load_coding
from streamlr.dataset.tables.formulas import RowFormula, parse_formula
from streamlr.dataset.tables.levels import Progress
from streamlr.dataset.tables.missing import Missing
from streamlr.errors import DataError, StoreChanged, UnsupportedDtype, UsageError
from streamlr.files import publish

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What `ingest` did.

    Attributes
    ----------
    path : Path
        The store.
    n_rows, n_dropped : int
        Rows written, and rows left out because a cell was missing.
    dropped_by_column : dict of str to int
        For each column of the tables with missing cells, in how many rows; a row may miss several.
    features, targets : tuple of str
        Names of the columns of X and y; no targets where the tables had none.
    rows_per_chunk : int
        Rows in a chunk of the store.
    coding : Coding
        How the tables were coded; kept in the store, for `like`.
    """

    path: Path
    n_rows: int
    n_dropped: int
    dropped_by_column: dict[str, int]
    features: tuple[str, ...]
    targets: tuple[str, ...]
    rows_per_chunk: int
    coding: Coding


def ingest(
    sources: StrPath | Sequence[StrPath],
    destination: StrPath,
    *,
    formula: str | None = None,
    target: str | Sequence[str] | None = None,
    features: str | Sequence[str] | None = None,
    like: StrPath | None = None,
    weights: str | None = None,
    missing: Missing = "error",
    rows_per_chunk: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    reading: Reading | None = None,
) -> IngestReport:
    """Turn CSV and Parquet files into a store of rows to fit, with a checksum on every chunk.

    The files are streamed once, or twice when there are categories, whose levels are collected over all files first. The memory
    this takes depends neither on how many rows there are nor on how many columns a formula makes of each. The store appears at
    `destination` only when it is whole. What it holds depends on the rows and their order alone, not on how files or blocks divide
    them.

    Parameters
    ----------
    sources : path or sequence of paths
        CSV files (UTF-8, a header, commas; plain, gzip, or alone in a zip) and Parquet files, read in this order.
    destination : path
        The zarr group to write; apart from the sources and from `like`.
    formula : str, optional
        Like "y ~ a + C(b) + a:C(b)": C() marks categories, all else is a number. The first level in sorted order is the reference.
    target : str or sequence of str, optional
        Instead of a formula: number columns to predict, taken as they are.
    features : str or sequence of str, optional
        With `target`: number columns to predict from. Default: all others.
    like : path, optional
        Instead of both: a store or model whose coding to follow. Tables without its targets, or with no cell of them filled,
        give a store of X alone.
    weights : str, optional
        The column with the weights of the rows. With `like`, the coding says which.
    missing : "error" or "drop"
        What to do about a row with a missing cell (empty, NA, NaN, nan, null or NULL) in a column that is used: stop, or leave the
        row out.
    rows_per_chunk : int, optional
        Rows in a chunk. Default: about 16 MB of X.
    overwrite : bool
        Replace what is at `destination`.
    progress : callable, optional
        Called after each block with "levels" or "rows", and the number of rows read so far.
    reading : Reading, optional
        Who reads the files and writes the rows; by default this process, one file after another. The store is the same.

    Returns
    -------
    IngestReport
        What was written and left out.

    Raises
    ------
    UsageError, PathNotFound, OutputExists
        The request contradicts itself or the tables: an unknown column, a formula that cannot be used, a path.
    BadCell, UnknownLevel, NonFiniteValue
        A cell that cannot be read, is missing, infinite, or of a level unknown to `like`; says file, line and column.
    DataError, UnsupportedDtype, NoRows, StoreChanged
        A damaged file, columns that hold no numbers, no row left, a file that changed while it was read.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> table = Path(folder.name) / "sales.csv"
    >>> _ = table.write_text("price,size,kind\\n10,1,a\\n25,2,b\\n,3,a\\n31,3,b\\n")
    >>> report = ingest(table, Path(folder.name) / "sales.zarr", formula="price ~ size + C(kind)", missing="drop")
    >>> report.n_rows, report.dropped_by_column, report.features
    (3, {'price': 1}, ('size', 'kind=b'))
    >>> folder.cleanup()
    """
    if missing not in ("error", "drop"):
        raise UsageError(f"missing is {missing!r}; it should be 'error' or 'drop'")
    paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not paths:
        raise UsageError("there is nothing to ingest; name at least one CSV or Parquet file")
    parsed = _check_request(formula, target, features, like, weights)
    _check_apart(destination, paths if like is None else [*paths, like])
    tables, reading = [open_table(path) for path in paths], reading or OneAfterAnother()
    with publish(destination, overwrite=overwrite, folder=True) as beside:
        n_expected, with_targets = None, True
        if like is not None:
            coding = load_coding(like)
            with_targets = _has_targets(coding, tables)
        elif parsed is None:
            coding = _coding_of_columns(_names(target), None if features is None else _names(features), weights, tables)
        else:
            others = [*parsed.target_columns, *parsed.numbers, *_names(weights)]
            _check_columns(tables, [*others, *parsed.categories])
            levels: dict[str, list[str]] = {}
            if parsed.categories:
                levels, n_expected = reading.levels(tables, parsed.categories, others, missing, progress)
            coding = Coding.of_formula(parsed, levels, weights)
        rows = TableRows(coding, with_targets, missing)
        with rows.writer(beside, rows_per_chunk) as writer:
            counts = reading.write(writer, rows, tables, progress)
            tally = {"rows_read": counts.read, "rows_dropped": counts.dropped, "dropped_by_column": counts.by_column}
            writer.finish(coding=coding.to_json(), counts=tally)
        if n_expected not in (None, counts.read):
            raise StoreChanged(
                f"the tables had {n_expected:,} rows, and {counts.read:,} when read again; ingest when nobody writes to them"
            )
    return IngestReport(
        path=Path(destination),
        n_rows=writer.n_rows,
        n_dropped=counts.dropped,
        dropped_by_column=counts.by_column,
        features=coding.features,
        targets=coding.targets if with_targets else (),
        rows_per_chunk=writer.rows_per_chunk,
        coding=coding,
    )


def _names(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _check_request(formula: str | None, target: object, features: object, like: object, weights: object) -> RowFormula | None:
    """Make sure that the request says once what is wanted; read its formula."""
    given = [name for name, value in (("formula", formula), ("target", target), ("like", like)) if value is not None]
    if len(given) != 1:
        raise UsageError(f"got {' and '.join(given) or 'neither formula nor target nor like'}; give exactly one of the three")
    if features is not None and target is None:
        raise UsageError(f"features go with target; {given[0]} says by itself which columns are used")
    if weights is not None and like is not None:
        raise UsageError("the coding that `like` names says which column holds the weights; leave weights out")
    return None if formula is None else parse_formula(formula)


def _check_apart(destination: StrPath, inputs: Sequence[StrPath]) -> None:
    """Refuse to write to what is read, into it or around it: `overwrite` would take the input away."""
    output = Path(os.path.realpath(destination))
    for given in inputs:
        place = Path(os.path.realpath(given))
        if place == output or place in output.parents or output in place.parents:
            raise UsageError(
                f"the output {os.fspath(destination)} is the input {os.fspath(given)}, or one lies inside the other; write the "
                "store to a path of its own"
            )


def _check_columns(tables: Sequence[Table], names: Sequence[str]) -> None:
    for table in tables:
        for name in names:
            if name not in table.columns:
                close = difflib.get_close_matches(name, table.columns, n=3)
                hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"its columns are {_listed(table.columns)}"
                raise UsageError(f"{table.path} has no column {name!r}; {hint}")


def _coding_of_columns(targets: list[str], features: list[str] | None, weights: str | None, tables: Sequence[Table]) -> Coding:
    special = [*targets, *_names(weights)]
    if not targets or features == []:
        raise UsageError("the list of targets or features is empty; name at least one column")
    _check_columns(tables, [*special, *(features or [])])
    chosen = features or [name for name in tables[0].columns if name not in special]
    if features is None:
        _check_all_others(tables, chosen, special)
    repeated = [name for name, count in Counter([*chosen, *special]).items() if count > 1]
    if repeated:
        raise UsageError(f"the column {repeated[0]!r} is named twice among features, target and weights; name it once")
    return Coding.of_columns(chosen, targets, weights)


def _check_all_others(tables: Sequence[Table], chosen: list[str], special: list[str]) -> None:
    """Make sure that "all other columns" is the same in every table, and means numbers."""
    if not chosen:
        raise UsageError(f"{tables[0].path} has no column but {_listed(special)}; nothing is left to predict from")
    for table in tables:
        differing = sorted({*chosen, *special} ^ set(table.columns))
        if differing:
            raise DataError(
                f"{table.path} and {tables[0].path} differ in the columns {_listed(differing)}; name the features to use"
            )
        words = wordy_columns(table, chosen)
        if words:
            raise UnsupportedDtype(
                f"{table.path}: the columns {_listed(words)} hold text; name number columns as features (--features), "
                f'or code categories by a formula, as in --formula "{special[0]} ~ ... + C({words[0]})"'
            )


def _has_targets(coding: Coding, tables: Sequence[Table]) -> bool:
    """Tell whether these tables have the targets of the coding (all in every one) or not (none in any); check for all else.

    Columns of targets without a single value count as absent: that is how rows to be predicted often come.
    """
    absent = [(table, name) for table in tables for name in coding.target_columns if name not in table.columns]
    if absent and len(absent) < len(tables) * len(coding.target_columns):
        table, name = absent[0]
        raise DataError(
            f"{table.path} has no target column {name!r}, but others are there; give all targets in all tables, or none"
        )
    with_targets = not absent and any(
        not np.isnan(column).all()
        for table in tables
        for batch in read_batches(table, numbers=coding.target_columns)
        for column in batch.numbers.values()
    )
    needed = [*coding.numbers, *coding.levels, *(_names(coding.weights) if with_targets else [])]
    _check_columns(tables, needed)
    return with_targets


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
