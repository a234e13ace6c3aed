"""The command line: one command is one call of the API; what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from streamlr.errors import DataError, ResourceError, StreamlrError
from streamlr.files import check_output, to_json

STOPPED = 128  # a process that a signal stopped ends with this and the signal's number: 130 or 143
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Linear regression on data larger than memory: exact, in one pass over the rows.",
    epilog="Exit status: 0 done; 1 a bug of ours; 2 usage; 3 the data are wrong or incomplete; 4 the numbers failed; "
    "5 memory or disk; 130 interrupted, 143 terminated.",
)


class Stopped(BaseException):
    """Ctrl-C or SIGTERM came. No `KeyboardInterrupt`, for which each version of typer has an end of its own."""

    def __init__(self, number: int) -> None:
        self.exit_status = STOPPED + number


@dataclass(frozen=True)
class Outcome:
    """What a command has to say: `text` for people, `facts` for programs."""

    text: str
    facts: dict[str, Any]
    exit_status: int = field(default=0)


def command(function: Callable[..., Outcome]) -> Callable[..., None]:
    """Register a command: print its outcome, or what went wrong and what to do, and end with the status that belongs to it."""

    @app.command()
    @wraps(function)
    def run(*args: Any, **options: Any) -> None:
        as_json = bool(options.get("as_json"))
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                outcome = function(*args, **options)
        except Stopped as stop:
            facts = {"error": "Interrupted", "message": "interrupted; nothing was left half-written"}
            outcome = Outcome("", facts, stop.exit_status)
        except StreamlrError as error:
            outcome = _failure(error, error.exit_status)
        except (MemoryError, OSError) as error:  # also a full disk, a folder that may not be written
            outcome = _failure(error, ResourceError.exit_status)
        except Exception as error:
            traceback.print_exc()
            outcome = _failure(error, StreamlrError.exit_status)
        if "error" in outcome.facts:
            _print(f"error: {outcome.facts['message']}", err=True)
        if as_json:
            _print(json.dumps(to_json({**outcome.facts, "exit_status": outcome.exit_status}), allow_nan=False))
        elif outcome.text:
            _print(outcome.text)
        raise typer.Exit(outcome.exit_status)

    return run


Data = Annotated[str, typer.Argument(metavar="DATA", help="A zarr array or group.", show_default=False)]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A model file that `fit --out` wrote.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
MemoryLimit = Annotated[str | None, typer.Option(help="For example 2GB; by default most of what the process may use.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Tasks at once; by default Dask's num_workers, else one per processor.")]
Missing = Annotated[str, typer.Option(metavar="error|drop", help="What a NaN does: stop, or leave the row out and count it.")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing-chunks", help="Read absent chunks as fill values, and count them.")]
Target = Annotated[str | None, typer.Option(help="Name of the target, or several with commas; by default what the store says.")]
Features = Annotated[str | None, typer.Option(help="A 2-D array, or names of arrays or columns with commas.")]
Weights = Annotated[str | None, typer.Option(help="Name of the weights.")]


@command
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where to put the demo's files.")] = Path("streamlr-demo"),
    as_json: Json = False,
) -> Outcome:
    """Fit real flights: ingest 336,776 rows of CSV, fit, evaluate, predict, and print the coefficients."""
    from streamlr.demo import run_demo

    text, facts = run_demo(folder, say=lambda line: _print(line, err=as_json))
    return Outcome(text, facts)


@command
def ingest(
    paths: Annotated[list[Path], typer.Argument(metavar="SRC... DEST.zarr", help="CSV or Parquet files, and the store to write.")],
    formula: Annotated[str | None, typer.Option(help='For example "price ~ carat + C(cut)".')] = None,
    target: Annotated[str | None, typer.Option(help="Name of the target column, or several with commas.")] = None,
    features: Annotated[str | None, typer.Option(help="Names of numeric columns with commas; by default all others.")] = None,
    like: Annotated[Path | None, typer.Option(metavar="STORE|MODEL", help="Code these files as those were coded.")] = None,
    weights: Annotated[str | None, typer.Option(help="Name of the column of weights.")] = None,
    missing: Missing = "error",
    rows_per_chunk: Annotated[int | None, typer.Option(min=1, help="By default about 16 MB of X.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Outcome:
    """Turn CSV or Parquet files into a store that can be checked and fitted."""
    from streamlr.dataset.ingest import ingest as run
    from streamlr.errors import UsageError
    from streamlr.passes.progress import row_counter

    if len(paths) < 2:
        raise UsageError(f"got {len(paths)} path; give at least one file to read and, last, the store to write")
    with row_counter() if sys.stderr.isatty() else nullcontext() as progress:
        report = run(
            paths[:-1],
            paths[-1],
            formula=formula,
            target=_names(target),
            features=_names(features),
            like=like,
            weights=weights,
            missing=missing,  # type: ignore[arg-type]  # checked there, with a message that says what is allowed
            rows_per_chunk=rows_per_chunk,
            overwrite=overwrite,
            progress=progress,
        )
    facts = {
        "path": str(report.path),
        "n_rows": report.n_rows,
        "n_dropped": report.n_dropped,
        "dropped_by_column": report.dropped_by_column,
        "features": list(report.features),
        "targets": list(report.targets),
        "rows_per_chunk": report.rows_per_chunk,
    }
    lines = [
        f"{report.path}: {report.n_rows:,} rows, {len(report.features)} features, target {', '.join(report.targets) or 'none'}"
    ]
    if report.n_dropped:
        causes = ", ".join(f"{name} ({count:,})" for name, count in report.dropped_by_column.items())
        lines.append(f"{report.n_dropped:,} rows left out for missing values in {causes}")
    if report.targets:
        lines.append(f"next: streamlr fit {report.path} --out model.json")
    return Outcome("\n".join(lines), facts)


@command
def inspect(data: Data, memory_limit: MemoryLimit = None, as_json: Json = False) -> Outcome:
    """Show arrays, chunks, completeness, the plan of a fit and the recommended solver; reads metadata only."""
    from streamlr.inspection import inspect_store

    found = inspect_store(data, memory_limit=memory_limit)
    return Outcome(str(found), found.to_dict(), found.exit_status)


@command
def verify(data: Data, memory_limit: MemoryLimit = None, threads: Threads = None, as_json: Json = False) -> Outcome:
    """Read every chunk of every array of numbers, and name those that are missing or damaged."""
    from streamlr.inspection import verify as run

    with _workers(threads), _progress() as progress:
        found = run(data, memory_limit=memory_limit, progress=progress)
    facts = {**asdict(found), "n_problems": len(found.problems)}
    return Outcome(str(found), facts, DataError.exit_status if found.problems else 0)


@command
def fit(
    data: Data,
    target: Target = None,
    features: Features = None,
    solver: Annotated[str, typer.Option(metavar="auto|normal", help="How to solve.")] = "auto",
    ridge: Annotated[float, typer.Option(help="Penalty on |b|^2: scikit-learn's alpha divided by the sum of weights.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Write the model to this JSON file.")] = None,
    weights: Weights = None,
    no_intercept: Annotated[bool, typer.Option("--no-intercept", help="Fit no intercept.")] = False,
    missing: Missing = "error",
    allow_missing_chunks: AllowMissing = False,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Outcome:
    """Fit a linear model to every row, in one pass, and print its coefficients."""
    from streamlr.api import fit as run
    from streamlr.passes.write import check_apart

    dataset = _open(data, target, features, weights, missing, allow_missing_chunks)
    if out is not None:  # before the pass, not after it
        check_output(out, overwrite=overwrite)
        check_apart(dataset, out)
    with _workers(threads), _progress() as progress:
        model = run(
            dataset,
            solver,
            fit_intercept=not no_intercept,
            ridge=ridge,
            memory_limit=memory_limit,
            progress=progress or False,
        )
    lines = [str(model.summary())]
    if out is not None:
        model.save(out, overwrite=overwrite)
        lines += ["", f"{out} written; next: streamlr predict {out} DATA OUT.zarr"]
    return Outcome("\n".join(lines), {**model.to_dict(), "out": None if out is None else str(out)})


@command
def evaluate(
    model: ModelPath,
    data: Data,
    target: Target = None,
    features: Features = None,
    weights: Weights = None,
    missing: Missing = "error",
    allow_missing_chunks: AllowMissing = False,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    as_json: Json = False,
) -> Outcome:
    """Print the cost of a model on any rows: mean squared error, its root, mean absolute error, R^2."""
    from streamlr.api import evaluate as run
    from streamlr.model_files import load_model

    fitted = load_model(model)
    dataset = _open(data, target, features, weights, missing, allow_missing_chunks)
    with _workers(threads), _progress() as progress:
        cost = run(fitted, dataset, memory_limit=memory_limit, progress=progress or False)
    return Outcome(str(cost), cost.to_dict())


@command
def predict(
    model: ModelPath,
    data: Data,
    out: Annotated[Path, typer.Argument(metavar="OUT.zarr", help="The store to write.", show_default=False)],
    features: Features = None,
    missing: Missing = "error",
    allow_missing_chunks: AllowMissing = False,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Outcome:
    """Write the prediction of every row to a store with the array `prediction`."""
    from streamlr.api import predict as run
    from streamlr.model_files import load_model

    fitted = load_model(model)
    dataset = _open(data, None, features, None, missing, allow_missing_chunks)
    with _workers(threads), _progress() as progress:
        tally = run(fitted, dataset, out, overwrite=overwrite, memory_limit=memory_limit, progress=progress or False)
    lacking = f", {tally.dropped:,} of them NaN for missing values" if tally.dropped else ""
    facts = {"path": str(out), "n_rows": tally.rows, "n_missing": tally.dropped, "chunks_missing": tally.chunks_missing}
    return Outcome(f"{out}: {tally.rows:,} predictions{lacking}", facts)


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it, wherever it is, by an exception that lets everybody tidy up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell leaves it for commands in the background
            signal.signal(number, _stop)
    try:
        app()
    except Stopped as stop:
        raise SystemExit(stop.exit_status) from None
    except OSError as error:  # the help, printed by typer to a full disk
        _print(f"error: {error}", err=True)
        _silence(sys.stdout)
        raise SystemExit(ResourceError.exit_status) from None


def _stop(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # the same once more, as impatience has it, must not cut the tidying short
    raise Stopped(number)


def _print(text: str, *, err: bool = False) -> None:
    """Print, even if nobody reads it; but what was asked for and cannot be written ends the process with status 5."""
    try:
        typer.echo(text, err=err)
    except OSError as error:
        _silence(sys.stderr if err else sys.stdout)
        if not err and not isinstance(error, BrokenPipeError):
            _print(f"error: the output cannot be written: {error}", err=True)
            raise SystemExit(ResourceError.exit_status) from error


def _silence(stream: Any) -> None:
    """Lead a stream that cannot be written nowhere: what is still in its buffer would fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open(data: str, target: str | None, features: str | None, weights: str | None, missing: str, allow: bool) -> Any:
    from streamlr.dataset.opening import open_dataset

    return open_dataset(
        data,
        target=_names(target),
        features=_names(features),
        weights=weights,
        missing=missing,
        allow_missing_chunks=allow,
    )


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _workers(threads: int | None) -> Any:
    import dask

    return nullcontext() if threads is None else dask.config.set(num_workers=threads)


def _progress() -> Any:
    from streamlr.passes.progress import progress_bar

    return progress_bar() if sys.stderr.isatty() else nullcontext()


def _failure(error: BaseException, status: int) -> Outcome:
    return Outcome("", {"error": type(error).__name__, "message": str(error) or type(error).__name__}, status)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _print(f"warning: {message}", err=True)


if __name__ == "__main__":
    main()
