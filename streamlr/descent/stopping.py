"""The history of a descent, and the rules that look at it and say why to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from streamlr.aggregates.cost import Cost, number_or_array
from streamlr.descent.options import Descent
from streamlr.descent.updates import CLOSE
from streamlr.files import to_json

FALLING = 1e-3  # as a share of a cost: by more, a descent is not at its end


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What was seen at one moment of a descent: at the end of an epoch, or after `log_every` rows of it.

    Attributes
    ----------
    epoch : int
        Epochs finished, the running one included: 1 for the first.
    steps, rows : int
        Steps taken, and rows used, since the start.
    learning_rate : float
        alpha of the last step, before any cap.
    cost : Cost
        On the training rows of this epoch, from residuals as they were met: each before the step that it led to.
    validation : Cost or None
        On held-out rows, of the coefficients at this moment; None without validation, and within an epoch.
    gradient_norm : float
        Norm of the mean gradient of this epoch, in trained coordinates; for several targets, over all of them.
    gap : float, (k,) float64 or None
        J of the coefficients less that of the optimum, exactly, where moments exist.
    scale : str
        The coordinates: "standard", "whiten" or "none".
    seconds : float
        Since the start, less the time that a resumed run lay still.
    complete : bool
        Whether the epoch had ended.
    """

    epoch: int
    steps: int
    rows: int
    learning_rate: float
    cost: Cost
    validation: Cost | None
    gradient_norm: float
    gap: Any
    scale: str
    seconds: float
    complete: bool = True

    @property
    def watched(self) -> float:
        """What the stopping rules watch: J of the held-out rows where there are any; of several targets, the mean of 1 - R^2.

        Both fall by the same share. But R^2 knows only right and wrong where the target is constant, as in few held-out rows.
        """
        cost = self.cost if self.validation is None else self.validation
        return cost.mse if isinstance(cost.mse, float) else 1 - float(np.mean(cost.r2))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        validation = None if self.validation is None else self.validation.to_dict()
        values: dict[str, Any] = to_json({**facts, "cost": self.cost.to_dict(), "validation": validation})
        return values

    @classmethod
    def of_dict(cls, facts: Mapping[str, Any]) -> Record:
        """Return the record that `to_dict` described."""
        validation = None if facts["validation"] is None else Cost.of_dict(facts["validation"])
        gap = number_or_array(facts["gap"])
        return cls(**{**facts, "cost": Cost.of_dict(facts["cost"]), "validation": validation, "gap": gap})

    def __str__(self) -> str:
        held_out = "" if self.validation is None else f"  validation {_number(self.validation.mse)}"
        gap = "" if self.gap is None else f"  gap {_number(self.gap)}"
        within = "" if self.complete else f", {self.rows:,} rows"
        return (
            f"epoch {self.epoch:>3}{within}  mse {_number(self.cost.mse)}{held_out}{gap}  "
            f"rate {self.learning_rate:.2g}  {self.seconds:.1f} s"
        )


def verdict(history: Sequence[Record], first_norm: float, options: Descent, hold: int = 0) -> str:
    """Return why to stop after the last record, by the first of the rules that says so; empty to go on."""
    last = history[-1]
    return (
        level(history, first_norm, options.gradient_tol)
        or flat(settled(history, hold), options.tol, options.patience)
        or spent(last.epoch, last.seconds, options, falling(history))
        or ""
    )


def settled(history: Sequence[Record], hold: int) -> Sequence[Record]:
    """Return the records behind step `hold`, up to which the learning rate is high on purpose; all of them where it never is.

    Before it the cost is flat because steps are large, not because it is least.
    """
    return [record for record in history if record.steps > hold] if hold else history


def chosen(history: Sequence[Record], hold: int) -> Record | None:
    """Return the record of the best coefficients behind step `hold`, by the rule of `Best`, else the last; None without one."""
    best, found = float("inf"), history[-1] if history else None
    for record in settled(history, hold):
        if record.complete and record.watched <= (1 + CLOSE) * best:
            best, found = min(best, record.watched), record
    return found


def falling(history: Sequence[Record]) -> str:
    """Say by how much the last tenth of the epochs lowered the watched cost, where that is more than a thousandth; else nothing."""
    whole = [record for record in history if record.complete]
    last = max(len(whole) // 10, 1)
    before = whole[-1 - last].watched if len(whole) > last else 0.0
    share = 1 - whole[-1].watched / before if before > 0 else 0.0
    if share <= FALLING:
        return ""
    return f", and the last of them still lowered the cost by {share:.1%}: allow more, or choose solver='normal', which is exact"


def flat(history: Sequence[Record], tol: float | None, patience: int) -> str | None:
    """Stop when, for `patience` epochs, the watched cost has not fallen below its best by more than a share `tol`.

    Examples
    --------
    >>> flat([], 1e-3, 3) is None
    True
    """
    watched = [record.watched for record in history if record.complete] if tol else []
    if tol and len(watched) > patience and min(watched[-patience:]) >= (1 - tol) * min(watched[:-patience]):
        which = "validation" if history[-1].validation is not None else "training"
        rate = history[-1].learning_rate
        return f"the {which} cost has not improved by more than {tol:g} of itself for {patience} epochs (learning rate {rate:.2g})"
    return None


def level(history: Sequence[Record], first_norm: float, tol: float | None) -> str | None:
    """Stop when the gradient's norm has fallen to a share `tol` of what it was at the start."""
    if tol and history and history[-1].gradient_norm <= tol * first_norm:
        return f"the gradient's norm has fallen to {tol:g} of what it was at the start"
    return None


def spent(epochs: int, seconds: float, options: Descent, still: str = "") -> str | None:
    """Stop when the epochs or the seconds that were allowed are used up; `still` is what else there is to say of the epochs."""
    if options.max_epochs is not None and epochs >= options.max_epochs:
        return f"all {options.max_epochs:,} epochs were used (max_epochs){still}"
    if options.max_seconds is not None and seconds >= options.max_seconds:
        return f"{options.max_seconds:g} seconds were used (max_seconds)"
    return None


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "[" + ", ".join(f"{one:.6g}" for one in np.atleast_1d(value)) + "]"
