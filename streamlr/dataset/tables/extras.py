"""Packages that only some uses need: imported when those uses come, with advice when they are not there."""

from __future__ import annotations

import importlib
from typing import Any

from streamlr.errors import UsageError


def load_extra(module: str) -> Any:
    """Import a module that only the reading of tables needs.

    Parameters
    ----------
    module : str
        Its full name.

    Raises
    ------
    UsageError
        It is not installed.

    Examples
    --------
    >>> load_extra("pyarrow.csv").__name__
    'pyarrow.csv'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f'reading tables needs {module.partition(".")[0]}, which is not installed: pip install "streamlr[ingest]"'
        ) from error
