"""Mean and scatter of the rows of one block: one symmetric product of rows that are centred near their mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block, tile_rows

EPS = {"double": float(np.finfo(np.float64).eps), "single": float(np.finfo(np.float32).eps)}
CONSTANT = 32 * EPS["double"]  # a column varies by more than this beside its mean, or by rounding
# So much of a sum of squares may be due to a centre away from the mean: four bits of float64 at most, hardly one of float32.
MOSTLY = {"double": 15 / 16, "single": 1 / 4}
SOME = 64  # rows at least, where there are as many
ROUNDS = 4  # of centring again: each leaves some eps of the distance before it
PIECE_BYTES = 2**20  # of centred rows that are multiplied at once: what a core's second-level cache holds
SHORT_ROWS = 2048  # summed at most, but where columns are many: the shorter a sum, the less of it is rounding
FEW = 3  # rows at most that are multiplied with a matrix one by one: for them together BLAS would first copy the matrix
FOLD = 64  # short rows that are centred as one


def centred_product(
    block: Block, total: float, precision: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return mean, what its rounding left out, and scatter of the rows of a block, whose weights sum to `total`.

    Rows are centred near their mean, at that of some of them, so that they are gone through once. The product, which has a column
    of ones too, tells how far from there the mean is, and the scatter is corrected by the square of that. Where some rows say too
    little about the others the rows are centred again, so that the correction costs next to no digits.
    """
    weights = block.weights
    heaviest = float(weights.max()) if weights is not None and precision == "single" else 1.0  # float32 has less range
    root = None if weights is None else np.sqrt(weights / heaviest)[:, None]

    def around(centre: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        products = _products(block, centre, root, precision)
        if heaviest != 1:
            products *= heaviest
        return products[:-1, :-1], products[-1, :-1] / total

    centre = _mean_of_some(block)
    scatter, offset = around(centre)
    for _ in range(ROUNDS):
        far = offset * offset * total > MOSTLY[precision] * np.diagonal(scatter)
        if not (far & (np.abs(offset) > CONSTANT * np.abs(centre))).any():
            break
        centre = centre + offset
        del scatter  # its memory is planned for once
        scatter, offset = around(centre)
    away = offset * np.sqrt(total)
    correction = away[:, None] * away
    scatter = np.subtract(scatter, correction, out=correction)
    np.fill_diagonal(scatter, np.maximum(np.diagonal(scatter), 0.0))  # of a constant, rounding may leave less than nothing
    return *exact_sum(centre, offset), scatter


def _mean_of_some(block: Block) -> NDArray[np.float64]:
    """Return the mean of rows that are spread over a block; of all, where those have no weight."""
    every = max(len(block.x) // SOME, 1)
    w = None if block.weights is None else block.weights[::every]
    if w is not None and not w.any():
        every, w = 1, block.weights
    some = block.x[::every], block.y[::every]
    if w is None:
        return np.concatenate([rows.sum(axis=0) for rows in some]) / len(some[0])
    mean: NDArray[np.float64] = np.concatenate([w @ rows for rows in some]) / w.sum()
    return mean


def _products(block: Block, centre: NDArray[np.float64], root: NDArray[np.float64] | None, precision: str) -> NDArray[np.float64]:
    """Return the products of centred columns, and of one of ones, with each other, of rows times the roots of their weights."""
    m, q = len(block.x), len(centre)
    short = min(tile_rows(q + 1, cache_bytes=min(PIECE_BYTES, 8 * (q + 1) * SHORT_ROWS)), m)
    step = min(short * max(PIECE_BYTES // (8 * (q + 1) * short), 1), m)
    room = block.workspace(step * (q + 1))
    products: NDArray[np.float64] | None = None
    first = 0
    while first < m:  # while a piece is in the core's cache
        rows = min(step, m - first)
        rows -= rows % short if rows > short else 0
        piece = slice(first, first + rows)
        features, rest = _centred(block.x[piece], block.y[piece], centre, room)
        if root is not None:
            features *= root[piece]
            rest *= root[piece].T
        found = _multiplied(features, rest, min(short, rows), precision)
        products = found if products is None else np.add(products, found, out=products)
        first += rows
    assert products is not None
    return products


def _centred(
    x: NDArray[np.float64], y: NDArray[np.float64], centre: NDArray[np.float64], room: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return, in `room`, the centred features as rows, and apart from them the targets and ones as columns.

    Apart, since NumPy subtracts one long row several times as fast as many short ones.
    """
    (m, p), q = x.shape, len(centre)
    features, rest = room[: m * p].reshape(m, p), room[m * p : m * (q + 1)].reshape(q + 1 - p, m)
    fold = min(m & -m, FOLD)  # rows of a tile are a power of two; those of a last one perhaps not
    np.subtract(x.reshape(m // fold, -1), np.tile(centre[:p], fold), out=features.reshape(m // fold, -1))
    np.subtract(y.T, centre[p:, None], out=rest[:-1])
    rest[-1] = 1.0
    return features, rest


def _multiplied(features: NDArray[np.float64], rest: NDArray[np.float64], short: int, precision: str) -> NDArray[np.float64]:
    """Return the products with each other of all columns of `features`, (m, p), and rows of `rest`, (q + 1 - p, m).

    Each `short` rows are summed by themselves, and then their sums: one call multiplies a stack of such pieces. The largest product
    is the symmetric one, `z.T @ z` of one contiguous array: another spelling would give other bits. In single precision it alone is
    made of float32 numbers, twice as fast; sums of products are float64 always.
    """
    p, others = features.shape[1], len(rest)
    z = features.reshape(-1, short, p)
    o = rest.reshape(others, -1, short).transpose(1, 0, 2)
    square = z if precision == "double" else z.astype(np.float32)
    products = np.empty((p + others, p + others))
    products[:p, :p] = _sum(square.transpose(0, 2, 1) @ square)
    products[p:, :p] = _sum(o @ z if others > FEW else (o[:, :, None] @ z[:, None])[:, :, 0])
    products[:p, p:] = products[p:, :p].T
    products[p:, p:] = _sum(o @ o.transpose(0, 2, 1))
    return products


def _sum(stack: NDArray[Any]) -> NDArray[Any]:
    """Return the sum of a stack of matrices; of one, without a copy."""
    total: NDArray[Any] = stack[0] if len(stack) == 1 else stack.sum(axis=0, dtype=np.float64)
    return total


def exact_sum(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a + b as float64 has it, and what its rounding left out (Knuth, The Art of Computer Programming 2, section 4.2.2)."""
    rounded = a + b
    of_b = rounded - a
    return rounded, (a - (rounded - of_b)) + (b - of_b)
