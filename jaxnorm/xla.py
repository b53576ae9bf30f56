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
# Instances this small are read whole for their center: they sit in cache anyway.
_SMALL_INSTANCE = 256
# Rows per partial sum on a GPU. XLA for GPU fuses a column reduction of up to 64 rows with the broadcast that
# feeds it; from 128 rows it splits the reduction itself and writes x-sized temporaries first. Fewer rows cost
# more partial sums.
_CHUNK = 64


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
    xhat = _normalized(x, statistics)
    dz = dy.astype(xhat.dtype)
    if activation is not None:
        z = xhat * gamma + beta
        if residual is not None:
            z = z + residual.astype(z.dtype)
        _, pullback = jax.vjp(activation, z)
        (dz,) = pullback(dz)
    dbeta, dgamma = _sum_rows(dz, dz * xhat)
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
    total, squares = _sum_rows(deviation, jnp.square(deviation))
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
    rows = x.shape[1]
    count = rows if rows <= _SMALL_INSTANCE else -(-rows // _CENTER_SHARE)
    subset = x[:, :count].astype(dtype)
    # Around the first row: a sum of the plain values would round by more than the spread at a large offset.
    first = subset[:, :1]
    return first + jnp.mean(subset - first, axis=1, keepdims=True)


def _sum_rows(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums of two (B, R, K) arrays over R, each (B, 1, K), in the form the platform compiles best."""
    sums: tuple[jax.Array, jax.Array] = lax.platform_dependent(
        a, b, cuda=_sum_rows_chunked, rocm=_sum_rows_chunked, default=_sum_rows_plain
    )
    return sums


def _sum_rows_plain(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(a, axis=1, keepdims=True), jnp.sum(b, axis=1, keepdims=True)


def _sum_rows_chunked(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chunks of rows first, both sums in one reduction, then the partial sums.

    Reduced in one step, a channels-last array makes XLA for GPU write x-sized float32 temporaries. The barrier keeps
    the two steps from being merged again.
    """
    batch, rows, lanes = a.shape
    chunks = -(-rows // _CHUNK)
    padding = ((0, 0), (0, chunks * _CHUNK - rows), (0, 0))
    a, b = (jnp.pad(v, padding).reshape(batch, chunks, _CHUNK, lanes) for v in (a, b))
    partial = lax.optimization_barrier(_sum_pair(a, b, axis=2))
    a, b = _sum_pair(*partial, axis=1)
    return a[:, None], b[:, None]


def _sum_pair(a: jax.Array, b: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
    zero = jnp.zeros((), a.dtype)
    a, b = lax.reduce((a, b), (zero, zero), lambda p, q: (p[0] + q[0], p[1] + q[1]), (axis,))
    return a, b
