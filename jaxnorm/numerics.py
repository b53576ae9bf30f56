"""The provisional center of the one-pass statistics, and the powers of two that keep squares finite.

The variance of an instance is taken in one pass around a center c near its mean: with d = x - c it is
mean(d^2) - mean(d)^2. What cancels is mean(d)^2 = (mean - c)^2, so the center must be near: see provisional_center.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.platforms import Platform

# The rounding errors of the variance, relative to variance + eps, that an eps at the limit of least_eps allows.
_EPS_DIGITS = 2.0**-20


def provisional_center(platform: Platform, slab: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A number near the mean of each instance: the mean of its slab (Platform.slab).

    The mean of any subset that holds a share f of an instance obeys (center - mean)^2 <= variance * (1 - f) / f, by
    Cauchy-Schwarz on the subset's indicator, whatever the data. So mean(d^2) <= variance / f, and the rounding error of
    the variance grows by at most 1 / f: 16 for f = 1/16, about 1e-6 relative in float32. The slabs of all devices
    that share an instance are such a subset, too.
    """
    # The sum is taken around the first position, since the sum of plain values at a large offset would be rounded by
    # more than their spread.
    center = first = _first(platform, platform.first(slab), dtype)
    number = platform.count(slab)
    if not isinstance(number, int) or number > 1:
        # We divide before we add, since the sum of large numbers would overflow.
        origin, share = platform.spread(first), 1 / number
        mean = platform.sum_one(lambda x: (x.astype(dtype) - origin) * share, slab)
        center = first + platform.group_sum(mean)
    return _finite(platform.add_up(center / platform.devices))


def masked_center(
    platform: Platform, x: jax.Array, where: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """The mean of the positions that count, and their number.

    It is the mean of all of them, since no share of what a mask counts is known to lie in a slab.
    """
    first = _first(platform, jnp.where(platform.first(where), platform.first(x), 0), dtype)
    # We divide before we add, by how many may count, since the sum of large numbers would overflow.
    most = platform.count(x)

    def terms(x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        deviation = (x.astype(dtype) - platform.spread(first)) / most
        return jnp.where(where, deviation, 0), where.astype(dtype)

    total, own = map(platform.group_sum, platform.sum(terms, x, jnp.broadcast_to(where, x.shape)))
    count = platform.add_up(own)
    return _finite(platform.add_up(total * (most / count) + first * (own / count))), count


def _first(platform: Platform, first: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The first position of each instance, of a group the mean over its channels."""
    return platform.group_sum(first.astype(dtype) / platform.layout.group_size)


def _finite(center: jax.Array) -> jax.Array:
    """The center, or where a difference overflowed, 0: a number that is the same on every device."""
    return jnp.where(jnp.isfinite(center), center, 0)


def overflow_scale(center: jax.Array, positions: Any) -> jax.Array:
    """A power of two for the deviations from the center, before they are squared and added up.

    The square of a number beyond 1.8e19 overflows in float32, and so does the sum of many smaller squares. Two scales
    are enough, and they cost no pass. For ordinary data it is about 1 / sqrt(positions): the sum of the squares is then
    finite wherever the variance is. Centers beyond 2^48 (for float32, whose range ends at 2^128) may have deviations
    up to 2^128, whose squares and their sum are finite with 2^-80; and a deviation of the last digit of such a center,
    2^24, is still squared to a normal number.

    Args:
      center: per instance.
      positions: the positions of an instance, an integer or a symbolic size.
    """
    exponents = jnp.finfo(center.dtype).maxexp
    if isinstance(positions, int):
        ordinary: Any = 2.0 ** -((positions.bit_length() + 1) // 2)
    else:
        ordinary = jnp.exp2(-jnp.ceil(jnp.log2(jnp.asarray(positions, center.dtype)) / 2))
    # Scalars rather than arrays of ones, since kernels evaluate this, too.
    small, other = (jnp.asarray(value, center.dtype) for value in (2.0 ** -(exponents * 5 // 8), ordinary))
    return jnp.where(jnp.abs(center) > _large(center), small, other)


def deviation_scale(half: jax.Array) -> jax.Array:
    """The scale of instances whose largest deviation is twice `half`: where that is large, it becomes about 1."""
    _, exponent = jnp.frexp(half)
    # The scale itself must be a normal number.
    exponent = jnp.minimum(exponent, jnp.finfo(half.dtype).maxexp * 3 // 4)
    return jnp.where(half > _large(half), jnp.ldexp(jnp.ones_like(half), -exponent), 1)


def _large(value: jax.Array) -> float:
    maxexp: int = jnp.finfo(value.dtype).maxexp
    return 2.0 ** (maxexp * 3 // 8)


def unscaled(
    delta: jax.Array, variance: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """delta, 1 / sqrt(variance + eps) and the variance, from delta and variance of scaled numbers.

    Where the squares overflow even so, the variance is infinite and rstd is 0: with a delta of 0 every finite number is
    normalized to 0. NaN stays NaN.
    """
    # The sum is kept at a normal number at least, since eps may vanish beside a large offset: a constant instance
    # then gives 0.
    floor = jnp.finfo(variance.dtype).tiny
    rstd = scale * lax.rsqrt(jnp.maximum(variance + (eps * scale) * scale, floor))
    return delta / scale, rstd, unscaled_variance(variance, scale)


def unscaled_variance(variance: jax.Array, scale: jax.Array) -> jax.Array:
    """The variance of numbers from that of scaled ones."""
    # By two products, since XLA makes one quotient of two, by a square of the scale that may be too small.
    inverse = 1 / scale
    return (variance * inverse) * inverse


def least_eps(positions: Any, dtype: jax.typing.DTypeLike) -> float:
    """The smallest eps of instances of so many positions.

    The squares of scaled deviations (overflow_scale) that are smaller than the smallest normal number are lost, up to
    that number for each position. That must be nothing beside eps, scaled likewise.
    """
    tiny = float(jnp.finfo(dtype).tiny)
    return tiny / _EPS_DIGITS * (4 * positions if isinstance(positions, int) else 1)
