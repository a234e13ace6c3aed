"""Solvers are values that own their options; words stand for values with defaults."""

from __future__ import annotations

from typing import Any

from streamlr.descent.options import MODES, Descent
from streamlr.direct.routes import ROUTES, Direct
from streamlr.errors import UsageError

Solver = str | Direct | Descent


def solver_named(solver: Any) -> Direct | Descent:
    """Return the solver that a word stands for; a solver stands for itself.

    Raises
    ------
    UsageError
        It is neither.

    Examples
    --------
    >>> solver_named("auto")
    Direct(route='auto', rank='min_norm', precision='double')
    >>> solver_named("sgd").mode
    'sgd'
    """
    if isinstance(solver, Direct | Descent):
        return solver
    if isinstance(solver, str) and solver in ROUTES:
        return Direct(solver)
    if isinstance(solver, str) and solver in MODES:
        return Descent(solver)
    allowed = ", ".join(map(repr, (*ROUTES, *MODES)))
    raise UsageError(f"solver is {solver!r}; allowed are {allowed}, and values such as Direct('normal') and Descent('sgd')")
