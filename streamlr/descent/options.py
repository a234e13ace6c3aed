"""Descent: the options of the iterative solvers, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from streamlr.descent.ranges import number_from_zero, real_number, whole_number
from streamlr.descent.schedules import Schedule, as_schedule
from streamlr.descent.updates import Update, as_update
from streamlr.errors import UsageError

MODES = ("gd", "minibatch", "sgd")
SCALES = ("auto", "standard", "whiten", None)
BATCH_ROWS = 256
BATCH_NUMBERS = 2**16  # where columns are few, batches are higher: a step costs calls besides what it computes,
BATCHES = 4096  # and as long as an epoch has so many, it leads as far
# what None stands for: in full-batch descent, and in the two stochastic modes
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "max_epochs": (10_000, 10),
    "tol": (0.0, 1e-6),
    "gradient_tol": (1e-9, 0.0),
    "shuffle": (False, True),
}
# no options of full-batch descent, which sees all rows in each step; what is False stands for that
STOCHASTIC = ("batch_size", "buffer_rows", "log_every", "shuffle", "average", "streams")
PATIENCE = 3
PERHAPS_NONE = ("batch_size", "buffer_rows", "log_every", "checkpoint_every")
WHOLE = {
    "batch_size": 1,
    "max_epochs": 1,
    "patience": 1,
    "seed": 0,
    "buffer_rows": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "streams": 1,
}


@dataclass(frozen=True, slots=True)
class Descent:
    r"""Go down the gradient of the cost, step by step.

    .. math:: \theta \leftarrow \theta - \alpha \frac2m X_B'(X_B \theta - y_B)

    Parameters
    ----------
    mode : "minibatch", "sgd" or "gd"
        Steps of a batch of rows, of one row, or of all rows. "gd" needs one pass for all its steps where p^2 numbers fit the memory
        limit, since moments of the rows tell the gradient; else a pass for each step.
    batch_size : int or None
        m, for "minibatch"; None for 256, or all rows where there are fewer; where columns are few, for the power of two that makes
        at most 65,536 numbers and leaves 4,096 steps an epoch.
    learning_rate : "auto", float or Schedule
        alpha: a number, a schedule of `streamlr.descent.schedules`, or "auto", from the curvature of a sample, falling, and capped
        at each batch where it would overshoot.
    update : "plain", "momentum", "nesterov", "adam" or a rule of `streamlr.descent.updates`
        What a gradient does.
    scale : "auto", "standard", "whiten" or None
        Coordinates: columns centred and in units of their deviation; decorrelated besides, by the eigenvectors of a sample; as they
        are. "auto" decorrelates where the eigenvalues of the sample's correlations spread by more than five or there are fewer than
        1,000 steps, p is at most 1,000 and the sample has rows enough; else, and for "gd", it is "standard". Coefficients come back
        in the user's units.
    max_epochs : int or None
        Passes over the training rows at most; None for 10, and 10,000 for "gd".
    tol : float or None
        Stop when for `patience` epochs the watched cost has not fallen by this share of itself; 0 for never; None for 1e-6, and 0
        for "gd".
    patience : int
        See `tol`; it needs one above 0.
    gradient_tol : float or None
        Stop when the norm of the gradient has fallen to this share of what it was at the start; 0 for never; None for 0, and 1e-9
        for "gd".
    max_seconds : float or None
        Stop after so long; None for never.
    validation : float
        Share of the rows, from 0 to below 1, that is held out, by a hash of a row's position, and watched instead of the training
        rows; the best coefficients by their cost are returned. Another reading of the store per epoch.
    seed : int
        Of the order of rows, the sample and the held-out rows.
    shuffle : bool or None
        Chunks in random order, and rows of several chunks together; None for True. False for rows as stored.
    average : bool or None
        Return the mean of late iterates (Polyak and Juditsky 1992) and not the last; None for True where a learning rate is given,
        since the automatic one falls in a way that makes the last iterate a mean.
    buffer_rows : int or None
        Rows that are shuffled together, in whole chunks; None for four chunks, at least 64 MiB. With one stream, as
        many are read meanwhile.
    log_every : int or None
        Rows after which a record is added to the history within an epoch.
    checkpoint_every : int or None
        Rows after which `fit(checkpoint=)` writes; None for every 15 seconds. Only with a checkpoint.
    streams : int
        Streams that go down side by side, on threads or on the workers of a cluster, each in its share of the chunks; an epoch
        begins at the mean of where those of the last one came to, weighted by rows. The result depends on their number, and not on
        that of threads or workers. With more than one, time is looked at and checkpoints are written between epochs only. 1 for the
        textbook's order.

    Raises
    ------
    UsageError
        An option is not one of those allowed, or none of this mode.

    References
    ----------
    Robbins and Monro (1951), A stochastic approximation method, equation 8; Bottou, Curtis and Nocedal (2018), Optimization methods
    for large-scale machine learning, algorithm 4.1; for streams, McDonald, Hall and Mann (2010), Distributed training strategies
    for the structured perceptron, figure 3.

    Examples
    --------
    >>> Descent("minibatch", max_epochs=3).batch_size is None
    True
    """

    mode: str = "minibatch"
    batch_size: int | None = None
    learning_rate: str | float | Schedule = "auto"
    update: str | Update = "plain"
    scale: str | None = "auto"
    max_epochs: int | None = None
    tol: float | None = None
    patience: int = PATIENCE
    gradient_tol: float | None = None
    max_seconds: float | None = None
    validation: float = 0.0
    seed: int = 0
    shuffle: bool | None = None
    average: bool | None = None
    buffer_rows: int | None = None
    log_every: int | None = None
    checkpoint_every: int | None = None
    streams: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (("mode", self.mode, MODES), ("scale", self.scale, SCALES)):
            if not isinstance(value, str | None) or value not in allowed:
                raise UsageError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")
        self._check_foreign()
        as_update(self.update)
        automatic = isinstance(self.learning_rate, str) and self.learning_rate == "auto"
        if not automatic and as_schedule(self.learning_rate) is not self.learning_rate:  # a number, perhaps of NumPy's
            self._take("learning_rate", real_number(self.learning_rate))
        if self.average is None:
            self._take("average", self.mode != "gd" and not automatic)
        for name, (full, stochastic) in DEFAULTS.items():
            if getattr(self, name) is None:
                self._take(name, full if self.mode == "gd" else stochastic)
        for name, least in WHOLE.items():
            if (value := getattr(self, name)) is not None or name not in PERHAPS_NONE:
                self._take(name, whole_number(name, value, least))
        for name in ("shuffle", "average"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}; allowed are True and False")
        for name in ("tol", "gradient_tol", "validation"):
            self._take(name, number_from_zero(name, getattr(self, name), 1.0))
        if self.max_seconds is not None:
            self._take("max_seconds", number_from_zero("max_seconds", self.max_seconds, np.inf))
        if not self.tol and self.patience != PATIENCE:
            raise UsageError(
                f"patience is {self.patience}, and tol is 0: no cost is watched; give a tol above 0, or leave patience out"
            )
        if self.streams > 1 and self.log_every is not None:
            raise UsageError("log_every is for records within an epoch, and streams that run side by side have none; leave one out")
        if not self.shuffle and self.buffer_rows is not None:
            raise UsageError("buffer_rows is how many rows are shuffled together, and shuffle is False; leave one of them out")

    def _check_foreign(self) -> None:
        """Refuse options that this mode would ignore."""
        foreign = {"gd": STOCHASTIC, "sgd": ("batch_size",)}.get(self.mode, ())
        for name in foreign:
            value = getattr(self, name)
            if value is not None and value is not False and not (name == "streams" and value == 1):
                raise UsageError(f"{name} is no option of mode {self.mode!r}; leave it out, or choose mode 'minibatch'")

    def _take(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def rule(self) -> Update:
        """The update rule."""
        return as_update(self.update)

    def batch_rows(self, n_rows: int, n_features: int) -> int:
        """Return the rows of a batch, for so many rows and features in all.

        Raises
        ------
        UsageError
            A batch was asked for that is larger than that.
        """
        if self.mode == "sgd":
            return 1
        if self.batch_size is not None and self.batch_size > n_rows:
            raise UsageError(
                f"batch_size is {self.batch_size:,} and there are {n_rows:,} rows to train on; choose a smaller one, or mode 'gd'"
            )
        if self.batch_size is not None:
            return self.batch_size
        most = max(min(BATCH_NUMBERS // max(n_features, 1), n_rows // BATCHES), BATCH_ROWS)
        return min(1 << (most.bit_length() - 1), n_rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values; equal options, equal values."""
        options = asdict(self)
        for name, value in (("update", self.rule), ("learning_rate", self.learning_rate)):
            options[name] = value if isinstance(value, str) else _described(value)
        return options


def _described(value: Any) -> Any:
    if not hasattr(value, "__dataclass_fields__"):
        return [_described(one) for one in value] if isinstance(value, tuple) else float(value)
    return [type(value).__name__, *(_described(getattr(value, name)) for name in value.__dataclass_fields__)]
