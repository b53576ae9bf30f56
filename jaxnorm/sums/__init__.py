"""Sums over the positions of an instance, in the form that each platform compiles best."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import scaling
from jaxnorm.arguments import AxisName
from jaxnorm.reference import statistics_dtype
from jaxnorm.sums import cpu, gpu

# The share of an instance whose mean serves as the provisional center. A smaller share reads less and cancels more.
_CENTER_SHARE = 16


class Positions(NamedTuple):
    """Where the positions of an instance are.

    Attributes:
      axes: of the arrays, (1,) for a view; per-instance values have size 1 there.
      axis_name: None, or the mapped axis over which the positions are spread besides, in equal shares.
      split_by_jit: whether the arrays are N-d because jit may split them along any axis.
    """

    axes: tuple[int, ...]
    axis_name: AxisName | None
    split_by_jit: bool

    def count(self, x: jax.Array, where: jax.Array | None = None) -> Any:
        """The positions of an instance, a number; with a mask those that count, one value per instance."""
        own = self.own_count(x, where)
        return own * self.devices if where is None else self.add_up(own)

    def own_count(self, x: jax.Array, where: jax.Array | None = None) -> Any:
        """Those of this device."""
        if where is None:
            return math.prod(x.shape[axis] for axis in self.axes)
        # A mask of size 1 along an axis stands for all positions there.
        repeated = math.prod(x.shape[axis] for axis in self.axes if where.shape[axis] == 1)
        return jnp.sum(where, axis=self.axes, keepdims=True, dtype=statistics_dtype(x.dtype)) * repeated

    @property
    def devices(self) -> int:
        """That share an instance over the mapped axis."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def add_up[Values: (jax.Array, tuple[jax.Array, ...])](self, values: Values) -> Values:
        """Over the mapped axis."""
        return values if self.axis_name is None else lax.psum(values, self.axis_name)


def provisional_center(
    x: jax.Array, where: jax.Array | None, dtype: jax.typing.DTypeLike, positions: Positions
) -> jax.Array:
    """A number near the mean: the mean of the first rows, or of all that count where there is a mask.

    The variance is then mean(d^2) - mean(d)^2 with d = x - center, and what cancels is mean(d)^2. The mean of any
    subset that holds a share f of the instance obeys (center - mean)^2 <= variance * (1 - f) / f (Cauchy-Schwarz on
    the subset's indicator), whatever the data. So mean(d^2) <= variance / f, and the rounding error of the variance
    grows by at most 1 / f: 16 for f = 1/16, about 1e-6 relative in float32. The first rows of every device are such a
    subset too. Where jit may split the rows, it is all of them; and of what a mask counts no share is known to lie in
    the first rows.
    """
    share = 1 if positions.split_by_jit or where is not None else _CENTER_SHARE
    first_axis = positions.axes[0]
    rows = lax.slice_in_dim(x, 0, -(-x.shape[first_axis] // share), axis=first_axis)
    # Around the first position: a sum of the plain values would round by more than the spread at a large offset.
    first = _first(x, positions).astype(dtype)
    if where is not None:
        first = jnp.where(_first(where, positions), first, 0)
    scale = scaling.of(first)

    def terms(rows: jax.Array, where: jax.Array | None) -> tuple[jax.Array]:
        deviation = rows.astype(dtype) * scale - first * scale
        return (deviation if where is None else jnp.where(where, deviation, 0),)

    mask = None if where is None else jnp.broadcast_to(where, rows.shape)
    (total,) = over_positions(terms, (rows, mask), positions)
    own, count = positions.own_count(rows, where), positions.count(rows, where)
    center = positions.add_up(total / count / scale + first * (own / count))
    # Where the sum overflows, a number that is the same on every device.
    return jnp.where(jnp.isfinite(center), center, 0)


def _first(array: jax.Array, positions: Positions) -> jax.Array:
    for axis in positions.axes:
        array = lax.slice_in_dim(array, 0, 1, axis=axis)
    return array


def over_positions(
    terms: Callable[..., tuple[jax.Array, ...]], arrays: tuple[jax.Array | None, ...], positions: Positions
) -> tuple[jax.Array, ...]:
    """The sums of terms(*arrays) over the positions of this device, in the form that the platform compiles best.

    Args:
      terms: elementwise in the arrays; per-instance values that it closes over have size 1 on the summed axes.
      arrays: views, or N-d where positions say so.
      positions: those of an instance.

    Returns:
      Of each term the sum, with the summed axes kept at size 1.
    """

    def at_once(*arrays: Any) -> tuple[jax.Array, ...]:
        return tuple(jnp.sum(term, axis=positions.axes, keepdims=True) for term in terms(*arrays))

    def in_parts(*arrays: Any) -> tuple[jax.Array, ...]:
        return cpu.sum_parts(terms, *arrays)

    def in_chunks(*arrays: Any) -> tuple[jax.Array, ...]:
        return gpu.sum_chunks(terms(*arrays))

    if positions.split_by_jit:
        return at_once(*arrays)
    sums: tuple[jax.Array, ...] = lax.platform_dependent(
        *arrays, cpu=in_parts, cuda=in_chunks, rocm=in_chunks, default=at_once
    )
    return sums
