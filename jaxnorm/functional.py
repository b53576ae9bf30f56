"""The public functions: check the arguments, choose an implementation."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm import arguments, numerics, op, reference, sharding
from jaxnorm.activation import resolve
from jaxnorm.arguments import Activation, Axes, AxisName, Implementation
from jaxnorm.call import Arguments, Call, Statistics
from jaxnorm.layout import Layout


def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: Axes = 1,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    where: ArrayLike | None = None,
    moments: tuple[ArrayLike, ArrayLike] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Instance normalization with the affine, the residual add and the activation that follow it.

    For every sample n and channel c, over the M spatial positions s (Ulyanov, Vedaldi, Lempitsky 2016,
    https://arxiv.org/abs/1607.08022)::

        mean[n, c] = sum_s x / M
        var[n, c]  = sum_s (x - mean)^2 / M
        y          = activation((x - mean) / sqrt(var + eps) * gamma + beta + residual)

    The statistics are accurate at any offset of the data: the variance is never E[x^2] - E[x]^2, and the mean is not
    rounded to one number before it is subtracted. They are accurate for any magnitude up to a fifth of the largest
    number of their dtype (6e37 in float32), and NaN does not come from finite numbers up to there: where the squares
    of the deviations overflow even so, as when single numbers beyond 1e19 stand in an instance around 0, the variance
    counts as infinite and y is activation(beta + residual).

    Args:
      x: ``(N, C, *spatial)`` with at least one spatial axis; float16, bfloat16, float32 or float64.
      gamma: scale; None (1), (C,), or (N, C) for one per sample, as in conditional instance norm. For several channel
        axes the shape of those axes, in the order in which they stand in x. Any floating dtype.
      beta: shift; None (0), or a shape that gamma can have.
      eps: added to the variance, in its units; a Python number > 0, static under jit.
      channel_axis: the axis of the channels, 1 for ``(N, C, *spatial)``, -1 for ``(N, *spatial, C)``; or several
        axes. The batch is axis 0 and every remaining axis is spatial.
      residual: None, or an array of the shape and dtype of x that is added before the activation.
      activation: None, or a function that keeps the shape of its input, such as jax.nn.relu. It is evaluated in at
        least float32. JAX's own pointwise functions, and partials of one with numbers as keywords, are fused with the
        norm; other functions are where x is traced by jit, they are pointwise, and close over numbers only. All else,
        such as softmax or a learned slope, is applied after the norm. jaxnorm.explain says which.
      where: None, or a bool array broadcastable to x: the positions included in the statistics. All positions are
        normalized. An instance in which none counts has no statistics: its y is NaN, as with jnp.mean(where=).
      moments: None, or the pair (mean, var) to normalize with instead of the statistics of x, each with a shape that
        gamma can have: those of a whole image for its tiles, or running statistics. y is differentiable in them.
        Nothing is reduced then, and axis_name is ignored. A negative variance that is traced gives NaN.
      axis_name: None, or the mapped axis (shard_map, pmap, vmap) over which the positions of one instance are spread.
      axis_index_groups: None, or the groups of indices of that axis that share their instances, as in jax.lax.psum.
      implementation: None: chosen automatically. "xla": one fused forward and backward pass in plain JAX, on any
        device. "reference": the plain formula, differentiable by JAX itself, so that forward mode works too (jvp,
        jacfwd, hessian); the only one that computes axis_index_groups and an axis_name that is not of shard_map, and
        chosen then. "pallas": the fused GPU kernel (experimental), or an error with the reason why it cannot run here;
        None takes it only where it has been proven on that kind of GPU.

    Returns:
      y, with the shape and dtype of x. An empty batch gives an empty y, and a constant instance gives
      activation(beta + residual). NaN or inf in one instance stays in that instance.

    Raises:
      TypeError: an argument has a type or dtype that the rules above do not allow.
      ValueError: a shape or a value is not allowed. Both messages state the rule, what was seen and the remedy.
      NameError: axis_name is not the name of a mapped axis around the call.

    >>> import jax, jax.numpy as jnp
    >>> import jaxnorm
    >>> x = 1e4 + jax.random.normal(jax.random.key(0), (2, 3, 8, 8))
    >>> y = jaxnorm.instance_norm(x, gamma=jnp.full(3, 2.0), beta=jnp.ones(3))
    >>> print(y.mean(axis=(2, 3)).round(3))
    [[1. 1. 1.]
     [1. 1. 1.]]
    >>> print(y.std(axis=(2, 3)).round(3))
    [[2. 2. 2.]
     [2. 2. 2.]]
    """
    y, _ = normalize(
        x,
        gamma,
        beta,
        eps,
        channel_axis=channel_axis,
        residual=residual,
        activation=activation,
        where=where,
        moments=moments,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        implementation=implementation,
    )
    return y


