"""Write a synthetic CSV file, of any size: `python scripts/make_tables.py OUT.csv --rows 1_000_000 --categories 2`."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.csv
import typer

BLOCK_ROWS = 2**17
DIGITS = 6  # behind the point


def make_tables(
    path: str,
    rows: Annotated[int, typer.Option(help="n")] = 1_000_000,
    features: Annotated[int, typer.Option(help="columns of numbers: x0, x1, ...")] = 10,
    categories: Annotated[int, typer.Option(help="columns of text: c0 of 4 levels, c1 of 8, c2 of 16, ...")] = 0,
    seed: Annotated[int, typer.Option(help="another seed, other numbers")] = 0,
) -> None:
    """Write columns N(0, 1), columns of words, and y = 3 + sum of the numbers + the number of each level + N(0, 1)."""
    generator = np.random.default_rng(seed)
    names = [*(f"x{j}" for j in range(features)), *(f"c{j}" for j in range(categories)), "y"]
    kinds = [pa.float64()] * features + [pa.string()] * categories + [pa.float64()]
    plain = pa.csv.WriteOptions(quoting_style="none")
    with pa.csv.CSVWriter(path, pa.schema(zip(names, kinds, strict=True)), write_options=plain) as writer:
        for start in range(0, rows, BLOCK_ROWS):
            m = min(BLOCK_ROWS, rows - start)
            x = generator.normal(size=(features, m)).round(DIGITS)
            levels = [generator.integers(4 << j, size=m) for j in range(categories)]
            y = (3.0 + x.sum(axis=0) + sum(levels, np.zeros(m)) + generator.normal(size=m)).round(DIGITS)
            words = [np.array([f"level {i:02}" for i in range(4 << j)])[chosen] for j, chosen in enumerate(levels)]
            writer.write_batch(pa.record_batch([*map(pa.array, x), *map(pa.array, words), pa.array(y)], names=names))


if __name__ == "__main__":
    typer.run(make_tables)
