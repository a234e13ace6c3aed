"""A fitted model as a value: it predicts row by row, says how sure it is, and comes back from disk bit for bit."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import digits_of, fractions_of, matrices

import streamlr
from streamlr.errors import BadFile, OutputExists, PathNotFound, RankWarning, UsageError
from streamlr.files import digest

DATA = Path(__file__).parent / "data"
SETS = json.loads((DATA / "nist" / "nist.json").read_text(encoding="utf-8"))


def rows(p: int = 3, k: int = 1, n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(p + 10 * k)
    return rng.standard_normal((n, p)), rng.standard_normal((n, k)) if k > 1 else rng.standard_normal(n)


def build(kind: str) -> streamlr.FittedModel:
    x, y = rows()
    if kind == "several targets":
        return streamlr.fit(streamlr.Dataset(*rows(k=2)))
    if kind == "no intercept":
        return streamlr.fit(streamlr.Dataset(x, y), fit_intercept=False)
    if kind == "ridge":
        return streamlr.fit(streamlr.Dataset(x, y, feature_names=["größe", "x 1", '"']), ridge=0.1)
    if kind == "ridge, several targets":
        return streamlr.fit(streamlr.Dataset(*rows(k=2)), ridge=0.1)
    if kind == "weights":
        return streamlr.fit(streamlr.Dataset(x, y, np.linspace(0, 1, len(y))))
    if kind == "solved":
        return streamlr.solve(streamlr.accumulate(streamlr.Dataset(x, y)))
    if kind == "aliased":
        with pytest.warns(RankWarning):
            return streamlr.fit(streamlr.Dataset(np.column_stack([x, x[:, 0], np.ones(len(x))]), y))
    if kind == "aliased, several targets":
        x, y = rows(k=2)
        with pytest.warns(RankWarning):
            return streamlr.fit(streamlr.Dataset(np.column_stack([x, x[:, 0], np.ones(len(x))]), y))
    if kind == "one row":
        with pytest.warns(RankWarning):
            return streamlr.fit(streamlr.Dataset(x[:1], y[:1]))
    if kind == "beyond the range of squares":
        return streamlr.fit(streamlr.Dataset(x, y * 1e200))
    if kind == "one target of several beyond the range of squares":
        return streamlr.fit(streamlr.Dataset(x, np.column_stack([y, y * 1e200])))
    assert kind == "single"
    return streamlr.fit(streamlr.Dataset(x, y))


KINDS = [
    "single",
    "several targets",
    "no intercept",
    "ridge",
    "ridge, several targets",
    "weights",
    "solved",
    "aliased",
    "aliased, several targets",
    "one row",
    "beyond the range of squares",
    "one target of several beyond the range of squares",
]


def bits(value: Any) -> Any:
    """What must be equal for two values to be the same bit for bit."""
    if isinstance(value, streamlr.Cost):
        return {name: bits(getattr(value, name)) for name in value.__slots__}
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {name: bits(one) for name, one in value.items()}
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_is_the_identity(kind: str, tmp_path: Path):
    model = build(kind)
    model.save(tmp_path / "m.json")
    again = streamlr.load_model(tmp_path / "m.json")
    for field in fields(model):
        assert bits(getattr(again, field.name)) == bits(getattr(model, field.name)), field.name
    x = np.random.default_rng(9).standard_normal((7, model.n_features))
    assert again.predict(x).tobytes() == model.predict(x).tobytes()
    assert str(again.summary()) == str(model.summary())
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "m.json").read_bytes()


def test_a_model_file_is_json_without_nan(tmp_path: Path):
    build("aliased").save(tmp_path / "m.json")
    text = (tmp_path / "m.json").read_text(encoding="utf-8")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    body = json.loads(text, parse_constant=refuse)
    assert body["format"] == "streamlr model"
    assert body["std_err"][0] is None
    assert body["aliased"]["x4"] == {}
    assert len(text) < 4000


def test_an_existing_file_is_kept(tmp_path: Path):
    model = build("single")
    (tmp_path / "m.json").write_text("mine")
    with pytest.raises(OutputExists):
        model.save(tmp_path / "m.json")
    assert (tmp_path / "m.json").read_text() == "mine"
    model.save(tmp_path / "m.json", overwrite=True)
    assert streamlr.load_model(tmp_path / "m.json").n_rows == 30


def altered(body: dict[str, Any], **changes: Any) -> str:
    """The model file with other values and a digest that fits them: what only the check of the content can notice."""
    body = {key: value for key, value in body.items() if key != "digest"} | changes
    body = {key: value for key, value in body.items() if value is not ...}
    return json.dumps({**body, "digest": digest(body)})


@pytest.mark.parametrize(
    "change",
    [
        {"coef": [1.0]},
        {"coef": [1.0, 2.0, None]},
        {"coef": "a"},
        {"coef": ...},
        {"intercept": "zero"},
        {"intercept": None},
        {"std_err": ...},
        {"cost": {}},
        {"cost": None},
        {"version": 99},
        {"version": True},
        {"format": "streamlr moments"},
        {"feature_names": None},
        {"feature_names": ["x0", "x0", "x1"]},
        {"target_names": []},
        {"n_rows": "30"},
        {"std_err": [1.0]},
    ],
    ids=str,
)
def test_a_file_that_is_no_model_is_refused(change: dict[str, Any], tmp_path: Path):
    build("single").save(tmp_path / "m.json")
    body = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert streamlr.load_model(tmp_path / "m.json").rank == 3
    (tmp_path / "m.json").write_text(altered(body))
    assert streamlr.load_model(tmp_path / "m.json").rank == 3
    (tmp_path / "m.json").write_text(altered(body, **change))
    with pytest.raises(BadFile, match=r"m\.json"):
        streamlr.load_model(tmp_path / "m.json")


def test_damage_is_noticed(tmp_path: Path):
    path = tmp_path / "m.json"
    build("single").save(path)
    whole = path.read_bytes()
    replaced = [
        (b'"rank": 3', b'"rank": 2'),
        (b'"rank": 3', b'"rank": NaN'),
        (b"streamlr model", b"other"),
        (b'"digits"', b'"digit"'),
    ]
    for damaged in (
        whole[:-20],
        whole[: len(whole) // 2],
        b"",
        whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
        pickle.dumps({"coef": 1}),
        *(whole.replace(old, new) for old, new in replaced),
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(BadFile):
            streamlr.load_model(path)
    with pytest.raises(PathNotFound):
        streamlr.load_model(tmp_path / "none.json")


# --- prediction ------------------------------------------------------------------------------------------------------


@given(matrices(min_rows=2, max_rows=40, min_columns=3, max_columns=3, awkward=False), st.integers(0, 100))
def test_a_row_is_predicted_alone_as_among_others(x: np.ndarray, seed: int):
    for model in (build("single"), build("several targets")):
        together = model.predict(x)
        order = np.random.default_rng(seed).permutation(len(x))
        assert model.predict(x[order]).tobytes() == together[order].tobytes()
        for i in (0, len(x) - 1):
            assert np.asarray(model.predict(x[i])).tobytes() == together[i].tobytes()
            assert model.predict(x[i : i + 1]).tobytes() == together[i].tobytes()
        assert model.predict(np.asfortranarray(x)).tobytes() == together.tobytes()


def test_a_prediction_is_the_sum_it_says():
    model = build("several targets")
    x = np.array([1.5, -2.0, 0.25])
    for j in range(2):
        products = [a * b for a, b in zip(fractions_of(x), fractions_of(model.coef[:, j]), strict=True)]
        exact = sum(products, fractions_of(model.intercept[j]))
        assert digits_of([model.predict(x)[j]], [exact]) >= 14


def test_shapes_of_predictions():
    x = np.ones((5, 3))
    single, several = build("single"), build("several targets")
    assert single.predict(x).shape == (5,)
    assert several.predict(x).shape == (5, 2)
    assert np.ndim(single.predict(x[0])) == 0
    assert several.predict(x[0]).shape == (2,)
    assert single.predict(x.tolist()).tobytes() == single.predict(x).tobytes()
    assert single.predict(x.astype("float32")).dtype == np.float64


@pytest.mark.parametrize("kind", ["single", "several targets"])
def test_dask_predictions_are_lazy_and_the_same(kind: str):
    model = build(kind)
    x = np.random.default_rng(0).standard_normal((20, 3))
    lazy = model.predict(da.from_array(x, chunks=(7, 2)))
    assert isinstance(lazy, da.Array)
    assert lazy.shape == model.predict(x).shape
    assert lazy.compute().tobytes() == model.predict(x).tobytes()


def test_other_columns_are_refused():
    model = build("single")
    for count in (2, 4):
        with pytest.raises(UsageError, match=f"X has {count} features, .*3 features"):
            model.predict(np.ones((2, count)))

    class Frame:
        def __init__(self, columns: list[str]) -> None:
            self.columns = columns

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.ones((2, len(self.columns)))

    assert model.predict(Frame(["x0", "x1", "x2"])).shape == (2,)
    with pytest.raises(UsageError, match="another order"):
        model.predict(Frame(["x1", "x0", "x2"]))
    with pytest.raises(UsageError, match=r"lacking \['x2'\], unknown \['other'\]"):
        model.predict(Frame(["x0", "x1", "other"]))


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least"), [("Norris", 10.2), ("NoInt1", 14.5), ("Longley", 11.0)])
def test_the_table_against_certified_values(name: str, least: float):
    source = SETS[name]
    y = np.array(source["y"])
    x = np.array(source["x"]).reshape(len(y), -1)
    table = streamlr.fit(streamlr.Dataset(x, y), fit_intercept=source["intercept"]).summary()
    coef, errors = (np.array(source[key], dtype=np.float64) for key in ("exact_coef_25digits", "exact_std_err_25digits"))
    assert table.names[0] == ("intercept" if source["intercept"] else "x0")
    assert table.df_resid == source["df_resid"]
    assert digits_of(table.coef, fractions_of(coef)) >= least
    assert digits_of(table.std_err, fractions_of(errors)) >= least
    assert digits_of(table.t, fractions_of(coef / errors)) >= least
    if name != "Longley":  # one regressor: t^2 is the certified F
        assert table.t[-1] ** 2 == pytest.approx(source["anova"]["F"], rel=1e-10)


def test_p_values_and_intervals_against_closed_forms():
    # with 2 degrees of freedom Student's distribution is F(t) = 1/2 + t / (2 sqrt(2 + t^2)), and its quantile has a closed form
    x, y = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 3.0, 5.0, 8.0])
    model = streamlr.fit(streamlr.Dataset(x, y))
    for level in (0.5, 0.95, 0.99):
        table = model.summary(level=level)
        assert table.df_resid == 2
        assert table.p == pytest.approx(1 - np.abs(table.t) / np.sqrt(2 + table.t**2), rel=1e-9)
        alpha = 1 - level
        quantile = level * math.sqrt(2 / (alpha * (2 - alpha)))
        assert table.conf_int[:, 0] == pytest.approx(table.coef - quantile * table.std_err, rel=1e-9)
        assert table.conf_int[:, 1] == pytest.approx(table.coef + quantile * table.std_err, rel=1e-9)
    # by hand: slope 2.3, intercept 0.8, residuals .2 -.1 -.4 .3, RSS 0.3
    assert model.coef[0] == pytest.approx(2.3, rel=1e-14)
    assert model.std_err[0] == pytest.approx(math.sqrt(0.15 / 5), rel=1e-13)
    assert model.intercept_std_err == pytest.approx(math.sqrt(0.15 * (1 / 4 + 2.25 / 5)), rel=1e-13)


def test_the_text_holds_the_table():
    text = str(build("single").summary())
    assert "30 rows, 3 features, rank 3, route cholesky" in text
    for name in ("intercept", "x0", "x1", "x2", "95% interval"):
        assert name in text
    assert "ridge 0.1" in str(build("ridge").summary())
    assert str(build("several targets").summary()).count("intercept") == 2
    assert "nan" in str(build("aliased").summary())


def test_shapes_of_the_table():
    table = build("several targets").summary()
    assert (table.coef.shape, table.p.shape, table.conf_int.shape) == ((4, 2), (4, 2), (4, 2, 2))
    table = build("no intercept").summary()
    assert (table.names, table.coef.shape, table.conf_int.shape) == (("x0", "x1", "x2"), (3,), (3, 2))


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -0.1, float("nan")])
def test_a_level_that_is_none_is_refused(level: float):
    with pytest.raises(UsageError, match="level is"):
        build("single").summary(level=level)
