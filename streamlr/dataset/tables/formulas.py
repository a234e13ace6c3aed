"""Formulas, read into terms that are functions of one row; whatever would look at other rows is refused.

A formula is evaluated block by block, so a term such as `center(x)` or `x - x.mean()` would silently take the mean of one block.
Only arithmetic, comparisons and NumPy's element-wise functions are let through, which also makes a formula from somebody else's
file safe to evaluate. Categories are marked by C(column), and every other column is a number: nothing depends on what the data
look like.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamlr.dataset.tables.extras import load_extra
from streamlr.errors import UsageError

FUNCTIONS = {
    "I": 1,
    "log": 1,
    "log2": 1,
    "log10": 1,
    "exp": 1,
    "exp2": 1,
}  # formulaic's own, with their number of arguments
_QUOTED = re.compile(r"`([^`]+)`")
_CATEGORY = re.compile(r"C\((?:`([^`]+)`|([^\W\d]\w*))\)")
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)


@dataclass(frozen=True, slots=True)
class RowFormula:
    """A formula whose every term is a function of one row.

    Attributes
    ----------
    text : str
        The formula as it was written.
    left, right : formulaic.Formula
        The targets; and the features, with an intercept. A category is a look-up of the column that `category_key` names.
    numbers : tuple of str
        Number columns of the table that the features need.
    categories : tuple of str
        Columns that stand inside C().
    target_columns : tuple of str
        Number columns of the table that the targets need.
    """

    text: str
    left: Any
    right: Any
    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    target_columns: tuple[str, ...]


def parse_formula(text: str) -> RowFormula:
    """Read a formula such as "y ~ a + C(b)".

    Parameters
    ----------
    text : str
        Targets, "~", features: column names (in backticks where they are no plain words), C(column) for categories, `:` and `*` for
        interactions, arithmetic and comparisons within I() or {}, log, log2, log10, exp, exp2, and NumPy's element-wise functions.

    Raises
    ------
    UsageError
        It cannot be read, leaves the intercept out, or has a term that is no function of one row.

    Examples
    --------
    >>> formula = parse_formula("np.log(price) ~ carat * C(cut)")
    >>> formula.numbers, formula.categories, formula.target_columns
    (('carat',), ('cut',), ('price',))
    """
    formulaic, errors = load_extra("formulaic"), load_extra("formulaic.errors")
    try:
        parsed = formulaic.Formula(text)
    except (errors.FormulaicError, SyntaxError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"the formula {text!r} cannot be read: {reason} Write it like 'y ~ a + b + C(kind)'") from error
    left, right = getattr(parsed, "lhs", None), getattr(parsed, "rhs", None)
    if not isinstance(left, formulaic.SimpleFormula) or not isinstance(right, formulaic.SimpleFormula) or not left:
        raise UsageError(f"the formula {text!r} should be one target or more, '~', and features, like 'y ~ a + b + C(kind)'")
    if not any(_is_intercept(term) for term in right):
        raise UsageError(
            f"the formula {text!r} leaves the intercept out; the store never holds one: write the formula with it, "
            "and fit with fit_intercept=False (--no-intercept)"
        )
    if len(right) == 1:
        raise UsageError(f"the formula {text!r} has no feature; name at least one column after '~'")
    for factor in (factor for term in (*left, *right) if not _is_intercept(term) for factor in term.factors):
        if factor.eval_method.value == "literal":
            raise UsageError(f"the formula {text!r} scales a term by {factor.expr}; write {{{factor.expr} * column}} instead")
    for term in left:
        if len(term.factors) != 1 or _is_intercept(term) or _category(term.factors[0]):
            raise UsageError(
                f"the target {term} of the formula {text!r} should be a number column or a function of one, like log(y)"
            )
    formula = RowFormula(
        text,
        _with_category_keys(formulaic, left),
        _with_category_keys(formulaic, right),
        _columns(right, categories=False),
        _columns(right, categories=True),
        _columns(left, categories=False),
    )
    _refuse_ambiguous_names(formula, [factor for term in (*left, *right) for factor in term.factors])
    return formula


def category_key(column: str) -> str:
    """Return the name under which formulaic finds the categories of `column`, so that it can be a number as well."""
    return f"C({column})"


def _is_intercept(term: Any) -> bool:
    return [factor.expr for factor in term.factors] == ["1"]


def _category(factor: Any) -> str | None:
    """Return the column of a factor C(column), else None."""
    found = _CATEGORY.fullmatch(factor.expr) if factor.eval_method.value == "python" else None
    return (found[1] or found[2]) if found else None


def _with_category_keys(formulaic: Any, terms: Any) -> Any:
    """Return the terms with every C(column) turned into a look-up of `category_key(column)`."""
    types = load_extra("formulaic.parser.types")

    def replaced(factor: Any) -> Any:
        column = _category(factor)
        return factor if column is None else types.Factor(category_key(column), eval_method="lookup")

    return formulaic.Formula([types.Term([replaced(factor) for factor in term.factors]) for term in terms], _ordering="none")


def _columns(terms: Any, *, categories: bool) -> tuple[str, ...]:
    """Return the columns that the terms need as categories, or as numbers, in the order of their first mention."""
    found: list[str] = []
    for factor in (factor for term in terms if not _is_intercept(term) for factor in term.factors):
        column = _category(factor)
        if column is not None:
            found += [column] if categories else []
        elif not categories:
            found += [factor.expr] if factor.eval_method.value == "lookup" else _expression_columns(factor.expr)
    return tuple(dict.fromkeys(found))


def _expression_columns(expression: str) -> list[str]:
    """Return the columns of a Python expression, after making sure that it is a function of one row."""
    quoted: dict[str, str] = {}

    def alias(match: re.Match[str]) -> str:
        name = f"_quoted_{len(quoted)}_"
        quoted[name] = match[1]
        return name

    try:
        tree = ast.parse(_QUOTED.sub(alias, expression), mode="eval")
    except SyntaxError as error:
        raise UsageError(f"the term {expression!r} of the formula is no Python expression: {error.msg}") from error
    names = [quoted.get(name, name) for name in _names(tree.body, expression)]
    if not names:
        raise UsageError(f"the term {expression!r} of the formula names no column; leave it out")
    return names


def _names(node: ast.expr, expression: str) -> Iterator[str]:
    """Iterate over the column names in an expression; raise at the first part that is not allowed."""
    match node:
        case ast.Name(id=name):
            yield name
        case ast.Constant(value=bool()):
            raise _not_of_one_row(expression, node)
        case ast.Constant(value=int() | float()):
            pass
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            yield from _names(operand, expression)
        case ast.BinOp(left=left, op=operator, right=right) if isinstance(operator, _ARITHMETIC):
            yield from _names(left, expression)
            yield from _names(right, expression)
        case ast.Compare(left=left, ops=[operator], comparators=[right]) if isinstance(operator, _COMPARISONS):
            yield from _names(left, expression)
            yield from _names(right, expression)
        case ast.Call(func=function, args=arguments, keywords=[]) if _is_element_wise(function, len(arguments)):
            for argument in arguments:
                yield from _names(argument, expression)
        case _:
            raise _not_of_one_row(expression, node)


def _is_element_wise(function: ast.expr, n_arguments: int) -> bool:
    match function:
        case ast.Name(id=name):
            return FUNCTIONS.get(name) == n_arguments
        case ast.Attribute(value=ast.Name(id="np"), attr=name):
            found = getattr(np, name, None)
            # `signature` tells matmul and its kin, which mix rows, from the others; `nin` keeps an `out` argument away
            return isinstance(found, np.ufunc) and (found.nin, found.nout, found.signature) == (n_arguments, 1, None)
    return False


def _not_of_one_row(expression: str, node: ast.expr) -> UsageError:
    return UsageError(
        f"the term {expression!r} of the formula cannot be used: {ast.unparse(node)!r} is no known function of one row, so it "
        "could depend on which rows are read together. Allowed are C(column) on its own; numbers, column names, + - * / // % **, "
        f"comparisons; {', '.join(FUNCTIONS)}; and NumPy's element-wise functions, such as np.sqrt(x). Compute anything else into "
        "a column of the table first; centring and scaling are not needed, each solver does its own"
    )


def _refuse_ambiguous_names(formula: RowFormula, factors: list[Any]) -> None:
    """Refuse columns that would hide a function, or that bear the name of a term."""
    expressions = " ".join(factor.expr for factor in factors if factor.eval_method.value == "python")
    called = set(re.findall(r"\w+", expressions)) & {*FUNCTIONS, "np"}
    outside = _QUOTED.sub("", formula.text)
    terms = {name for name in _QUOTED.findall(formula.text) if "(" in name and name in outside}
    for column in (*formula.numbers, *formula.target_columns, *sorted(terms)):
        if column in called or column in terms:
            raise UsageError(
                f"the column {column!r} has the name of a function or term that the formula uses; rename it in the table"
            )
