"""What of a run is random: which item is at which position, and the random numbers of that position.

Everything random in a run is keyed by its seed and by a *position*, the number of a sample in the endless stream of the
run, never by a worker, a process or the order of calls. So a run is the same for any number of workers and processes,
and going on with one means starting at another position: no state of a random generator is ever saved.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from m2d_embed.errors import ConfigError

_WORD = (1 << 64) - 1


class Purpose(IntEnum):
    """What random numbers are for; each purpose has a stream of its own."""

    ORDER = 0
    CROP = 1
    MASK = 2
    NOISE = 3
    REPLACE = 4
    SHARDS = 5
    SHUFFLE = 6
    DROP = 7


def rng_at(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """The random generator of one sample of a run; independent of those of other positions and purposes.

    Args:
        seed: of the run; its low 64 bits count.
        position: number of the sample, or of the epoch, from 0.
        purpose: what the numbers are for.
    """
    # Word 0 of the counter counts the numbers drawn: 2 ** 64 blocks before the next position's begin.
    bits = np.random.Philox(key=[seed & _WORD, int(purpose)], counter=[0, position & _WORD, 0, 0])
    return np.random.Generator(bits)


def order_of_epoch(weights: npt.NDArray[np.float64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Indices of the items in the order in which one epoch takes them.

    Items of equal weight come once each. Otherwise an item of weight ``w`` comes ``n * w / sum(weights)`` times, that
    number rounded up or down at random.

    Args:
        weights: (n,), none negative.
        seed: of the run.
        epoch: its number, from 0.

    Returns:
        (n,) int64.

    Raises:
        ConfigError: if there are no items, or all weights are zero.
    """
    rng = rng_at(seed, epoch, Purpose.ORDER)
    n = len(weights)
    if n == 0:
        raise ConfigError("There are no items to train on.")
    if weights.min() == weights.max() > 0:
        return rng.permutation(n)
    ends = np.cumsum(weights)
    if not 0 < ends[-1] < math.inf:
        raise ConfigError("The weights of the items add up to nothing (or to infinity), so none could be drawn.")
    # Systematic draws: evenly spaced points from a random start, so luck moves no item's count by more than one.
    drawn = np.searchsorted(ends, (rng.random() + np.arange(n)) * (ends[-1] / n), side="right")
    # Rounding may put the last point at the very end.
    order: npt.NDArray[np.int64] = np.minimum(drawn, np.flatnonzero(weights)[-1])
    rng.shuffle(order)
    return order


class ItemOrder:
    """Which item is at which position of the endless stream."""

    def __init__(self, weights: npt.NDArray[np.float64], seed: int):
        self.weights = weights
        self.seed = seed
        self._ends = np.cumsum(weights)
        self._orders: dict[int, npt.NDArray[np.int64]] = {0: order_of_epoch(weights, seed, 0)}  # raises on bad weights

    def item_at(self, position: int) -> int:
        """Index of the item at ``position``."""
        epoch, place = divmod(position, len(self.weights))
        if epoch not in self._orders:
            for old in sorted(self._orders)[:-1]:  # a batch may reach over the end of an epoch: two are kept
                del self._orders[old]
            self._orders[epoch] = order_of_epoch(self.weights, self.seed, epoch)
        return int(self._orders[epoch][place])

    def draw(self, rng: np.random.Generator) -> int:
        """Index of one item drawn by weight."""
        drawn = int(np.searchsorted(self._ends, rng.random() * self._ends[-1], side="right"))
        return min(drawn, int(np.flatnonzero(self.weights)[-1]))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_orders": {}}
