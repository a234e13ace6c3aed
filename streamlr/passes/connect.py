"""Connecting to a Dask cluster: a scheduler's, or one of processes that are started here."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker

from streamlr.errors import ClusterError, UsageError
from streamlr.passes import cluster as clusters


@contextmanager
def connected(scheduler: str | None = None, workers: int | None = None, certificates: Sequence[str | None] = ()) -> Iterator[str]:
    """Use a cluster while the block runs: that of a scheduler, or one of so many processes of this machine; yield its dashboard.

    Parameters
    ----------
    scheduler : str or None
        Its address, such as "tcp://10.0.0.1:8786".
    workers : int or None
        Processes to start, of one thread each.
    certificates : sequence of str
        Files for TLS: the authority, this side's certificate, and its key; empty, or of None, without TLS.

    Raises
    ------
    ClusterError
        The scheduler does not answer.
    UsageError
        The package `distributed` is not installed.
    """
    try:
        import distributed
    except ImportError as error:
        raise UsageError("a cluster needs the package distributed: pip install 'streamlr[cluster]'") from error
    if scheduler is not None:
        files = dict(zip(("tls_ca_file", "tls_client_cert", "tls_client_key"), certificates, strict=False))
        security = distributed.Security(require_encryption=True, **files) if any(certificates) else None
        try:
            client = distributed.Client(scheduler, timeout=clusters.PATIENCE, security=security)
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"no scheduler answers at {scheduler} ({error}); check address, port and certificates") from error
        with client:
            yield client.dashboard_link
    else:
        options = {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": logging.ERROR}
        with _deaf_children():
            local = distributed.LocalCluster(n_workers=workers, **options)
        with local, distributed.Client(local) as client:
            yield client.dashboard_link


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Leave Ctrl-C, which a terminal sends to all processes, to this one, which stops those that are started in the block.

    They inherit from birth, from the threads that start them, that it is blocked; here it waits for the end of the block.
    """
    resource_tracker.ensure_running()  # else the first child starts it, and then unblocks the signal for itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
