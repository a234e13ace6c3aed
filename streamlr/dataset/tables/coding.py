"""From rows of tables to rows of numbers: which columns, formula and levels; fixed once, kept with the store and the model.

The levels of every category are imposed before formulaic sees a row. Left to itself it takes them from the first block, and gives a
level that only appears later a row of zeros.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from streamlr.dataset.integrity import read_seal
from streamlr.dataset.tables.batches import Batch
from streamlr.dataset.tables.extras import load_extra
from streamlr.dataset.tables.formulas import RowFormula, category_key, parse_formula
from streamlr.errors import BadFile, DataError, NonFiniteValue, UnknownLevel, UsageError
from streamlr.files import read_json

# what a model file says of itself: stated here, since this floor reads its coding and the floor of models stands on this one
MODEL_FORMAT = "streamlr model"
MODEL_VERSION = 2


@dataclass(frozen=True, slots=True)
class Coding:
    """How rows of a table become rows of X and y.

    Attributes
    ----------
    formula : str or None
        The formula; None when number columns are taken as they are.
    features, targets : tuple of str
        Names of the columns of X and of y.
    numbers : tuple of str
        Number columns of the table that X needs.
    levels : mapping of str to tuple of str
        For each category column of the table its levels; the first is the reference, which has no column in X.
    target_columns : tuple of str
        Number columns of the table that y needs.
    weights : str or None
        The number column that holds the weights of the rows.
    """

    formula: str | None
    features: tuple[str, ...]
    targets: tuple[str, ...]
    numbers: tuple[str, ...]
    levels: Mapping[str, tuple[str, ...]]
    target_columns: tuple[str, ...]
    weights: str | None = None

    @classmethod
    def of_columns(cls, features: Sequence[str], targets: Sequence[str], weights: str | None = None) -> Coding:
        """Take number columns as they are.

        Examples
        --------
        >>> Coding.of_columns(["a", "b"], ["y"]).features
        ('a', 'b')
        """
        names = tuple(features)
        return cls(None, names, tuple(targets), names, {}, tuple(targets), weights)

    @classmethod
    def of_formula(cls, formula: RowFormula, levels: Mapping[str, Sequence[str]], weights: str | None = None) -> Coding:
        """Fix a formula together with the levels of its categories.

        Parameters
        ----------
        formula : RowFormula
            From `parse_formula`.
        levels : mapping of str to sequence of str
            For each category of the formula its levels, the reference first.
        weights : str, optional
            The column of weights.

        Raises
        ------
        UsageError
            Two columns of X would have one name, or the formula keeps state between rows.
        DataError
            A category has a single level, so that it could have no column.

        Examples
        --------
        >>> Coding.of_formula(parse_formula("y ~ x + C(kind) + C(kind):x"), {"kind": ["a", "b", "c"]}).features
        ('x', 'kind=b', 'kind=c', 'kind=b:x', 'kind=c:x')
        """
        fixed = {column: tuple(levels[column]) for column in formula.categories}
        design = _Design(formula, fixed)
        return cls(formula.text, design.features, design.targets, formula.numbers, fixed, formula.target_columns, weights)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Coding:
        """Restore what `to_json` gave.

        Raises
        ------
        BadFile
            It is no coding, or its columns are not those that its formula gives.

        Examples
        --------
        >>> coding = Coding.of_columns(["a"], ["y"])
        >>> Coding.from_json(coding.to_json()) == coding
        True
        """
        try:
            weights = content["weights"]
            if content["formula"] is None:
                coding = cls.of_columns(content["features"], content["targets"], weights)
            else:
                levels = {column: content["levels"][column]["levels"] for column in content["levels"]}
                coding = cls.of_formula(parse_formula(content["formula"]), levels, weights)
            same = coding.to_json() == dict(content)
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"the coding of the columns cannot be read: {error!r}; write the store or model again") from error
        if not same:
            raise BadFile("the coding of the columns contradicts its own formula; write the store or model again")
        return coding

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value; category columns say their levels in order, and which is the reference."""
        return {
            "formula": self.formula,
            "features": list(self.features),
            "targets": list(self.targets),
            "numbers": list(self.numbers),
            "levels": {column: {"reference": levels[0], "levels": list(levels)} for column, levels in self.levels.items()},
            "target_columns": list(self.target_columns),
            "weights": self.weights,
        }


