"""Instance norm in plain JAX: the formulas of the forward and the backward pass, for any device and any shape.

Both work on the views that a Platform makes of the arrays (jaxnorm.platforms): per-instance values are spread over a
view, and sums over the positions of an instance are the platform's. Where the positions are spread over devices
(axis_name), every device works on its own view, and only sums of (N, C) numbers are exchanged.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import numerics
from jaxnorm.arguments import Activation
from jaxnorm.call import Gradients, Operands, Statistics
from jaxnorm.platforms import Platform


def forward(
    platform: Platform, operands: Operands, *, eps: float, activation: Activation | None
) -> tuple[jax.Array, Statistics]:
    """Normalizes, scales, shifts, adds the residual and applies the activation.

    Args:
      platform: that computes.
      operands: the arrays.
      eps: added to the variance.
      activation: None, or a pointwise function.

    Returns:
      y like x, and the statistics.
    """
    x, gamma, beta, residual, where, center = views(platform, operands)
    if center is None:
        statistics = _statistics(platform, x, where, platform.slab(operands.x), gamma.dtype, eps)
    else:
        one = jnp.ones_like(center)
        statistics = Statistics(center, jnp.zeros_like(center), one, one, one * platform.count(x))
    z = _affine(platform, _deviation(platform, x, statistics), statistics, gamma, beta)
    y = _activated(z, residual, activation).astype(x.dtype)
    # Without an activation users compute their own, which is to be fused.
    y = platform.array(y, final=activation is not None)
    return y, jax.tree.map(platform.instances, statistics)


def backward(
    platform: Platform, operands: Operands, statistics: Statistics, dy: jax.Array, *, activation: Activation | None
) -> Gradients:
    """The gradients of forward, for the cotangent dy of y.

    With xhat = (x - mean) * rstd and dz the cotangent before the activation (Ioffe, Szegedy 2015, per instance):

        dbeta = sum dz        dgamma = sum dz * xhat        dx = gamma * rstd * (dz - (dbeta + xhat * dgamma) / M)

    The fraction is what reaches x through its statistics. It is absent where they are given, and with a mask it is
    there only at the positions that count, M being their number. With groups it is the mean over the group of
    gamma * dz and of gamma * dz * xhat.

    Args:
      platform, activation: as in forward.
      operands: of forward; residual is None where the gradients do not depend on it.
      statistics: of forward.
      dy: like x.

    Returns:
      Gradients, x-sized ones in the dtype of x. With axis_name, dgamma and dbeta are the terms of this device: their
      sum over the axis is left to the transpose of gamma and beta.
    """
    x, gamma, beta, residual, where, center = views(platform, operands)
    x, statistics = platform.apart((x, jax.tree.map(platform.view_instances, statistics)))
    dy = platform.view(dy)

    def deviation_of(x: jax.Array, statistics: Statistics) -> jax.Array:
        deviation = _deviation(platform, x, statistics)
        # With a mask, what is not finite does not count and has no part in any gradient; or it does count, and all
        # statistics of its instance are NaN.
        return deviation if where is None else jnp.where(jnp.isfinite(x), deviation, 0)

    def cotangent(
        statistics: Statistics,
        activation: Activation | None,
        x: jax.Array,
        dy: jax.Array,
        residual: jax.Array | None,
    ) -> jax.Array:
        dz = dy.astype(gamma.dtype)
        if activation is not None:
            z = _affine(platform, _deviation(platform, x, statistics), statistics, gamma, beta)
            dz = jax.vjp(lambda z: _activated(z, residual, activation), z)[1](dz)[0]
        return dz if where is None else jnp.where(jnp.isfinite(x), dz, 0)

    arrays, pending = (x, dy, residual), activation
    if platform.keeps_cotangent:
        dz = dy if activation is None else cotangent(statistics, activation, *arrays)
        arrays, pending = (x, platform.materialize(dz), None), None

    def terms(x: jax.Array, dy: jax.Array, residual: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        dz = cotangent(statistics, pending, x, dy, residual)
        xhat = (deviation_of(x, statistics) - platform.spread(statistics.delta)) * platform.spread(statistics.rstd)
        return dz, dz * xhat

    dbeta, dgamma = platform.sum(terms, *arrays)
    # The barrier keeps two passes two. XLA may write to memory what they share, such as the mask of a ReLU, so the
    # second one computes it again from statistics that it cannot know to be the same; and it may fuse the sums with the
    # second pass, or with the sum over the batch that follows.
    center_again, delta, rstd, dbeta, dgamma = lax.optimization_barrier((*statistics[:3], dbeta, dgamma))
    again = statistics._replace(center=center_again, delta=delta, rstd=rstd)
    dz = cotangent(again, pending, *arrays)
    factor = again.rstd * gamma
    dx = platform.spread(factor) * dz
    if center is None:
        mean_dz, mean_dz_xhat = (
            again.rstd / again.counted * platform.group_sum(gamma * total) for total in platform.add_up((dbeta, dgamma))
        )
        through_statistics = _affine(platform, deviation_of(x, again), again, mean_dz_xhat, mean_dz)
        dx = dx - (through_statistics if where is None else jnp.where(where, through_statistics, 0))
    return Gradients(
        platform.array(dx.astype(x.dtype), final=True),
        platform.instances(dgamma),
        platform.instances(dbeta),
        platform.array(dz.astype(x.dtype), final=True) if residual is not None else None,
    )


def views(platform: Platform, operands: Operands) -> Operands:
    """The operands as views of a platform."""
    x, gamma, beta, residual, where, center = operands
    return Operands(
        platform.view(x),
        platform.view_instances(gamma),
        platform.view_instances(beta),
        None if residual is None else platform.view(residual),
        None if where is None else platform.view_mask(where),
        None if center is None else platform.view_instances(center),
    )


def _deviation(platform: Platform, x: jax.Array, statistics: Statistics) -> jax.Array:
    """x - center: exact or nearly so at any offset of the data, unlike x - mean, since the mean is rounded."""
    return x.astype(statistics.center.dtype) - platform.spread(statistics.center)


def _affine(
    platform: Platform, deviation: jax.Array, statistics: Statistics, gamma: jax.Array, beta: jax.Array
) -> jax.Array:
    """xhat * gamma + beta = deviation * factor + shift, a multiply-add per position.

    Little cancels between the two, since delta is at most 4 standard deviations (numerics.provisional_center).
    """
    factor = statistics.rstd * gamma
    shift = beta - statistics.delta * factor
    return deviation * platform.spread(factor) + platform.spread(shift)


def _activated(z: jax.Array, residual: jax.Array | None, activation: Activation | None) -> jax.Array:
    if residual is not None:
        z = z + residual.astype(z.dtype)
    return z if activation is None else activation(z)


def _statistics(
    platform: Platform,
    x: jax.Array,
    where: jax.Array | None,
    slab: jax.Array,
    dtype: jax.typing.DTypeLike,
    eps: float,
) -> Statistics:
    """Mean and variance of every instance, from one pass around a provisional center."""
    positions = platform.count(x) * platform.devices
    count: Any = positions
    if where is None:
        center = numerics.provisional_center(platform, slab, dtype)
    else:
        center, count = numerics.masked_center(platform, x, where, dtype)
    # The barrier makes the pass below read these numbers, and not compute them again at every position.
    center, scale = lax.optimization_barrier((center, numerics.overflow_scale(center, positions)))

    def terms(x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        deviation = (x.astype(dtype) - platform.spread(center)) * platform.spread(scale)
        if where is not None:
            deviation = jnp.where(where, deviation, 0)
        return deviation, jnp.square(deviation)

    mask = None if where is None else jnp.broadcast_to(where, x.shape)
    total, squares = map(platform.group_sum, platform.add_up(platform.sum(terms, x, mask)))
    delta = total / count
    # Where the squares overflow the variance is infinite, also where that of delta does. It is not negative, since
    # delta is at most 4 standard deviations (numerics.provisional_center).
    variance = squares / count - jnp.minimum(jnp.square(delta), jnp.finfo(dtype).max)
    delta, rstd, variance = numerics.unscaled(delta, variance, scale, eps)
    # Otherwise a CPU computes the root again at every position.
    delta, rstd = platform.materialize((delta, rstd))
    counted = jnp.broadcast_to(jnp.asarray(count, dtype), center.shape)
    return Statistics(center, delta, rstd, variance, counted)
