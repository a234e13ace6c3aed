"""The house: data flows down the list of floors, and only `passes/` schedules work on Dask."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import streamlr

PACKAGE = Path(streamlr.__file__).parent
FLOORS = [
    "errors",
    "files",
    "dataset",
    "aggregates",
    "passes",
    "direct",
    "descent",
    "solvers",
    "model",
    "model_files",
    "training",
    "api",
    "estimators",
    "sgd_estimator",
    "inspection",
    "demo",
    "solver_flags",
    "terminal",
    "cli",
]
# what makes tasks, or runs them; `dask.array` alone builds graphs, which is what a lazy prediction is
SCHEDULING = {"dask.delayed", "dask.base", "dask.threaded", "dask.multiprocessing", "dask.system", "distributed"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def floor_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_floor_reaches_up(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    own = FLOORS.index(parts[0])
    for module in imports_of(path):
        if module.startswith("streamlr."):
            assert FLOORS.index(floor_of(module)) <= own, f"{path.name} imports {module}, which is below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_passes_schedules_work(path):
    if path.relative_to(PACKAGE).parts[0] in ("passes", "cli.py"):  # the command line sets the number of threads
        return
    used = {module for module in imports_of(path) if any(module == name or module.startswith(name + ".") for name in SCHEDULING)}
    tokens = ast.walk(ast.parse(path.read_text()))
    names = {
        alias.name for node in tokens if isinstance(node, ast.ImportFrom) and node.module == "dask.base" for alias in node.names
    }
    assert used <= {"dask.base"}
    assert names <= {"tokenize"}
    assert ".compute(" not in path.read_text()


def test_every_module_is_on_a_floor_and_short_enough():
    for path in MODULES:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        assert parts[0] == "__init__" or parts[0] in FLOORS
        assert len(path.read_text().splitlines()) <= 350, f"{path.name} holds two ideas"


def test_no_module_bears_the_name_of_a_public_function():
    modules = {
        path.stem if path.stem != "__init__" else path.parent.name
        for path in MODULES
        if path.parent in (PACKAGE, *PACKAGE.iterdir())
    }
    at_top = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    functions = {name for name in streamlr.__all__ if callable(getattr(streamlr, name))}
    assert not at_top & functions
    assert modules


def test_every_public_name_loads_and_is_documented():
    for name in streamlr.__all__:
        assert getattr(streamlr, name).__doc__, name


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    loaded = run_python("import streamlr, sys; print(*sys.modules)").split()
    assert not {"numpy", "scipy", "dask", "zarr", "sklearn", "typer", "pyarrow", "pandas"} & set(loaded)


@pytest.mark.parametrize("solver", ["normal", "minibatch", "gd"])
def test_a_fit_imports_no_extra_no_estimator_and_no_second_blas(solver):
    code = f"import streamlr, sys; streamlr.fit(streamlr.Dataset([[0.0], [1.0]], [0.0, 1.0]), {solver!r}); print(*sys.modules)"
    assert not {"sklearn", "pyarrow", "pandas", "formulaic", "scipy", "typer", "rich", "distributed"} & set(
        run_python(code).split()
    )
