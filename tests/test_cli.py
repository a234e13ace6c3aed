"""The command line as a script meets it: real processes, their output, their exit status."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import zarr

import streamlr
from streamlr.dataset.ingest import ingest

DATA = Path(__file__).parent / "data"


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::DeprecationWarning", "-m", "streamlr.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def run_json(*arguments: object) -> tuple[int, dict[str, object]]:
    done = run(*arguments, "--json")
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "houses.csv"
    rng = np.random.default_rng(0)
    area, rooms, town = rng.uniform(40, 200, 400), rng.integers(1, 7, 400), rng.choice(["Ulm", "Bonn", "Kiel"], 400)
    price = 1000 * area + 5000 * rooms + 20_000 * (town == "Ulm") + rng.normal(0, 3000, 400)
    lines = [f"{p!r},{a!r},{r},{t}" for p, a, r, t in zip(price.tolist(), area.tolist(), rooms.tolist(), town, strict=True)]
    path.write_text("\n".join(["price,area,rooms,town", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def ingested(table):
    path = table.with_name("houses.zarr")
    ingest([table], path, formula="price ~ area + rooms + C(town)")
    return path


@pytest.fixture
def store(ingested, tmp_path):
    return Path(shutil.copytree(ingested, tmp_path / "houses.zarr"))


@pytest.fixture
def foreign(tmp_path):
    """A store that somebody else wrote: plain zarr, several chunks."""
    rng = np.random.default_rng(1)
    group = zarr.open_group(tmp_path / "foreign.zarr", mode="w")
    x = rng.normal(size=(1000, 3))
    group.create_array("X", data=x, chunks=(100, 3))
    group.create_array("y", data=x @ [1.0, 2.0, 3.0] + 4, chunks=(100,))
    return tmp_path / "foreign.zarr"


def test_a_newcomers_path_from_csv_to_predictions(table, tmp_path):
    store, model, out = tmp_path / "h.zarr", tmp_path / "m.json", tmp_path / "p.zarr"
    status, facts = run_json("ingest", table, store, "--formula", "price ~ area + rooms + C(town)")
    assert (status, facts["n_rows"], facts["features"]) == (0, 400, ["area", "rooms", "town=Kiel", "town=Ulm"])
    fitted = run("fit", store, "--out", model)
    assert fitted.returncode == 0
    assert "area" in fitted.stdout
    assert fitted.stderr == ""
    status, cost = run_json("evaluate", model, store)
    assert status == 0
    assert 2000 < cost["rmse"] < 4000
    assert run("predict", model, store, out).returncode == 0
    assert zarr.open_group(out, mode="r")["prediction"].shape == (400,)
    status, facts = run_json("verify", store)
    assert (status, facts["n_problems"]) == (0, 0)
    # the same table again, coded as the model was
    again = tmp_path / "again.zarr"
    assert run("ingest", table, again, "--like", model).returncode == 0
    assert (zarr.open_group(again, mode="r")["X"][:] == zarr.open_group(store, mode="r")["X"][:]).all()


def test_help_names_every_command_and_the_exit_status():
    text = run("--help").stdout
    for name in ("demo", "ingest", "inspect", "verify", "fit", "evaluate", "predict"):
        assert name in text
    assert "Exit status" in text


def test_fit_prints_one_json_object_with_exact_numbers(store, tmp_path):
    status, facts = run_json("fit", store, "--out", tmp_path / "m.json")
    model = streamlr.fit(streamlr.open_dataset(store))
    assert status == 0
    assert facts["coef"] == model.coef.tolist()
    assert facts["feature_names"] == list(model.feature_names)
    assert streamlr.load_model(tmp_path / "m.json").coef.tolist() == model.coef.tolist()


def test_options_of_fit_act(foreign):
    _, plain = run_json("fit", foreign)
    _, ridged = run_json("fit", foreign, "--ridge", "0.5")
    _, through_zero = run_json("fit", foreign, "--no-intercept")
    _, named = run_json("fit", foreign, "--target", "x2", "--features", "x0,x1")
    _, weighted = run_json("fit", foreign, "--features", "x0,x1", "--weights", "y", "--missing", "drop", "--threads", "1")
    assert np.allclose(plain["coef"], [1, 2, 3])
    assert np.linalg.norm(ridged["coef"]) < np.linalg.norm(plain["coef"])
    assert through_zero["intercept"] == 0
    assert (named["feature_names"], named["target_names"]) == (["x0", "x1"], ["x2"])
    assert weighted["error"] == "DataError"  # y has negative values, which are no weights


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["fit", "{nowhere}"], 2, "nothing is at"),
        (["fit", "{table}"], 2, "streamlr ingest"),
        (["fit", "{store}", "--target", "prize"], 2, "'prize'"),
        (["fit", "{store}", "--features", "area,romos"], 2, "'romos'"),
        (["fit", "{store}", "--solver", "magic"], 2, "'magic'"),
        (["fit", "{store}", "--ridge", "-1"], 2, "ridge is -1"),
        (["fit", "{store}", "--missing", "ignore"], 2, "'ignore'"),
        (["fit", "{store}", "--memory-limit", "lots"], 2, "'lots'"),
        (["fit", "{store}", "--memory-limit", "1MB"], 5, "the limit is 1.0 MB"),
        (["fit", "{store}", "--out", "{store}"], 2, "already exists"),
        (["fit", "{store}", "--processes", "2"], 2, "No such option"),
        (["evaluate", "{nowhere}", "{store}"], 2, "no file at"),
        (["evaluate", "{table}", "{store}"], 3, "not a streamlr model"),
        (["predict", "{nowhere}", "{store}", "{out}"], 2, "no file at"),
        (["ingest", "{table}", "{out}", "--target", "price"], 3, "town"),
        (["ingest", "{table}", "{out}", "--formula", "price ~ area + town"], 3, "town"),
        (["ingest", "{table}"], 2, "at least one file"),
        (["ingest", "{nowhere}", "{out}", "--target", "price"], 2, "nowhere"),
        (["verify", "{nowhere}"], 2, "nothing is at"),
        (["inspect", "{nowhere}"], 2, "nothing is at"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_mistakes_end_with_their_status_and_a_remedy(arguments, status, says, store, table, tmp_path):
    places = {"store": store, "table": table, "nowhere": tmp_path / "nowhere", "out": tmp_path / "out.zarr"}
    done = run(*[argument.format(**places) for argument in arguments])
    assert done.returncode == status
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize(("array", "chunk"), [("X", "c/3/0"), ("y", "c/3")])
@pytest.mark.parametrize("damage", ["delete", "empty", "truncate"])
def test_damaged_chunks_end_with_status_3_and_their_place(foreign, array, chunk, damage):
    file = foreign / array / chunk
    whole = file.read_bytes()
    file.unlink()
    if damage != "delete":
        file.write_bytes(whole[: len(whole) // 2] if damage == "truncate" else b"")
    for command in ("fit", "verify"):
        done = run(command, foreign)
        assert done.returncode == 3
        assert (
            f"chunk {chunk.removeprefix('c/').replace('/', '.')} of array {array!r} (rows 300 to 399)" in done.stderr + done.stdout
        )
    status, facts = run_json("inspect", foreign)
    assert (status == 3) == (damage in ("delete", "empty"))
    assert facts["plan"]["n_rows"] == 1000


def test_a_nan_and_a_row_count_mismatch(foreign, tmp_path):
    group = zarr.open_group(foreign)
    group["X"][123, 1] = np.nan
    done = run("fit", foreign)
    assert done.returncode == 3
    assert "row 123, column 'x1' is nan" in done.stderr
    status, facts = run_json("fit", foreign, "--missing", "drop")
    assert (status, facts["n_dropped"], facts["dropped_by_column"]) == (0, 1, {"x1": 1})
    group["y"].resize((990,))
    done = run("fit", foreign)
    assert done.returncode == 3
    assert "X has 1,000" in done.stderr
    assert "y has 990" in done.stderr


def test_a_text_column_is_refused_by_name(tmp_path):
    group = zarr.open_group(tmp_path / "t.zarr", mode="w", zarr_format=2)
    group.create_array("X", data=np.ones((10, 2)))
    group.create_array("y", data=np.array(["a"] * 10, dtype="U1"))
    done = run("fit", tmp_path / "t.zarr")
    assert done.returncode == 3
    assert "'y' has dtype" in done.stderr


def test_failures_are_json_too(foreign):
    status, facts = run_json("fit", foreign, "--target", "nobody")
    assert (status, facts["exit_status"], facts["error"]) == (2, 2, "UsageError")
    assert "nobody" in facts["message"]


def test_warnings_go_to_stderr(tmp_path):
    group = zarr.open_group(tmp_path / "w.zarr", mode="w")
    x = np.random.default_rng(0).normal(size=(50, 2))
    group.create_array("X", data=np.column_stack([x, x.sum(axis=1)]))
    group.create_array("y", data=x[:, 0])
    done = run("fit", tmp_path / "w.zarr", "--json")
    facts = json.loads(done.stdout)
    assert "warning: 1 column depends on others: x2 = 1 x0 + 1 x1" in done.stderr
    assert facts["rank"] == 2
    assert np.allclose([facts["aliased"]["x2"][name] for name in ("x0", "x1")], 1)


def test_existing_outputs_stay_without_overwrite(store, tmp_path):
    model, out = tmp_path / "m.json", tmp_path / "p.zarr"
    assert run("fit", store, "--out", model).returncode == 0
    assert run("predict", model, store, out).returncode == 0
    before = model.read_bytes()
    assert run("fit", store, "--out", model, "--ridge", "1").returncode == 2
    assert model.read_bytes() == before
    assert run("predict", model, store, out).returncode == 2
    assert run("fit", store, "--out", model, "--ridge", "1", "--overwrite").returncode == 0
    assert model.read_bytes() != before
    assert run("predict", model, store, out, "--overwrite").returncode == 0


def test_overwriting_destroys_nothing_but_an_output(foreign, store, tmp_path):
    model = tmp_path / "m.json"
    assert run("fit", foreign, "--out", model).returncode == 0
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "diary").write_text("dear")
    (tmp_path / "link").symlink_to(foreign)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments, says in (
        (["predict", model, foreign, foreign], "which is read"),
        (["predict", model, foreign, tmp_path / "link"], "which is read"),
        (["predict", model, foreign / "X", foreign], "which is read"),
        (["predict", model, foreign, foreign / "out.zarr"], "which is read"),
        (["predict", model, foreign, tmp_path / "precious"], "a folder with other files"),
        (["predict", model, foreign, model], "is a file"),
        (["fit", foreign, "--out", foreign], "is a zarr store"),
        (["fit", foreign, "--out", store], "is a zarr store"),
        (["fit", foreign, "--out", foreign / "zarr.json"], "which is read"),
    ):
        done = run(*arguments, "--overwrite")
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """One stored chunk, read three thousand times by as many names: long to fit, quick to write."""
    path = tmp_path_factory.mktemp("slow") / "slow.zarr"
    group = zarr.open_group(path, mode="w")
    x = group.create_array("X", shape=(120_000_000, 20), chunks=(40_000, 20), dtype="float64", compressors=None)
    y = group.create_array("y", shape=(120_000_000,), chunks=(40_000,), dtype="float64", compressors=None)
    block = np.random.default_rng(0).normal(size=(40_000, 20))
    x[:40_000], y[:40_000] = block, block[:, 0]
    for number in range(1, 3000):
        (path / f"X/c/{number}").mkdir()
        (path / f"X/c/{number}/0").hardlink_to(path / "X/c/0/0")
        (path / f"y/c/{number}").hardlink_to(path / "y/c/0")
    return path


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_signal_ends_a_pass_within_two_seconds(slow, tmp_path, command, stop, status):
    out = tmp_path / "out"
    arguments = ["fit", slow, "--out", out]
    if command == "predict":
        x = np.random.default_rng(0).normal(size=(50, 20))
        streamlr.fit(streamlr.Dataset(x, x[:, 0])).save(tmp_path / "m.json")
        arguments = ["predict", tmp_path / "m.json", slow, out]
    process = subprocess.Popen(
        [sys.executable, "-m", "streamlr.cli", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(2.5)
    assert process.poll() is None, "the pass was over before it could be stopped"
    process.send_signal(stop)
    began = time.monotonic()
    time.sleep(0.05)
    process.send_signal(stop)  # impatience does not cut the tidying short
    _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - began < 2
    assert process.returncode == status
    assert stderr == "error: interrupted; nothing was left half-written\n"
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(("stop", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("module", ["streamlr.api", "zarr", "rich.table"])
def test_a_signal_during_the_imports_of_a_command_is_quiet(store, module, stop, status):
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{stop})
sys.meta_path.insert(0, Finder())
from streamlr.cli import main
main()
"""
    arguments = ["--help"] if module == "rich.table" else ["fit", str(store)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["fit", "{store}"], ["fit", "{store}", "--json"], ["verify", "{store}"], ["--help"]])
