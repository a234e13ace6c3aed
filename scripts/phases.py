"""Where the time of an exact fit goes: `python scripts/phases.py STORE` prints one JSON object, seconds of all threads by phase.

The library knows nothing of this: its functions are wrapped from outside, and the products of its moments are found in their
source. Each moment of a thread counts for the innermost phase that it is in, waiting for the disk and for Python's lock included.
The timers cost some microseconds a call: compare `seconds` with those of an untimed fit, above all where chunks are small.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import operator
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ours import opened

PHASES = {
    "look through the store": ("streamlr.dataset.zarr_rows:ZarrRows.check", "streamlr.dataset.zarr_rows:ZarrRows.fingerprint"),
    "read": ("streamlr.dataset.stored_chunks:StoredChunks.get",),
    "decode": ("streamlr.dataset.codecs:ChunkCodec.decode", "streamlr.dataset.codecs:ZarrCodec.decode"),
    "check and copy rows": ("streamlr.dataset.checked:DatasetReader.blocks",),
    "centre": ("streamlr.aggregates.moments:MomentsOf.of",),  # all of it but the product
    "merge": ("streamlr.aggregates.moments:Moments.__add__",),
    "solve": ("streamlr.api:_solved",),
}
PRODUCT, REST = "product", "other, wait"
PRODUCTS_IN = "streamlr.aggregates.moments"


class Clock(threading.local):
    """Seconds of one thread by phase."""

    everyone: list[dict[str, float]] = []  # noqa: RUF012  # shared by all threads

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside: list[str] = []
        self.since = 0.0
        self.everyone.append(self.seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens within for a phase, and not for the one around it."""
        self._turn()
        self.inside.append(name)
        try:
            yield
        finally:
            self._turn()
            self.inside.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self.inside:
            self.seconds[self.inside[-1]] += now - self.since
        self.since = now


CLOCK = Clock()


def wrap(where: str, phase: str) -> None:
    """Time a function, or every step of a generator."""
    module, _, path = where.partition(":")
    *outer, name = path.split(".")
    try:
        owner = functools.reduce(getattr, outer, importlib.import_module(module))
        function = vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise SystemExit(
            f"{where} is gone ({error!r}); say in PHASES of {Path(__file__).name} where {phase!r} happens now"
        ) from None

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        with CLOCK.phase(phase):
            return function(*arguments, **options)

    @functools.wraps(function)
    def timed_steps(*arguments: Any, **options: Any) -> Iterator[Any]:
        steps = function(*arguments, **options)
        while True:
            with CLOCK.phase(phase):
                item = next(steps, steps)
            if item is steps:
                return
            yield item

    setattr(owner, name, timed_steps if inspect.isgeneratorfunction(function) else timed)


class TimedProducts(ast.NodeTransformer):
    """Rewrites `a @ b`, `np.matmul(a, b)` and `np.dot(a, b)` as calls of `timed_product`."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Rewrite `a @ b`."""
        self.generic_visit(node)
        if not isinstance(node.op, ast.MatMult):
            return node
        return self._timed(node, ast.Name("plain_product", ast.Load()), [node.left, node.right], [])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Rewrite `np.matmul(a, b)` and `np.dot(a, b)`."""
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Attribute) and node.func.attr in ("matmul", "dot")):
            return node
        return self._timed(node, node.func, node.args, node.keywords)

    def _timed(self, node: ast.AST, function: ast.expr, operands: list[ast.expr], options: list[ast.keyword]) -> ast.AST:
        return ast.copy_location(ast.Call(ast.Name("timed_product", ast.Load()), [function, *operands], options), node)


def timed_product(function: Callable[..., Any], *operands: Any, **options: Any) -> Any:
    """Multiply; of two matrices, as a phase of its own."""
    if any(np.ndim(operand) < 2 for operand in operands):
        return function(*operands, **options)
    with CLOCK.phase(PRODUCT):
        return function(*operands, **options)


def import_with_timed_products(name: str) -> None:
    """Import a module of which each product is timed, before anybody else imports it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the module {name} is gone; say in PRODUCTS_IN of {Path(__file__).name} where rows are multiplied now")
    module = importlib.util.module_from_spec(spec)
    vars(module).update(timed_product=timed_product, plain_product=operator.matmul)
    sys.modules[name] = module
    tree = TimedProducts().visit(ast.parse(Path(spec.origin).read_text(), spec.origin))
    exec(compile(ast.fix_missing_locations(tree), spec.origin, "exec"), vars(module))


def main(path: str) -> None:
    """Fit once, timed, and print the seconds of the fit, its threads, and their seconds by phase."""
    import_with_timed_products(PRODUCTS_IN)
    for phase, places in PHASES.items():
        for where in places:
            wrap(where, phase)

    import streamlr

    dataset = opened(Path(path))
    threads = streamlr.plan(dataset).tasks_at_once
    for seconds in CLOCK.everyone:
        seconds.clear()
    began = time.perf_counter()
    streamlr.fit(dataset)
    elapsed = time.perf_counter() - began
    order = [name for phase in PHASES for name in ((phase, PRODUCT) if phase == "centre" else (phase,))]
    spent = {phase: sum(seconds.get(phase, 0.0) for seconds in CLOCK.everyone) for phase in order}
    if not (spent[PRODUCT] and spent["centre"] and spent["read"]):
        raise SystemExit(
            f"a fit of {path} met no product, statistic or reading that is timed; bring PHASES and PRODUCTS_IN up to date"
        )
    spent[REST] = threads * elapsed - sum(spent.values())
    print(json.dumps({"seconds": elapsed, "threads": threads, "phases": spent}))


if __name__ == "__main__":
    main(*sys.argv[1:])