class Coder:
    """A coding made ready for work: turns batches of rows into X and y, each row for itself.

    Parameters
    ----------
    coding : Coding
        What to do.

    Examples
    --------
    >>> from streamlr.dataset.tables.batches import open_table, read_batches
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "t.csv"
    >>> _ = path.write_text("y,x,kind\\n1,2,a\\n3,4,b\\n")
    >>> coder = Coder(Coding.of_formula(parse_formula("y ~ x + C(kind)"), {"kind": ["a", "b"]}))
    >>> [coder.x(batch).tolist() for batch in read_batches(open_table(path), numbers=["y", "x"], texts=["kind"])]
    [[[2.0, 0.0], [4.0, 1.0]]]
    >>> folder.cleanup()
    """

    def __init__(self, coding: Coding) -> None:
        self._coding = coding
        self._design = None if coding.formula is None else _Design(parse_formula(coding.formula), coding.levels)

    def x(self, batch: Batch) -> NDArray[np.float64]:
        """Return the features of a batch in which no cell is missing: (m, p) float64 in C order.

        Raises
        ------
        UnknownLevel
            A category holds a level that the coding does not know.
        NonFiniteValue
            A term of the formula is infinite or undefined in some row.
        """
        if self._design is None:
            return np.column_stack([batch.numbers[name] for name in self._coding.numbers])
        x = self._design.x(batch)
        _check_finite(x, self._coding.features, batch)
        return x

    def y(self, batch: Batch) -> NDArray[np.float64]:
        """Return the targets of a batch in which no cell is missing: (m, k) float64 in C order.

        Raises
        ------
        NonFiniteValue
            A target, as the formula computes it, is infinite or undefined in some row.
        """
        if self._design is None:
            return np.column_stack([batch.numbers[name] for name in self._coding.target_columns])
        y = self._design.y(batch)
        _check_finite(y, self._coding.targets, batch)
        return y


def load_coding(source: str | os.PathLike[str]) -> Coding:
    """Return the coding that a store or a model was made with.

    Parameters
    ----------
    source : path
        A store that `ingest` wrote, or a model fitted to one.

    Raises
    ------
    PathNotFound, BadFile, StoreIncomplete
        There is nothing at that path, or it is damaged or unfinished.
    UsageError
        It was not made from a table, so it holds no coding.
    """
    path = Path(source)
    if path.is_dir():
        try:
            group = zarr.open_group(str(path), mode="r")
        except FileNotFoundError as error:
            raise UsageError(f"{path} is a folder but no zarr group; name a store written by ingest, or a model file") from error
        stated = read_seal(group)
        content = stated.coding if stated else None
    else:
        content = read_json(path, MODEL_FORMAT, MODEL_VERSION).get("coding")
    if not content:
        raise UsageError(f"{path} was not made from a table, so it holds no coding to follow; give a formula or a target instead")
    return Coding.from_json(content)


