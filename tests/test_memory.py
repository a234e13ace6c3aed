"""Data larger than memory: a process that the kernel holds to 500 MB fits and predicts 6 GB, to the same bits."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

ROWS, FEATURES, CHUNK = 7_500_000, 100, 32_768  # 6.0 GB of float64 in chunks of 26 MB
LIMIT = 500_000_000

FIT_AND_PREDICT = r"""
import json, re, sys
import streamlr
store, out = sys.argv[1:]
dataset = streamlr.open_dataset(store)
model = streamlr.fit(dataset)
streamlr.predict(model, dataset, out)
peak = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"coef": model.coef.tobytes().hex(), "intercept": model.intercept.hex(), "n": model.n_rows, "peak": peak}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """6 GB of rows that compress well, since it is memory and not the disk that is tested."""
    path = tmp_path_factory.mktemp("large") / "large.zarr"
    group = zarr.open_group(path, mode="w")
    x = group.create_array("X", shape=(ROWS, FEATURES), chunks=(CHUNK, FEATURES), dtype="float64")
    y = group.create_array("y", shape=(ROWS,), chunks=(CHUNK,), dtype="float64")
    rng = np.random.default_rng(0)
    for start in range(0, ROWS, CHUNK):
        block = rng.integers(-8, 8, size=(min(CHUNK, ROWS - start), FEATURES), dtype=np.int8).astype(np.float64)
        x[start : start + len(block)] = block
        y[start : start + len(block)] = block[:, 0] - block[:, 1] + rng.integers(-8, 8, size=len(block))
    return path


def run(store: Path, out: Path, **options: object) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", FIT_AND_PREDICT, store, out], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unlimited(large):
    out = large.with_name("unlimited.zarr")
    return run(large, out), out


def same_predictions(one: Path, other: Path) -> bool:
    a, b = (zarr.open_group(path, mode="r")["prediction"] for path in (one, other))
    step = 10 * CHUNK
    return a.shape == b.shape == (ROWS,) and all((a[at : at + step] == b[at : at + step]).all() for at in range(0, ROWS, step))


def test_the_unlimited_run_needs_little_all_the_same(unlimited):
    facts, _ = unlimited
    assert facts["n"] == ROWS
    assert facts["peak"] < 400_000_000


def test_under_rlimit_data(large, unlimited):
    facts, out = unlimited
    held = run(
        large,
        large.with_name("rlimit.zarr"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
    )
    assert (held["coef"], held["intercept"], held["n"]) == (facts["coef"], facts["intercept"], facts["n"])
    assert same_predictions(large.with_name("rlimit.zarr"), out)


def memory_group() -> tuple[Path, str]:
    """Make a control group below this process's own that limits memory, by either version of the interface."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup") / path.lstrip("/") / f"streamlr-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(LIMIT))
        except OSError:
            group.rmdir()
            continue
        return group, name
    pytest.skip("NOT RUN: no memory control group can be made here; RLIMIT_DATA is tested instead")


def test_under_a_control_group(large, unlimited):
    facts, out = unlimited
    group, name = memory_group()
    try:
        assert int((group / name).read_text()) <= LIMIT
        held = run(
            large,
            large.with_name("group.zarr"),
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
    finally:
        group.rmdir()
    assert (held["coef"], held["intercept"], held["n"]) == (facts["coef"], facts["intercept"], facts["n"])
    assert same_predictions(large.with_name("group.zarr"), out)
