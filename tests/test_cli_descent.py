"""Gradient descent from the command line: options that act or are refused, statuses, and an end in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

import streamlr

N, P = 60_000, 5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "rows.zarr"
    rng = np.random.default_rng(3)
    x = rng.normal(size=(N, P)) * 10.0 ** np.arange(P) + 1e3
    group = zarr.open_group(path, mode="w")
    group.create_array("X", data=x, chunks=(7_000, P))
    group.create_array("y", data=x @ (1.0 / 10.0 ** np.arange(P)) + rng.normal(size=N), chunks=(7_000,))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "streamlr.cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def facts(*arguments: object) -> dict[str, object]:
    done = run(*arguments, "--json")
    assert len(done.stdout.splitlines()) == 1, done
    return json.loads(done.stdout)


@pytest.mark.parametrize("solver", ["minibatch", "sgd", "gd"])
def test_each_solver_comes_close_to_the_exact_fit_and_says_how_it_went(store, solver, tmp_path):
    exact = streamlr.fit(streamlr.open_dataset(store))
    found = facts("fit", store, "--solver", solver, "--out", tmp_path / "m.json")
    assert found["exit_status"] == 0
    assert found["route"] == solver
    assert found["stopped"]
    assert found["cost"]["mse"] <= exact.cost.mse * 1.001
    model = streamlr.load_model(tmp_path / "m.json")
    assert model.coef.tolist() == found["coef"]
    assert len(model.history) == len(found["history"]) > 0
    done = run("fit", store, "--solver", solver)
    assert done.returncode == 0
    assert found["stopped"] in done.stdout
    assert "nan" not in done.stdout


def test_every_option_reaches_the_descent(store):
    given = facts(
        *(
            "fit",
            store,
            "--solver",
            "minibatch",
            "--batch-size",
            100,
            "--learning-rate",
            "cosine:0.05,3000",
            "--update",
            "momentum",
        ),
        *("--scale", "standard", "--max-epochs", 4, "--tol", 1e-9, "--patience", 2, "--gradient-tol", 0, "--max-seconds", 1000),
        *(
            "--validation",
            0.2,
            "--seed",
            5,
            "--no-shuffle",
            "--no-average",
            "--log-every",
            20_000,
            "--ridge",
            0.1,
            "--no-intercept",
        ),
    )
    solver = streamlr.Descent(
        "minibatch",
        batch_size=100,
        learning_rate=streamlr.descent.schedules.Cosine(0.05, 3000),
        update="momentum",
        scale="standard",
        max_epochs=4,
        tol=1e-9,
        patience=2,
        gradient_tol=0,
        max_seconds=1000,
        validation=0.2,
        seed=5,
        shuffle=False,
        average=False,
        log_every=20_000,
    )
    model = streamlr.fit(streamlr.open_dataset(store), solver, ridge=0.1, fit_intercept=False)
    assert given["coef"] == model.coef.tolist()
    assert [record["rows"] for record in given["history"]] == [record.rows for record in model.history]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch-size", "5"], "--batch-size is an option of gradient descent"),
        (["--solver", "normal", "--checkpoint", "{tmp}/c"], "checkpoint"),
        (["--solver", "sgd", "--batch-size", "5"], "batch_size"),
        (["--solver", "sgd", "--checkpoint-every", "5"], "checkpoint_every"),
        (["--solver", "gd", "--shuffle"], "shuffle"),
        (["--solver", "minibatch", "--batch-size", "0"], "batch_size is 0"),
        (["--solver", "minibatch", "--batch-size", "60001"], "60,001"),
        (["--solver", "minibatch", "--learning-rate", "fast"], "learning rate is 'fast'"),
        (["--solver", "minibatch", "--learning-rate", "cosine:1"], "cosine:1"),
        (["--solver", "minibatch", "--learning-rate", "-1"], "rate"),
        (["--solver", "minibatch", "--update", "newton"], "'adam'"),
        (["--solver", "minibatch", "--scale", "minmax"], "'whiten'"),
        (["--solver", "minibatch", "--validation", "1"], "validation is 1"),
        (["--solver", "newton"], "'minibatch'"),
        (["--solver", "minibatch", "--checkpoint", "{tmp}/none/c"], "no folder"),
        (["--solver", "minibatch", "--checkpoint", "{tmp}/a", "--out", "{tmp}/../{name}/a"], "--out and --checkpoint are both"),
    ],
)
def test_options_that_cannot_act_are_refused(store, arguments, says, tmp_path):
    done = run("fit", store, *[argument.format(tmp=tmp_path, name=tmp_path.name) for argument in arguments])
    assert done.returncode == 2, done
    assert says in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("solver", ["minibatch", "sgd", "gd"])
def test_a_descent_that_goes_up_ends_with_status_4(store, solver):
    found = facts("fit", store, "--solver", solver, "--learning-rate", "1e3")
    assert found["exit_status"] == 4
    assert found["error"] == "Diverged"
    assert "learning_rate='auto'" in found["message"]


def test_interrupted_in_the_middle_it_goes_on_to_the_same_bits(store, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    options = ("fit", store, "--solver", "minibatch", "--batch-size", 4, "--max-epochs", 3, "--json")
    whole = json.loads(run(*options).stdout)
    kept = (*options, "--checkpoint", checkpoint, "--checkpoint-every", 8_000)
    process = subprocess.Popen(command(*kept), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 2, err
    assert process.returncode == 130
    assert "error: interrupted" in err
    assert json.loads(out)["exit_status"] == 130
    resumed = json.loads(run(*kept).stdout)
    assert resumed["coef"] == whole["coef"]
    assert resumed["cost"] == whole["cost"]
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == [checkpoint.name]
    other = run(*kept, "--seed", 1)
    assert other.returncode == 2
    assert "seed was 0 and is 1" in other.stderr


def test_a_checkpoint_never_takes_the_place_of_the_data(store):
    done = run("fit", store, "--solver", "minibatch", "--checkpoint", store / "X")
    assert done.returncode == 2
    assert streamlr.fit(streamlr.open_dataset(store)).n_rows == N


def test_an_interruption_leaves_a_checkpoint_although_none_was_due(store, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    options = ("fit", store, "--solver", "minibatch", "--batch-size", 2, "--max-epochs", 100, "--checkpoint", checkpoint)
    process = subprocess.Popen(command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(6)
    assert process.poll() is None, process.communicate()
    assert not checkpoint.exists()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"run it again to go on from {checkpoint}" in err
    assert json.loads(checkpoint.read_text())["state"]["rows"] > 0
    process = subprocess.Popen(command(*options), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("going on from")
    process.kill()
    process.wait()
    process.stderr.close()
