"""What the thread blocks that share an instance have found, where they leave it for each other, and how it is merged.

Few    a cluster: each part in registers of its own
Many   a group: as many ranks at a time as an instruction covers, one for each row of a chunk or each position
"""

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm.gpu import copies
from jaxnorm.gpu.cutting import ELEMENTS_PER_STEP
from jaxnorm.gpu.tile import Tile

Values = tuple[jax.Array, ...]
# The parts of the largest cluster fit into registers.
_FEW = 8
# So many rounds of many parts do: 3 values in 4 registers each.
_KEPT = 3


class Parts(abc.ABC):
    """One tuple of values per instance for each rank.

    Attributes:
      first: that of the first one.
    """

    first: Values

    @abc.abstractmethod
    def spread(self, value: jax.Array) -> jax.Array:
        """A value per instance as something that a term can be made of."""

    @abc.abstractmethod
    def total(self, term: Callable[..., Values]) -> Values:
        """The sums of the values of term(rank, *part) over all ranks."""


class Few(Parts):
    def __init__(self, parts: Sequence[Values]) -> None:
        self.first, self._parts = parts[0], parts

    def spread(self, value: jax.Array) -> jax.Array:
        return value

    def total(self, term: Callable[..., Values]) -> Values:
        return functools.reduce(_add, (term(rank, *part) for rank, part in enumerate(self._parts)))


class Many(Parts):
    """They are read whenever they are needed, unless they fit into registers.

    Args:
      tile: of the thread blocks.
      first: the values of the first rank.
      read: read(i, start, count) is value i of that many rows: see shape.
      spread: spread(value, shape) of a value per instance.
      sum_up: the sum of a chunk per instance.
    """

    def __init__(
        self,
        tile: Tile,
        first: Values,
        *,
        read: Callable[[int, int, int], jax.Array],
        spread: Callable[..., jax.Array],
        sum_up: Callable[[jax.Array], jax.Array],
    ) -> None:
        self.tile, self.first = tile, first
        self._read, self._spread, self._sum_up = read, spread, sum_up
        self._at_once = (ELEMENTS_PER_STEP // tile.lanes, tile.lanes)
        starts = range(0, _rows(tile), self._at_once[0])
        self._kept = {start: self._values(start) for start in starts} if len(starts) <= _KEPT else {}

    def spread(self, value: jax.Array) -> jax.Array:
        return self._spread(value, self._at_once)

    def total(self, term: Callable[..., Values]) -> Values:
        # Not a loop: the loads of all ranks are on their way at the same time.
        total: Values = functools.reduce(_add, self._terms(term))
        return tuple(map(self._sum_up, total))

    def _terms(self, term: Callable[..., Values]) -> Iterator[Values]:
        layout, (rows, lanes) = copies.registers(self.tile.lanes), self._at_once
        row, lane = (plgpu.broadcasted_iota(jnp.int32, self._at_once, axis, layout=layout) for axis in (0, 1))
        for start in range(0, _rows(self.tile), rows):
            rank = row + start if self.tile.reduces == "rows" else (row + start) * lanes + lane
            found = term(rank, *(self._kept.get(start) or self._values(start)))
            # Nobody wrote to what fills up the last rows.
            yield tuple(jnp.where(rank < self.tile.parts, value, 0.0) for value in found)

    def _values(self, start: int) -> Values:
        return tuple(self._read(i, start, self._at_once[0]) for i in range(len(self.first)))


def are_few(tile: Tile) -> bool:
    return tile.parts <= _FEW


def shape(tile: Tile, positions: int) -> tuple[int, int]:
    """Where a value of each part lies, for each of the outer, which have so many positions side by side.

    A row of many parts has one rank for "rows", and one rank in each of its lanes for "both".
    """
    if are_few(tile):
        return tile.parts, positions
    return _rows(tile), positions if tile.reduces == "rows" else tile.lanes


def total(parts: Parts) -> Values:
    """The sums of all values."""
    return parts.total(lambda _, *values: values)


def merged_moments(
    parts: Parts, count: Callable[[Any], Any], positions: int, scale: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Center, delta and variance of an instance from the moments of its parts (Chan et al. 1983).

    Args:
      parts: of (center, delta, squares): the mean is center + delta / scale, and squares the sum of
        (scale * (x - mean))^2. The center of the first part becomes that of the instance.
      count: the number of positions of a rank.
      positions: of the instance.
      scale: as above; of the variance its square.
    """
    center, around, unit = parts.first[0], parts.spread(parts.first[0]), parts.spread(scale)

    def mean(own: jax.Array, delta: jax.Array) -> jax.Array:
        mean: jax.Array = unit * (own - around) + delta
        return mean

    weighted: jax.Array
    (weighted,) = parts.total(lambda rank, own, delta, _: (count(rank) * mean(own, delta),))
    merged = weighted / positions
    of_all = parts.spread(merged)
    (squares,) = parts.total(
        lambda rank, own, delta, squares: (squares + count(rank) * jnp.square(mean(own, delta) - of_all),)
    )
    variance: jax.Array = squares / positions
    return center, merged, variance


def _rows(tile: Tile) -> int:
    """That hold a value of all ranks, as whole chunks."""
    at_once = ELEMENTS_PER_STEP // tile.lanes
    of_all = tile.parts if tile.reduces == "rows" else -(-tile.parts // tile.lanes)
    return -(-of_all // at_once) * at_once


def _add(total: Values, more: Values) -> Values:
    return tuple(a + b for a, b in zip(total, more, strict=True))
