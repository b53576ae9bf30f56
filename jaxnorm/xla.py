"""Instance norm in plain JAX, tuned for what XLA makes of it: any device, any shape.

Works on the canonical view (B, R, K), with one instance per (b, k):

    channels-last  (N, *spatial, C): B = N,     R = spatial positions, K = C
    channels-first (N, C, *spatial): B = N * C, R = spatial positions, K = 1

Per-instance values (gamma, beta, the statistics) are (B, 1, K), in the dtype of the statistics.

The positions of an instance may be spread over devices in two ways. Over a mapped axis (axis_name), every device works
on its own view, and only sums of size (B, 1, K) travel. By jit over a mesh nobody knows here which axes are split:
then the arrays stay N-d (Positions.split_by_jit), and are neither merged nor sliced along an axis, which would move
them between devices; XLA adds the same small sums.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.arguments import Activation, AxisName

# The share of an instance whose mean serves as the provisional center. A smaller share reads less and cancels more.
_CENTER_SHARE = 16
# Rows per partial sum on a GPU. XLA for GPU fuses a column reduction of up to 64 rows with the broadcast that
# feeds it; from 128 rows it splits the reduction itself and writes x-sized temporaries first. Fewer rows cost
# more partial sums. Beyond 256 lanes it fuses no more than 32 rows of a half-precision backward pass.
_CHUNK, _CHUNK_OF_WIDE_ROWS, _WIDE = 64, 32, 256
# Parts of the rows that are added element by element on a CPU.
_PARTS = 16


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

    def count(self, x: jax.Array) -> int:
        return math.prod(x.shape[axis] for axis in self.axes) * self.devices

    @property
    def devices(self) -> int:
        """That share an instance over the mapped axis."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def add_up[Values: (jax.Array, tuple[jax.Array, ...])](self, values: Values) -> Values:
        """Over the mapped axis."""
        return values if self.axis_name is None else lax.psum(values, self.axis_name)


class Statistics(NamedTuple):
    """What the backward pass needs to know of an instance, each (B, 1, K): mean = center + delta."""

    center: jax.Array
    delta: jax.Array
    rstd: jax.Array


class Gradients(NamedTuple):
    """dgamma and dbeta are per instance; residual is None where the forward pass had none to differentiate."""

    x: jax.Array
    gamma: jax.Array
    beta: jax.Array
    residual: jax.Array | None


def forward(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: Activation | None,
    positions: Positions,
) -> tuple[jax.Array, Statistics]:
    """Normalizes, scales, shifts, adds the residual and applies the activation.

    Args:
      x: (B, R, K), float16, bfloat16, float32 or float64.
      gamma, beta: (B, 1, K), in the dtype of the statistics (at least float32).
      residual: None or like x.
      eps: added to the variance.
      activation: None or an elementwise function.
      positions: those of an instance.

    Returns:
      y like x, and the statistics.
    """
    statistics = _statistics(x, gamma.dtype, eps, positions)
    z = _normalized(x, statistics) * gamma + beta
    if residual is not None:
        z = z + residual.astype(z.dtype)
    if activation is not None:
        z = activation(z)
    return z.astype(x.dtype), statistics


