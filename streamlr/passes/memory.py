"""How much memory there is, and one BLAS thread while a pass runs."""

from __future__ import annotations

import os
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from streamlr.errors import UsageError

SHARE = 0.8  # of the smallest limit found; the rest is for what no plan sees: allocator slack, thread stacks, other libraries
PYTHON_BYTES = 130_000_000  # the interpreter, the imports of a fit, and some slack
SET_ASIDE_BYTES = 150_000_000  # stacks of threads and buffers of OpenBLAS that are never touched, but that RLIMIT_DATA counts
UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def memory_limit(asked: int | str | None) -> tuple[int, str]:
    """Return the limit, in bytes, that a plan must keep, and where it comes from.

    Parameters
    ----------
    asked : int, str or None
        Bytes, or a text such as "2GB" or "500MiB"; None for four fifths of the smallest of physical memory, the limits of the
        process's own control groups (v1 and v2) and RLIMIT_DATA.

    Raises
    ------
    UsageError
        The text is not a size above zero.

    Examples
    --------
    >>> memory_limit("2GB")
    (2000000000, 'as asked')
    """
    if asked is not None:
        return parse_bytes(asked), "as asked"
    found = {"physical memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), **_control_groups()}
    data = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if data != resource.RLIM_INFINITY:
        found["RLIMIT_DATA"] = data
    source = min(found, key=lambda name: found[name])
    return int(SHARE * found[source]), f"{SHARE:.0%} of {source}"


def parse_bytes(text: int | str) -> int:
    """Return a number of bytes given as a number or as a text with a unit.

    Examples
    --------
    >>> parse_bytes("1.5 GB"), parse_bytes("64MiB"), parse_bytes(1000)
    (1500000000, 67108864, 1000)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE]\+?[0-9]+)?)\s*([kKmMgGtT]?[iI]?)[bB]?\s*", str(text))
    if match is None or match[2].upper() not in UNITS or (size := int(float(match[1]) * UNITS[match[2].upper()])) <= 0:
        raise UsageError(f"{text!r} is not an amount of memory; write a number of bytes, or for example '2GB' or '500MiB'")
    return size


def memory_in_use(limit_source: str) -> int:
    """Return the bytes that count against the limit already: resident pages and, for RLIMIT_DATA, what is set aside besides.

    What the kernel counts there now would be no guide: before a first pass the buffers are not yet set aside, and after it the
    count holds what that pass has freed and the next will use again.
    """
    aside = SET_ASIDE_BYTES if "RLIMIT_DATA" in limit_source else 0
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: what a fresh process needs is the best guess
        return PYTHON_BYTES + aside
    match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return max(PYTHON_BYTES, int(match[1]) * 1024 if match else 0) + aside


def _control_groups() -> dict[str, int]:
    """Return the memory limits of this process's control groups, parents included."""
    limits: dict[str, int] = {}
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return limits
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        folder = root / path.lstrip("/")
        for level in (folder, *folder.parents):
            text = _read(level / name)
            if text.isdigit() and int(text) < 2**60:
                limits[f"the control group's {name}"] = min(limits.get(f"the control group's {name}", 2**60), int(text))
            if level == root:
                break
    return limits


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


_lock = threading.Lock()
_holders = 0
_limits: Any = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS at one thread while any holder is inside: several tasks gain more than several threads on one product.

    The setting is the process's, so it is taken by the first holder and given back by the last, also on error.
    """
    global _holders, _limits
    with _lock:
        if _holders == 0:
            _free_openblas()
            _limits = _loaded_libraries(len(sys.modules)).limit(limits=1, user_api="blas")
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _free_openblas()  # the last holder is often another thread than the first
                _limits.restore_original_limits()
                _limits = None
                _free_openblas()


@lru_cache(maxsize=1)
def _loaded_libraries(modules: int) -> Any:
    """Look for the libraries of this process, which takes milliseconds, again only after imports: those may bring others."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _free_openblas() -> None:
    """Let any thread set OpenBLAS's threads: from 3.8 on, threadpoolctl silently ignores all but the first that did."""
    import threadpoolctl

    clear = getattr(getattr(threadpoolctl, "OpenBLASController", None), "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)
