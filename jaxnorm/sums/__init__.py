"""Sums over the positions of an instance, in the form that each platform compiles best."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.arguments import AxisName
from jaxnorm.sums import cpu, gpu

# The share of an instance whose mean serves as the provisional center. A smaller share reads less and cancels more.
_CENTER_SHARE = 16

# What decides the form of a sum. On a TPU, and where nothing is known, the arrays stay N-d.
Platform = Literal["cpu", "gpu", "tpu"]


class Positions(NamedTuple):
    """Where the positions of an instance are.

    Attributes:
      axes: of the arrays, one for a view; per-instance values do not have them.
      axis_name: None, or the mapped axis over which the positions are spread besides, in equal shares.
      split_by_jit: whether the arrays are N-d because jit may split them along any axis.
      platform: that computes.
    """

    axes: tuple[int, ...]
    axis_name: AxisName | None
    split_by_jit: bool
    platform: Platform

    def count(self, x: jax.Array) -> int:
        """The positions of an instance."""
        return math.prod(x.shape[axis] for axis in self.axes) * self.devices

    @property
    def devices(self) -> int:
        """That share an instance over the mapped axis."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def spread(self, value: jax.Array) -> jax.Array:
        """A per-instance value, to broadcast against the arrays."""
        return jnp.expand_dims(value, self.axes)

    def add_up[Values: (jax.Array, tuple[jax.Array, ...])](self, values: Values) -> Values:
        """Over the mapped axis."""
        return values if self.axis_name is None else lax.psum(values, self.axis_name)


def corner_of(x: jax.Array, axes: tuple[int, ...], *, split_by_jit: bool) -> jax.Array:
    """The first positions along each axis, a share of at least 1 / _CENTER_SHARE: a slab where the first axis is long.

    A slab lies in one piece, which is read without the rest; the next axes are cut only as far as the first ones are
    too short for it. To be taken of x as the user gave it: of a view XLA for CPU takes the small loop that reads a
    slice for one that reads all of it, and divides it among threads, which take longer to wake than it.

    Args:
      x: N-d.
      axes: the spatial ones.
      split_by_jit: whether they may lie on several devices: then it is all of x, as it is of symbolic sizes.
    """
    if split_by_jit or _is_symbolic(x):
        return x
    left = math.prod(x.shape[axis] for axis in axes)
    wanted = -(-left // _CENTER_SHARE)
    for axis in axes:
        # Half as much again is less trouble than rows that are cut: these do not lie in one piece.
        if left <= wanted * 3 // 2:
            break
        size = x.shape[axis]
        kept = -(-size * wanted // left)
        x = lax.slice_in_dim(x, 0, kept, axis=axis)
        left = left // size * kept
    return x


def provisional_center(corner: jax.Array, dtype: jax.typing.DTypeLike, positions: Positions) -> jax.Array:
    """A number near the mean: the mean of a corner of the instance (corner_of).

    The variance is then mean(d^2) - mean(d)^2 with d = x - center, and what cancels is mean(d)^2. The mean of any
    subset that holds a share f of the instance obeys (center - mean)^2 <= variance * (1 - f) / f (Cauchy-Schwarz on
    the subset's indicator), whatever the data. So mean(d^2) <= variance / f, and the rounding error of the variance
    grows by at most 1 / f: 16 for f = 1/16, about 1e-6 relative in float32. The corners of all devices together are
    such a subset too. Where jit may split the positions, it is all of them.
    """
    # Around the first position: a sum of the plain values would round by more than the spread at a large offset.
    center = first = _first(corner, positions).astype(dtype)
    if any(corner.shape[axis] != 1 for axis in positions.axes):
        # Divided before they are added: the sum of large numbers would overflow.
        share = 1 / math.prod(corner.shape[axis] for axis in positions.axes)
        origin = positions.spread(first)
        (mean,) = over_positions(lambda x: ((x.astype(dtype) - origin) * share,), (corner,), positions)
        center = first + mean
    return _finite(positions.add_up(center / positions.devices))


def masked_center(
    x: jax.Array, where: jax.Array, dtype: jax.typing.DTypeLike, positions: Positions
) -> tuple[jax.Array, jax.Array]:
    """The mean of the positions that count, as a provisional center, and their number.

    Of all of them: no share of what a mask counts is known to lie in a corner.
    """
    first = jnp.where(_first(where, positions), _first(x, positions), 0).astype(dtype)
    # Divided before they are added, by how many they may be: the sum of large numbers would overflow.
    most = math.prod(x.shape[axis] for axis in positions.axes)

    # A mask as large as x is counted by the pass that reads it anyway, a smaller one for less.
    # A CPU adds up two terms at a time anyway.
    is_large = where.size == x.size or positions.platform == "cpu"

    def terms(x: jax.Array, where: jax.Array) -> tuple[jax.Array, ...]:
        deviation = jnp.where(where, (x.astype(dtype) - positions.spread(first)) / most, 0)
        return (deviation, where.astype(dtype)) if is_large else (deviation,)

    total, *counted = over_positions(terms, (x, jnp.broadcast_to(where, x.shape)), positions)
    own = counted[0] if is_large else _count(where, x.shape, dtype, positions)
    count = positions.add_up(own)
    return _finite(positions.add_up(total * (most / count) + first * (own / count))), count


def _count(where: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, positions: Positions) -> jax.Array:
    """What a mask that is repeated along some axes of an array of that shape counts."""
    repeated = math.prod(shape[axis] for axis in positions.axes if where.shape[axis] == 1)
    return jnp.sum(where, axis=positions.axes, dtype=dtype) * repeated


def _finite(center: jax.Array) -> jax.Array:
    """Where a difference overflowed, a number that is the same on every device."""
    return jnp.where(jnp.isfinite(center), center, 0)


def _first(array: jax.Array, positions: Positions) -> jax.Array:
    for axis in positions.axes:
        array = lax.slice_in_dim(array, 0, 1, axis=axis)
    return array.squeeze(positions.axes)


def _is_symbolic(array: jax.Array) -> bool:
    """Whether sizes are symbols, as in an export: which of two is larger cannot be asked then."""
    return not all(isinstance(size, int) for size in array.shape)


def over_positions(
    terms: Callable[..., tuple[jax.Array, ...]], arrays: tuple[jax.Array | None, ...], positions: Positions
) -> tuple[jax.Array, ...]:
    """The sums of terms(*arrays) over the positions of this device, in the form that the platform compiles best.

    Args:
      terms: elementwise in the arrays, and in per-instance values that it closes over and spreads.
      arrays: views (B, R, K), on a CPU also (B, R) or (R, K), or N-d on a TPU and where jit may split them.
      positions: those of an instance.

    Returns:
      Of each term the sum, per instance.
    """

    if positions.split_by_jit or positions.platform == "tpu" or any(map(_is_symbolic, jax.tree.leaves(arrays))):
        return tuple(jnp.sum(term, axis=positions.axes) for term in terms(*arrays))
    if positions.platform == "cpu":
        return cpu.sum_tree(terms, *arrays, axis=positions.axes[0])
    return gpu.sum_chunks(terms(*arrays))
