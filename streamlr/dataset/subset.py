"""Which rows belong to a part of a split: by a seeded hash of their position, and by nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GAMMA = 0x9E3779B97F4A7C15
FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class Subset:
    """Rows whose hashed position falls below `fraction` (or, with `complement`, does not).

    Attributes
    ----------
    fraction : float
        Share of the rows, between 0 and 1.
    seed : int
        Another seed, another hash.
    depth : int
        How many splits came before, so that a part is split by another hash than the one that made it.
    complement : bool
        Take the other rows.

    Examples
    --------
    >>> part = Subset(0.5, seed=0, depth=0, complement=False)
    >>> rest = Subset(0.5, seed=0, depth=0, complement=True)
    >>> bool((part.holds(0, 100) ^ rest.holds(0, 100)).all())
    True
    """

    fraction: float
    seed: int
    depth: int
    complement: bool

    def holds(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return, for each of the rows [start, stop), whether it belongs (splitmix64; Steele, Lea and Flood 2014, figure 15)."""
        key = np.array([self.seed % 2**64, self.depth], dtype=np.uint64)
        ordered: NDArray[np.uint64] = key * np.uint64(GAMMA) + np.array([1, 2], dtype=np.uint64)
        origin = np.bitwise_xor.reduce(_mixed(ordered))
        positions: NDArray[np.uint64] = np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(GAMMA) + origin
        hashed = _mixed(positions)
        chosen = (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.fraction
        return ~chosen if self.complement else chosen


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in FACTORS:
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
