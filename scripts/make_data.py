"""Write a synthetic zarr store with known coefficients, of any size: `python scripts/make_data.py OUT.zarr --rows 4_000_000`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

BLOCK_BYTES = 2**25  # of X that are made at once, where chunks are smaller
CODECS: dict[str, Callable[[], list[Any]]] = {
    "zstd": lambda: [ZstdCodec(level=0)],
    "zstd+crc32c": lambda: [ZstdCodec(level=0), Crc32cCodec()],
    "blosc-lz4": lambda: [BloscCodec(cname="lz4")],
    "gzip": lambda: [GzipCodec(level=1)],
    "none": list,
}


def make_data(
    path: str,
    rows: Annotated[int, typer.Option(help="n")] = 1_000_000,
    features: Annotated[int, typer.Option(help="p")] = 100,
    targets: Annotated[int, typer.Option(help="k")] = 1,
    dtype: Annotated[str, typer.Option(help="of X; y is float64")] = "float64",
    codec: Annotated[str, typer.Option(help=", ".join(CODECS))] = "zstd",
    rows_per_chunk: Annotated[int, typer.Option(help="rows in a chunk")] = 65_536,
    rows_per_shard: Annotated[int | None, typer.Option(help="rows in a shard; none by default")] = None,
    offset: Annotated[float, typer.Option(help="mean of every feature, whose standard deviation is 1")] = 0.0,
    weights: Annotated[bool, typer.Option("--weights", help="an array `weights` besides, uniform between 0.5 and 1.5")] = False,
    noise: Annotated[float, typer.Option(help="standard deviation of the errors")] = 1.0,
    seed: Annotated[int, typer.Option(help="another seed, other numbers")] = 0,
) -> None:
    """Write X = offset + N(0, 1) and y = 3 + X b + noise, with b drawn from N(0, 1) and kept in the attribute `coef`."""
    if codec not in CODECS:
        raise typer.BadParameter(f"codec is {codec!r}; allowed are {', '.join(CODECS)}")
    coef = np.random.default_rng([seed, 0]).normal(size=(features, targets))
    group = zarr.open_group(path, mode="w-")
    piece, shards = rows_per_shard or rows_per_chunk, rows_per_shard

    def create(name: str, width: int | None, kind: str) -> zarr.Array[Any]:
        tail = () if width is None else (width,)
        return group.create_array(
            name,
            shape=(rows, *tail),
            chunks=(rows_per_chunk if shards else min(rows_per_chunk, rows), *tail),
            shards=(shards, *tail) if shards else None,
            dtype=kind,
            compressors=CODECS[codec](),
            config={"write_empty_chunks": True},
        )

    x = create("X", features, dtype)
    y = create("y", None if targets == 1 else targets, "float64")
    w = create("weights", None, "float64") if weights else None
    step = piece * max(BLOCK_BYTES // (8 * features * piece), 1)
    for number, start in enumerate(range(0, rows, step)):
        generator = np.random.default_rng([seed, 1 + number])
        block = generator.normal(size=(min(step, rows - start), features)) + offset
        stored = block.astype(dtype)
        response = 3.0 + stored.astype(np.float64) @ coef + noise * generator.normal(size=(len(block), targets))
        x[start : start + len(block)] = stored
        y[start : start + len(block)] = response[:, 0] if targets == 1 else response
        if w is not None:
            w[start : start + len(block)] = generator.uniform(0.5, 1.5, len(block))
    group.attrs.update({"coef": coef.tolist(), "intercept": 3.0})


if __name__ == "__main__":
    typer.run(make_data)
