"""Standard errors, t, p and confidence intervals of the exact fit, for independent errors of one variance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamlr.aggregates.moments import Moments
from streamlr.direct.routes import Solution

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class StandardErrors:
    """Standard errors of coefficients and intercept.

    Attributes
    ----------
    coef : (p, k) float64
        NaN for columns that are part of a dependence; with rank="drop", for those that were dropped.
    intercept : (k,) float64
        NaN where there is none, or where columns share a coefficient.
    df_resid : int
        Rows with a weight above zero, less rank, less one for an intercept; never below 0.
    """

    coef: Array
    intercept: Array
    df_resid: int


def standard_errors(moments: Moments, solution: Solution, residual_squares: Array, *, fit_intercept: bool) -> StandardErrors:
    r"""Return the classical standard errors.

    .. math:: \mathrm{se}(b_j)^2 = s^2 [(X'WX)^{-1}]_{jj}, \quad s^2 = \mathrm{RSS} / (n - \mathrm{rank} - 1)

    Parameters
    ----------
    moments, solution : Moments, Solution
        The rows and the fit to them.
    residual_squares : (k,) float64
        Weighted residual sums of squares, in units of 4**exponent of each target.
    fit_intercept : bool
        Whether an intercept was fitted.

    References
    ----------
    Seber and Lee (2003), Linear Regression Analysis, equations 3.11 and 3.12.
    """
    df = max(moments.n_weighted - solution.rank - int(fit_intercept), 0)
    # by roots, in units of the target: squares of a column such as 1e200 are beyond float64
    unit = moments.units[moments.n_features :]
    deviation = np.sqrt(residual_squares / df) if df else np.full_like(residual_squares, np.nan)
    leverage = 1 / moments.weight_sum + solution.mean_leverage if fit_intercept else np.nan
    with np.errstate(over="ignore", under="ignore"):
        coef = np.ldexp(solution.inverse_root[:, None] * deviation, unit)
        intercept = np.ldexp(np.sqrt(leverage) * deviation, unit)
    return StandardErrors(coef, intercept, df)


def t_table(coef: Array, std_err: Array, df: int, level: float) -> tuple[Array, Array, Array]:
    """Return t values, two-sided p values and confidence intervals (m, 2) of coefficients and their standard errors, both (m,)."""
    from scipy.special import stdtr, stdtrit  # Student's t; here, since it brings 17 MB or more, which a fit does without

    with np.errstate(divide="ignore", invalid="ignore"):
        t = coef / std_err
    p = 2 * stdtr(df, -np.abs(t)) if df else np.full_like(t, np.nan)
    half = std_err * (stdtrit(df, 0.5 + level / 2) if df else np.nan)
    return t, p, np.column_stack([coef - half, coef + half])


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """A table of coefficients with their uncertainty; `str()` prints it.

    Attributes
    ----------
    names : tuple of str
        Row names: the intercept, where there is one, then the features.
    coef, std_err, t, p : (m,) float64, or (m, k) with several targets
        Coefficients, standard errors, t values, two-sided p values.
    conf_int : (m, 2) float64, or (m, k, 2)
        Confidence intervals.
    df_resid : int
        Residual degrees of freedom.
    level : float
        Of the confidence intervals.
    """

    names: tuple[str, ...]
    target_names: tuple[str, ...]
    coef: Array
    std_err: Array
    t: Array
    p: Array
    conf_int: Array
    df_resid: int
    level: float
    head: str

    def __str__(self) -> str:
        width = max(12, *(len(name) for name in self.names))
        lines = [self.head]
        m = len(self.names)
        for j, target in enumerate(self.target_names):
            if np.isnan(self.std_err).all():  # under ridge, and after a descent
                lines += ["", f"{target:<{width}} {'coef':>14}"]
                lines += [
                    f"{name:<{width}} {coef:>14.7g}" for name, coef in zip(self.names, self.coef.reshape(m, -1)[:, j], strict=True)
                ]
                continue
            columns = [values.reshape(m, -1)[:, j] for values in (self.coef, self.std_err, self.t, self.p)]
            low, high = self.conf_int.reshape(m, -1, 2)[:, j].T
            lines += ["", f"{target:<{width}} {'coef':>14} {'std err':>12} {'t':>11} {'p':>9} {f'{self.level:.0%} interval':>28}"]
            for i, name in enumerate(self.names):
                coef, err, t, p = (values[i] for values in columns)
                lines.append(f"{name:<{width}} {coef:>14.7g} {err:>12.4g} {t:>11.4g} {p:>9.3g} {low[i]:>14.6g} {high[i]:>13.6g}")
        return "\n".join(lines)


def summarise(
    names: tuple[str, ...], target_names: tuple[str, ...], coef: Array, std_err: Array, df: int, level: float, head: str
) -> Summary:
    """Return the table of coefficients (m, k) with these standard errors (m, k)."""
    tables = [t_table(coef[:, j], std_err[:, j], df, level) for j in range(coef.shape[1])]
    t, p = (np.column_stack([table[i] for table in tables]) for i in (0, 1))
    conf_int = np.stack([table[2] for table in tables], axis=1)
    if len(target_names) == 1:
        return Summary(names, target_names, coef[:, 0], std_err[:, 0], t[:, 0], p[:, 0], conf_int[:, 0], df, level, head)
    return Summary(names, target_names, coef, std_err, t, p, conf_int, df, level, head)
