"""Mean and scatter of the rows of one block: one symmetric product of rows that are centred near their mean."""

from __future__ import annotations

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
PIECE_ROWS = 2048  # at most, but where columns are many: the shorter a sum, the less of it is rounding
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
    step = min(tile_rows(q + 1, cache_bytes=min(PIECE_BYTES, 8 * (q + 1) * PIECE_ROWS)), m)
    room = block.workspace(step * (q + 1))
    products: NDArray[np.float64] | None = None
    for first in range(0, m, step):  # while a piece is in the core's cache
        piece = slice(first, first + step)
        found = _products_of_piece(block.x[piece], block.y[piece], centre, None if root is None else root[piece], room, precision)
        products = found if products is None else np.add(products, found, out=products)
    assert products is not None
    return products


def _products_of_piece(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    centre: NDArray[np.float64],
    root: NDArray[np.float64] | None,
    room: NDArray[np.float64],
    precision: str,
) -> NDArray[np.float64]:
    """Return what `_products` does, of as many rows as there is room for.

    Features and the rest lie apart, since NumPy subtracts one long row several times as fast as many short ones.
    """
    (m, p), q = x.shape, len(centre)
    features, rest = room[: m * p].reshape(m, p), room[m * p : m * (q + 1)].reshape(q + 1 - p, m)
    fold = min(m & -m, FOLD)  # rows of a tile are a power of two; those of a last one perhaps not
    np.subtract(x.reshape(m // fold, -1), np.tile(centre[:p], fold), out=features.reshape(m // fold, -1))
    np.subtract(y.T, centre[p:, None], out=rest[:-1])
    rest[-1] = 1.0
    if root is not None:
        features *= root
        rest *= root.T
    return _multiplied(features, rest, precision)


def _multiplied(features: NDArray[np.float64], rest: NDArray[np.float64], precision: str) -> NDArray[np.float64]:
    """Return the products with each other of all columns of `features`, (m, p), and rows of `rest`, (q + 1 - p, m).

    The largest is the symmetric one, `z.T @ z` of one contiguous array: another spelling would give other bits. In single precision
    it alone is made of float32 numbers, twice as fast; sums of products are float64 always.
    """
    p = features.shape[1]
    q = p + len(rest)
    products = np.empty((q, q))
    if precision == "double":
        products[:p, :p] = features.T @ features
    else:
        single = features.astype(np.float32)
        products[:p, :p] = single.T @ single
    products[p:, :p] = rest @ features
    products[:p, p:] = products[p:, :p].T
    products[p:, p:] = rest @ rest.T
    return products


def exact_sum(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a + b as float64 has it, and what its rounding left out (Knuth, The Art of Computer Programming 2, section 4.2.2)."""
    rounded = a + b
    of_b = rounded - a
    return rounded, (a - (rounded - of_b)) + (b - of_b)
