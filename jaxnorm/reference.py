"""The formula as one would write it: plain JAX on the N-d array, differentiable by JAX itself, in every mode.

The fused implementations are differentiated by it from the second order on, and it computes what they do not: forward
mode, axis_index_groups, and an axis_name that is not of shard_map.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import numerics
from jaxnorm.arguments import Activation, AxisName
from jaxnorm.call import Statistics
from jaxnorm.layout import Layout


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
    center, scale, delta, variance, _ = _moments(x, axes, where, axis_name, axis_index_groups)
    return center + delta / scale, numerics.unscaled_variance(variance, scale)


def _moments(
    x: jax.Array, axes: tuple[int, ...], where: jax.Array | None, axis_name: AxisName | None, axis_index_groups: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Any]:
    """Center, the scale of what follows (numerics.deviation_scale), delta, variance, and how many positions count.

    This is the corrected two-pass algorithm (Chan, Golub, LeVeque 1983): the mean of the deviations from the rounded
    mean is what rounding took from it. It stays in two parts, center + delta, since their sum would be rounded again.
    """

    def total(values: jax.Array) -> jax.Array:
        values = jnp.sum(values, axis=axes, keepdims=True, where=where)
        return values if axis_name is None else lax.psum(values, axis_name, axis_index_groups=axis_index_groups)

    def largest(values: jax.Array) -> jax.Array:
        values = jnp.abs(values) if where is None else jnp.where(where, jnp.abs(values), 0)
        values = jnp.max(values, axis=axes, keepdims=True)
        return values if axis_name is None else lax.pmax(values, axis_name, axis_index_groups=axis_index_groups)

    x = x.astype(statistics_dtype(x.dtype))
    count = (
        total(jnp.ones_like(x)) if where is not None or axis_name is not None else math.prod(x.shape[a] for a in axes)
    )
    # y does not depend on the center in exact arithmetic, so neither do its derivatives. Divided before they are
    # added: the sum of large numbers would overflow.
    center = lax.stop_gradient(total(x / count))
    scale = numerics.deviation_scale(largest(lax.stop_gradient(x) / 2 - center / 2))
    deviation = x * scale - center * scale
    delta = total(deviation) / count
    deviation = deviation - delta
    if where is not None:
        # Before the square, so that a NaN in a position that does not count stays out of the gradient too.
        deviation = jnp.where(where, deviation, 0)
    return center, scale, delta, total(jnp.square(deviation)) / count, count


def normalize(
    layout: Layout,
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: Activation | None,
    where: jax.Array | None = None,
    given: tuple[jax.Array, Any, Any] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
) -> tuple[jax.Array, Statistics]:
    """activation((x - mean) / sqrt(var + eps) * gamma + beta + residual), in the dtype of x; and the statistics.

    Args:
      layout: of x.
      x: float array.
      gamma, beta: None, or of shape (*channels) or (N, *channels).
      residual: None or like x.
      given: None, or the mean, the variance and rstd to take instead of those of x: numbers, or shaped like gamma.
      where: None, or a mask of the rank of x.
      eps, activation, axis_name, axis_index_groups: as in jaxnorm.instance_norm.
    """
    # Groups are instances of a layout whose channels are split into groups and, as one more spatial axis, their rest.
    by_groups = layout.by_groups if layout.group_size > 1 else lambda value: value
    axes = layout.split.spatial_axes if layout.group_size > 1 else layout.spatial_axes
    shape, dtype = x.shape, x.dtype
    # Converted once, so that the gradient of a narrow x is summed before it is rounded.
    x = by_groups(x.astype(statistics_dtype(dtype)))

    def spread(value: Any) -> jax.Array:
        value = jnp.asarray(value, x.dtype)
        return by_groups(layout.expand(value)) if value.ndim else value

    broken = None
    if where is not None:
        # A NaN in a position that does not count has no part in the gradient of rsqrt(variance + eps) either.
        where = by_groups(where)
        broken = ~(jnp.broadcast_to(where, x.shape) | jnp.isfinite(x))
        x = jnp.where(broken, 0, x)
    if given is None:
        center, scale, delta, variance, count = _moments(x, axes, where, axis_name, axis_index_groups)
        padded = variance + (eps * scale) * scale
        # A constant instance of large numbers, beside which eps vanishes, is normalized to 0 by any rstd.
        rstd = lax.rsqrt(jnp.where(padded < jnp.finfo(x.dtype).tiny, 1, padded))
        z = ((x * scale - center * scale) - delta) * rstd
        variance = numerics.unscaled_variance(variance, scale)
        statistics = Statistics(center, delta / scale, rstd * scale, variance, jnp.asarray(count))
    else:
        mean, variance, rstd = map(spread, given)
        z = (x - mean) * rstd
        count = math.prod(x.shape[a] for a in axes)
        statistics = Statistics(mean, jnp.zeros_like(mean), rstd, variance, jnp.asarray(count))
    if gamma is not None:
        z = z * spread(gamma)
    if beta is not None:
        z = z + spread(beta)
    if residual is not None:
        z = z + by_groups(residual).astype(z.dtype)
    if activation is not None:
        z = activation(z)
    if broken is not None:
        z = jnp.where(broken, jnp.nan, z)

    def per_instance(value: jax.Array) -> jax.Array:
        expanded = jax.eval_shape(by_groups, jax.ShapeDtypeStruct(layout.expanded, value.dtype)).shape
        return jnp.broadcast_to(value, expanded).reshape(layout.instances)

    return z.astype(dtype).reshape(shape), Statistics(*map(per_instance, statistics))


def statistics_dtype(dtype: Any) -> Any:
    """Statistics, saved values and parameter gradients are computed in at least float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
