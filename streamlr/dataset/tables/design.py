"""The columns of X and y as functions of one row: planned once, then written straight into the rows of a store.

formulaic says which columns a formula has, and computes the expressions in it. The columns of categories are nearly all zeros: they
are not computed but written, zeros first, then a number where the level is met.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.tables.batches import Batch
from streamlr.dataset.tables.extras import load_extra
from streamlr.dataset.tables.formulas import RowFormula, category_key
from streamlr.errors import DataError, UnknownLevel, UsageError

Factors = Mapping[str, NDArray[Any]]  # by name: numbers, or for a category the positions of its levels


@dataclass(frozen=True, slots=True)
class PlainColumns:
    """Neighbouring columns that are number columns of the table, as they are.

    Attributes
    ----------
    start : int
        Where they begin in the matrix.
    names : tuple of str
        The columns of the table.
    """

    start: int
    names: tuple[str, ...]

    def write(self, factors: Factors, rows: slice, out: NDArray[np.float64]) -> bool:
        """Write some rows into `out`; they are finite, as every number that was read."""
        np.stack([factors[name][rows] for name in self.names], axis=1, out=out[:, self.start : self.start + len(self.names)])
        return True


@dataclass(frozen=True, slots=True)
class Product:
    """A product of factors: one column, or neighbouring ones for all combinations of levels of its categories.

    Attributes
    ----------
    start : int
        Where its columns begin in the matrix.
    single : tuple of (str, int or None)
        In their order, the factors that are one number for each row: numbers, and categories with one level apart from the
        reference, whose position stands beside the name.
    spread : tuple of (str, int, int)
        The other categories: name, first level that has columns, number of levels that have. The first one varies fastest.
    """

    start: int
    single: tuple[tuple[str, int | None], ...]
    spread: tuple[tuple[str, int, int], ...]

    @property
    def width(self) -> int:
        """The number of its columns."""
        return math.prod(width for _, _, width in self.spread)

    def write(self, factors: Factors, rows: slice, out: NDArray[np.float64]) -> bool:
        """Write some rows into `out`, which holds zeros, and tell whether all are finite."""
        with np.errstate(all="ignore"):  # what is not finite is found afterwards, with its row
            numbers = [factors[name][rows] if level is None else factors[name][rows] == level for name, level in self.single]
            product = functools.reduce(np.multiply, numbers).astype(np.float64) if numbers else np.ones(len(out))
            if not self.spread:
                out[:, self.start] = product
            elif numbers:  # multiplied, because of negative zeros and of infinities
                out[:, self.start : self.start + self.width] = (0.0 * product)[:, np.newaxis]
        if self.spread:
            positions = [factors[name][rows] - first for name, first, _ in self.spread]
            index = np.flatnonzero(np.logical_and.reduce([position >= 0 for position in positions]))
            columns = np.full(len(index), self.start)
            stride = 1
            for position, (_, _, width) in zip(positions, self.spread, strict=True):
                columns += stride * position[index]
                stride *= width
            out[index, columns] = product[index]
        return bool(np.isfinite(product).all())


@dataclass(frozen=True, slots=True)
class PlainDesign:
    """Number columns of the table, taken as they are.

    Attributes
    ----------
    features, targets : tuple of PlainColumns
        The columns of X and of y.
    """

    features: tuple[PlainColumns, ...]
    targets: tuple[PlainColumns, ...]

    def factors(self, batch: Batch, *, with_targets: bool) -> Factors:
        """Return the number columns."""
        return batch.numbers


class FormulaDesign:
    """The columns of a formula, with the levels of its categories imposed.

    Left to itself, formulaic takes the levels from the first block, and gives a level that only appears later a row of zeros.

    Parameters
    ----------
    formula : RowFormula
        From `parse_formula`.
    levels : mapping of str to tuple of str
        The levels of each category, the reference first.

    Attributes
    ----------
    feature_names, target_names : tuple of str
        Names of the columns of X and of y.
    features, targets : tuple of PlainColumns and Product
        What the columns are.

    Raises
    ------
    DataError
        A category has a single level.
    UsageError
        The formula cannot be computed, keeps state between rows, or gives two columns of one name.
    """

    def __init__(self, formula: RowFormula, levels: Mapping[str, tuple[str, ...]]) -> None:
        for column, known in levels.items():
            if len(known) < 2:
                raise DataError(
                    f"the category {column!r} has the single level {', '.join(known)!r}; leave C({column}) out of the formula"
                )
        self._levels = levels
        pandas, arrow, self._compute = (load_extra(name) for name in ("pandas", "pyarrow", "pyarrow.compute"))
        self._known = {column: arrow.array(known, arrow.string()) for column, known in levels.items()}
        # one row of ones and reference levels is enough, since nothing in an allowed formula depends on the data
        ones = {name: np.ones(1) for name in (*formula.numbers, *formula.target_columns)}
        categories = {
            category_key(column): pandas.Categorical.from_codes([0], categories=list(known)) for column, known in levels.items()
        }
        probe = pandas.DataFrame({**ones, **categories})
        try:
            x_spec, y_spec = _spec(formula.right, probe), _spec(formula.left, probe)
        except load_extra("formulaic.errors").FormulaicError as error:
            raise UsageError(f"the formula {formula.text!r} cannot be computed: {error}") from error
        if x_spec.transform_state or y_spec.transform_state:
            state = ", ".join((*x_spec.transform_state, *y_spec.transform_state))
            raise UsageError(
                f"the formula {formula.text!r} keeps state of the rows it has seen ({state}); compute those columns first"
            )
        names = list(_readable_names(x_spec, levels))
        readable = dict(names)
        repeated = [new for new, count in Counter(new for _, new in names).items() if count > 1]
        if repeated or len(readable) != len(names):
            raise UsageError(
                f"the formula {formula.text!r} gives two columns of one name, {repeated}; rename a column or level of the table"
            )
        self.feature_names = tuple(readable[name] for name in x_spec.column_names[1:])  # formulaic puts the intercept first
        self.target_names = tuple(y_spec.column_names)
        self.features, self.targets = _columns(x_spec, formula.numbers, levels), _columns(y_spec, formula.target_columns, {})
        self._of_features = _Expressions(formula.right, formula.numbers, probe)
        self._of_targets = _Expressions(formula.left, formula.target_columns, probe)

    def factors(self, batch: Batch, *, with_targets: bool) -> Factors:
        """Return what the columns are made of: the positions of levels, numbers as they are, and expressions.

        Raises
        ------
        UnknownLevel
            A category holds a level that the coding does not know.
        """
        codes = {category_key(column): self._codes(batch, column) for column in self._levels}
        computed = (
            self._of_targets(batch.numbers) | self._of_features(batch.numbers) if with_targets else self._of_features(batch.numbers)
        )
        return {**batch.numbers, **computed, **codes}

    def _codes(self, batch: Batch, column: str) -> NDArray[np.intp]:
        texts = batch.texts[column]
        found = self._compute.index_in(texts, value_set=self._known[column]).fill_null(-1).to_numpy()
        unseen = np.flatnonzero(found < 0)
        if unseen.size:
            known = self._levels[column]
            shown = ", ".join(map(repr, known[:20])) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
            row = int(unseen[0])
            raise UnknownLevel(
                f"{batch.place(row, column)}: got the level {texts[row].as_py()!r}, but the coding knows {shown}; mend "
                "or leave out such rows, or ingest and fit anew by a formula"
            )
        codes: NDArray[np.intp] = found.astype(np.intp)
        return codes


class _Expressions:
    """The factors of a formula that are expressions, such as log(x), computed by formulaic."""

    def __init__(self, terms: Any, columns: Sequence[str], probe: Any) -> None:
        formulaic, types = load_extra("formulaic"), load_extra("formulaic.parser.types")
        factors = {factor.expr: factor for term in terms for factor in term.factors if factor.eval_method.value == "python"}
        self._names, self._columns = tuple(factors), columns
        self._frame = load_extra("pandas").DataFrame
        self._spec = (
            _spec(formulaic.Formula([types.Term([factor]) for factor in factors.values()], _ordering="none"), probe)
            if factors
            else None
        )

    def __call__(self, numbers: Factors) -> dict[str, NDArray[Any]]:
        if self._spec is None:
            return {}
        materializer = self._spec.get_materializer(self._frame({name: numbers[name] for name in self._columns}), context={})
        with np.errstate(all="ignore"):  # what is not finite is found afterwards, with its row
            matrix = np.asarray(materializer.get_model_matrix(self._spec))
        # a materializer stands in a cycle of references, and would keep its columns until the garbage collector comes round
        materializer.factor_cache.clear()
        materializer.encoded_cache.clear()
        return dict(zip(self._names, matrix.T, strict=True))


def _spec(terms: Any, probe: Any) -> Any:
    with np.errstate(all="ignore"):
        return terms.get_model_matrix(probe, context={}, output="numpy", na_action="ignore").model_spec


def _columns(spec: Any, numbers: Sequence[str], levels: Mapping[str, tuple[str, ...]]) -> tuple[PlainColumns | Product, ...]:
    """Return what the columns of a matrix are, in their order, without the intercept."""
    n_levels = {category_key(column): len(known) for column, known in levels.items()}
    found: list[PlainColumns | Product] = []
    start = 0
    for scoped in itertools.chain.from_iterable(entry.scoped_terms for entry in spec.structure):
        single: list[tuple[str, int | None]] = []
        spread = []
        for part in scoped.factors:
            name, first = part.factor.expr, int(part.reduced)
            if name not in n_levels:
                single.append((name, None))
            elif n_levels[name] - first == 1:
                single.append((name, first))
            else:
                spread.append((name, first, n_levels[name] - first))
        if not single and not spread:
            continue  # the intercept
        product = Product(start, tuple(single), tuple(spread))
        start += product.width
        plain = single[0][0] if len(single) == 1 and not spread else None
        if plain is None or plain not in numbers:
            found.append(product)
        elif found and isinstance(found[-1], PlainColumns):
            found[-1] = PlainColumns(found[-1].start, (*found[-1].names, plain))
        else:
            found.append(PlainColumns(product.start, (plain,)))
    return tuple(found)


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
