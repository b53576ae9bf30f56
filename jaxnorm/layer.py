"""What the Flax layers, linen and NNX, have in common: Flax's axes, dtypes and masks, and running statistics."""

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype
from jax import lax

from jaxnorm import arguments, functional
from jaxnorm.arguments import Axes, AxisName
from jaxnorm.layout import Layout
from jaxnorm.reference import statistics_dtype

# Mean and variance.
Moments = tuple[jax.Array, jax.Array]


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
    running: Moments | None = None,
    **options: Any,
) -> tuple[jax.Array, Moments]:
    """instance_norm with Flax's arguments.

    Args:
      x: any real dtype; integers are converted.
      scale, bias: None, or of the shape of the channel axes.
      epsilon: added to the variance.
      dtype: of the result; None infers it from x, scale and bias.
      mask: None, or an array broadcastable to x, nonzero at the positions that count for the statistics.
      residual: None, or an array of the shape of x, of any dtype.
      running: None, or the mean and variance per channel to normalize with; the mask has no part then.
      options: the keywords that Flax does not change.

    Returns:
      y, and the mean and biased variance of every instance, as constants.
    """
    dtype = canonicalize_dtype(x, scale, bias, dtype=dtype)
    # Never narrower than the input: the statistics see what came in, the result is rounded once, at the end.
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    x = x.astype(jnp.promote_types(x.dtype if floating else jnp.float32, dtype))
    eps = arguments.check_eps(epsilon, statistics_dtype(x.dtype), "epsilon")
    where = None if mask is None else arguments.check_where(jnp.asarray(mask, bool), x.shape, "mask")
    y, statistics = functional.normalize(
        x,
        scale,
        bias,
        eps,
        where=where if running is None else None,
        moments=running,
        residual=None if residual is None else jnp.asarray(residual, x.dtype),
        **options,
    )
    # What was saved for the backward pass is 1 / sqrt(variance + eps).
    variance = jnp.maximum(1 / jnp.square(statistics.rstd) - eps, 0)
    return y.astype(dtype), (statistics.center + statistics.delta, variance)


def check_momentum(momentum: float) -> None:
    """The weight of the new statistics."""
    if not 0 <= momentum <= 1:
        raise ValueError(
            "momentum must lie in [0, 1]: it is the weight of the new statistics, as in PyTorch, and 1 - momentum that "
            f"of the old ones: got {momentum!r}. Flax's momentum of 0.9 is 0.1 here."
        )


def updated(running: Moments, moments: Moments, momentum: float, count: Any) -> Moments:
    """The running statistics after a batch, as torch.nn.InstanceNorm forms them.

    Means and unbiased variances are averaged over the batch; the result is (1 - momentum) * old + momentum * new.

    Args:
      running: mean and variance per channel, of any shape.
      moments: mean and biased variance, (N, *channels).
      momentum: the weight of the batch.
      count: positions of an instance, a number or (N, *channels). A single one has no unbiased variance: 0 counts.
    """
    mean, variance = moments
    unbiased = variance * (count / jnp.maximum(count - 1, 1))

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        return ((1 - momentum) * old + momentum * new.mean(0).reshape(old.shape)).astype(old.dtype)

    return mix(running[0], mean), mix(running[1], unbiased)


def counted(
    shape: tuple[int, ...], axes: tuple[int, ...], mask: Any, axis_name: AxisName | None, axis_index_groups: Any
) -> Any:
    """The positions of an instance that its statistics are taken of, a number or (N, *channels).

    Args:
      shape: of x.
      axes: of the channels.
      mask, axis_name, axis_index_groups: of the call.
    """
    layout = Layout(shape, axes)
    if mask is None:
        count: Any = math.prod(shape[axis] for axis in layout.spatial_axes)
    else:
        where = jnp.broadcast_to(jnp.asarray(mask, bool), shape)
        count = jnp.sum(where, layout.spatial_axes, dtype=jnp.float32)
    return count if axis_name is None else lax.psum(count, axis_name, axis_index_groups=axis_index_groups)
