"""What a reading met besides the rows it kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from streamlr.errors import PrecisionWarning


@dataclass(frozen=True)
class Tally:
    """What a reading met besides the rows it kept; tallies of disjoint rows add up.

    Attributes
    ----------
    rows : int
        Rows read.
    dropped : int
        Rows left out because a value was missing.
    dropped_by_column : mapping of str to int
        For each column, how many of those rows lacked its value.
    chunks_missing : int
        Absent chunks read as fill values, where that was allowed.
    rounded : frozenset of str
        Columns with integers beyond 2**53, which float64 rounds.
    """

    rows: int = 0
    dropped: int = 0
    dropped_by_column: Mapping[str, int] = field(default_factory=dict)
    chunks_missing: int = 0
    rounded: frozenset[str] = frozenset()

    def __add__(self, other: Tally) -> Tally:
        names = sorted({*self.dropped_by_column, *other.dropped_by_column})
        by_column = {name: self.dropped_by_column.get(name, 0) + other.dropped_by_column.get(name, 0) for name in names}
        return Tally(
            self.rows + other.rows,
            self.dropped + other.dropped,
            by_column,
            self.chunks_missing + other.chunks_missing,
            self.rounded | other.rounded,
        )


def warn_rounded(tally: Tally, *, stacklevel: int) -> None:
    """Warn of columns whose integers float64 rounds, where there are any; the caller is `stacklevel` calls up."""
    if tally.rounded:
        names = ", ".join(map(repr, sorted(tally.rounded)))
        warnings.warn(
            f"column {names} holds integers beyond 2**53, which float64 rounds; subtract a constant before storing them, "
            "if their last digits matter",
            PrecisionWarning,
            stacklevel=stacklevel + 1,
        )
