"""What the command line's flags of a solver stand for."""

from __future__ import annotations

from typing import Any

from streamlr.descent import schedules
from streamlr.descent.options import MODES, Descent
from streamlr.errors import UsageError

SCHEDULES = {"constant": "Constant", "inverse": "InverseScaling", "exponential": "Exponential", "cosine": "Cosine"}


def solver_of(name: str, **options: Any) -> Any:
    """Return what --solver names, with those options of a descent that were given."""
    given = {option: value for option, value in options.items() if value is not None}
    if name not in MODES:
        if given:
            flag = "--" + next(iter(given)).replace("_", "-")
            raise UsageError(
                f"{flag} is an option of gradient descent, and the solver is {name!r}; add --solver minibatch, sgd or gd"
            )
        return name
    if given.get("scale") == "none":
        given["scale"] = None
    if "learning_rate" in given:
        given["learning_rate"] = _rate_of(given["learning_rate"])
    return Descent(name, **given)


def _rate_of(text: str) -> Any:
    """Return what --learning-rate names: "auto", a number, or a schedule such as cosine:0.1,1000."""
    if text == "auto":
        return text
    name, _, numbers = text.rpartition(":")
    try:
        values = [float(number) for number in numbers.split(",")]
        return getattr(schedules, SCHEDULES[name or "constant"])(*values)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        allowed = ", ".join(f"{name}:..." for name in SCHEDULES)
        raise UsageError(
            f"the learning rate is {text!r}; allowed are auto, a number, and {allowed} with the schedule's numbers, such as "
            "cosine:0.1,20000; they count steps"
        ) from error