def test_output_that_cannot_be_written_ends_with_status_5(store, arguments):
    command = [sys.executable, "-m", "streamlr.cli", *[argument.format(store=store) for argument in arguments]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        silent = subprocess.run(command, stdout=full, stderr=full, timeout=60)
    assert done.returncode == silent.returncode == 5
    assert "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("command", "status"), [("fit", 0), ("verify", 3)])
def test_a_reader_that_goes_away_is_no_error(store, command, status):
    zarr.open_group(store).create_array("unwritten", shape=(10,), chunks=(10,), dtype="f8")
    arguments = [sys.executable, "-m", "streamlr.cli", command, str(store)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == status


def test_numbers_that_json_lacks_are_null(tmp_path):
    x = np.arange(10.0)
    streamlr.fit(streamlr.Dataset(x[:, None], x)).save(tmp_path / "m.json")
    group = zarr.open_group(tmp_path / "s.zarr", mode="w")
    group.create_array("X", data=x[:, None])
    group.create_array("y", data=np.full(10, 3e200))  # the square of its residuals is beyond float64, and it has no variance
    status, cost = run_json("evaluate", tmp_path / "m.json", tmp_path / "s.zarr")
    assert (status, cost["n"]) == (0, 10)
    assert cost["mse"] is None
    assert cost["mae"] == pytest.approx(3e200)


def test_inspect_takes_its_status_from_what_a_fit_would_meet(foreign):
    text = run("inspect", foreign).stdout
    assert "recommended solver: normal" in text
    zarr.open_group(foreign).create_array("log", shape=(50,), chunks=(10,), dtype="f8")
    status, facts = run_json("inspect", foreign)
    assert (status, facts["recommended_solver"], facts["n_missing"]) == (0, "normal", 0)
    assert [array["n_missing"] for array in facts["arrays"]] == [0, 5, 0]
    status, facts = run_json("inspect", foreign, "--memory-limit", "1MB")
    assert (status, facts["plan"]) == (5, None)
    assert "the limit is 1.0 MB" in facts["no_plan"]
    assert run("inspect", foreign, "--memory-limit", "lots").returncode == 2
    zarr.open_group(foreign).attrs["streamlr"] = {"complete": False}
    status, facts = run_json("inspect", foreign)
    assert status == 3
    assert "never finished" in facts["no_plan"]


def test_verify_says_what_it_did_not_check(foreign):
    zarr.open_group(foreign).create_array("cube", data=np.zeros((2, 2, 2)))
    status, facts = run_json("verify", foreign)
    assert (status, facts["n_chunks"], facts["n_problems"]) == (0, 20, 0)
    assert "3 dimensions" in facts["not_checked"]["cube"]
    assert "not checked: array 'cube' has 3 dimensions" in run("verify", foreign).stdout
    assert run("verify", foreign, "--memory-limit", "1MB").returncode == 5


def test_the_demo_reproduces_the_reference_to_eleven_digits(tmp_path):
    status, facts = run_json("demo", "--dir", tmp_path / "demo")
    assert status == 0
    reference = json.loads((DATA / "reference_fits.json").read_text())["nycflights_arr_delay"]
    found = {"intercept": facts["intercept"], **facts["coef"]}
    assert list(found) == reference["columns"]
    assert facts["cost"]["n"] == reference["n"]
    for name, exact in zip(reference["columns"], reference["coef"], strict=True):
        assert abs(Decimal(found[name]) - Decimal(exact)) < abs(Decimal(exact)) * Decimal("1e-11"), name
    # a second run replaces its own files
    assert run("demo", "--dir", tmp_path / "demo").returncode == 0
