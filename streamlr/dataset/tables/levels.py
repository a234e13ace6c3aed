"""The levels of categories, collected over all files before any row is coded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise

from streamlr.dataset.tables.batches import Table
from streamlr.dataset.tables.csv_files import NUMERAL
from streamlr.dataset.tables.missing import Missing, RowCounts, check_rows_left, kept_rows
from streamlr.errors import DataError

MOST_LEVELS = 10_000
Progress = Callable[[str, int], None]


def collect_levels(
    tables: Sequence[Table], categories: Sequence[str], others: Sequence[str], missing: Missing, progress: Progress | None = None
) -> tuple[dict[str, list[str]], int]:
    """Return the sorted levels of each category, and the number of rows read; the first level is the reference.

    Parameters
    ----------
    tables : sequence of Table
        All files.
    categories : sequence of str
        Columns whose levels are wanted.
    others : sequence of str
        Number columns that will be used as well. With "drop" they are read too: a level that occurs only in rows to be left out
        is no level, since nothing could be learned about it.
    missing : "error" or "drop"
        What to do about a row with a missing cell.
    progress : callable, optional
        Called after each block with "levels" and the number of rows read so far.

    Raises
    ------
    DataError
        A category has more than 10,000 levels, or two levels that are one number spelled in two ways.
    BadCell, NoRows
        As `complete_rows`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from streamlr.dataset.tables.batches import open_table
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "t.csv"
    >>> _ = path.write_text("month,kind\\n10,b\\n9,a\\n9,b\\n")
    >>> collect_levels([open_table(path)], ["month", "kind"], [], "error")
    ({'month': ['9', '10'], 'kind': ['a', 'b']}, 3)
    >>> folder.cleanup()
    """
    counts = RowCounts()
    note = None if progress is None else lambda: progress("levels", counts.read)
    found = levels_in(tables, categories, others, missing, counts, note)
    check_rows_left(tables, counts)
    return {column: sort_levels(column, levels) for column, levels in found.items()}, counts.read


def levels_in(
    tables: Sequence[Table],
    categories: Sequence[str],
    others: Sequence[str],
    missing: Missing,
    counts: RowCounts,
    note: Callable[[], None] | None,
) -> dict[str, set[str]]:
    """Return the levels of each category in tables that may be a part of all; count rows, and call `note` after each block."""
    found: dict[str, set[str]] = {column: set() for column in categories}
    for batch in kept_rows(tables, others if missing == "drop" else (), categories, missing, counts):
        for column, levels in found.items():
            levels.update(batch.texts[column].unique().to_pylist())
            check_levels(column, levels, partial(batch.place, 0, column))  # to find the line, a file is read from its start
        if note is not None:
            note()
    return found


def check_levels(column: str, levels: Collection[str], place: Callable[[], object]) -> None:
    """Raise `DataError` where a category has more levels than a column of a design for each would be worth."""
    if len(levels) > MOST_LEVELS:
        raise DataError(
            f"{place()}: from here on there are more than {MOST_LEVELS:,} levels; is it an identifier? "
            f"Group its levels in the table, or leave C({column}) out of the formula"
        )


def sort_levels(column: str, levels: Collection[str]) -> list[str]:
    """Sort levels as numbers if they all are, else as text by code points.

    Raises
    ------
    DataError
        Two levels are one number spelled in two ways.

    Examples
    --------
    >>> sort_levels("month", ["10", "9"]), sort_levels("gate", ["10", "9", "A"])
    (['9', '10'], ['10', '9', 'A'])
    """
    if not all(NUMERAL.fullmatch(level) for level in levels):
        return sorted(levels)
    ordered = sorted(levels, key=float)
    for one, other in pairwise(ordered):
        if float(one) == float(other):
            raise DataError(
                f"the category {column!r} has levels {one!r} and {other!r}, one number spelled in two ways; spell it in one"
            )
    return ordered
