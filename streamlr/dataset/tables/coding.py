"""From rows of tables to rows of numbers: which columns, formula and levels; fixed once, kept with the store and the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from streamlr.dataset.integrity import read_seal
from streamlr.dataset.tables.batches import Batch
from streamlr.dataset.tables.design import Factors, FormulaDesign, PlainColumns, PlainDesign, Product
from streamlr.dataset.tables.formulas import RowFormula, parse_formula
from streamlr.errors import BadFile, NonFiniteValue, UsageError
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
        design = FormulaDesign(formula, fixed)
        return cls(formula.text, design.feature_names, design.target_names, formula.numbers, fixed, formula.target_columns, weights)

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
    with_targets : bool
        Whether the tables hold the targets.

    Examples
    --------
    >>> from streamlr.dataset.tables.batches import open_table, read_batches
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "t.csv"
    >>> _ = path.write_text("y,x,kind\\n1,2,a\\n3,4,b\\n")
    >>> coder = Coder(Coding.of_formula(parse_formula("y ~ x + C(kind)"), {"kind": ["a", "b"]}))
    >>> x = np.empty((2, 2))
    >>> for batch in read_batches(open_table(path), numbers=["y", "x"], texts=["kind"]):
    ...     coder.code(batch).write_x(x)
    >>> x.tolist()
    [[2.0, 0.0], [4.0, 1.0]]
    >>> folder.cleanup()
    """

    def __init__(self, coding: Coding, *, with_targets: bool = True) -> None:
        self._coding, self._with_targets = coding, with_targets
        self._design: PlainDesign | FormulaDesign
        if coding.formula is None:
            self._design = PlainDesign((PlainColumns(0, coding.numbers),), (PlainColumns(0, coding.target_columns),))
        else:
            self._design = FormulaDesign(parse_formula(coding.formula), coding.levels)

    def code(self, batch: Batch) -> CodedBatch:
        """Compute what the rows of a batch, in which no cell is missing, are made of.

        Raises
        ------
        UnknownLevel
            A category holds a level that the coding does not know.
        """
        return CodedBatch(batch, self._coding, self._design, self._design.factors(batch, with_targets=self._with_targets))


@dataclass(frozen=True, slots=True)
class CodedBatch:
    """Rows of a table that are ready to be written as rows of X and y; a level is still one number, not one column.

    Attributes
    ----------
    batch : Batch
        The rows.
    coding : Coding
        What the columns are called.
    design : PlainDesign or FormulaDesign
        What they are.
    factors : mapping of str to array
        What they are made of.
    """

    batch: Batch
    coding: Coding
    design: PlainDesign | FormulaDesign
    factors: Factors

    def write_x(self, out: NDArray[np.float64], rows: slice = slice(None)) -> None:
        """Write the features of some rows to `out`, (m, p) float64.

        Raises
        ------
        NonFiniteValue
            A term of the formula is infinite or undefined in some row.
        """
        self._write(self.design.features, self.coding.features, out, rows)

    def write_y(self, out: NDArray[np.float64], rows: slice = slice(None)) -> None:
        """Write the targets of some rows to `out`, (m, k) float64.

        Raises
        ------
        NonFiniteValue
            A target, as the formula computes it, is infinite or undefined in some row.
        """
        self._write(self.design.targets, self.coding.targets, out, rows)

    def _write(
        self, columns: Sequence[PlainColumns | Product], names: Sequence[str], out: NDArray[np.float64], rows: slice
    ) -> None:
        if any(isinstance(part, Product) and part.spread for part in columns):
            out.fill(0.0)
        finite = [part.write(self.factors, rows, out) for part in columns]
        if all(finite):
            return
        row, column = (int(index) for index in np.argwhere(~np.isfinite(out))[0])
        raise NonFiniteValue(
            f"{self.batch.place((rows.start or 0) + row, names[column])}: the formula gives {out[row, column]}; every value must "
            "be finite: change the term or leave out such rows"
        )


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
