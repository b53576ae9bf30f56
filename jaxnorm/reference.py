"""The formula as one would write it: plain JAX on the N-d array, differentiable by JAX itself, in every mode.

It serves what the fused implementations do not (where, axis_name, forward mode), and it is what they are
differentiated by at second order.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import scaling
from jaxnorm.arguments import Activation, AxisName


def moments(
    x: jax.Array,
    axes: tuple[int, ...],
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of x.

    Args:
      x: float array.
      axes: the axes to reduce.
      where: bool, broadcastable to x; the positions that count.
      axis_name: mapped axis over which the positions of one instance are spread.
      axis_index_groups: groups of indices of that axis which share their instances.

    Returns:
      mean and variance, with the axes kept at size 1, in at least float32.
    """
    center, scale, delta, variance = _moments(x, axes, where, axis_name, axis_index_groups)
    return center + delta / scale, variance / scale / scale


def _moments(
    x: jax.Array, axes: tuple[int, ...], where: jax.Array | None, axis_name: AxisName | None, axis_index_groups: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Center, the scale of what follows (see jaxnorm.scaling), delta and variance.

    Corrected two-pass algorithm (Chan, Golub, LeVeque 1983): the mean of the deviations from the rounded mean is
    what rounding took from it. It travels as center + delta, because their sum would be rounded again.
    """

    def total(values: jax.Array) -> jax.Array:
        values = jnp.sum(values, axis=axes, keepdims=True, where=where)
        return values if axis_name is None else lax.psum(values, axis_name, axis_index_groups=axis_index_groups)

    def largest(values: jax.Array) -> jax.Array:
        values = jnp.max(jnp.abs(values), axis=axes, keepdims=True, where=where, initial=0)
        return values if axis_name is None else lax.pmax(values, axis_name, axis_index_groups=axis_index_groups)

    x = x.astype(statistics_dtype(x.dtype))
    count = (
        total(jnp.ones_like(x)) if where is not None or axis_name is not None else math.prod(x.shape[a] for a in axes)
    )
    # y does not depend on the center in exact arithmetic, so neither do its derivatives. Divided before they are
    # added: the sum of large numbers would overflow.
    center = lax.stop_gradient(total(x / count))
    scale = scaling.of_deviation(largest(lax.stop_gradient(x) / 2 - center / 2))
    deviation = x * scale - center * scale
    delta = total(deviation) / count
    deviation = deviation - delta
    if where is not None:
        # Before the square, so that a NaN in a position that does not count stays out of the gradient too.
        deviation = jnp.where(where, deviation, 0)
    return center, scale, delta, total(jnp.square(deviation)) / count


def normalize(
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    residual: jax.Array | None,
    *,
    axes: tuple[int, ...],
    eps: float,
    activation: Activation | None,
    where: jax.Array | None = None,
    given: tuple[jax.Array, Any, Any] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
) -> tuple[jax.Array, tuple[jax.Array, Any, Any]]:
    """activation((x - mean) / sqrt(var + eps) * gamma + beta + residual), in the dtype of x; and the statistics.

    Args:
      x: float array.
      gamma, beta: None or broadcastable to x.
      residual: None or like x.
      axes: the spatial axes.
      given: None, or center, delta and rstd to take instead of those of x, broadcastable to x.
      eps, activation, where, axis_name, axis_index_groups: as in jaxnorm.instance_norm.
    """
    dtype = x.dtype
    # Converted once, so that the gradient of a narrow x is summed before it is rounded.
    x = x.astype(statistics_dtype(dtype))
    broken = None
    if where is not None:
        # A NaN in a position that does not count has no part in the gradient of rsqrt(variance + eps) either.
        broken = ~(jnp.broadcast_to(where, x.shape) | jnp.isfinite(x))
        x = jnp.where(broken, 0, x)
    if given is None:
        center, scale, delta, variance = _moments(x, axes, where, axis_name, axis_index_groups)
        variance = variance + (eps * scale) * scale
        # A constant instance of large numbers, beside which eps vanishes, is normalized to 0 by any rstd.
        rstd = lax.rsqrt(jnp.where(variance < jnp.finfo(x.dtype).tiny, 1, variance))
        z = ((x * scale - center * scale) - delta) * rstd
        delta, rstd = delta / scale, rstd * scale
    else:
        center, delta, rstd = given
        z = ((x - center) - delta) * rstd
    if gamma is not None:
        z = z * gamma.astype(z.dtype)
    if beta is not None:
        z = z + beta.astype(z.dtype)
    if residual is not None:
        z = z + residual.astype(z.dtype)
    if activation is not None:
        z = activation(z)
    if broken is not None:
        z = jnp.where(broken, jnp.nan, z)
    return z.astype(dtype), (center, delta, rstd)


def statistics_dtype(dtype: Any) -> Any:
    """Statistics, saved values and parameter gradients are computed in at least float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
