"""The scripts run as README says, on small data; and README shows the script that is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.core.sync import sync

import streamlr

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"


def run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "figures.json").read_text())


async def listed(store: Any, folder: str) -> list[str]:
    return [name async for name in store.list_dir(folder)]


@pytest.fixture
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def made(tmp_path):
    done = run("make_data.py", "made.zarr", "--rows", 5000, "--features", 6, "--rows-per-chunk", 700, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "made.zarr"


def test_made_data_have_the_coefficients_they_name(made):
    import streamlr

    group = zarr.open_group(made, mode="r")
    model = streamlr.fit(streamlr.open_dataset(made))
    known = np.array(group.attrs["coef"])[:, 0]
    assert np.abs((model.coef - known) / model.std_err).max() < 5
    assert abs(model.intercept - group.attrs["intercept"]) < 5 * model.intercept_std_err


@pytest.mark.parametrize("options", [["--dtype", "float32", "--codec", "blosc-lz4"], ["--targets", 2, "--rows-per-shard", 1400]])
def test_made_data_come_in_many_kinds(tmp_path, options):
    import streamlr

    arguments = ["made.zarr", "--rows", 3000, "--features", 3, "--rows-per-chunk", 700, "--offset", 100, *options]
    assert run("make_data.py", *arguments, cwd=tmp_path).returncode == 0
    model = streamlr.fit(streamlr.open_dataset(tmp_path / "made.zarr"))
    known = np.array(zarr.open_group(tmp_path / "made.zarr", mode="r").attrs["coef"])
    assert np.abs((model.coef_matrix - known) / model.std_err.reshape(known.shape)).max() < 5


def test_the_etl_script_fits_and_predicts(made):
    done = run("fit_zarr.py", made, made, "out.zarr", cwd=made.parent)
    assert done.returncode == 0, done.stderr
    assert "held out: mse" in done.stdout
    assert zarr.open_group(made.parent / "out.zarr", mode="r")["prediction"].shape == (5000,)
    assert (made.parent / "model.json").exists()
    missing = run("fit_zarr.py", "nowhere.zarr", made, "out.zarr", cwd=made.parent)
    assert (missing.returncode, missing.stderr.startswith("error: nothing is at")) == (2, True)


def test_readme_shows_the_etl_script_as_it_is():
    source = (SCRIPTS / "fit_zarr.py").read_text()
    function = source[source.index("def main") : source.index('\n\nif __name__ == "__main__"')].strip()
    assert function in (ROOT / "README.md").read_text()


def test_the_benchmark_prints_ratios_of_fits_that_agree(made):
    done = run("bench.py", "--store", made, "--repeats", 1, "--out", "figures.json", cwd=made.parent)
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout
    runs = figures(made.parent)["runs"]["given"]
    # the hand-made contestants fit without an intercept, so compare them with each other
    assert np.allclose(runs["da.map_blocks, BLAS at 1"][0]["coef"], runs["hand-tuned loop"][0]["coef"])
    assert np.allclose(runs["scikit-learn Ridge in memory"][0]["coef"], runs["streamlr fit"][0]["coef"])
    assert all(len(found) == 1 for found in runs.values())
    gaps = {name: found[0]["gap"] for name, found in runs.items() if "gap" in found[0]}
    assert {"streamlr minibatch epoch", "scikit-learn SGD epoch"} <= gaps.keys()
    assert all(gap > 0 for gap in gaps.values()), "no descent ends below the optimum"


def test_neighbours_that_know_weights_use_them(tmp_path, scripts_on_path):
    import neighbours

    arguments = ["made.zarr", "--rows", 5000, "--features", 6, "--rows-per-chunk", 700, "--weights"]
    assert run("make_data.py", *arguments, cwd=tmp_path).returncode == 0
    done = run("bench.py", "--store", "made.zarr", "--repeats", 1, "--out", "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = figures(tmp_path)["runs"]["given"]
    assert np.allclose(runs["da.map_blocks, BLAS at 1"][0]["coef"], runs["hand-tuned loop"][0]["coef"], rtol=1e-9)
    assert "scikit-learn SGD epoch" in runs
    assert "scikit-learn Ridge in memory" not in runs, "it is not told of weights"
    zarr.open_group(tmp_path / "made.zarr", mode="r+")["weights"][:] = 1e-9
    coef, _ = next(neighbours.scikit_learn_steps(tmp_path / "made.zarr"))
    assert np.abs(coef).max() < 1e-6, "rows of hardly any weight teach hardly anything"


def test_the_benchmark_ingests_every_row_that_arrow_reads(tmp_path):
    arguments = [
        "--regime",
        "ingest",
        "--regime",
        "ingest, categories",
        "--bytes",
        400_000,
        "--repeats",
        1,
        "--out",
        "figures.json",
    ]
    done = run("bench.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {name: runs["streamlr ingest"][0]["coef"] for name, runs in figures(tmp_path)["runs"].items()}
    assert rows == {name: runs["pyarrow.csv.open_csv"][0]["coef"] for name, runs in figures(tmp_path)["runs"].items()}
    assert rows == {"ingest": [400_000 // 4 // 80], "ingest, categories": [400_000 // 4 // 64]}


def test_made_tables_have_the_categories_asked_for(tmp_path):
    from streamlr.dataset.ingest import ingest

    assert run("make_tables.py", "made.csv", "--rows", 500, "--features", 1, "--categories", 2, cwd=tmp_path).returncode == 0
    report = ingest(tmp_path / "made.csv", tmp_path / "made.zarr", formula="y ~ x0 + C(c0) + C(c1)")
    assert (report.n_rows, len(report.features)) == (500, 1 + 3 + 7)


def test_no_moment_of_a_profile_counts_twice(tmp_path):
    run("make_data.py", "made.zarr", "--rows", 20_000, "--features", 60, "--rows-per-chunk", 3000, cwd=tmp_path)
    done = run("bench.py", "--store", "made.zarr", "--profile", "--repeats", 1, "--out", "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = figures(tmp_path)["phases"]["given"]
    assert all(seconds >= 0 for seconds in found["phases"].values()), "what is left for other things is not less than nothing"
    assert all(found["phases"][phase] > 0 for phase in ("read", "decode", "centre", "product", "merge"))
    assert all(phase in done.stdout for phase in found["phases"])


def test_a_moment_counts_for_the_innermost_phase(scripts_on_path, monkeypatch):
    import phases

    ticks = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(ticks))
    clock = phases.Clock()
    with clock.phase("outer"), clock.phase("inner"):
        pass
    assert clock.seconds == {"outer": (1 - 0) + (7 - 3), "inner": 3 - 1}


def test_a_profile_says_which_function_is_gone(scripts_on_path):
    import phases

    with pytest.raises(SystemExit, match=r"streamlr.api:nothing is gone .* where 'solve' happens now"):
        phases.wrap("streamlr.api:nothing", "solve")
    with pytest.raises(SystemExit, match=r"streamlr.nowhere:nothing is gone .* where 'solve' happens now"):
        phases.wrap("streamlr.nowhere:nothing", "solve")


def test_the_benchmark_scales_rows_by_ten(tmp_path):
    done = run("bench.py", "--scaling", "--only", "fit", "--bytes", 400_000, "--repeats", 1, "--out", "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {who: set(runs) for who, runs in figures(tmp_path)["scaling"].items()} == {"streamlr fit": {"125 rows", "1250 rows"}}
    assert "125 and 1,250 rows" in done.stdout


def test_scale_plans_schedules_and_concludes(tmp_path):
    found = json.loads(run("scale.py", "--spans", 150, cwd=tmp_path).stdout)
    assert [plan["rows"] for plan in found["planned"].values()] == [10**12] * 3
    assert all(plan["chunks"] == 10**6 and plan["tasks"] <= 10_000 for plan in found["planned"].values())
    assert found["scheduled"]["spans"] == 150
    assert found["scheduled"]["bytes of a span's task"] < 1_000
    assert all(0 < found["100 TB on 100 workers"][f"p = {p}"]["merging and scheduling, share"] < 1 for p in (100, 1_000, 4_096))


def test_made_rows_are_a_function_of_their_place(scripts_on_path):
    import scale

    dataset = scale.made(1_000, 3, 100)
    assert streamlr.accumulate(dataset).n == 1_000
    whole, part = np.empty((1_000, 3)), np.empty((10, 3))
    reader = dataset.features[0].reader()
    reader.read_into(whole, 0)
    reader.read_into(part, 500)
    assert (part == whole[500:510]).all()
    assert len(np.unique(whole)) > 1_000


def test_many_chunks_are_one(scripts_on_path, tmp_path):
    import many_chunks

    group = zarr.open_group(many_chunks.many_chunks_of(3), mode="r")
    rows = group["X"][:]
    assert rows.shape == (3 * many_chunks.ROWS, many_chunks.FEATURES)
    assert np.array_equal(rows[: many_chunks.ROWS], rows[-many_chunks.ROWS :])
    keys = sorted(key for name in "Xy" for key in sync(listed(group.store, f"{name}/c")))
    assert keys == ["0", "0", "1", "1", "2", "2"]
    assert [sync(group.store.exists(f"y/c/{i}")) for i in (2, 3)] == [True, False]
    read = json.loads(run("many_chunks.py", "--chunks", 40, "--read", cwd=tmp_path).stdout)
    assert read["rows read"] == read["rows"] == 40 * many_chunks.ROWS


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (["--profile", "--only", "fit"], "--only"),
        (["--scaling", "--picture", "a.png"], "--picture"),
        (["--many-chunks", "--store", "a.zarr"], "--store"),
        (["--store", "a.zarr", "--regime", "p = 10"], "--regime"),
        (["--store", "a.zarr", "--bytes", "1000"], "--bytes"),
        (["--tasks", "--bytes", "1000"], "--bytes"),
    ],
)
def test_the_benchmark_refuses_options_that_would_not_act(tmp_path, options, idle):
    done = run("bench.py", *options, cwd=tmp_path)
    assert (done.returncode, f"{idle} would not act" in done.stderr) == (2, True)
