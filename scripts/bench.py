"""Compare streamlr with the limits of the machine and with its neighbours, in one run: `python scripts/bench.py`.

Every contestant is a process of its own on the same data, and they take turns, so that a machine whose speed drifts is fair to
all. Printed are medians of seconds inside the process (imports excluded), their ratio to the regime's reference and, of ours, to
the same work by hand ("of limit"; an epoch, to the exact fit), the most memory of the whole process, and milliseconds for each
chunk of X with what belongs to it. An epoch is the second of two. A gap is how much the cost exceeds the optimum's, relatively,
after a descent of one epoch; "to a gap of 1e-3" is from opening the store to coefficients that are as good. Neighbours that are
not installed are left out, by name: `pip install -e ".[bench]"` brings them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import typer
import zarr
from contestants import CONTESTANTS

HERE = Path(__file__).parent
BYTES, QUICK_BYTES = 3_200_000_000, 200_000_000  # of X, decoded
QUICK_RUNS, QUICK_PATIENCE, PATIENCE = 3, 4.0, 60.0  # who takes longer than these seconds, imports included, runs once
FIT, PARSE = "streamlr fit", "pyarrow.csv.open_csv"
OURS = (FIT, "streamlr evaluate", "streamlr predict", "streamlr minibatch epoch")
LIMITS = ("hand-tuned loop", "read and decode alone", "read, decode and write", "product alone")
LIMIT_OF = {
    FIT: "hand-tuned loop",
    "streamlr fit, two workers": FIT,
    "streamlr evaluate": "read and decode alone",
    "streamlr predict": "read, decode and write",
    "streamlr minibatch epoch": FIT,
    "streamlr minibatch epoch, two streams": FIT,
    "streamlr sgd epoch": FIT,
    "streamlr ingest": PARSE,
}
NEIGHBOURS = ("da.map_blocks, BLAS at 1", "oneDAL incremental", "dask-ml newton", "scikit-learn SGD epoch")
EVERYWHERE = (*OURS, *LIMITS, *NEIGHBOURS)
READERS = tuple(name for name in EVERYWHERE if name not in ("streamlr predict", "read, decode and write"))
AND_STREAMS = (*EVERYWHERE, "streamlr minibatch epoch, two streams")
ALL = tuple(name for name in CONTESTANTS if name not in ("streamlr ingest", PARSE))
INGEST = ("streamlr ingest", PARSE)


class Regime(NamedTuple):
    """Data, and who takes part on them."""

    data: Mapping[str, Any]  # what make_data.py is told, or make_tables.py, which knows categories
    who: tuple[str, ...] = EVERYWHERE
    reference: str = FIT  # whose time is 1
    share: float = 1.0  # of the bytes

    @property
    def tables(self) -> bool:
        """Whether the data are tables to ingest."""
        return "categories" in self.data


MANY, SCALING = "chunks of 64 KB", {"features": 100, "rows_per_chunk": 31_250}  # 25 MB
REGIMES = {
    "p = 100": Regime({"features": 100, "rows_per_chunk": 65_536}, ALL),
    "p = 10": Regime({"features": 10, "rows_per_chunk": 655_360}, AND_STREAMS),
    "p = 1,000": Regime({"features": 1_000, "rows_per_chunk": 6_554}, AND_STREAMS),
    "float32": Regime({"features": 100, "rows_per_chunk": 131_072, "dtype": "float32"}),
    "blosc-lz4": Regime({"features": 100, "rows_per_chunk": 65_536, "codec": "blosc-lz4"}),
    "uncompressed": Regime({"features": 100, "rows_per_chunk": 65_536, "codec": "none"}),
    "sharded": Regime({"features": 100, "rows_per_chunk": 8_192, "rows_per_shard": 65_536}),
    MANY: Regime({"features": 100, "rows_per_chunk": 82}, READERS, share=0.4),  # to write so many takes minutes
    "chunks of 256 KB": Regime({"features": 100, "rows_per_chunk": 328}),
    "chunks of 4 MB": Regime({"features": 100, "rows_per_chunk": 5_243}),
    "chunks of 64 MB": Regime({"features": 100, "rows_per_chunk": 83_886}),
    "weights": Regime({"features": 100, "rows_per_chunk": 65_536, "weights": True}),
    "10 targets": Regime({"features": 100, "rows_per_chunk": 65_536, "targets": 10}),
    "ingest": Regime({"features": 10, "categories": 0}, INGEST, PARSE, share=0.25),
    "ingest, categories": Regime({"features": 8, "categories": 2}, INGEST, PARSE, share=0.25),
}
Run = dict[str, Any]
Key = TypeVar("Key")


def bench(
    store: Annotated[Path | None, typer.Option(help="A store of make_data.py, instead of the regimes")] = None,
    regime: Annotated[list[str] | None, typer.Option(help="only these regimes; by default the first, or all with --all")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every regime")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="instead: where the time of the exact fit goes, by phase")] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="instead: time and memory on 10 times the rows")] = False,
    many: Annotated[bool, typer.Option("--many-chunks", help="instead: the plan of 1,000,000 chunks, and a run on many")] = False,
    tasks: Annotated[bool, typer.Option("--tasks", help="instead: a span on a cluster, beside a task that does nothing")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="0.2 GB, and 3 runs at most: about a minute a regime")] = False,
    size: Annotated[int | None, typer.Option("--bytes", help="of X, decoded; by default 3.2 GB, or 0.2 with --quick")] = None,
    repeats: Annotated[int, typer.Option(help="runs of each contestant")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="only contestants whose name has this in it")] = None,
    out: Annotated[Path | None, typer.Option(help="write the figures to this JSON file")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw the ratios into this file")] = None,
) -> None:
    """Run the contestants in turn, and print medians and ratios."""
    if unknown := set(regime or ()) - set(REGIMES):
        raise typer.BadParameter(f"no regime {', '.join(sorted(unknown))}; there are {', '.join(REGIMES)}")
    contest = not (profile or scaling or many or tasks)
    acting = {
        "--only": contest or scaling or not only,
        "--picture": contest or picture is None,
        "--store": contest or profile or store is None,
        "--bytes": not size or not (store or (tasks and not (profile or scaling or many))),
        "--regime": ((contest or profile) and not (many or store)) or not (regime or everything),
    }
    if idle := [option for option, acts in acting.items() if not acts]:
        raise typer.BadParameter(f"{', '.join(idle)} would not act beside the other options; leave out the one or the others")
    names = [MANY] if many else regime or (list(REGIMES) if everything else list(REGIMES)[:1])
    size = size or (QUICK_BYTES if quick else BYTES)
    turns = Turns(min(repeats, QUICK_RUNS) if quick else repeats, QUICK_PATIENCE if quick else PATIENCE)
    print(f"{platform.machine()}, Python {platform.python_version()}, {turns.repeats} runs each, medians")
    found: dict[str, Any] = {"machine": platform.platform(), "seconds": {}, "runs": {}}
    if many:
        found["plan of 1,000,000 chunks"] = print_plan(turns)
    if tasks:
        found["tasks"] = print_tasks(turns)
    if scaling:
        found["scaling"] = print_scaling(turns, size, [who for who in OURS if wanted(who, only)])
    for name in ["given"] if store else names if contest or profile or many else []:
        chosen = regime_of(store) if store else REGIMES[name]
        with tempfile.TemporaryDirectory() as folder:
            if profile and chosen.tables:
                print(f"\n{name}: left out, since there is no exact fit in it")
                continue
            data = store or made(Path(folder), chosen.data, int(size * chosen.share))
            if profile:
                found.setdefault("phases", {})[name] = print_phases(name, turns, data)
            if contest or many:
                runs = turns.taken({who: contestant(who, data) for who in taking_part(chosen, only)})
                found["runs"][name], found["seconds"][name] = runs, medians(runs)
                print_table(name, runs, chosen.reference, None if chosen.tables else chunk_count(data))
        save(found, out)  # a long run that is interrupted keeps what it has
    save(found, out)
    if picture is not None:
        draw(found["seconds"], picture)


class Turns(NamedTuple):
    """How often commands run, one after the other, then all again."""

    repeats: int
    patience: float  # a command that takes longer than these seconds runs once

    def taken(self, commands: Mapping[Key, Sequence[object]]) -> dict[Key, list[Run]]:
        """Return the JSON objects that each command prints."""
        runs: dict[Key, list[Run]] = {key: [] for key in commands}
        slow: set[Key] = set()
        for _ in range(self.repeats):
            for key in [key for key in commands if key not in slow]:
                began = time.perf_counter()
                command = [sys.executable, *map(str, commands[key])]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}; its message is above")
                runs[key].append(json.loads(done.stdout.splitlines()[-1]))
                if time.perf_counter() - began > self.patience:
                    slow.add(key)
        return runs


def contestant(who: str, data: Path) -> list[object]:
    return [HERE / "contestants.py", who, data]


def wanted(who: str, only: list[str] | None) -> bool:
    return not only or any(part in who for part in only)


def regime_of(store: Path) -> Regime:
    """Return what is known of a store that is given, from which follows who can take part."""
    group = zarr.open_group(store, mode="r")
    targets = math.prod(group["y"].shape[1:])
    return Regime({"targets": targets, "weights": True} if "weights" in group else {"targets": targets}, ALL)


def taking_part(regime: Regime, only: list[str] | None) -> list[str]:
    """Return those of the contestants who are wanted, installed, and know this kind of data."""
    chosen = []
    for who in regime.who:
        package = CONTESTANTS[who].needs
        if who != regime.reference and not wanted(who, only):
            continue
        if CONTESTANTS[who].one_target and regime.data.get("targets", 1) > 1:
            continue
        if CONTESTANTS[who].unweighted and "weights" in regime.data:
            continue
        if package is not None and importlib.util.find_spec(package) is None:
            print(f"left out: {who}, since {package} is not installed")
            continue
        chosen.append(who)
    return chosen


def made(folder: Path, data: Mapping[str, Any], size: int) -> Path:
    """Make data whose numbers take `size` bytes in memory, and return where they are."""
    rows = max(size // ((4 if data.get("dtype") == "float32" else 8) * data["features"]), 1)
    script, path = ("make_tables.py", folder / "data.csv") if "categories" in data else ("make_data.py", folder / "data.zarr")
    options = [
        f"--{key.replace('_', '-')}" if value is True else f"--{key.replace('_', '-')}={value}" for key, value in data.items()
    ]
    subprocess.run([sys.executable, HERE / script, path, f"--rows={rows}", *options], check=True)
    return path


def chunk_count(store: Path) -> int:
    array = zarr.open_group(store, mode="r")["X"]
    return -(-array.shape[0] // array.chunks[0])


def median(values: list[float | None]) -> float | None:
    """Return the median; None, for never, where one is."""
    return None if None in values else statistics.median(values)


def medians(runs: Mapping[Key, list[Run]]) -> dict[Key, float | None]:
    return {key: median([run["seconds"] for run in found]) for key, found in runs.items()}


def peak_megabytes(runs: list[Run]) -> float:
    return max(run["peak"] for run in runs) / 1e6


def print_table(title: str, runs: dict[str, list[Run]], reference: str, chunks: int | None) -> None:
    seconds = medians(runs)
    print(f"\n{title:32}{'seconds':>10}{'ratio':>8}{'of limit':>10}{'peak MB':>9}{'gap':>10}{'ms/chunk':>10}")
    for name, value in seconds.items():
        figures = f"{'never':>10}{'':>8}" if value is None else f"{value:>10.2f}{value / seconds[reference]:>8.2f}"
        limit = seconds.get(LIMIT_OF.get(name, ""))
        beside = "" if value is None or limit is None else f"{value / limit:.2f}"
        gap = f"{median([run['gap'] for run in runs[name]]):.1e}" if "gap" in runs[name][0] else ""
        each = "" if value is None or chunks is None else f"{1000 * value / chunks:.2f}"
        print(f"{name:32}{figures}{beside:>10}{peak_megabytes(runs[name]):>9.0f}{gap:>10}{each:>10}")


def print_phases(title: str, turns: Turns, data: Path) -> dict[str, Any]:
    """Print where the time of the exact fit goes, in seconds of all threads; and the time of one without timers."""
    runs = turns.taken({"timed": [HERE / "phases.py", data], "untimed": contestant(FIT, data)})
    threads, seconds = runs["timed"][0]["threads"], medians(runs)
    phases = {phase: statistics.median(run["phases"][phase] for run in runs["timed"]) for phase in runs["timed"][0]["phases"]}
    print(f"\n{title}: {seconds['timed']:.2f} s on {threads} threads; {seconds['untimed']:.2f} s without timers")
    print(f"{'':32}{'seconds':>10}{'%':>8}")
    for phase, value in phases.items():
        print(f"{phase:32}{value:>10.2f}{100 * value / sum(phases.values()):>8.1f}")
    return {"threads": threads, "seconds": seconds, "phases": phases}


def print_scaling(turns: Turns, size: int, names: list[str]) -> dict[str, Any]:
    """Print time and memory on n rows and on 10 n, at p = 100 and chunks of 25 MB: a quarter of the bytes, and 10 times that."""
    with tempfile.TemporaryDirectory() as folder:
        stores = []
        for factor in (1, 10):
            (Path(folder) / str(factor)).mkdir()
            stores.append(made(Path(folder) / str(factor), SCALING, size // 4 * factor))
        rows = [zarr.open_group(store, mode="r")["X"].shape[0] for store in stores]
        runs = turns.taken({(who, n): contestant(who, store) for who in names for n, store in zip(rows, stores, strict=True)})
    seconds, few, many = medians(runs), *rows
    print(f"\n{f'{few:,} and {many:,} rows':32}{'seconds':>10}{'seconds':>10}{'ratio':>8}{'peak MB':>9}{'peak MB':>9}")
    for who in names:
        small, large = seconds[who, few], seconds[who, many]
        peaks = "".join(f"{peak_megabytes(runs[who, n]):>9.0f}" for n in rows)
        print(f"{who:32}{small:>10.2f}{large:>10.2f}{large / small:>8.2f}{peaks}")
    return {who: {f"{n} rows": runs[who, n] for n in rows} for who in names}


def print_plan(turns: Turns) -> dict[str, Any]:
    runs = turns.taken({"plan": [HERE / "many_chunks.py"]})["plan"]
    last = runs[-1]
    opening, planning = (statistics.median(run[what] for run in runs) for what in ("open", "plan"))
    print(
        f"\n{last['chunks']:,} chunks of 64 KB: opened in {opening:.3f} s, planned in {planning:.3f} s, as {last['tasks']:,} tasks"
    )
    return {**last, "open": opening, "plan": planning}


def print_tasks(turns: Turns) -> dict[str, Any]:
    runs = turns.taken({"tasks": [HERE / "task_costs.py"]})["tasks"]
    medians_of = {what: statistics.median(run[what] for run in runs) for what in runs[-1]}
    print("\non a cluster of two processes: " + ", ".join(f"{what} {value:,.5g}" for what, value in medians_of.items()))
    return medians_of


def save(found: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")


def draw(seconds: dict[str, dict[str, float | None]], path: Path) -> None:
    """Draw, for each regime, how long each contestant takes beside the regime's reference."""
    import matplotlib.pyplot as plt

    heights = [1.8 + len(found) for found in seconds.values()]
    figure, axes = plt.subplots(
        len(seconds), 1, figsize=(8, 0.28 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, (title, found) in zip(axes[:, 0], seconds.items(), strict=True):
        reference = REGIMES[title].reference if title in REGIMES else FIT
        ratios = {name: value / found[reference] for name, value in found.items() if value is not None}
        colors = ["tab:blue" if name.startswith("streamlr") else "tab:gray" for name in ratios]
        bars = axis.barh(list(ratios), list(ratios.values()), color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{title}: time beside {reference}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(bench)
