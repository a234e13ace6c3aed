"""Coding rows: what a formula may say, what its columns are called, and that each row is coded for itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from streamlr.dataset.integrity import seal
from streamlr.dataset.tables.batches import Table, open_table, read_batches
from streamlr.dataset.tables.coding import Coder, Coding, load_coding
from streamlr.dataset.tables.formulas import parse_formula
from streamlr.dataset.tables.levels import sort_levels
from streamlr.errors import BadFile, DataError, NonFiniteValue, PathNotFound, StoreIncomplete, UnknownLevel, UsageError
from streamlr.files import write_json

pytest.importorskip("pyarrow")
formulaic = pytest.importorskip("formulaic")
pandas = pytest.importorskip("pandas")

Row = tuple[float, float, str, str, int]
LEVELS = {"kind": ["a", "b", "c"], "my place": ["in:", "out]"], "month": ["9", "10"]}
ROWS = [(1.0, 2.0, "b", "in:", 9), (4.0, 8.0, "a", "out]", 10), (9.0, 0.5, "c", "out]", 9), (2.0, 1.0, "a", "in:", 9)]


@pytest.fixture
def table(tmp_path: Path):
    lines = ["y,x,kind,my place,month", *(",".join(map(str, row)) for row in ROWS)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    return open_table(tmp_path / "t.csv")


def coded(formula: str, table: Table, block_bytes: int = 2**20):
    parsed = parse_formula(formula)
    coding = Coding.of_formula(parsed, LEVELS)
    coder = Coder(coding)
    numbers = list(dict.fromkeys([*coding.numbers, *coding.target_columns]))
    batches = list(read_batches(table, numbers=numbers, texts=list(coding.levels), block_bytes=block_bytes))
    n_rows = sum(len(batch.rows) for batch in batches)
    x, y = np.full((n_rows, len(coding.features)), np.nan), np.full((n_rows, len(coding.targets)), np.nan)
    start = 0
    for batch in batches:
        stop = start + len(batch.rows)
        coder.code(batch).write_x(x[start:stop])
        coder.code(batch).write_y(y[start:stop])
        start = stop
    return coding, x, y


def is_b(row: Row):
    return float(row[2] == "b")


def is_c(row: Row):
    return float(row[2] == "c")


@pytest.mark.parametrize(
    ("formula", "columns"),
    [
        ("y ~ x", {"x": lambda r: r[1]}),
        ("y ~ 1 + x", {"x": lambda r: r[1]}),
        ("y ~ C(kind) - 1 + 1", {"kind=b": is_b, "kind=c": is_c}),
        ("y ~ x + C(kind)", {"x": lambda r: r[1], "kind=b": is_b, "kind=c": is_c}),
        (
            "y ~ C(kind):x",
            {
                "kind=a:x": lambda r: (r[2] == "a") * r[1],
                "kind=b:x": lambda r: is_b(r) * r[1],
                "kind=c:x": lambda r: is_c(r) * r[1],
            },
        ),
        (
            "y ~ x * C( kind )",
            {
                "x": lambda r: r[1],
                "kind=b": is_b,
                "kind=c": is_c,
                "x:kind=b": lambda r: r[1] * is_b(r),
                "x:kind=c": lambda r: r[1] * is_c(r),
            },
        ),
        (
            "y ~ C(kind):C(`my place`) + C(kind)",
            {
                "kind=b": is_b,
                "kind=c": is_c,
                "kind=a:my place=out]": lambda r: float((r[2], r[3]) == ("a", "out]")),
                "kind=b:my place=out]": lambda r: float((r[2], r[3]) == ("b", "out]")),
                "kind=c:my place=out]": lambda r: float((r[2], r[3]) == ("c", "out]")),
            },
        ),
        ("y ~ month + C(month)", {"month": lambda r: r[4], "month=10": lambda r: float(r[4] == 10)}),
        ("y ~ {x / 2} + I(x ** 2)", {"x / 2": lambda r: r[1] / 2, "I(x ** 2)": lambda r: r[1] ** 2}),
        ("y ~ np.sqrt(y) + I(x > 1)", {"np.sqrt(y)": lambda r: math.sqrt(r[0]), "I(x > 1)": lambda r: float(r[1] > 1)}),
        (
            "y ~ np.maximum(x, 1.5) + log2(x)",
            {"np.maximum(x, 1.5)": lambda r: max(r[1], 1.5), "log2(x)": lambda r: math.log2(r[1])},
        ),
    ],
)
def test_columns_and_their_names(table: Table, formula: str, columns: dict[str, Callable[[Row], float]]):
    coding, x, _ = coded(formula, table)
    assert coding.features == tuple(columns)
    np.testing.assert_array_equal(x, [[value(row) for value in columns.values()] for row in ROWS])


def test_targets_may_be_several_and_functions_of_a_column(table: Table):
    coding, _, y = coded("y + np.sqrt(y) ~ x", table)
    assert coding.targets == ("y", "np.sqrt(y)")
    np.testing.assert_array_equal(y, [[row[0], math.sqrt(row[0])] for row in ROWS])


def test_every_row_is_coded_as_if_it_were_alone(table: Table):
    formula = "y ~ x*C(kind) + log(x) + C(`my place`):C(month)"
    _, together, _ = coded(formula, table)
    _, alone, _ = coded(formula, table, block_bytes=25)
    np.testing.assert_array_equal(together, alone)


terms = st.sampled_from(
    [
        *("x", "z", "log(x)", "I(x > 1)", "{x * z}", "{z // x}", "np.maximum(x, z)", "I(z < 0):x", "np.exp(z):x:z"),
        *("C(kind)", "C(two)", "C(month)", "C(`my place`)", "x:C(kind)", "C(two):z", "z:C(two):x", "C(kind):C(two):C(`my place`)"),
        *(
            "z * C(kind) * C(month)",
            "np.exp(x):C(two):z",
            "I(x > 1):C(kind)",
            "C(kind):z:C(two):np.exp(x)",
            "(z + C(two) + C(kind)) ** 3",
        ),
    ]
)
numbers = st.one_of(st.sampled_from([0.0, -0.0, -1.5, 1.0, 300.0, 1e200, -1e200]), st.floats(-1e3, 1e3))
all_levels = {**LEVELS, "two": ["no", "yes"]}
table_rows = st.lists(
    st.tuples(numbers, numbers, *(st.sampled_from(levels) for levels in all_levels.values())), min_size=1, max_size=20
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(terms=st.lists(terms, min_size=1, max_size=4), rows=table_rows)
@example(terms=["np.exp(z):x:z"], rows=[(x, z, "a", "in:", "9", "no") for x in (0.1, 0.7) for z in (-1.3, 0.3, 2.3)])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_columns_are_to_the_bit_those_that_formulaic_computes_from_all_rows(tmp_path: Path, terms: list[str], rows: list[Any]):
    frame = pandas.DataFrame(rows, columns=["x", "z", *all_levels])
    frame["y"] = frame["z"]
    frame.to_csv(tmp_path / "t.csv", index=False)
    expected_frame = frame.assign(**{column: pandas.Categorical(frame[column], levels) for column, levels in all_levels.items()})
    formula = " + ".join(terms)
    expected = np.asarray(formulaic.model_matrix(formula, expected_frame, output="numpy", na_action="ignore"), dtype=np.float64)[
        :, 1:
    ]
    coding = Coding.of_formula(parse_formula(f"y ~ {formula}"), all_levels)
    (batch,) = read_batches(open_table(tmp_path / "t.csv"), numbers=["x", "z", "y"], texts=list(coding.levels))
    coded, x = Coder(coding).code(batch), np.full(expected.shape, np.nan)
    if not np.isfinite(expected).all():
        line = 2 + int(np.argwhere(~np.isfinite(expected))[0, 0])
        with pytest.raises(NonFiniteValue, match=f"line {line}, "):
            coded.write_x(x)
        return
    cut = len(rows) // 2
    coded.write_x(x[:cut], slice(0, cut))
    coded.write_x(x[cut:], slice(cut, None))
    assert len(coding.features) == expected.shape[1]
    assert x.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "term",
    [
        *("center(x)", "scale(x)", "poly(x, 2)", "bs(x, df=4)", "lag(x)", "hashed(x)", "x.mean()", "I(x - x.mean())", "np.mean(x)"),
        *("np.cumsum(x)", "I(x @ x)", "I(x[0])", "np.add.reduce(x)", "np.matmul(x, x)", "np.add(x, x, x)", "np.exp(x, out=x)"),
        *("C(kind, contr.sum)", "C(x + 1)", "C(a.b)", "Q('x')", "np.load(x)", "I(__import__('os'))", "I((lambda: x)())", "I('x')"),
        *("I(True + x)", "I(1 < x < 2)", "exp10(x)"),
    ],
)
def test_terms_that_are_no_function_of_one_row_are_refused(term: str):
    with pytest.raises(UsageError, match=r"function of one row.*Compute anything else into a column"):
        parse_formula(f"y ~ a + {term}")


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("y ~ 0 + x", "fit_intercept=False"),
        ("y ~ x - 1", "--no-intercept"),
        ("y ~ 1", "has no feature"),
        ("~ x", "should be one target or more"),
        ("x", "should be one target or more"),
        ("", "should be one target or more"),
        ("y ~ x | z", "should be one target or more"),
        ("y ~ x +", "cannot be read"),
        ("y ~ (x", "cannot be read"),
        ("y ~ .", "cannot be read"),
        ("y ~ 2*x", "cannot be read"),
        ("y ~ 2:x", r"write \{2 \* column\}"),
        ("C(y) ~ x", "should be a number column"),
        ("y:z ~ x", "should be a number column"),
        ("1 ~ x", "should be a number column"),
        ("y ~ I(1 + 2)", "names no column"),
        ("y ~ np.bitwise_and(x, 1)", "cannot be computed"),
        ("y ~ log + log(x)", "has the name of a function"),
        ("y ~ C(a) + `C(a)`", "has the name of a function or term"),
    ],
)
def test_formulas_that_are_refused(formula: str, message: str):
    with pytest.raises(UsageError, match=message):
        Coding.of_formula(parse_formula(formula), {"a": ["p", "q"]})


def test_a_column_may_be_called_intercept():
    assert Coding.of_formula(parse_formula("y ~ x + Intercept"), {}).features == ("x", "Intercept")


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(UsageError, match=r"two columns of one name.*kind=b"):
        Coding.of_formula(parse_formula("y ~ C(kind) + `kind=b`"), LEVELS)


def test_a_category_of_one_level_is_an_error():
    with pytest.raises(DataError, match=r"'kind' has the single level 'a'; leave C\(kind\) out"):
        Coding.of_formula(parse_formula("y ~ x + C(kind)"), {"kind": ["a"]})


def test_levels_sort_as_numbers_if_all_are():
    assert sort_levels("m", {"10", "9", "-1.5"}) == ["-1.5", "9", "10"]
    assert sort_levels("m", {"10", "9", "b", "B"}) == ["10", "9", "B", "b"]
    with pytest.raises(DataError, match="spelled in two ways"):
        sort_levels("m", {"1", "1.0"})


def test_an_unknown_level_is_an_error_with_its_line_and_the_known_levels(table: Table):
    coder = Coder(Coding.of_formula(parse_formula("y ~ C(kind)"), {"kind": ["a", "b"]}))
    (batch,) = read_batches(table, texts=["kind"])
    with pytest.raises(UnknownLevel, match=r"t.csv, line 4, column 'kind': got the level 'c'.*'a', 'b'"):
        coder.code(batch)


def test_a_term_that_is_not_finite_is_an_error_with_its_line(table: Table):
    with pytest.raises(NonFiniteValue, match=r"t.csv, line 5, column 'log\(y - 2\)': the formula gives -inf"):
        coded("x ~ log(y - 2) + y", open_table(_without_first_row(table)))
    with pytest.raises(NonFiniteValue, match=r"line 2, column 'log\(y - 2\)': the formula gives nan"):
        coded("log(y - 2) ~ x", table)


def _without_first_row(table: Table):
    path = table.path.with_name("u") / "t.csv"
    path.parent.mkdir()
    lines = table.path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2], lines[3], lines[3], lines[4]]))
    return path


def test_json_restores_the_coding():
    coding = Coding.of_formula(parse_formula("y ~ x + C(kind) + C(month)"), LEVELS, weights="w")
    restored = Coding.from_json(json.loads(json.dumps(coding.to_json())))
    assert restored == coding
    assert coding.to_json()["levels"]["month"] == {"reference": "9", "levels": ["9", "10"]}


@pytest.mark.parametrize(
    "change",
    [
        {"formula": "y ~ x + C(kind) + center(z)"},
        {"formula": "y ~ I(__import__('os').system('true'))"},
        {"formula": "y ~ z + C(kind)"},
        {"formula": 3},
        {"formula": None},
        {"features": ["x"]},
        {"levels": {}},
        {"levels": {"kind": {"reference": "b", "levels": ["a", "b"]}}},
        {"levels": []},
        {"more": 1},
    ],
)
def test_a_coding_that_contradicts_itself_is_refused(change: dict[str, Any]):
    content = Coding.of_formula(parse_formula("y ~ x + C(kind)"), LEVELS).to_json()
    with pytest.raises(BadFile, match="write the store or model again"):
        Coding.from_json(content | change)


def test_coding_of_a_store_and_of_a_model(tmp_path: Path):
    coding = Coding.of_formula(parse_formula("y ~ x + C(kind)"), LEVELS)
    write_json(tmp_path / "m.json", "streamlr model", 1, {"coding": coding.to_json()}, overwrite=False)
    assert load_coding(tmp_path / "m.json") == coding
    zarr.create_group(tmp_path / "sealed.zarr")
    seal(tmp_path / "sealed.zarr", features=[], targets=[], coding=coding.to_json(), counts={})
    assert load_coding(tmp_path / "sealed.zarr") == coding


def test_places_that_hold_no_coding(tmp_path: Path):
    write_json(tmp_path / "m.json", "streamlr model", 1, {"coef": [1.0]}, overwrite=False)
    zarr.create_group(tmp_path / "foreign.zarr")
    zarr.create_group(tmp_path / "unfinished.zarr", attributes={"streamlr": {"complete": False}})
    (tmp_path / "folder").mkdir()
    for name in ("m.json", "foreign.zarr", "folder"):
        with pytest.raises(UsageError):
            load_coding(tmp_path / name)
    with pytest.raises(StoreIncomplete):
        load_coding(tmp_path / "unfinished.zarr")
    with pytest.raises(PathNotFound):
        load_coding(tmp_path / "none.json")
