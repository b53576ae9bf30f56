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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import sums
from jaxnorm.arguments import Activation


class Statistics(NamedTuple):
    """What the backward pass needs to know of an instance, each (B, 1, K): mean = center + delta."""

    center: jax.Array
    delta: jax.Array
    rstd: jax.Array


class Gradients(NamedTuple):
    """Those of gamma, beta and captures are per instance; residual is None where there was none to differentiate."""

    x: jax.Array
    gamma: jax.Array
    beta: jax.Array
    captures: tuple[jax.Array, ...]
    residual: jax.Array | None


def forward(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: Activation | None,
    positions: sums.Positions,
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
    positions: sums.Positions,
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

    dbeta, dgamma = sums.over_positions(terms, (x, dy, residual), positions)
    # The barrier keeps two passes two. What they share XLA may write to memory, such as the mask of a relu, so that it
    # is computed again; and the sums it may fuse into the second pass, or into the sum over the batch that follows.
    again, dbeta, dgamma = lax.optimization_barrier((statistics, dbeta, dgamma))
    xhat, dz = before_the_affine(again, x, dy, residual)
    sum_dz, sum_dz_xhat = positions.add_up((dbeta, dgamma))
    dx = (gamma * again.rstd) * (dz - (sum_dz + xhat * sum_dz_xhat) / positions.count(x))
    dresidual = None if residual is None else dz.astype(residual.dtype)
    return Gradients(dx.astype(x.dtype), dgamma, dbeta, (), dresidual)


def _normalized(x: jax.Array, statistics: Statistics) -> jax.Array:
    # In this order: x - center is exact or nearly so at any offset, x - (center + delta) is not.
    return ((x.astype(statistics.center.dtype) - statistics.center) - statistics.delta) * statistics.rstd


def _statistics(x: jax.Array, dtype: jax.typing.DTypeLike, eps: float, positions: sums.Positions) -> Statistics:
    """Mean and variance from one pass around a provisional center."""
    count = positions.count(x)
    # Materialized, so that the pass below reads it and does not compute it again.
    center = lax.optimization_barrier(sums.provisional_center(x, dtype, positions))

    def terms(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        deviation = x.astype(dtype) - center
        return deviation, jnp.square(deviation)

    total, squares = positions.add_up(sums.over_positions(terms, (x,), positions))
    delta = total / count
    variance = jnp.maximum(squares / count - jnp.square(delta), 0)
    return Statistics(center, delta, lax.rsqrt(variance + eps))
