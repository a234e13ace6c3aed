"""Mean and scatter of the rows of one block: one symmetric product of rows, centred near their mean where that is far from zero."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlr.dataset.blocks import Block, tile_rows

EPS = {"double": float(np.finfo(np.float64).eps), "single": float(np.finfo(np.float32).eps)}
CONSTANT = 32 * EPS["double"]  # a column varies by more than this beside its mean, or by rounding
# So much of a sum of squares may be due to a centre away from the mean: four bits of float64 at most, hardly one of float32.
MOSTLY = {"double": 15 / 16, "single": 1 / 4}
# Zero is the centre of all features where by some rows no mean has a square above this share of the mean square: one bit at most.
HARDLY = {"double": 1 / 2, "single": 1 / 8}
SOME = 64  # rows at least, where there are as many
ROUNDS = 4  # of centring again: each leaves some eps of the distance before it
PIECE_BYTES = 2**21  # of centred rows, about a core's cache: fewer, and the interpreter's lock is passed on too often
SHORT_ROWS = 2048  # that products beside many columns, and float32, sum at most: the shorter a sum, the less of it is rounding
FEW = 3  # rows at most that are multiplied with a matrix one by one: for them together BLAS would first copy the matrix
FEW_COLUMNS = 14  # features, or targets, that are multiplied column by column: of more, symmetric products of rows are faster
FEWEST_COLUMNS = 6  # in all, that are multiplied one by one: the sums keep the most digits, and of more they take longer
COLUMNS_BYTES = 2**20  # of columns at once, about half of a core's cache: the other half has the rows they are made of
FEW_RESULTS = 500  # of a product: while NumPy makes so few by `matmul`, it keeps other threads out of the interpreter
FOLD = 64  # short rows that are centred as one
STRIP = 64  # rows of a product that are corrected at once

Array = NDArray[np.float64]


class Products(NamedTuple):
    """Products of q centred columns.

    Attributes
    ----------
    scatter : (q, q) float64
        With each other, symmetric to the last bit; in memory of its own.
    sums : (q,) float64
        With ones.
    """

    scatter: Array
    sums: Array

    @property
    def squares(self) -> Array:
        """Sums of squares (q,), where they are kept."""
        diagonal: Array = np.einsum("ii->i", self.scatter)
        return diagonal

    def correct(self, away: Array) -> None:
        """Take the products of `away` (q,) with itself off the scatter, since the centre was so far from the mean."""
        for first in range(0, len(away), STRIP):  # while they are in the cache: of many columns these are many numbers
            rows = slice(first, first + STRIP)
            self.scatter[rows] -= away[rows, None] * away


def centred_product(block: Block, total: float, precision: str) -> tuple[Array, Array, Array]:
    """Return mean, what its rounding left out, and scatter of the rows of a block, whose weights sum to `total`.

    Rows are centred near their mean, at that of some of them, so that they are gone through once; many features that are near zero
    stay as they are. Sums tell how far from there the mean is, and the scatter is corrected by the square of that. Where some rows
    say too little about the others the rows are centred again, so that the correction costs next to no digits.
    """
    few = max(block.x.shape[1], block.y.shape[1]) <= FEW_COLUMNS and precision == "double"
    centre = centre_of_some(block, None if few else HARDLY[precision])

    def around(centre: Array) -> tuple[Products, Array]:
        products = _products_of_columns(block, centre) if few else _products_of_rows(block, centre, precision)
        return products, products.sums / total

    products, offset = around(centre)
    for _ in range(ROUNDS):
        if not far_off(offset, centre, total, products.squares, precision):
            break
        centre = centre + offset
        del products  # its memory is planned for once
        products, offset = around(centre)
    products.correct(offset * np.sqrt(total))
    np.maximum(products.squares, 0.0, out=products.squares)  # of a constant, rounding may leave less than nothing
    return *exact_sum(centre, offset), products.scatter


def far_off(offset: Array, centre: Array, total: float, squares: Array, precision: str = "double") -> bool:
    """Return whether a centre is so far off from the mean that squares about it say too little of those about the mean."""
    far = offset * offset * total > MOSTLY[precision] * squares
    return bool(far.any() and (far & (np.abs(offset) > CONSTANT * np.abs(centre))).any())


def centre_of_some(block: Block, hardly: float | None) -> Array:
    """Return the mean of rows that are spread over a block, of all where those have no weight; zero for features if it will do.

    It will where no square of a mean is more than `hardly` of the mean square; never where that is None.
    """
    every, w = some_rows(block)
    p, some = block.x.shape[1], np.concatenate((block.x[every], block.y[every]), axis=1)
    mean: Array = w.dot(some) / w.sum()
    if hardly is not None and (mean[:p] ** 2 <= hardly * (w.dot(some[:, :p] ** 2) / w.sum())).all():
        mean[:p] = 0.0
    return mean


def some_rows(block: Block) -> tuple[slice, Array]:
    """Return which rows of a block are spread over it, and their weights: all rows where these weigh nothing."""
    every = slice(None, None, max(len(block.y) // SOME, 1))
    if block.weights is None:
        return every, np.ones(-(-len(block.y) // every.step))
    w = block.weights[every]
    return (every, w) if w.any() else (slice(None), block.weights)


def _products_of_columns(block: Block, centre: Array) -> Products:
    """Return the products of few columns that are centred: each in one piece of memory, along which NumPy and BLAS are quick.

    Products are made once for two columns, with the weights in one of them, so that the scatter is symmetric to the last bit.
    """
    (m, p), q = block.x.shape, len(centre)
    step = min(tile_rows(q + 1, 0, COLUMNS_BYTES), m)
    room = block.workspace((q + 2) * step)
    products = np.zeros((q + 1, q + 1))  # of ones, features and targets
    for first in range(0, m, step):
        here, rows = slice(first, first + step), min(step, m - first)
        columns, weighted = room[: (q + 1) * rows].reshape(q + 1, rows), room[(q + 1) * rows : (q + 2) * rows]
        columns[0] = 1.0
        np.subtract(block.x[here].T, centre[:p, None], out=columns[1 : p + 1])
        np.subtract(block.y[here].T, centre[p:, None], out=columns[p + 1 :])
        for j in range(1, q + 1):
            column, others = columns[j], columns[: j + 1]
            if block.weights is not None:
                column = np.multiply(column, block.weights[here], out=weighted)
            products[j, : j + 1] += [other.dot(column) for other in others] if q <= FEWEST_COLUMNS else others.dot(column)
    for j in range(2, q + 1):
        products[1:j, j] = products[j, 1:j]
    return Products(products[1:, 1:].copy(), products[1:, 0])


def _products_of_rows(block: Block, centre: Array, precision: str) -> Products:
    """Return the products of the columns of rows that are centred, but at zero, and multiplied by the roots of their weights.

    Each `step` rows make one symmetric product, after each `near` of them were centred and multiplied with the targets while the
    cache holds them; all rows at once where features are multiplied as they lie.
    """
    (m, p), q, weights = block.x.shape, len(centre), block.weights
    heaviest = float(weights.max()) if weights is not None and precision == "single" else 1.0  # float32 has less range
    root = None if weights is None else np.sqrt(weights / heaviest)[:, None]
    # blocks of one statistic are all in C order or none is, so that the order in memory, which shows in bits, depends on no layout
    as_they_lie = root is None and not centre[:p].any() and block.x.flags.c_contiguous
    step, near = m, m
    if not as_they_lie:
        step = min(tile_rows(q + 1, cache_bytes=PIECE_BYTES), m)
        near = min(tile_rows(q + 1, 0, PIECE_BYTES), step)
    room = block.workspace((0 if as_they_lie else step * p) + near * (q + 1 - p))
    rest, room = room[: near * (q + 1 - p)], room[near * (q + 1 - p) :]
    scatter, beside = np.empty((q, q)), np.zeros((q + 1 - p, q + 1))
    square = scatter[:p, :p]
    for first in range(0, m, step):
        rows = min(step, m - first)
        features = block.x[first : first + rows] if as_they_lie else room[: rows * p].reshape(rows, p)
        for part in range(0, rows, near):
            height = min(near, rows - part)
            here = slice(first + part, first + part + height)
            z, others = features[part : part + height], rest[: height * (q + 1 - p)].reshape(q + 1 - p, height)
            np.subtract(block.y[here].T, centre[p:, None], out=others[:-1])
            others[-1] = 1.0
            if not as_they_lie:
                _centre(block.x[here], centre[:p], z)
            if root is not None:
                z *= root[here]
                others *= root[here].T
            beside += _beside(z, others)
        found = np.empty((p, p)) if first else square
        _write_square(features, precision, found)
        if first:
            square += found
    if heaviest != 1:
        square *= heaviest
        beside *= heaviest
    scatter[p:] = beside[:-1, :-1]
    scatter[:p, p:] = scatter[p:, :p].T
    return Products(scatter, beside[-1, :-1])


def _centre(x: Array, centre: Array, out: Array) -> None:
    """Write rows less their centre: from one long row NumPy subtracts several times as fast as from many short ones."""
    m = len(x)
    fold = min(m & -m, FOLD)  # rows of a tile are a power of two; those of a last one perhaps not
    np.subtract(x.reshape(m // fold, -1), np.tile(centre, fold), out=out.reshape(m // fold, -1))


def _beside(features: Array, others: Array) -> Array:
    """Return the products of targets and ones, the rows of `others`, with features (m, p) and with each other."""
    p = features.shape[1]
    products = np.zeros((len(others), p + len(others)))
    if len(others) > FEW:
        products[:, :p], products[:, p:] = others.dot(features), others.dot(others.T)
        return products
    for at in range(0, len(features), SHORT_ROWS):  # BLAS would sum all of them row by row
        piece, some = features[at : at + SHORT_ROWS], others[:, at : at + SHORT_ROWS]
        for j, row in enumerate(some):
            products[j, :p] += row.dot(piece)
            products[j, p : p + j + 1] += some[: j + 1].dot(row)
    for j in range(len(others)):
        products[:j, p + j] = products[j, p : p + j]
    return products


def _write_square(features: Array, precision: str, out: Array) -> None:
    """Write the products with each other of all columns of `features`, (m, p), into `out`, (p, p).

    It is the symmetric product, of one contiguous array with itself: another spelling would give other bits. In single precision
    it alone is made of float32 numbers, twice as fast; the sums of short products are float64 always.
    """
    p = features.shape[1]
    if precision == "single":
        short = max(SHORT_ROWS, 4 * p)
        out[...] = 0.0
        for first in range(0, len(features), short):
            z = features[first : first + short].astype(np.float32)
            out += z.T.dot(z)
    elif out.size > FEW_RESULTS:
        np.matmul(features.T, features, out=out)  # where they belong: `dot` would not write into a part of a matrix
    else:
        out[...] = features.T.dot(features)


def exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b as float64 has it, and what its rounding left out (Knuth, The Art of Computer Programming 2, section 4.2.2)."""
    rounded = a + b
    of_b = rounded - a
    return rounded, (a - (rounded - of_b)) + (b - of_b)
