"""Every error and warning of the package; each is also a builtin, and each error knows its exit status.

An `OSError` stands first among the bases of a class: its instances have a layout of their own, and whoever rebuilds an error that
came from another process takes the `__new__` of the first base.
"""

from __future__ import annotations

from typing import Any, ClassVar


class StreamlrError(Exception):
    """The base of all errors of this package; `exit_status` is what the command line returns."""

    exit_status: ClassVar[int] = 1


class UsageError(StreamlrError, ValueError):
    """A request that cannot be carried out as written: a bad value, an unknown name."""

    exit_status = 2


class PathNotFound(FileNotFoundError, UsageError):
    """A path that leads nowhere."""


class OutputExists(FileExistsError, UsageError):
    """An output is already there and `overwrite` was not asked for."""


class DataError(StreamlrError, ValueError):
    """The data are wrong or incomplete."""

    exit_status = 3


class ChunkMissing(FileNotFoundError, DataError):
    """A chunk that the metadata promises is absent or empty."""


class ChunkCorrupt(OSError, DataError):
    """A chunk is there but cannot be what was written: too short, undecodable, a wrong checksum."""


class NonFiniteValue(DataError):
    """A NaN or an infinity among the rows."""


class UnsupportedDtype(DataError, TypeError):
    """A column that is not made of real numbers."""


class RowCountMismatch(DataError):
    """Arrays that should have the same rows do not, or a pass saw fewer rows than promised."""


class NoRows(DataError):
    """No row is left to learn from."""


class StoreIncomplete(DataError):
    """A store whose writing was never finished, or whose metadata no longer match its manifest."""


class StoreChanged(DataError, RuntimeError):
    """A store was rewritten while it was being read."""


class BadCell(DataError):
    """A cell of a table that cannot be read as what its column holds."""


class UnknownLevel(DataError, LookupError):
    """A category that was not among the levels when the coding was fixed."""


class BadFile(DataError):
    """A file of ours that is damaged, of another format, or of a newer version."""


class NumericalError(StreamlrError, ArithmeticError):
    """The numbers failed: an overflow, a singular system where that was forbidden."""

    exit_status = 4


class RankDeficient(NumericalError):
    """Columns depend on others, and the caller asked for an error in that case."""


class Diverged(NumericalError):
    """A descent went up instead of down.

    Attributes
    ----------
    coef, intercept : array or float
        The best coefficients before that, in the user's units.
    history : list
        What was recorded.
    """

    def __init__(self, message: str, coef: Any = None, intercept: Any = None, history: Any = ()) -> None:
        super().__init__(message, coef, intercept, history)
        self.coef, self.intercept, self.history = coef, intercept, history

    def __str__(self) -> str:
        return str(self.args[0])


class ResourceError(StreamlrError, RuntimeError):
    """Memory, disk, network or cluster do not suffice."""

    exit_status = 5


class MemoryLimitExceeded(ResourceError, MemoryError):
    """The plan needs more memory than the limit allows."""


class ClusterError(ResourceError):
    """A Dask cluster cannot do the work: it has no workers, they died, or they do not have what they need."""


class StoreUnreachable(ConnectionError, ResourceError):
    """A store at a URL that does not answer, or not to us."""


class Cancelled(StreamlrError, RuntimeError):
    """A pass was cancelled while it ran."""

    exit_status = 130


class StreamlrWarning(UserWarning):
    """The base of all warnings of this package."""


class RankWarning(StreamlrWarning):
    """Some columns depend on others; the solution is one of many."""


class PrecisionWarning(StreamlrWarning):
    """Digits were lost: badly conditioned columns, or integers that float64 cannot hold."""
