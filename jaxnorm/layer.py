"""What the Flax layers, linen and NNX, have in common: Flax's axes, dtypes and masks, and a call of instance_norm."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype

from jaxnorm import arguments
from jaxnorm.arguments import Axes
from jaxnorm.functional import instance_norm
from jaxnorm.reference import statistics_dtype


def channel_axes(shape: tuple[int, ...], feature_axes: Axes) -> tuple[int, ...]:
    """The axes of the channels, sorted. Flax takes one axis named twice, such as (-1, 3), as named once."""
    rank = len(shape)
    axes = tuple(feature_axes) if isinstance(feature_axes, Iterable) else (feature_axes,)
    once = {axis % rank if isinstance(axis, Integral) and -rank <= axis < rank else axis for axis in axes}
    return arguments.check_channel_axes(shape, tuple(once), "feature_axes")


def normalize(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: float,
    dtype: Dtype | None,
    mask: Any,
    residual: Any,
    **options: Any,
) -> jax.Array:
    """instance_norm with Flax's arguments.

    Args:
      x: any real dtype; integers are converted.
      scale, bias: None, or of the shape of the channel axes.
      epsilon: added to the variance.
      dtype: of the result; None infers it from x, scale and bias.
      mask: None, or an array broadcastable to x, nonzero at the positions that count for the statistics.
      residual: None, or an array of the shape of x, of any dtype.
      options: the keywords that Flax does not change.
    """
    dtype = canonicalize_dtype(x, scale, bias, dtype=dtype)
    # Never narrower than the input: the statistics see what came in, the result is rounded once, at the end.
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    x = x.astype(jnp.promote_types(x.dtype if floating else jnp.float32, dtype))
    y = instance_norm(
        x,
        scale,
        bias,
        arguments.check_eps(epsilon, statistics_dtype(x.dtype), "epsilon"),
        where=None if mask is None else arguments.check_where(jnp.asarray(mask, bool), x.shape, "mask"),
        residual=None if residual is None else jnp.asarray(residual, x.dtype),
        **options,
    )
    return y.astype(dtype)
