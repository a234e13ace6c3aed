"""Compare fits and descents with the limits of the machine and with the neighbours, in one run: `python scripts/bench.py`.

Every contestant is a process of its own on the same store, and they take turns, so that a machine whose speed drifts is fair to
all. Printed are medians of seconds inside the process (imports excluded), their ratio to streamlr's exact fit, and peak memory.
An epoch is the second of two. "To a gap of 1e-3" is from opening the store to coefficients whose cost is within 1e-3 of the
optimum's, relatively. Neighbours that are not installed are left out, by name: `pip install -e ".[bench]"` brings them.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from contestants import CONTESTANTS

HERE = Path(__file__).parent
REFERENCE = "streamlr fit"
NEEDS = {"oneDAL incremental": "sklearnex", "dask-ml newton": "dask_ml"}
ONE_TARGET = ("scikit-learn SGD epoch", "scikit-learn, to a gap of 1e-3", "plain NumPy loop epoch", "dask-ml newton")
OURS = ("streamlr fit", "streamlr evaluate", "streamlr predict", "streamlr minibatch epoch")
LIMITS = ("hand-tuned loop", "read and decode alone", "product alone")
BYTES, QUICK_BYTES = 3_200_000_000, 200_000_000  # of X, decoded
EVERYWHERE = (*OURS, *LIMITS, "da.map_blocks, BLAS at 1")
# what make_data.py is told, and who takes part: None for all
REGIMES: dict[str, tuple[dict[str, Any], tuple[str, ...] | None]] = {
    "p = 100": ({"features": 100, "rows_per_chunk": 65_536}, None),
    "p = 10": ({"features": 10, "rows_per_chunk": 655_360}, (*EVERYWHERE, "oneDAL incremental", "dask-ml newton")),
    "p = 1,000": ({"features": 1_000, "rows_per_chunk": 6_554}, (*EVERYWHERE, "oneDAL incremental", "dask-ml newton")),
    "float32": ({"features": 100, "rows_per_chunk": 131_072, "dtype": "float32"}, EVERYWHERE),
    "blosc-lz4": ({"features": 100, "rows_per_chunk": 65_536, "codec": "blosc-lz4"}, EVERYWHERE),
    "uncompressed": ({"features": 100, "rows_per_chunk": 65_536, "codec": "none"}, EVERYWHERE),
    "sharded": ({"features": 100, "rows_per_chunk": 8_192, "rows_per_shard": 65_536}, EVERYWHERE),
    "chunks of 256 KB": ({"features": 100, "rows_per_chunk": 328}, EVERYWHERE),
    "chunks of 4 MB": ({"features": 100, "rows_per_chunk": 5_243}, EVERYWHERE),
    "weights": ({"features": 100, "rows_per_chunk": 65_536, "weights": True}, (*OURS, *LIMITS)),
    "10 targets": ({"features": 100, "rows_per_chunk": 65_536, "targets": 10}, EVERYWHERE),
}
Run = dict[str, Any]


def bench(
    store: Annotated[Path | None, typer.Option(help="A store of make_data.py, instead of the regimes")] = None,
    regime: Annotated[list[str] | None, typer.Option(help="only these regimes; by default the first, or all with --all")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every regime")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="0.2 GB instead of 3.2, and 3 runs")] = False,
    repeats: Annotated[int, typer.Option(help="runs of each contestant")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="only contestants whose name has this in it")] = None,
    out: Annotated[Path | None, typer.Option(help="write the figures to this JSON file")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw the ratios into this file")] = None,
) -> None:
    """Run the contestants in turn, and print medians and ratios."""
    if unknown := set(regime or ()) - set(REGIMES):
        raise typer.BadParameter(f"no regime {', '.join(unknown)}; there are {', '.join(REGIMES)}")
    names = ["given"] if store else regime or (list(REGIMES) if everything else list(REGIMES)[:1])
    repeats = min(repeats, 3) if quick else repeats
    print(f"{platform.machine()}, Python {platform.python_version()}, {repeats} runs each, medians")
    found: dict[str, dict[str, list[Run]]] = {}
    for name in names:
        options, taking_part = ({}, None) if store else REGIMES[name]
        chosen = [who for who in CONTESTANTS if (taking_part is None or who in taking_part) and _wanted(who, options, only)]
        with tempfile.TemporaryDirectory() as folder:
            found[name] = _take_turns(store or _made(Path(folder), options, quick), chosen, repeats)
        _print_table(name, found[name])
    if out is not None:
        out.write_text(json.dumps({"seconds": {name: _medians(runs) for name, runs in found.items()}, "runs": found}, indent=2))
    if picture is not None:
        _draw({name: _medians(runs) for name, runs in found.items()}, picture)


def _wanted(who: str, options: dict[str, Any], only: list[str] | None) -> bool:
    if only and not any(part in who for part in (*only, REFERENCE)):
        return False
    if who in NEEDS and importlib.util.find_spec(NEEDS[who]) is None:
        print(f"left out: {who}, since {NEEDS[who]} is not installed")
        return False
    return options.get("targets", 1) == 1 or who not in ONE_TARGET


def _made(folder: Path, options: dict[str, Any], quick: bool) -> Path:
    width = 4 if options.get("dtype") == "float32" else 8
    size = QUICK_BYTES if quick else BYTES
    rows = size // (width * options["features"])
    arguments = [
        f"--{key.replace('_', '-')}" if value is True else f"--{key.replace('_', '-')}={value}" for key, value in options.items()
    ]
    subprocess.run([sys.executable, HERE / "make_data.py", folder / "data.zarr", f"--rows={rows}", *arguments], check=True)
    return folder / "data.zarr"


def _take_turns(store: Path, names: list[str], repeats: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            done = subprocess.run(
                [sys.executable, HERE / "contestants.py", name, str(store)], check=True, stdout=subprocess.PIPE, text=True
            )
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def _medians(runs: dict[str, list[Run]]) -> dict[str, float]:
    return {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}


def _print_table(title: str, runs: dict[str, list[Run]]) -> None:
    seconds = _medians(runs)
    print(f"\n{title:32}{'seconds':>10}{'ratio':>10}{'peak MB':>10}")
    for name, value in seconds.items():
        peak = max(run["peak"] for run in runs[name])
        print(f"{name:32}{value:>10.2f}{value / seconds[REFERENCE]:>10.2f}{peak / 1e6:>10.0f}")


def _draw(seconds: dict[str, dict[str, float]], path: Path) -> None:
    """Draw, for each regime, how long each contestant takes beside the exact fit."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(seconds), 1, figsize=(8, 0.6 + sum(0.6 + 0.28 * len(found) for found in seconds.values())), squeeze=False
    )
    for axis, (title, found) in zip(axes[:, 0], seconds.items(), strict=True):
        names = [name for name in found if found[name] != float("inf")]
        ratios = [found[name] / found[REFERENCE] for name in names]
        bars = axis.barh(names, ratios, color=["tab:blue" if name.startswith("streamlr") else "tab:gray" for name in names])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{title}: time beside {REFERENCE}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(bench)
