"""The command line: one command is one call of the API; what it prints, and how it ends."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from streamlr.errors import DataError, UsageError
from streamlr.files import check_output
from streamlr.terminal import Outcome, command, crew, echo, progress_on_terminal, run_app

Data = Annotated[str, typer.Argument(metavar="DATA", help="A zarr array or group: a path or a URL.", show_default=False)]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A model file that `fit --out` wrote.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
MemoryLimit = Annotated[str | None, typer.Option(help="For example 2GB; by default most of what the process may use.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Tasks at once; by default Dask's num_workers, else one per processor.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Instead of threads, so many processes: a Dask cluster of this machine.")]
Scheduler = Annotated[str | None, typer.Option(metavar="tcp://HOST:PORT", help="Run on the Dask cluster of this scheduler.")]
Authority = Annotated[str | None, typer.Option("--tls-ca", help="Of a scheduler at tls://: the authority's certificate.")]
Certificate = Annotated[str | None, typer.Option("--tls-cert", help="This side's certificate.")]
Secret = Annotated[str | None, typer.Option("--tls-key", help="Its key.")]
Missing = Annotated[str, typer.Option(metavar="error|drop", help="What a NaN does: stop, or leave the row out and count it.")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing-chunks", help="Read absent chunks as fill values, and count them.")]
Target = Annotated[str | None, typer.Option(help="Name of the target, or several with commas; by default what the store says.")]
Features = Annotated[str | None, typer.Option(help="A 2-D array, or names of arrays or columns with commas.")]
Weights = Annotated[str | None, typer.Option(help="Name of the weights.")]
SOLVERS = "auto|normal|gd|minibatch|sgd"
RATES = "Or inverse:RATE,POWER,STEPS, exponential:RATE,FACTOR,STEPS, cosine:RATE,STEPS; rates of scaled columns."
DESCENT: dict[str, Any] = {"rich_help_panel": "Gradient descent", "show_default": False}


@command
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where to put the demo's files.")] = Path("streamlr-demo"),
    as_json: Json = False,
) -> Outcome:
    """Fit real flights: ingest 336,776 rows of CSV, fit exactly and by mini-batches, evaluate, predict, print the coefficients."""
    from streamlr.demo import run_demo

    text, facts = run_demo(folder, say=lambda line: echo(line, err=as_json))
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
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca: Authority = None,
    tls_cert: Certificate = None,
    tls_key: Secret = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Outcome:
    """Turn CSV or Parquet files into a store that can be checked and fitted; on a cluster, each file is a task."""
    from streamlr.dataset.ingest import ingest as run
    from streamlr.passes.ingestion import active_reading
    from streamlr.passes.progress import row_counter

    if len(paths) < 2:
        raise UsageError(f"got {len(paths)} path; give at least one file to read and, last, the store to write")
    shown = row_counter() if sys.stderr.isatty() else nullcontext()
    with crew(None, workers, scheduler, (tls_ca, tls_cert, tls_key)), shown as progress:
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
            reading=active_reading(),
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
def verify(
    data: Data,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca: Authority = None,
    tls_cert: Certificate = None,
    tls_key: Secret = None,
    as_json: Json = False,
) -> Outcome:
    """Read every chunk of every array of numbers, and name those that are missing or damaged."""
    from streamlr.inspection import verify as run

    with crew(threads, workers, scheduler, (tls_ca, tls_cert, tls_key)), progress_on_terminal() as progress:
        found = run(data, memory_limit=memory_limit, progress=progress)
    facts = {**asdict(found), "n_problems": len(found.problems)}
    return Outcome(str(found), facts, DataError.exit_status if found.problems else 0)


@command
def fit(
    data: Data,
    target: Target = None,
    features: Features = None,
    solver: Annotated[str, typer.Option(metavar=SOLVERS, help="Exactly, in one pass; or by gradient descent.")] = "auto",
    ridge: Annotated[float, typer.Option(help="Penalty on |b|^2: scikit-learn's alpha divided by the sum of weights.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Write the model to this JSON file.")] = None,
    weights: Weights = None,
    no_intercept: Annotated[bool, typer.Option("--no-intercept", help="Fit no intercept.")] = False,
    missing: Missing = "error",
    allow_missing_chunks: AllowMissing = False,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca: Authority = None,
    tls_cert: Certificate = None,
    tls_key: Secret = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch: 256, or more of few columns.", **DESCENT)] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            metavar="auto|NUMBER|NAME:A,B",
            help=RATES,
            **DESCENT,
        ),
    ] = None,
    update: Annotated[
        str | None, typer.Option(metavar="plain|momentum|nesterov|adam", help="What a gradient does.", **DESCENT)
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="auto|standard|whiten|none", help="Coordinates that steps are taken in.", **DESCENT)
    ] = None,
    max_epochs: Annotated[int | None, typer.Option(help="Passes at most: by default 10, and 10,000 for gd.", **DESCENT)] = None,
    tol: Annotated[
        float | None,
        typer.Option(help="Stop when the cost falls by less than this share of itself, for --patience epochs.", **DESCENT),
    ] = None,
    patience: Annotated[int | None, typer.Option(help="See --tol; by default 3.", **DESCENT)] = None,
    gradient_tol: Annotated[float | None, typer.Option(help="Stop at this share of the first gradient's norm.", **DESCENT)] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Stop after so long.", **DESCENT)] = None,
    validation: Annotated[float | None, typer.Option(help="Share of the rows that is held out and watched.", **DESCENT)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of rows and of the held-out rows.", **DESCENT)] = None,
    shuffle: Annotated[bool | None, typer.Option(help="Rows in random order, or as stored.", **DESCENT)] = None,
    average: Annotated[bool | None, typer.Option(help="Return the mean of late iterates, or the last.", **DESCENT)] = None,
    buffer_rows: Annotated[
        int | None,
        typer.Option(help="Rows that are shuffled together, in whole chunks; by default four, 64 MiB at least.", **DESCENT),
    ] = None,
    log_every: Annotated[int | None, typer.Option(help="Rows between records within an epoch.", **DESCENT)] = None,
    streams: Annotated[int | None, typer.Option(help="Go down side by side, and average after epochs.", **DESCENT)] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep the state in this file, and go on from it where it exists.", **DESCENT)
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Rows between checkpoints; by default every 15 seconds.", **DESCENT)
    ] = None,
) -> Outcome:
    """Fit a linear model to every row, exactly or by gradient descent, and print its coefficients."""
    from streamlr.api import fit as run
    from streamlr.passes.write import check_apart
    from streamlr.solver_flags import solver_of

    chosen = solver_of(
        solver,
        batch_size=batch_size,
        learning_rate=learning_rate,
        update=update,
        scale=scale,
        max_epochs=max_epochs,
        tol=tol,
        patience=patience,
        gradient_tol=gradient_tol,
        max_seconds=max_seconds,
        validation=validation,
        seed=seed,
        shuffle=shuffle,
        average=average,
        buffer_rows=buffer_rows,
        log_every=log_every,
        streams=streams,
        checkpoint_every=checkpoint_every,
    )
    dataset = _open(data, target, features, weights, missing, allow_missing_chunks)
    for path, replaced in ((out, overwrite), (checkpoint, True)):  # before the pass, not after it
        if path is not None:
            check_output(path, overwrite=replaced)
            check_apart(dataset, path)
    if out is not None and checkpoint is not None and out.resolve() == checkpoint.resolve():
        raise UsageError(f"--out and --checkpoint are both {out}; choose another path for one of them")
    if checkpoint is not None and checkpoint.exists():
        echo(f"going on from {checkpoint}", err=True)
    with crew(threads, workers, scheduler, (tls_ca, tls_cert, tls_key)), progress_on_terminal() as progress:
        model = run(
            dataset,
            chosen,
            fit_intercept=not no_intercept,
            ridge=ridge,
            memory_limit=memory_limit,
            progress=progress or False,
            checkpoint=checkpoint,
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
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca: Authority = None,
    tls_cert: Certificate = None,
    tls_key: Secret = None,
    as_json: Json = False,
) -> Outcome:
    """Print the cost of a model on any rows: mean squared error, its root, mean absolute error, R^2."""
    from streamlr.api import evaluate as run
    from streamlr.model_files import load_model

    fitted = load_model(model)
    dataset = _open(data, target, features, weights, missing, allow_missing_chunks)
    with crew(threads, workers, scheduler, (tls_ca, tls_cert, tls_key)), progress_on_terminal() as progress:
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
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls_ca: Authority = None,
    tls_cert: Certificate = None,
    tls_key: Secret = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Outcome:
    """Write the prediction of every row to a store with the array `prediction`."""
    from streamlr.api import predict as run
    from streamlr.model_files import load_model

    fitted = load_model(model)
    dataset = _open(data, None, features, None, missing, allow_missing_chunks)
    with crew(threads, workers, scheduler, (tls_ca, tls_cert, tls_key)), progress_on_terminal() as progress:
        tally = run(fitted, dataset, out, overwrite=overwrite, memory_limit=memory_limit, progress=progress or False)
    lacking = f", {tally.dropped:,} of them NaN for missing values" if tally.dropped else ""
    facts = {"path": str(out), "n_rows": tally.rows, "n_missing": tally.dropped, "chunks_missing": tally.chunks_missing}
    return Outcome(f"{out}: {tally.rows:,} predictions{lacking}", facts)


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


def main() -> None:
    """Run the command line."""
    run_app()


if __name__ == "__main__":
    main()
