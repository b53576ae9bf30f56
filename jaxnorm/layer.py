"""What the Flax layers, linen and NNX, have in common: Flax's axes, dtypes and masks, and running statistics."""

import warnings
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype
from jax import lax
from jax.typing import ArrayLike

from jaxnorm import arguments, functional
from jaxnorm.arguments import Activation, Axes, AxisName, Implementation
from jaxnorm.call import Statistics
from jaxnorm.reference import statistics_dtype

# Mean and variance of every channel.
Moments = tuple[jax.Array, jax.Array]
AxisIndexGroups = Sequence[Sequence[int]]


def channel_axes(shape: tuple[int, ...], feature_axes: Axes) -> tuple[int, ...]:
    """The axes of the channels, sorted. Flax accepts an axis that is named twice, such as (-1, 3), so we do too."""
    if isinstance(feature_axes, Iterable):
        rank = len(shape)
        # A value that is no axis of x stays as it is, for the message.
        feature_axes = tuple({axis % rank if axis in range(-rank, rank) else axis for axis in feature_axes})
    return arguments.check_channel_axes(shape, feature_axes, "feature_axes")


def channels_per_group(num_groups: int | None, group_size: int | None, shape: tuple[int, ...]) -> int:
    """The group size of a layer, whose num_groups is 32 unless the user says something else."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "Either num_groups or group_size should be specified. If group_size is to be specified, pass "
            f"num_groups=None to override the default num_groups of 32: got num_groups={arguments.shown(num_groups)} "
            f"and group_size={arguments.shown(group_size)}."
        )
    return arguments.check_groups(num_groups, group_size, shape, (len(shape) - 1,))


def check_reduction_axes(reduction_axes: Axes | None, shape: tuple[int, ...]) -> None:
    """None, or all axes but the batch. Flax can also leave axes out, which then count as further batch axes."""
    if reduction_axes is None:
        return
    axes = reduction_axes if isinstance(reduction_axes, Iterable) else (reduction_axes,)
    rank = len(shape)
    if {axis % rank if axis in range(-rank, rank) else axis for axis in axes} != set(range(1, rank)):
        raise ValueError(
            f"reduction_axes must be None or all axes but the batch, {tuple(range(1, rank))}, since every sample has "
            f"one mean and one variance per group: got {arguments.shown(reduction_axes)} for x of shape {shape}. Merge "
            "the axes that are not reduced into the batch, as in x.reshape(-1, *x.shape[2:])."
        )


def normalize(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: float,
    dtype: Dtype | None,
    channel_axis: tuple[int, ...],
    group_size: int | None = None,
    activation: Activation | None,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
    implementation: Implementation | None,
    running: Moments | None = None,
    initializing: bool = False,
) -> tuple[jax.Array, Statistics]:
    """instance_norm or group_norm with Flax's arguments.

    Args:
      x: any real dtype; integers are converted.
      scale, bias: None, or of the shape of the channel axes.
      epsilon: added to the variance.
      dtype: result dtype; None infers it from x, scale and bias.
      mask: None, or an array broadcastable to x, nonzero at the positions that count for the statistics.
      residual: None, or an array of the shape of x, of any dtype.
      channel_axis, activation, axis_name, axis_index_groups, implementation: as in jaxnorm.instance_norm.
      group_size: of group norm; None for instance norm.
      running: None, or the mean and variance per channel to normalize with; the mask is ignored then.
      initializing: whether the activation may create parameters in this call.

    Returns:
      y, and the statistics of every instance as constants.
    """
    dtype = canonicalize_dtype(x, scale, bias, dtype=dtype)
    # We never make x narrower than it came: the statistics are those of the input, and the result is rounded once.
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    computed_dtype = jnp.promote_types(x.dtype if floating else jnp.float32, dtype)
    if initializing:
        # A Flax module in the activation creates its parameters in the scope of the layer, and only once. So we call
        # it here, where nothing is traced, on what instance_norm would give it: numbers of at least float32.
        computed_dtype = jnp.promote_types(computed_dtype, jnp.float32)
        arguments.check_activation(activation)
    x = x.astype(computed_dtype)
    # Flax's layers have epsilon and mask where the functions have eps and where, so messages must say so.
    eps = arguments.check_eps(epsilon, statistics_dtype(x.dtype), "epsilon")
    where = None if mask is None else arguments.check_where(_as_bool(mask), x.shape, "mask")
    y, statistics = functional.normalize(
        x,
        scale,
        bias,
        eps,
        channel_axis=channel_axis,
        group_size=group_size,
        residual=None if residual is None else arguments.as_array("residual", residual).astype(x.dtype),
        activation=None if initializing else activation,
        where=where if running is None else None,
        moments=running,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        implementation=implementation,
    )
    if initializing and activation is not None:
        y = arguments.check_activated(activation(y), y)
    return y.astype(dtype), statistics


def _as_bool(mask: ArrayLike) -> jax.Array:
    return arguments.as_array("mask", mask).astype(bool)


def check_momentum(momentum: float) -> None:
    """The weight of the new statistics. It is PyTorch's, and Flax's is the weight of the old ones."""
    if not 0 <= momentum <= 1:
        raise ValueError(
            "momentum must lie in [0, 1]: it is the weight of the new statistics, as in PyTorch, and 1 - momentum that "
            f"of the old ones: got {momentum!r}. Flax's momentum of 0.9 is 0.1 here."
        )
    if 0.5 < momentum < 1:
        # Python shows a warning once for each line that warns: once in a program, however many layers there are.
        warnings.warn(
            f"momentum={momentum!r} replaces {momentum:.0%} of the running statistics at every update: here it is the "
            f"weight of the new statistics, as in PyTorch. Flax's momentum of {momentum!r} is "
            f"{round(1 - momentum, 12)!r} here.",
            stacklevel=1,
        )


def uses_running_average(track_running_stats: bool, in_layer: bool | None, at_call: bool | None) -> bool:
    """Whether to normalize with the running averages: as the call says, otherwise as the layer does.

    Args:
      track_running_stats: whether there are running averages.
      in_layer, at_call: the attribute and the argument named use_running_average; None leaves it to the other.
    """
    chosen = in_layer if at_call is None else at_call
    if chosen and not track_running_stats:
        raise ValueError(
            "use_running_average=True needs running averages: got track_running_stats=False. "
            "Pass track_running_stats=True from the start of the training."
        )
    if chosen is None and track_running_stats:
        raise ValueError(
            "use_running_average must be True or False where track_running_stats=True: got None. Pass "
            "use_running_average=False in training and True in evaluation, to the layer or to its call."
        )
    return bool(chosen)


def updated(
    running: Moments, statistics: Statistics, momentum: float, stats_axis_name: AxisName | None = None
) -> Moments:
    """The running statistics after a batch, as torch.nn.InstanceNorm forms them.

    The result is (1 - momentum) * old + momentum * new. What is new is the average of the means, and of the unbiased
    variances, over the samples of the batch in which a position counts. Where there is none, the old values stay.

    Args:
      running: mean and variance per channel, of any shape.
      statistics: of every instance; each (N, *channels). A single position has no unbiased variance: we take 0.
      momentum: the weight of the batch.
      stats_axis_name: the mapped axes whose batches are averaged too.
    """
    names = arguments.as_names(stats_axis_name)

    def over_samples(values: jax.Array) -> jax.Array:
        total = jnp.sum(values, 0, keepdims=True)
        return lax.psum(total, names) if names else total

    counts = statistics.counted > 0
    samples = over_samples(jnp.asarray(counts, jnp.float32))
    # We divide before the sum, since a sum of large variances may overflow where their average does not.
    share = 1 / jnp.maximum(samples, 1)

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        average = over_samples(jnp.where(counts, new, 0) * share)
        mixed = (1 - momentum) * old + momentum * average.reshape(old.shape)
        return jnp.where(samples.reshape(old.shape) > 0, mixed, old).astype(old.dtype)

    unbiased = statistics.variance * (statistics.counted / jnp.maximum(statistics.counted - 1, 1))
    return mix(running[0], statistics.center + statistics.delta), mix(running[1], unbiased)
