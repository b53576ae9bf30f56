"""Instance norm in plain JAX, tuned for what XLA makes of it: any device, any shape.

Works on the canonical view (B, R, K), with one instance per (b, k):

    channels-last  (N, *spatial, C): B = N,     R = spatial positions, K = C
    channels-first (N, C, *spatial): B = N * C, R = spatial positions, K = 1

Per-instance values (gamma, beta, the statistics) are (B, 1, K), in the dtype of the statistics.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.arguments import Activation

# The share of an instance whose mean serves as the provisional center. A smaller share reads less and cancels more.
_CENTER_SHARE = 16
# Rows per partial sum on a GPU. XLA for GPU fuses a column reduction of up to 64 rows with the broadcast that
# feeds it; from 128 rows it splits the reduction itself and writes x-sized temporaries first. Fewer rows cost
# more partial sums. Beyond 256 lanes it fuses no more than 32 rows of a half-precision backward pass.
_CHUNK, _CHUNK_OF_WIDE_ROWS, _WIDE = 64, 32, 256


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
) -> tuple[jax.Array, Statistics]:
    """Normalizes, scales, shifts, adds the residual and applies the activation.

    Args:
      x: (B, R, K), float16, bfloat16, float32 or float64.
      gamma, beta: (B, 1, K), in the dtype of the statistics (at least float32).
      residual: None or like x.
      eps: added to the variance.
      activation: None or an elementwise function.

    Returns:
      y like x, and the statistics.
    """
    statistics = _statistics(x, gamma.dtype, eps)
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
) -> Gradients:
    """The gradients of forward, for the cotangent dy of y.

    With xhat = (x - mean) * rstd and dz the cotangent before the activation (Ioffe, Szegedy 2015, per instance):

        dbeta = sum dz        dgamma = sum dz * xhat        dx = gamma * rstd * (dz - (dbeta + xhat * dgamma) / R)

    Args:
      x, gamma, beta: as in forward.
      statistics: of forward.
      residual: as in forward where the activation needs it, else None.
      dy: like x.
      activation: as in forward.

    Returns:
      Gradients, x-sized ones in the dtype of x, per-instance ones in the dtype of the statistics.
    """

    def before_the_affine(statistics: Statistics) -> tuple[jax.Array, jax.Array]:
        xhat = _normalized(x, statistics)
        dz = dy.astype(xhat.dtype)
        if activation is not None:
            z = xhat * gamma + beta
            if residual is not None:
                z = z + residual.astype(z.dtype)
            _, pullback = jax.vjp(activation, z)
            (dz,) = pullback(dz)
        return xhat, dz

    xhat, dz = before_the_affine(statistics)
    dbeta, dgamma = _sum_rows((dz, dz * xhat))
    # The barrier keeps two passes two. What they share XLA may write to memory, such as the mask of a relu, so that it
    # is computed again; and the sums it may fuse into the second pass, or into the sum over the batch that follows.
    statistics, dbeta, dgamma = lax.optimization_barrier((statistics, dbeta, dgamma))
    xhat, dz = before_the_affine(statistics)
    dx = (gamma * statistics.rstd) * (dz - (dbeta + xhat * dgamma) / x.shape[1])
    dresidual = None if residual is None else dz.astype(residual.dtype)
    return Gradients(dx.astype(x.dtype), dgamma, dbeta, dresidual)


def _normalized(x: jax.Array, statistics: Statistics) -> jax.Array:
    # In this order: x - center is exact or nearly so at any offset, x - (center + delta) is not.
    return ((x.astype(statistics.center.dtype) - statistics.center) - statistics.delta) * statistics.rstd


def _statistics(x: jax.Array, dtype: jax.typing.DTypeLike, eps: float) -> Statistics:
    """Mean and variance from one pass around a provisional center."""
    rows = x.shape[1]
    # Materialized, so that the pass below reads it and does not compute it again.
    center = lax.optimization_barrier(_provisional_center(x, dtype))
    deviation = x.astype(dtype) - center
    total, squares = _sum_rows((deviation, jnp.square(deviation)))
    delta = total / rows
    variance = jnp.maximum(squares / rows - jnp.square(delta), 0)
    return Statistics(center, delta, lax.rsqrt(variance + eps))


def _provisional_center(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A number near the mean: the mean of the first rows.

    The variance is then mean(d^2) - mean(d)^2 with d = x - center, and what cancels is mean(d)^2. The mean of any
    subset that holds a share f of the instance obeys (center - mean)^2 <= variance / f (Cauchy-Schwarz on the
    subset's indicator), whatever the data. So mean(d^2) <= (1 + 1/f) variance, and the rounding error of the
    variance grows by at most 1 + 1/f: 17 for f = 1/16, about 1e-6 relative in float32.
    """
    count = -(-x.shape[1] // _CENTER_SHARE)
    # Around the first row: a sum of the plain values would round by more than the spread at a large offset.
    first = x[:, :1].astype(dtype)
    (total,) = _sum_rows((x[:, :count].astype(dtype) - first,))
    return first + total / count


def _sum_rows(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The sums of (B, R, K) arrays over R, each (B, 1, K), in the form that the platform compiles best."""
    sums: tuple[jax.Array, ...] = lax.platform_dependent(
        values, cuda=_sum_rows_chunked, rocm=_sum_rows_chunked, default=_sum_rows_plain
    )
    return sums


def _sum_rows_plain(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.sum(value, axis=1, keepdims=True) for value in values)


def _sum_rows_chunked(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Chunks of rows first, all sums in one reduction, then the partial sums.

    Reduced in one step, a channels-last array makes XLA for GPU write x-sized float32 temporaries. The barrier keeps
    the two steps from being merged again.
    """
    batch, rows, lanes = values[0].shape
    chunk = _CHUNK if lanes <= _WIDE else _CHUNK_OF_WIDE_ROWS
    chunks = -(-rows // chunk)
    padding = ((0, 0), (0, chunks * chunk - rows), (0, 0))
    chunked = tuple(jnp.pad(value, padding).reshape(batch, chunks, chunk, lanes) for value in values)
    partial = lax.optimization_barrier(_sum_together(chunked, axis=2))
    return tuple(value[:, None] for value in _sum_together(partial, axis=1))


def _sum_together(values: tuple[jax.Array, ...], *, axis: int) -> tuple[jax.Array, ...]:
    zeros = tuple(jnp.zeros((), value.dtype) for value in values)
    sums: tuple[jax.Array, ...] = lax.reduce(
        values, zeros, lambda p, q: tuple(a + b for a, b in zip(p, q, strict=True)), (axis,)
    )
    return sums
