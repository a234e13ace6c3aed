"""scikit-learn's SGDRegressor over the descent: epochs over any rows, or streams of batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state

from streamlr.dataset.dataset import Dataset
from streamlr.dataset.tally import Tally
from streamlr.descent.online import Online, Standing
from streamlr.descent.options import PATIENCE, Descent
from streamlr.descent.ranges import number_above_zero, number_from_zero, real_number
from streamlr.descent.schedules import Constant, InverseScaling, Schedule
from streamlr.descent.stopping import Record
from streamlr.descent.updates import Update
from streamlr.direct.normal import check_penalty
from streamlr.errors import UsageError
from streamlr.estimators import LinearEstimator
from streamlr.model import FittedModel
from streamlr.passes.memory import one_blas_thread
from streamlr.training import Training, stretches_of

Array = NDArray[np.float64]
ETA0, POWER_T, VALIDATION_FRACTION, UNCHANGED = 0.01, 0.25, 0.1, 5  # scikit-learn's
UNUSED = {"auto": ("eta0", "power_t"), "constant": ("power_t",), "invscaling": ()}


class SGDRegressor(LinearEstimator):
    r"""Least squares by stochastic gradient descent, over epochs, or over a stream of batches without an end.

    .. math:: \min_{b_0, b} \frac1{2W} \sum w_i (y_i - b_0 - x_i'b)^2 + \frac\alpha2 |b|^2

    Columns need no scaling: coordinates and the learning rate come from a sample, and coefficients back in the user's units.

    Parameters
    ----------
    alpha : float
        The penalty, as in scikit-learn, which is `streamlr.fit(ridge=)` too; 0 unless asked for, where scikit-learn has 1e-4. The
        intercept is not penalised.
    fit_intercept : bool
        Fit b0.
    max_iter : int
        Epochs of `fit` at most.
    tol : float or None
        The least improvement of the watched cost, as a share of it (scikit-learn: as a difference). `fit` stops when for
        `n_iter_no_change` epochs there was less; None or 0 for never. With `partial_fit` it matters under `early_stopping`.
    shuffle : bool
        Epochs of `fit` in random order. `partial_fit` takes rows as they come.
    random_state : int, RandomState or None
        Of the order, the sample and the held-out rows of `fit`. An int gives the same bits always. `partial_fit` draws nothing.
    learning_rate : "auto", "constant", "invscaling" or a schedule of `streamlr.descent.schedules`
        "auto" from the curvature of a sample, falling, and capped where a batch would overshoot. scikit-learn's words are steps of
        its gradient, of half the square: eta0, and eta0 / t**power_t. A schedule is the alpha of the gradient of the square.
    eta0 : float or None
        See `learning_rate`; None for 0.01.
    power_t : float or None
        See `learning_rate`; None for 0.25.
    early_stopping : bool
        Hold out rows in `fit`, watch them, and keep the best coefficients. With `partial_fit` watch rows before they are learned
        from, and learn nothing more once their cost has not improved for `n_iter_no_change` windows of 8,192 rows; `stopped_` says
        so.
    validation_fraction : float or None
        Share of rows that `fit` holds out under `early_stopping`; None for 0.1.
    n_iter_no_change : int
        See `tol`.
    warm_start : bool
        `fit` starts from the coefficients there.
    average : bool
        Take the mean of late iterates.
    batch_size : int
        Rows of a step, at most all of them; 1 for single rows.
    update, scale
        As for `streamlr.Descent`.

    Attributes
    ----------
    coef_ : (p,) or (k, p) float64
        Coefficients.
    intercept_ : float or (k,) float64
        Intercepts.
    n_iter_ : int
        Epochs of the last `fit`; 1 after `partial_fit`.
    t_ : int
        Steps that led to the coefficients.
    n_features_in_, feature_names_in_
        As in scikit-learn.
    history_ : tuple of Record
        One for each epoch; of a stream, one after 1, 2, 4, 8, ... windows.
    stopped_ : str
        Why `fit` ended, or why a stream is no longer learned from; empty while it is.
    model_ : FittedModel
        The model as a value. Its cost is, of a stream, that of its rows, each before it was learned from.

    References
    ----------
    See `streamlr.Descent`, and `streamlr.descent.online.Online` for streams.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.arange(2000.0)[:, None]
    >>> SGDRegressor(random_state=0).fit(X, 2 * X[:, 0] + 1).coef_.round(6)
    array([2.])
    """

    _standing: tuple[Online, Online, Standing] | None  # as asked for, and with the batches of the first call

    def __init__(
        self,
        *,
        alpha: float = 0.0,
        fit_intercept: bool = True,
        max_iter: int = 10,
        tol: float | None = 1e-6,
        shuffle: bool = True,
        random_state: Any = None,
        learning_rate: str | Schedule = "auto",
        eta0: float | None = None,
        power_t: float | None = None,
        early_stopping: bool = False,
        validation_fraction: float | None = None,
        n_iter_no_change: int = UNCHANGED,
        warm_start: bool = False,
        average: bool = False,
        batch_size: int = 256,
        update: str | Update = "plain",
        scale: str | None = "auto",
    ) -> None:
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.shuffle = shuffle
        self.random_state = random_state
        self.learning_rate = learning_rate
        self.eta0 = eta0
        self.power_t = power_t
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.average = average
        self.batch_size = batch_size
        self.update = update
        self.scale = scale

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to all rows, in up to `max_iter` epochs over them, and one more pass for the cost. On an error nothing changes.

        Parameters
        ----------
        X : array, (n, p)
            NumPy-like, a Dask array or a zarr array; the latter two are read chunk by chunk and never loaded.
        y : array, (n,) or (n, k)
            Target or targets.
        sample_weight : array, (n,), optional
            Non-negative weights.

        Raises
        ------
        UsageError, DataError, Diverged, MemoryLimitExceeded
            As for `streamlr.fit`.
        """
        with self._unchanged_on_error():
            options = self._options()
            dataset = self._dataset(X, y, sample_weight, reset=True)
            origin = self._origin(dataset) if self.warm_start else None
            steps = self.t_ if origin else 0
            options = replace(options, validation=self._share(), seed=self._seed())
            if options.batch_size is not None:
                options = replace(options, batch_size=min(options.batch_size, self._rows_to_train(dataset, options)))
            ridge = check_penalty(self.alpha, "alpha")
            model = Training(dataset, options, self.fit_intercept, ridge, origin=origin).run(None)
            self._standing = None
            self._tell(model, model.history[-1].epoch, steps + model.history[-1].steps)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Learn from the next rows of a stream, in their order; the first call starts it, from the coefficients there are.

        The first 32,768 rows are the sample that coordinates and learning rate come from, again whenever the rows have doubled; the
        coefficients in the user's units do not change by that. The automatic rate is that of `streamlr.descent.online.Online`:
        each row counts alike, however many will come. Batches have `batch_size` rows, or those of the first call if it has fewer.
        Calls with whole batches, of two rows or more, give the same bits however the stream is cut; the last batch of a call may be
        shorter, and then counts for as much less.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`; rows without weights have weights of one. On an error the estimator stays as it was.

        Raises
        ------
        UsageError
            An option was changed in mid-stream, or the columns are others.
        DataError, Diverged, MemoryLimitExceeded
            As for `fit`.
        """
        with self._unchanged_on_error():
            options = self._options()
            dataset = self._dataset(X, y, sample_weight, reset=not hasattr(self, "coef_"))
            origin = self._origin(dataset)
            ridge = check_penalty(self.alpha, "alpha")
            asked = Online(options, dataset.n_features, dataset.n_targets, bool(self.fit_intercept), ridge)
            online = replace(asked, options=_of_batches(options, dataset.n_rows))
            before, online, state = getattr(self, "_standing", None) or (asked, online, online.start())
            if before != asked:
                raise UsageError(
                    "options were changed in mid-stream; set them before the first partial_fit, or start anew with fit"
                )
            patience = self.n_iter_no_change if self.early_stopping and self.tol else None
            if state.stopped and patience:
                return self
            steps = getattr(self, "t_", 0)
            with one_blas_thread():
                for rows in stretches_of(dataset, online.batch_rows):
                    state = online.over(rows, state, origin, steps, patience, options.tol or 0.0)
                model = self._model(dataset, online, state)
            self._standing = (asked, online, state)
            assert state.here is not None
            self._tell(model, 1, state.here.step)
        return self

    def _tell(self, model: FittedModel, epochs: int, steps: int) -> None:
        self._show(model)
        self.n_iter_, self.t_ = epochs, steps
        self.history_: tuple[Record, ...] = model.history
        self.stopped_ = model.stopped

    def _model(self, dataset: Dataset, online: Online, state: Standing) -> FittedModel:
        """Return the model of a stream so far."""
        coef, intercept = online.coefficients(state)
        return FittedModel.of_descent(
            dataset,
            coef,
            intercept,
            (state.total + state.seen).cost(),
            Tally(),
            route=self._mode(),
            fit_intercept=online.fit_intercept,
            ridge=online.ridge,
            history=state.history,
            stopped=state.stopped,
        )

    def _origin(self, dataset: Dataset) -> tuple[Array, Array] | None:
        """Return the coefficients to start from, (p, k), and intercepts, (k,)."""
        if not hasattr(self, "model_"):
            return None
        coef = self.model_.coef_matrix
        if coef.shape != (dataset.n_features, dataset.n_targets):
            raise UsageError(
                f"the rows have {dataset.n_features} features and {dataset.n_targets} targets, and the coefficients to go on from "
                f"{coef.shape[0]} and {coef.shape[1]}; give rows with as many, or start anew with fit and warm_start=False"
            )
        return coef, self.model_.intercept_vector

    def _mode(self) -> str:
        return "sgd" if self.batch_size == 1 else "minibatch"

    def _options(self) -> Descent:
        """Return what was asked for, but for what only `fit` knows; every option acts or is refused, under its own name."""
        for name, least in (("max_iter", 1), ("n_iter_no_change", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise UsageError(f"{name} is {value!r}; allowed are whole numbers from {least} on")
        for name in ("fit_intercept", "shuffle", "early_stopping", "warm_start", "average"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise UsageError(f"{name} is {getattr(self, name)!r}; allowed are True and False")
        if not self.tol and self.n_iter_no_change != UNCHANGED:
            raise UsageError(
                f"n_iter_no_change is {self.n_iter_no_change}, and tol is {self.tol!r}: no cost is watched; give a tol above 0, or "
                "leave n_iter_no_change out"
            )
        check_random_state(self.random_state)  # refuses what is no seed
        self._share()
        if self.validation_fraction is not None and not self.early_stopping:
            raise UsageError("validation_fraction is for early_stopping=True, which holds rows out; leave it out, or ask for that")
        return Descent(
            self._mode(),
            batch_size=None if self.batch_size == 1 else int(self.batch_size),
            learning_rate=self._rate(),
            update=self.update,
            scale=self.scale,
            max_epochs=int(self.max_iter),
            tol=0.0 if self.tol is None else self.tol,
            patience=int(self.n_iter_no_change) if self.tol else PATIENCE,
            shuffle=bool(self.shuffle),
            average=bool(self.average),
        )

    def _rate(self) -> Any:
        word = self.learning_rate
        if isinstance(word, int | float | np.number) or (isinstance(word, str) and word not in UNUSED):
            raise UsageError(
                f"learning_rate is {word!r}; allowed are 'auto', 'constant' and 'invscaling' with eta0, and a schedule of "
                "streamlr.descent.schedules"
            )
        for name in UNUSED[word] if isinstance(word, str) else ("eta0", "power_t"):
            if getattr(self, name) is not None:
                raise UsageError(f"{name} is no option of learning_rate={word!r}; leave it out, or choose 'invscaling'")
        if word not in ("constant", "invscaling"):
            return word
        eta0, power = ETA0 if self.eta0 is None else self.eta0, POWER_T if self.power_t is None else self.power_t
        eta0, power = number_above_zero("eta0", eta0), number_from_zero("power_t", power, np.inf)
        return Constant(eta0 / 2) if word == "constant" or power == 0 else InverseScaling(eta0 / 2, power)

    def _share(self) -> float:
        """Return the share of rows to hold out."""
        if not self.early_stopping:
            return 0.0
        share = VALIDATION_FRACTION if self.validation_fraction is None else self.validation_fraction
        if not 0 < real_number(share) < 1:
            raise UsageError(f"validation_fraction is {share!r}; allowed are numbers between 0 and 1")
        return share

    def _seed(self) -> int:
        random = check_random_state(self.random_state)
        return int(self.random_state) if isinstance(self.random_state, int | np.integer) else int(random.randint(2**31 - 1))

    @staticmethod
    def _rows_to_train(dataset: Dataset, options: Descent) -> int:
        if not options.validation:
            return dataset.n_rows
        train, held_out = dataset.split(options.validation, seed=options.seed)
        if not (train.n_rows and held_out.n_rows):
            raise UsageError(
                f"of {dataset.n_rows:,} rows, validation_fraction={options.validation:g} holds out {held_out.n_rows:,}; give more "
                "rows, or leave early_stopping out"
            )
        return train.n_rows


def _of_batches(options: Descent, most: int) -> Descent:
    """Return options with batches of at most so many rows."""
    if options.batch_size is None or options.batch_size <= most:
        return options
    return replace(options, mode="sgd", batch_size=None) if most == 1 else replace(options, batch_size=most)
