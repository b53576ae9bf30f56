"""Powers of two that keep the squares of very large numbers finite.

The square of a number beyond 1.8e19 overflows in float32. So the deviations of an instance whose center is large are
scaled by a power of two before they are squared, which is exact; ordinary data are scaled by 1, and nothing changes
for them. It costs no pass, since the scale follows from the center.
"""

import jax
import jax.numpy as jnp
from jax import lax


def of(center: jax.Array) -> jax.Array:
    """The scale of instances with these centers: 1, or a power of two below it.

    Two values are enough. In float32, with 2^128 the end of the range: centers up to 2^48 have deviations up to 2^49
    (those of data beyond it overflow, see undo), whose squares leave room for the sum of 2^30. Beyond, with 2^-80,
    even deviations of 2^128 leave as much; and the last digit of the center, 2^24, is still squared to a normal number.
    """
    exponents = jnp.finfo(center.dtype).maxexp
    large, scale = 2.0 ** (exponents * 3 // 8), 2.0 ** -(exponents * 5 // 8)
    return jnp.where(jnp.abs(center) > large, jnp.asarray(scale, center.dtype), jnp.asarray(1, center.dtype))


def rstd_of(variance: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(variance + eps), of numbers of that scale, from their variance."""
    # At least the smallest normal number, since eps may vanish beside a large offset: a constant instance gives 0.
    least = jnp.finfo(variance.dtype).tiny
    return lax.rsqrt(jnp.maximum(variance + (eps * scale) * scale, least))


def undo(
    center: jax.Array, delta: jax.Array, variance: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """center, delta and 1 / sqrt(variance + eps), of numbers, from delta and variance of the scaled ones.

    Where the squares overflow all the same, or the result is less than a normal number, the variance counts as
    infinite: every finite number is normalized to 0. NaN stays NaN.
    """
    rstd = scale * rstd_of(variance, scale, eps)
    vanishes = (variance == jnp.inf) | (rstd < jnp.finfo(rstd.dtype).tiny)
    center, delta, rstd = (jnp.where(vanishes, 0, value) for value in (center, delta / scale, rstd))
    return center, delta, rstd
