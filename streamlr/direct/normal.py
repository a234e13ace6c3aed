"""The normal equations: from moments to coefficients.

With an intercept the columns are centred, X'WX is the scatter itself and the intercept is mean(y) - mean(x)'b, so it costs the
other coefficients no digits; without one the means are added back. The equations are equilibrated, C = D^-1 (X'WX + ridge W I) D^-1
with D the root of the diagonal, which brings the condition number within a factor p of the best that any scaling of the columns can
do (van der Sluis 1969, theorem 4.1), and makes the rank a property of the columns and not of their units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, log10

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from streamlr.aggregates.moments import Moments
from streamlr.direct.routes import Direct, Solution
from streamlr.errors import NoRows, NumericalError, RankDeficient, UsageError

Matrix = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
CANCELLED = 1e-10  # in a null vector, at least what eigenvectors leave of a column that is no part of the dependence


@dataclass(frozen=True, slots=True)
class Equations:
    """Equilibrated normal equations of the columns that vary, in their units.

    Attributes
    ----------
    varies : (p,) bool
        False for constant columns (with an intercept) or zero ones (without).
    matrix : (r, r) float64
        C, with unit diagonal, of the r columns that vary.
    right : (r, k) float64
        D^-1 X'Wy.
    scale : (r,) float64
        The diagonal of D, in units of 2**exponent.
    """

    varies: NDArray[np.bool_]
    matrix: Matrix
    right: Matrix
    scale: NDArray[np.float64]


def solve_normal(moments: Moments, direct: Direct, *, fit_intercept: bool, ridge: float) -> Solution:
    r"""Minimise J(b) + ridge |b|^2 from moments of the rows.

    .. math:: (X'WX + \lambda W I) b = X'Wy

    Where C has an eigenvalue below 8 p eps times its largest, the rank is short: the solution is then found from the other
    eigenvectors, and is the one among all minimisers that has the least |b| in the user's units.

    Parameters
    ----------
    moments : Moments
        Of [X y].
    direct : Direct
        The options.
    fit_intercept : bool
        Whether b0 is fitted; it is never penalised.
    ridge : float
        The penalty; scikit-learn's alpha divided by W.

    Raises
    ------
    NoRows
        No row with a weight above zero.
    RankDeficient
        The rank is short and `direct.rank` is "error".
    NumericalError
        A coefficient is too large for float64.

    References
    ----------
    van der Sluis (1969), Condition numbers and equilibration of matrices, Numerische Mathematik 14.
    """
    _check(moments, ridge)
    p, unit = moments.n_features, moments.units
    equations = _equations(moments, fit_intercept=fit_intercept, ridge=ridge)
    varies = equations.varies
    eigenvalues = scipy.linalg.eigvalsh(equations.matrix) if varies.any() else np.empty(0)
    cutoff = 8 * EPS * len(eigenvalues) * eigenvalues.max(initial=0.0)
    short = int((eigenvalues <= cutoff).sum())
    rank = len(eigenvalues) - short
    aliased: dict[str, Mapping[str, float]] = {}
    if ridge == 0:  # the penalty leaves no choice: the coefficient of a constant is 0
        aliased = {moments.feature_names[j]: {} for j in np.flatnonzero(~varies)}
    mean = moments.mean[:p][varies] / equations.scale
    if short == 0:
        route = "cholesky"
        solved, inverse, mean_leverage = _by_cholesky(equations, mean)
    else:
        route = "eigen"
        units = np.ldexp(equations.scale, np.maximum(unit[:p][varies] - unit[:p][varies].max(), -1000))
        solved, inverse, mean_leverage, combinations = _by_eigenvectors(equations, mean, cutoff, units, drop=direct.rank == "drop")
        names = [moments.feature_names[j] for j in np.flatnonzero(varies)]
        for j, weights in combinations.items():
            aliased[names[j]] = {names[i]: float(weights[i] * units[j] / units[i]) for i in np.flatnonzero(weights)}
    if aliased and direct.rank == "error":
        raise RankDeficient(f"{describe_aliases(aliased)}; leave them out, or choose rank='min_norm' or rank='drop'")
    coef, intercept, inverse_root = np.zeros((p, moments.n_targets)), np.zeros(moments.n_targets), np.full(p, np.nan)
    if fit_intercept:
        intercept[:] = [moments.mean[p + j] - fsum(mean * solved[:, j]) for j in range(moments.n_targets)]
    with np.errstate(over="ignore", under="ignore"):
        coef[varies] = np.ldexp(solved, unit[p:] - unit[:p][varies, None]) / equations.scale[:, None]
        intercept = np.ldexp(intercept, unit[p:])
        inverse_root[varies] = np.ldexp(np.sqrt(inverse) / equations.scale, -unit[:p][varies])
    if ridge > 0:
        inverse_root[:], mean_leverage = np.nan, np.nan
    if not (np.isfinite(coef).all() and np.isfinite(intercept).all()):
        raise NumericalError("a coefficient is beyond the range of float64; measure that column, or the target, in a larger unit")
    condition = float(np.sqrt(eigenvalues[-1] / eigenvalues[short])) if rank else 1.0
    digits = max(-log10(EPS) - 2 * log10(condition), 0.0)
    if ridge > 0:
        rank += int((~varies).sum())
    return Solution(coef, intercept, rank, condition, digits, route, aliased, inverse_root, mean_leverage)


def solve_bytes(n_features: int, n_targets: int) -> int:
    """Return the bytes that `solve_normal` needs beside the moments: C, its copy, its eigenvectors and their workspace."""
    return 8 * (6 * n_features**2 + 8 * n_features * (n_targets + 4))


def describe_aliases(aliased: Mapping[str, Mapping[str, float]]) -> str:
    """Say which columns depend on which others.

    Examples
    --------
    >>> describe_aliases({"c": {"a": 1.0, "b": 2.0}, "one": {}})
    '2 columns depend on others: c = 1 a + 2 b, one is constant'
    """
    shown = []
    for name, combination in list(aliased.items())[:5]:
        terms = " + ".join(f"{weight:.6g} {other}" for other, weight in list(combination.items())[:5])
        shown.append(f"{name} = {terms}{' + ...' if len(combination) > 5 else ''}" if combination else f"{name} is constant")
    more = f" and {len(aliased) - 5} more" if len(aliased) > 5 else ""
    return f"{len(aliased)} column{'s depend' if len(aliased) > 1 else ' depends'} on others: {', '.join(shown)}{more}"


def _check(moments: Moments, ridge: float) -> None:
    if not (np.isfinite(ridge) and ridge >= 0):
        raise UsageError(f"ridge is {ridge!r}; allowed are finite numbers from 0 on")
    if moments.n_targets == 0:
        raise UsageError("there is no target to fit: name one with target= (--target), or give y")
    if moments.n_weighted == 0:
        raise NoRows("no row with a weight above zero is left to fit; check weights, missing= and the split")


def _equations(moments: Moments, *, fit_intercept: bool, ridge: float) -> Equations:
    p, total = moments.n_features, moments.weight_sum
    gram = moments.scatter if fit_intercept else moments.scatter + total * np.outer(moments.mean, moments.mean)
    constant = moments.constant if fit_intercept else np.diagonal(gram) <= 0
    varies = ~constant[:p]
    matrix = gram[:p, :p][np.ix_(varies, varies)]
    right = np.where(constant[p:], 0.0, gram[:p, p:][varies])
    # the penalty is on coefficients in the user's units, of which one unit of the scaled column has 2**exponent
    penalty_root = np.ldexp(np.sqrt(ridge) * np.sqrt(total), -moments.units[:p][varies])
    scale = np.hypot(np.sqrt(np.diagonal(matrix)), penalty_root)
    matrix = matrix / scale[:, None] / scale
    np.fill_diagonal(matrix, 1.0)
    return Equations(varies, matrix, right / scale[:, None], scale)


def _by_cholesky(equations: Equations, mean: NDArray[np.float64]) -> tuple[Matrix, NDArray[np.float64], float]:
    """Return the solution of C z = right, the diagonal of C^-1, and mean'C^-1 mean."""
    if len(equations.matrix) == 0:
        return equations.right, np.empty(0), 0.0
    factor = scipy.linalg.cho_factor(equations.matrix, lower=True)
    solved = scipy.linalg.cho_solve(factor, np.column_stack([equations.right, mean]))
    inverse, _ = scipy.linalg.lapack.dpotri(factor[0], lower=True)
    return solved[:, :-1], np.diagonal(inverse).copy(), float(mean @ solved[:, -1])


def _by_eigenvectors(
    equations: Equations, mean: NDArray[np.float64], cutoff: float, units: NDArray[np.float64], *, drop: bool
) -> tuple[Matrix, NDArray[np.float64], float, dict[int, NDArray[np.float64]]]:
    """Return a minimiser, as `_by_cholesky` does, and which column is which combination of others (equilibrated).

    The minimisers are z + N t, with N a basis of the null space of C. A later column of each dependence is expressed by earlier ones:
    from the last column up, the first independent rows of N are made an identity. With R = V L^-1/2 of the other eigenvectors,
    z = R R' right and its covariance is R R'; dropping the later columns turns R into R - N R[later].
    """
    eigenvalues, vectors = scipy.linalg.eigh(equations.matrix)
    kept = eigenvalues > cutoff
    null = vectors[:, ~kept]
    later = _independent_rows_from_below(null)
    null = scipy.linalg.solve(null[later].T, null.T).T
    gap = eigenvalues[kept][0] / eigenvalues[-1]
    null[np.abs(null) < min(max(CANCELLED, 64 * EPS / gap), 1e-3)] = 0.0  # eigenvectors are off by eps / gap
    combinations = {}
    for column, j in enumerate(later):
        combinations[j] = -null[:, column]
        combinations[j][j] = 0.0
    v = vectors[:, kept]
    projected = (v.T @ equations.right) / eigenvalues[kept][:, None]
    root = v / np.sqrt(eigenvalues[kept])
    if drop:
        root -= null @ root[later]
        root[later] = 0.0
        inverse = (root**2).sum(axis=1)
        inverse[later] = np.nan
        z = root @ (np.sqrt(eigenvalues[kept])[:, None] * projected)
        return z, inverse, float(((mean @ root) ** 2).sum()), combinations
    z, inverse = v @ projected, (root**2).sum(axis=1)
    involved = null.any(axis=1)
    inverse[involved] = np.nan
    z[involved] = _least_norm(v, projected, units)[involved]
    return z, inverse, np.nan, combinations


def _least_norm(v: Matrix, projected: Matrix, units: NDArray[np.float64]) -> Matrix:
    """Return z = D b with V'z = `projected` and the least |b|, where D is `units`.

    Such a b is a combination of the columns of D V = Q R, so b = Q R^-T projected. Rows in the order of their size and pivoted columns
    keep small units accurate beside large ones (Cox and Higham 1998, Stability of Householder QR for weighted least squares).
    """
    rows = np.argsort(-units, kind="stable")
    q, r, order = scipy.linalg.qr((units[:, None] * v)[rows], mode="economic", pivoting=True)
    b = np.empty((len(units), projected.shape[1]))
    b[rows] = q @ scipy.linalg.solve_triangular(r, projected[order], trans="T")
    return units[:, None] * b


def _independent_rows_from_below(null: Matrix) -> list[int]:
    """Return the last rows of a null basis that are independent, as many as it has columns."""
    remaining = null.copy()
    found: list[int] = []
    threshold = 1e-6
    while len(found) < null.shape[1]:
        for j in range(len(remaining) - 1, -1, -1):
            if len(found) == null.shape[1]:
                break
            size = float(np.linalg.norm(remaining[j]))
            if j not in found and size > threshold:
                direction = remaining[j] / size
                remaining -= np.outer(remaining @ direction, direction)
                found.append(j)
        threshold /= 100
    return sorted(found)