def backward(
    x: jax.Array,
    statistics: Statistics,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
    *,
    activation: Activation | None,
    positions: Positions,
) -> Gradients:
    """The gradients of forward, for the cotangent dy of y.

    With xhat = (x - mean) * rstd and dz the cotangent before the activation (Ioffe, Szegedy 2015, per instance):

        dbeta = sum dz        dgamma = sum dz * xhat        dx = gamma * rstd * (dz - (dbeta + xhat * dgamma) / R)

    Args:
      x, gamma, beta: as in forward.
      statistics: of forward.
      residual: as in forward where the activation needs it, else None.
      dy: like x.
      activation, positions: as in forward.

    Returns:
      Gradients, x-sized ones in the dtype of x, per-instance ones in the dtype of the statistics. Over a mapped axis
      dgamma and dbeta are the terms of this device: their sum over the axis is left to the transpose of gamma and beta.
    """

    def before_the_affine(
        statistics: Statistics, x: jax.Array, dy: jax.Array, residual: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        xhat = _normalized(x, statistics)
        dz = dy.astype(xhat.dtype)
        if activation is not None:
            z = xhat * gamma + beta
            if residual is not None:
                z = z + residual.astype(z.dtype)
            _, pullback = jax.vjp(activation, z)
            (dz,) = pullback(dz)
        return xhat, dz

    def terms(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        xhat, dz = before_the_affine(statistics, *arrays)
        return dz, dz * xhat

    dbeta, dgamma = _sum(terms, (x, dy, residual), positions)
    # The barrier keeps two passes two. What they share XLA may write to memory, such as the mask of a relu, so that it
    # is computed again; and the sums it may fuse into the second pass, or into the sum over the batch that follows.
    again, dbeta, dgamma = lax.optimization_barrier((statistics, dbeta, dgamma))
    xhat, dz = before_the_affine(again, x, dy, residual)
    sum_dz, sum_dz_xhat = positions.add_up((dbeta, dgamma))
    dx = (gamma * again.rstd) * (dz - (sum_dz + xhat * sum_dz_xhat) / positions.count(x))
    dresidual = None if residual is None else dz.astype(residual.dtype)
    return Gradients(dx.astype(x.dtype), dgamma, dbeta, dresidual)


def _normalized(x: jax.Array, statistics: Statistics) -> jax.Array:
    # In this order: x - center is exact or nearly so at any offset, x - (center + delta) is not.
    return ((x.astype(statistics.center.dtype) - statistics.center) - statistics.delta) * statistics.rstd


def _statistics(x: jax.Array, dtype: jax.typing.DTypeLike, eps: float, positions: Positions) -> Statistics:
    """Mean and variance from one pass around a provisional center."""
    count = positions.count(x)
    # Materialized, so that the pass below reads it and does not compute it again.
    center = lax.optimization_barrier(_provisional_center(x, dtype, positions))

    def terms(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        deviation = x.astype(dtype) - center
        return deviation, jnp.square(deviation)

    total, squares = positions.add_up(_sum(terms, (x,), positions))
    delta = total / count
    variance = jnp.maximum(squares / count - jnp.square(delta), 0)
    return Statistics(center, delta, lax.rsqrt(variance + eps))


def _provisional_center(x: jax.Array, dtype: jax.typing.DTypeLike, positions: Positions) -> jax.Array:
    """A number near the mean: the mean of the first rows.

    The variance is then mean(d^2) - mean(d)^2 with d = x - center, and what cancels is mean(d)^2. The mean of any
    subset that holds a share f of the instance obeys (center - mean)^2 <= variance / f (Cauchy-Schwarz on the
    subset's indicator), whatever the data. So mean(d^2) <= (1 + 1/f) variance, and the rounding error of the
    variance grows by at most 1 + 1/f: 17 for f = 1/16, about 1e-6 relative in float32. The first rows of every device
    are such a subset too. Where jit may split the rows, it is all of them.
    """
    share = 1 if positions.split_by_jit else _CENTER_SHARE
    first_axis = positions.axes[0]
    rows = lax.slice_in_dim(x, 0, -(-x.shape[first_axis] // share), axis=first_axis)
    # Around the first position: a sum of the plain values would round by more than the spread at a large offset.
    first = x
    for axis in positions.axes:
        first = lax.slice_in_dim(first, 0, 1, axis=axis)
    first = first.astype(dtype)
    (total,) = _sum(lambda rows: (rows.astype(dtype) - first,), (rows,), positions)
    center = first + total / math.prod(rows.shape[axis] for axis in positions.axes)
    return positions.add_up(center / positions.devices)


def _sum(
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
        return _sum_parts(terms, *arrays)

    def in_chunks(*arrays: Any) -> tuple[jax.Array, ...]:
        return _sum_chunks(terms(*arrays))

    if positions.split_by_jit:
        return at_once(*arrays)
    sums: tuple[jax.Array, ...] = lax.platform_dependent(
        *arrays, cpu=in_parts, cuda=in_chunks, rocm=in_chunks, default=at_once
    )
    return sums


def _sum_parts(terms: Callable[..., tuple[jax.Array, ...]], *arrays: Any) -> tuple[jax.Array, ...]:
    """Of views: sixteen equal parts of the rows are added up element by element first, then their rows.

    XLA for CPU writes what it sums to memory before it sums it, except for sums of the plain input. Here it computes
    the terms of all parts in one loop and writes a sixteenth. The parts are cut from the arrays, not from the terms:
    cut from the terms, all are computed before.
    """

    def of_rows(start: int, stop: int) -> tuple[jax.Array, ...]:
        rows = jax.tree.map(lambda array: lax.slice_in_dim(array, start, stop, axis=1), arrays)
        return terms(*rows)

    def add(*terms: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(functools.reduce(jnp.add, same) for same in zip(*terms, strict=True))

    def total(terms: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jnp.sum(term, axis=1, keepdims=True) for term in terms)

    count = arrays[0].shape[1]
    part = count // _PARTS
    rest = total(of_rows(part * _PARTS, count))
    if part == 0:
        return rest
    added = lax.optimization_barrier(add(*(of_rows(i * part, (i + 1) * part) for i in range(_PARTS))))
    return add(total(added), rest) if count % _PARTS else total(added)


def _sum_chunks(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Of views: chunks of rows first, all sums in one reduction, then the partial sums.

    Reduced in one step, a channels-last array makes XLA for GPU write x-sized float32 temporaries. The barrier keeps
    the two steps from being merged again.
    """
    partial = lax.optimization_barrier(_sum_together(tuple(map(_chunked, values)), axis=2))
    return tuple(value[:, None] for value in _sum_together(partial, axis=1))


def _chunked(value: jax.Array) -> jax.Array:
    """(B, R, K) to (B, chunks, chunk, K), filled up with zeros."""
    batch, rows, lanes = value.shape
    chunk = _CHUNK if lanes <= _WIDE else _CHUNK_OF_WIDE_ROWS
    chunks = -(-rows // chunk)
    padding = ((0, 0), (0, chunks * chunk - rows), (0, 0))
    return jnp.pad(value, padding).reshape(batch, chunks, chunk, lanes)


def _sum_together(values: tuple[jax.Array, ...], *, axis: int) -> tuple[jax.Array, ...]:
    zeros = tuple(jnp.zeros((), value.dtype) for value in values)
    sums: tuple[jax.Array, ...] = lax.reduce(
        values, zeros, lambda p, q: tuple(a + b for a, b in zip(p, q, strict=True)), (axis,)
    )
    return sums
