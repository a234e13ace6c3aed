"""What the tests of parts of chunks share: files by number, which must all be closed in the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def numbered_files(*contents: bytes) -> Iterator[Callable[[int], int]]:
    """Yield what opens the file of a number, and see afterwards that none is open any more."""
    with tempfile.TemporaryDirectory() as folder:
        opened = []
        for number, content in enumerate(contents):
            Path(folder, str(number)).write_bytes(content)

        def open_file(number: int) -> int:
            opened.append(os.open(Path(folder, str(number)), os.O_RDONLY))
            return opened[-1]

        yield open_file
        for file in opened:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(file)
