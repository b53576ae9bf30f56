"""Powers of two that keep the squares of very large numbers finite.

The square of a number beyond 1.8e19 overflows in float32. So the deviations of an instance of large numbers are scaled
by a power of two before they are squared, which is exact; ordinary data are scaled by 1, and nothing changes for them.
"""

import jax
import jax.numpy as jnp
from jax import lax


def of(center: jax.Array, ordinary: float = 1) -> jax.Array:
    """The scale of instances with these centers: a power of two far below 1, or that of ordinary data.

    It costs no pass. Two values are enough. In float32, with 2^128 the end of the range: centers up to 2^48 have
    deviations up to 2^49 (those of data beyond it overflow, see undo), whose squares leave room for the sum of 2^30.
    Beyond, with 2^-80, even deviations of 2^128 leave as much; and the last digit of the center, 2^24, is still squared
    to a normal number.

    Args:
      center: of any shape.
      ordinary: at most 1; not a power of two where deviations may be rounded once more.
    """
    exponents = jnp.finfo(center.dtype).maxexp
    scale = 2.0 ** -(exponents * 5 // 8)
    # Of scalars, not arrays of ones: kernels evaluate it too.
    small, other = (jnp.asarray(value, center.dtype) for value in (scale, ordinary))
    return jnp.where(jnp.abs(center) > _large(center), small, other)


def of_deviation(half: jax.Array) -> jax.Array:
    """The scale of instances whose largest deviation is twice this: that becomes a number near 1, where it is large."""
    _, exponent = jnp.frexp(half)
    # The scale itself must be a normal number.
    exponent = jnp.minimum(exponent, jnp.finfo(half.dtype).maxexp * 3 // 4)
    return jnp.where(half > _large(half), jnp.ldexp(jnp.ones_like(half), -exponent), 1)


def _large(value: jax.Array) -> float:
    maxexp: int = jnp.finfo(value.dtype).maxexp
    return 2.0 ** (maxexp * 3 // 8)


def undo(delta: jax.Array, variance: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """delta and 1 / sqrt(variance + eps), of numbers, from delta and variance of the scaled ones.

    Where the squares overflow all the same the variance is infinite, and rstd is 0: with a delta of 0 every finite
    number is normalized to 0. NaN stays NaN.
    """
    # At least a normal number, since eps may vanish beside a large offset: a constant instance gives 0.
    floor = jnp.finfo(variance.dtype).tiny
    return delta / scale, scale * lax.rsqrt(jnp.maximum(variance + (eps * scale) * scale, floor))
