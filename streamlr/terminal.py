"""What every command shares: how it is registered, who does its work, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import typer

from streamlr.errors import Diverged, ResourceError, StreamlrError, UsageError
from streamlr.files import to_json

STOPPED = 128  # a process that a signal stopped ends with this and the signal's number: 130 or 143
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Linear regression on data larger than memory: exactly, in one pass over the rows, or by gradient descent.",
    epilog="Exit status: 0 done; 1 a bug of ours; 2 usage; 3 the data are wrong or incomplete; 4 the numbers failed; "
    "5 memory, disk, cluster or network; 130 interrupted, 143 terminated.",
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
            kept = options.get("checkpoint")
            then = f"run it again to go on from {kept}" if kept and os.path.exists(kept) else "nothing was left half-written"
            facts = {"error": "Interrupted", "message": f"interrupted; {then}"}
            outcome = Outcome("", facts, stop.exit_status)
        except StreamlrError as error:
            outcome = _failure(error, error.exit_status)
        except (MemoryError, OSError) as error:  # also a full disk, a folder that may not be written
            outcome = _failure(error, ResourceError.exit_status)
        except Exception as error:
            traceback.print_exc()
            outcome = _failure(error, StreamlrError.exit_status)
        if "error" in outcome.facts:
            echo(f"error: {outcome.facts['message']}", err=True)
        if as_json:
            echo(json.dumps(to_json({**outcome.facts, "exit_status": outcome.exit_status}), allow_nan=False))
        elif outcome.text:
            echo(outcome.text)
        raise typer.Exit(outcome.exit_status)

    return run


@contextmanager
def crew(threads: int | None, workers: int | None, scheduler: str | None, certificates: Sequence[str | None]) -> Iterator[None]:
    """Run tasks on so many threads, on a cluster of so many processes, or on that of a scheduler, while the block runs."""
    import dask

    given = {"--threads": threads, "--workers": workers, "--scheduler": scheduler}
    chosen = [flag for flag, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are different ways to run; choose one of them")
    if any(certificates) and scheduler is None:
        raise UsageError("--tls-ca, --tls-cert and --tls-key are for the scheduler of --scheduler tls://HOST:PORT; name it")
    if workers is None and scheduler is None:
        with nullcontext() if threads is None else dask.config.set(num_workers=threads):
            yield
        return
    from streamlr.passes.connect import connected

    with connected(scheduler, workers, certificates) as dashboard:
        if sys.stderr.isatty():
            echo(f"dashboard: {dashboard}", err=True)
        yield


def progress_on_terminal() -> Any:
    """Return a context in which passes are shown as bars, if standard error is a terminal; it yields None elsewhere."""
    from streamlr.passes.progress import progress_bar

    return progress_bar() if sys.stderr.isatty() else nullcontext()


def run_app() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it, wherever it is, by an exception that lets everybody tidy up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell leaves it for commands in the background
            signal.signal(number, _stop)
    try:
        app()
    except Stopped as stop:
        raise SystemExit(stop.exit_status) from None
    except OSError as error:  # the help, printed by typer to a full disk
        echo(f"error: {error}", err=True)
        _silence(sys.stdout)
        raise SystemExit(ResourceError.exit_status) from None


def _stop(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # the same once more, as impatience has it, must not cut the tidying short
    raise Stopped(number)


def echo(text: str, *, err: bool = False) -> None:
    """Print, even if nobody reads it; but what was asked for and cannot be written ends the process with status 5."""
    try:
        typer.echo(text, err=err)
    except OSError as error:
        _silence(sys.stderr if err else sys.stdout)
        if not err and not isinstance(error, BrokenPipeError):
            echo(f"error: the output cannot be written: {error}", err=True)
            raise SystemExit(ResourceError.exit_status) from error


def _silence(stream: Any) -> None:
    """Lead a stream that cannot be written nowhere: what is still in its buffer would fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _failure(error: BaseException, status: int) -> Outcome:
    facts = {"error": type(error).__name__, "message": str(error) or type(error).__name__}
    best = {"coef": error.coef, "intercept": error.intercept} if isinstance(error, Diverged) and error.history else {}
    return Outcome("", {**facts, **best}, status)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    echo(f"warning: {message}", err=True)
