"""Numbers that users give, checked: real, and in the range that is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamlr.errors import UsageError


def number_above_zero(name: str, value: Any) -> float:
    """Return a finite number above zero.

    Raises
    ------
    UsageError
        It is none; the message has its name.

    Examples
    --------
    >>> number_above_zero("rate", 1)
    1.0
    """
    number = real_number(value)
    if not 0 < number < np.inf:
        raise UsageError(f"{name} is {value!r}; allowed are finite numbers above zero")
    return number


def number_from_zero(name: str, value: Any, high: float, *, included: bool = False) -> float:
    """Return a number from zero to below `high`, or to `high` itself where that is included.

    Raises
    ------
    UsageError
        It is none; the message has its name.

    Examples
    --------
    >>> number_from_zero("decay", 0.5, 1.0)
    0.5
    """
    number = real_number(value)
    if not (0 <= number < high or (included and number == high)):
        bound = "on" if high == np.inf else f"to {high:g}" if included else f"to below {high:g}"
        raise UsageError(f"{name} is {value!r}; allowed are numbers from 0 {bound}")
    return number


def whole_number(name: str, value: Any, least: int) -> int:
    """Return a whole number from `least` on.

    Raises
    ------
    UsageError
        It is none; the message has its name.

    Examples
    --------
    >>> whole_number("seed", 0, 0)
    0
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UsageError(f"{name} is {value!r}; allowed are whole numbers from {least} on")
    return int(value)


def real_number(value: Any) -> float:
    """Return a number as a float, and NaN for anything else; True is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return float("inf")
