"""The scripts run as README says, on small data; and README shows the script that is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"


def run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


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
    figures = made.parent / "figures.json"
    done = run("bench.py", "--store", made, "--repeats", 1, "--out", figures, cwd=made.parent)
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout
    runs = json.loads(figures.read_text())["runs"]["given"]
    # the hand-made contestants fit without an intercept, so compare them with each other
    assert np.allclose(runs["da.map_blocks, BLAS at 1"][0]["coef"], runs["hand-tuned loop"][0]["coef"])
    assert np.allclose(runs["scikit-learn Ridge in memory"][0]["coef"], runs["streamlr fit"][0]["coef"])
    assert all(len(found) == 1 for found in runs.values())
