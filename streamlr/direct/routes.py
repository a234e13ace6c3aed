"""Direct: the options of the closed form, as a value; and the solution it leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamlr.errors import UsageError

ROUTES = ("auto", "normal")
RANKS = ("min_norm", "drop", "error")
PRECISIONS = ("double", "single")


@dataclass(frozen=True, slots=True)
class Direct:
    """Solve the normal equations, from one pass over the rows.

    Parameters
    ----------
    route : "auto" or "normal"
        "normal": from moments, by Cholesky, or by eigenvectors where the rank is short. "auto" takes that route.
    rank : "min_norm", "drop" or "error"
        What columns that depend on others do: share the solution of least norm in the user's units; get the coefficient 0, the
        later ones of each dependent set; or raise `RankDeficient`.
    precision : "double" or "single"
        "single" makes the products of rows of float32 numbers, for features stored as float32 or less: where columns are many, in
        half the time. Coefficients of equilibrated columns then keep about 6 digits, less twice those of their condition.

    Raises
    ------
    UsageError
        An option is not one of those.

    Examples
    --------
    >>> Direct("normal", rank="error")
    Direct(route='normal', rank='error', precision='double')
    """

    route: str = "auto"
    rank: str = "min_norm"
    precision: str = "double"

    def __post_init__(self) -> None:
        options = ("route", self.route, ROUTES), ("rank", self.rank, RANKS), ("precision", self.precision, PRECISIONS)
        for name, value, allowed in options:
            if value not in allowed:
                raise UsageError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Coefficients, and how they were found.

    Attributes
    ----------
    coef : (p, k) float64
        Coefficients in the user's units.
    intercept : (k,) float64
        Intercepts; zeros where there is none.
    rank : int
        Feature columns that do not depend on others; under ridge all, unless the penalty vanishes beside them.
    condition : float
        Condition number of the equilibrated columns: 2-norm, over the directions that count in the rank.
    digits : float
        Correct decimal digits that this condition leaves to coefficients of equilibrated columns, at the least.
    route : "cholesky" or "eigen"
        How they were found.
    aliased : mapping of str to mapping of str to float
        For each dependent column, the combination of others that it equals; empty for a constant column.
    inverse_root : (p,) float64
        Square roots of the diagonal of (X'WX)^-1, the columns centred where there is an intercept; NaN for columns that share a
        coefficient with others, that were dropped or that are constant, and under ridge.
    mean_leverage : float
        mean(x)'(X'WX)^-1 mean(x), for the variance of the intercept; NaN where columns share a coefficient, and under ridge.
    """

    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    rank: int
    condition: float
    digits: float
    route: str
    aliased: Mapping[str, Mapping[str, float]]
    inverse_root: NDArray[np.float64]
    mean_leverage: float