class _Design:
    """A formula made ready by formulaic, with levels imposed: turns batches into matrices, each row for itself."""

    def __init__(self, formula: RowFormula, levels: Mapping[str, tuple[str, ...]]) -> None:
        for column, known in levels.items():
            if len(known) < 2:
                raise DataError(
                    f"the category {column!r} has the single level {', '.join(known)!r}; leave C({column}) out of the formula"
                )
        self._pandas, self._arrow, self._compute = (load_extra(name) for name in ("pandas", "pyarrow", "pyarrow.compute"))
        self._categories = {column: self._pandas.CategoricalDtype(list(known)) for column, known in levels.items()}
        self._numbers, self._target_columns = formula.numbers, formula.target_columns
        # one row of ones and reference levels is enough, since nothing in an allowed formula depends on the data
        ones = {name: np.ones(1) for name in (*formula.numbers, *formula.target_columns)}
        probe = self._frame(ones, {column: np.zeros(1, dtype=np.int32) for column in levels})
        try:
            with np.errstate(all="ignore"):
                self._x_spec, self._y_spec = (
                    side.get_model_matrix(probe, context={}, output="numpy", na_action="ignore").model_spec
                    for side in (formula.right, formula.left)
                )
        except load_extra("formulaic.errors").FormulaicError as error:
            raise UsageError(f"the formula {formula.text!r} cannot be computed: {error}") from error
        if self._x_spec.transform_state or self._y_spec.transform_state:
            state = ", ".join((*self._x_spec.transform_state, *self._y_spec.transform_state))
            raise UsageError(
                f"the formula {formula.text!r} keeps state of the rows it has seen ({state}); compute those columns first"
            )
        names = list(_readable_names(self._x_spec, levels))
        readable = dict(names)
        repeated = [new for new, count in Counter(new for _, new in names).items() if count > 1]
        if repeated or len(readable) != len(names):
            raise UsageError(
                f"the formula {formula.text!r} gives two columns of one name, {repeated}; rename a column or level of the table"
            )
        self.features = tuple(readable[name] for name in self._x_spec.column_names[1:])  # formulaic puts the intercept first
        self.targets = tuple(self._y_spec.column_names)

    def x(self, batch: Batch) -> NDArray[np.float64]:
        codes = {column: self._codes(batch, column) for column in self._categories}
        matrix = self._matrix(self._x_spec, {name: batch.numbers[name] for name in self._numbers}, codes)
        return np.ascontiguousarray(matrix[:, 1:])

    def y(self, batch: Batch) -> NDArray[np.float64]:
        return self._matrix(self._y_spec, {name: batch.numbers[name] for name in self._target_columns}, {})

    def _matrix(self, spec: Any, numbers: Mapping[str, Any], codes: Mapping[str, Any]) -> NDArray[np.float64]:
        materializer = spec.get_materializer(self._frame(numbers, codes), context={})
        with np.errstate(all="ignore"):  # what is not finite is found afterwards, with its row
            matrix = materializer.get_model_matrix(spec)
        # a materializer stands in a cycle of references, and would keep its columns until the garbage collector comes round
        materializer.factor_cache.clear()
        materializer.encoded_cache.clear()
        return np.ascontiguousarray(matrix, dtype=np.float64)

    def _frame(self, numbers: Mapping[str, Any], codes: Mapping[str, Any]) -> Any:
        categories = {
            category_key(column): self._pandas.Categorical.from_codes(values, dtype=self._categories[column])
            for column, values in codes.items()
        }
        return self._pandas.DataFrame({**numbers, **categories})

    def _codes(self, batch: Batch, column: str) -> NDArray[np.int32]:
        known = self._categories[column].categories.tolist()
        texts = batch.texts[column]
        codes: NDArray[np.int32] = (
            self._compute.index_in(texts, value_set=self._arrow.array(known, self._arrow.string())).fill_null(-1).to_numpy()
        )
        unseen = np.flatnonzero(codes < 0)
        if unseen.size:
            shown = ", ".join(map(repr, known[:20])) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
            row = int(unseen[0])
            raise UnknownLevel(
                f"{batch.place(row, column)}: got the level {texts[row].as_py()!r}, but the coding knows {shown}; mend "
                "or leave out such rows, or ingest and fit anew by a formula"
            )
        return codes


def _readable_names(spec: Any, levels: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Iterate over formulaic's names of the columns of X with ours: `C(kind)[T.b]:x` and `kind=b:x`."""
    columns = {category_key(column): column for column in levels}
    for scoped in itertools.chain.from_iterable(entry.scoped_terms for entry in spec.structure):
        options = []
        for part in scoped.factors:
            name = part.factor.expr
            column = columns.get(name)
            if column is None:
                options.append([(name, name)])
            elif part.reduced:
                options.append([(f"{name}[T.{level}]", f"{column}={level}") for level in levels[column][1:]])
            else:
                options.append([(f"{name}[{level}]", f"{column}={level}") for level in levels[column]])
        for combination in itertools.product(*options):
            if combination:
                yield ":".join(old for old, _ in combination), ":".join(new for _, new in combination)


def _check_finite(matrix: NDArray[np.float64], names: Sequence[str], batch: Batch) -> None:
    if np.isfinite(matrix).all():
        return
    row, column = (int(index) for index in np.argwhere(~np.isfinite(matrix))[0])
    raise NonFiniteValue(
        f"{batch.place(row, names[column])}: the formula gives {matrix[row, column]}; every value must be finite: "
        "change the term or leave out such rows"
    )