def group_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
    channel_axis: int = 1,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Group normalization with the affine, the residual add and the activation that follow it.

    As instance_norm, but with the statistics of all positions of the channels of a group (Wu, He 2018,
    https://arxiv.org/abs/1803.08494). One channel per group is instance norm, and a single group is layer norm over
    channels and positions. The kernel computes groups of 2 to 32 channels, a power of two, along the last axis; 64 in
    half precision.

    Args:
      x: ``(N, C, *spatial)``, with or without spatial axes; float16, bfloat16, float32 or float64.
      gamma: scale; None (1), (C,), or (N, C) for one per sample, as in adaptive group norm. Any floating dtype.
      beta: shift; None (0), or a shape that gamma can have.
      eps: added to the variance, in its units; a Python number > 0, static under jit.
      num_groups: how many groups the channels form, which must divide them.
      group_size: or how many neighboring channels form a group.
      channel_axis: the axis of the channels, 1 for ``(N, C, *spatial)``, -1 for ``(N, *spatial, C)``.
      residual, activation, where, axis_name, implementation: as in instance_norm.

    Returns:
      y, with the shape and dtype of x.

    Raises:
      TypeError: as instance_norm.
      ValueError: as instance_norm, or the groups do not divide the channels.

    >>> import jax
    >>> import jaxnorm
    >>> x = 1e4 + jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
    >>> y = jaxnorm.group_norm(x, num_groups=32, channel_axis=-1, activation=jax.nn.silu)
    >>> groups = jaxnorm.group_norm(x, num_groups=32, channel_axis=-1).reshape(2, 64, 32, 2)
    >>> bool(abs(groups.mean(axis=(1, 3))).max() < 1e-6)
    True
    """
    x = arguments.check_input(x, least_rank=2)
    channel_axes = arguments.check_channel_axes(x.shape, channel_axis)
    y, _ = normalize(
        x,
        gamma,
        beta,
        eps,
        group_size=arguments.check_groups(num_groups, group_size, x.shape, channel_axes),
        channel_axis=channel_axes,
        residual=residual,
        activation=activation,
        where=where,
        axis_name=axis_name,
        implementation=implementation,
    )
    return y


def normalize(
    x: Any,
    gamma: Any,
    beta: Any,
    eps: float,
    *,
    channel_axis: Axes,
    group_size: int | None = None,
    residual: Any = None,
    activation: Activation | None = None,
    where: Any = None,
    moments: Any = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, Statistics]:
    """The result of instance_norm, and the statistics as constants, (N, C) each, for a running average.

    Args:
      group_size: of group norm; None for instance norm, whose x must have positions.
    """
    x = arguments.check_input(x, least_rank=3 if group_size is None else 2)
    channel_axes = arguments.check_channel_axes(x.shape, channel_axis)
    arguments.check_spatial(x.shape, channel_axes, least_axes=1 if group_size is None else 0)
    gamma = arguments.check_parameter("gamma", gamma, x.shape, channel_axes)
    beta = arguments.check_parameter("beta", beta, x.shape, channel_axes)
    residual = arguments.check_residual(residual, x)
    dtype = reference.statistics_dtype(x.dtype)
    positions = Layout(x.shape, channel_axes).positions * (group_size or 1)
    eps = arguments.check_eps(eps, dtype, least=numerics.least_eps(positions, dtype))
    where = arguments.check_where(where, x.shape)
    mean, variance = arguments.check_moments(moments, x.shape, channel_axes, where) or (None, None)
    arguments.check_axis_name(axis_name, axis_index_groups)
    arguments.check_activation(activation)
    arguments.check_implementation(implementation)
    if where is not None:
        where = jnp.expand_dims(where, tuple(range(x.ndim - where.ndim)))
    if moments is not None:
        # Nothing is reduced then.
        axis_name = axis_index_groups = None

    resolved, result_dtype = resolve(activation, x, dtype), x.dtype
    if resolved.after is not None:
        # The activation sees the result of the norm before it is rounded.
        x, residual = (None if value is None else value.astype(dtype) for value in (x, residual))
    given = Arguments(x, gamma, beta, residual, where, mean, variance)
    call = Call(channel_axes, eps, resolved.fused, axis_name, implementation, group_size or 1)
    if _is_fused(call, x, axis_index_groups):
        y, statistics = _fused(call, given)
    else:
        y, statistics = _plain(call, given, axis_index_groups)
    if resolved.after is not None:
        y = arguments.check_activated(resolved.after(y), y).astype(result_dtype)
    return y, lax.stop_gradient(statistics)


def instance_moments(
    x: ArrayLike,
    *,
    channel_axis: Axes = 1,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of every instance, as instance_norm uses them; differentiable in every mode.

    The moments of a style image are the beta and gamma^2 of adaptive instance norm (Huang, Belongie 2017,
    https://arxiv.org/abs/1703.06868).

    Args:
      x, channel_axis, where, axis_name, axis_index_groups: as in instance_norm.

    Returns:
      mean and var, each (N, C), in float32, or float64 for a float64 x. For several channel axes (N, then their shape).

    Raises:
      TypeError: as instance_norm.
      ValueError: as instance_norm.

    >>> import jax, jax.numpy as jnp
    >>> import jaxnorm
    >>> content, style = jax.random.normal(jax.random.key(0), (2, 1, 3, 8, 8))
    >>> mean, var = jaxnorm.instance_moments(5 + 2 * style)
    >>> y = jaxnorm.instance_norm(content, gamma=jnp.sqrt(var + 1e-5), beta=mean)
    >>> print(jnp.allclose(y.mean(axis=(2, 3)), mean, rtol=1e-5))
    True
    """
    x = arguments.check_input(x)
    channel_axes = arguments.check_channel_axes(x.shape, channel_axis)
    arguments.check_spatial(x.shape, channel_axes)
    where = arguments.check_where(where, x.shape)
    arguments.check_axis_name(axis_name, axis_index_groups)
    layout = Layout(x.shape, channel_axes)
    mean, variance = reference.moments(x, layout.spatial_axes, where, axis_name, axis_index_groups)
    return mean.reshape(layout.instances), variance.reshape(layout.instances)


def _is_fused(call: Call, x: jax.Array, axis_index_groups: Any) -> bool:
    """Whether a fused implementation computes the call; raises where one was named that does not."""
    needs = {
        f"axis_name={call.axis_name!r} outside shard_map": not sharding.is_manual(x, call.axis_name),
        "axis_index_groups": axis_index_groups is not None,
    }
    beyond_fused = [need for need, is_needed in needs.items() if is_needed]
    if call.implementation in ("xla", "pallas") and beyond_fused:
        raise ValueError(
            f"implementation={call.implementation!r} does not compute {' and '.join(beyond_fused)}. "
            "Pass implementation=None or 'reference'."
        )
    return not beyond_fused and call.implementation != "reference"


def _fused(call: Call, given: Arguments) -> tuple[jax.Array, Statistics]:
    try:
        if sharding.is_explicit(given.x):
            return sharding.over_explicit_axes(op.normalize, call, given)
        return op.normalize(call, given)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            f"{error} Pass implementation='reference' to jaxnorm for forward mode (jvp, jacfwd, hessian) straight "
            "through it. Forward mode of a gradient, as for Hessian-vector products, works with any."
        ) from error


def _plain(call: Call, given: Arguments, axis_index_groups: Any) -> tuple[jax.Array, Statistics]:
    """The result by the plain formula."""
    x, gamma, beta, residual, where, mean, variance = given
    moments = None
    if mean is not None and variance is not None:
        variance = variance.astype(reference.statistics_dtype(x.dtype))
        moments = mean, variance, lax.rsqrt(variance + call.eps)
    return reference.normalize(
        call.layout(x.shape),
        x,
        gamma,
        beta,
        residual,
        eps=call.eps,
        activation=call.activation,
        where=where,
        given=moments,
        axis_name=call.axis_name,
        axis_index_groups=axis_index_groups,
    )
