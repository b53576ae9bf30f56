"""The public functions: check the arguments, choose an implementation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm import activations, arguments, choice, derivatives, partitioning, reference, xla
from jaxnorm.arguments import Activation, Axes, AxisName, Implementation
from jaxnorm.gpu.devices import Device, target
from jaxnorm.layout import Layout
from jaxnorm.passes import Call
from jaxnorm.placement import is_explicit, is_manual, is_partly_manual, is_split_by_jit, varying_axes


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

    The statistics are right at any offset of the data: the variance is never E[x^2] - E[x]^2, and the mean is not
    rounded to one number before it is subtracted. They are right for any magnitude up to a fifth of the largest number
    of their dtype (6e37 in float32), and NaN does not come from finite numbers up to there: where the squares of the
    deviations overflow all the same, as when single numbers beyond 1e19 stand in an instance around 0, the variance
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
      activation: None, or an elementwise function such as jax.nn.relu. It sees at least float32. Scalars that it closes
        over, such as a learned slope, have gradients. A function of JAX itself is checked once, one of your own is
        traced at every call that is not inside jit, which costs a few milliseconds and compiles nothing anew.
      where: None, or a bool array broadcastable to x: the positions that count for the statistics. All positions are
        normalized. An instance in which none counts has no statistics: its y is NaN, as with jnp.mean(where=).
      moments: None, or the pair (mean, var) to normalize with instead of the statistics of x, each with a shape that
        gamma can have: those of a whole image for its tiles, or running statistics. y is differentiable in them.
        Nothing is reduced then, and axis_name has no part.
      axis_name: None, or the mapped axis (shard_map, pmap, vmap) over which the positions of one instance are spread.
      axis_index_groups: None, or the groups of indices of that axis that share their instances, as in jax.lax.psum.
      implementation: None chooses. "xla": one fused forward and backward in plain JAX, on any device. "reference":
        the plain formula, differentiable by JAX itself, so that forward mode works too (jvp, jacfwd, hessian); the
        only one that computes axis_index_groups and an axis_name that is not of shard_map, and chosen then. "pallas":
        the fused GPU kernel (experimental), or an error with the reason why it cannot run here; None takes it only
        where it has been proven on that kind of GPU.

    Returns:
      y, with the shape and dtype of x. An empty batch gives an empty y, and a constant instance gives
      activation(beta + residual). NaN or inf in one instance stays in that instance.

    Raises:
      TypeError: an argument has a type or dtype that the rules above do not allow.
      ValueError: a shape or a value does not. Both messages state the rule, what was seen and the remedy.

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


def normalize(
    x: Any,
    gamma: Any,
    beta: Any,
    eps: float,
    *,
    channel_axis: Axes,
    residual: Any = None,
    activation: Activation | None = None,
    where: Any = None,
    moments: Any = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, xla.Statistics]:
    """The result of instance_norm, and the statistics as constants, (N, C) each, for a running average."""
    x = arguments.check_input(x)
    channel_axes = arguments.check_channel_axes(x.shape, channel_axis)
    arguments.check_spatial(x.shape, channel_axes)
    gamma = arguments.check_parameter("gamma", gamma, x.shape, channel_axes)
    beta = arguments.check_parameter("beta", beta, x.shape, channel_axes)
    residual = arguments.check_residual(residual, x)
    dtype = reference.statistics_dtype(x.dtype)
    eps = arguments.check_eps(eps, dtype)
    where = arguments.check_where(where, x.shape)
    moments = arguments.check_moments(moments, x.shape, channel_axes, where)
    arguments.check_axis_name(axis_name, axis_index_groups)
    prepared = activations.prepare(activation, dtype, varying_axes(x))
    arguments.check_implementation(implementation)
    layout = Layout(x.shape, channel_axes)

    needs = {
        f"axis_name={axis_name!r} outside shard_map": moments is None and not is_manual(x, axis_name),
        "axis_index_groups": moments is None and axis_index_groups is not None,
    }
    if _is_fused(implementation, [need for need, is_given in needs.items() if is_given]):
        name = axis_name if moments is None else None
        call = Call(channel_axes, eps, prepared.function, residual is not None, name, implementation)
        return _fused(call, x, gamma, beta, prepared.captures, residual, where, moments)
    y, statistics = reference.normalize(
        x,
        None if gamma is None else layout.expand(gamma),
        None if beta is None else layout.expand(beta),
        residual,
        axes=layout.spatial_axes,
        eps=eps,
        activation=activation,
        where=where,
        given=None if moments is None else _given(moments, layout, eps, dtype),
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    center, delta, rstd = (jnp.broadcast_to(v, layout.expanded).reshape(layout.instances) for v in statistics)
    return y, lax.stop_gradient(xla.Statistics(center, delta, rstd))


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


def _is_fused(implementation: Implementation | None, beyond_fused: list[str]) -> bool:
    """Whether a fused implementation computes the call; if one that cannot was named, the reason why not.

    Args:
      implementation: the user's choice.
      beyond_fused: what the call asks for that the fused implementations do not compute.
    """
    if implementation in ("xla", "pallas") and beyond_fused:
        raise ValueError(
            f"implementation={implementation!r} does not compute {' and '.join(beyond_fused)}. "
            "Pass implementation=None or 'reference'."
        )
    return not beyond_fused and implementation != "reference"


def _given(moments: Any, layout: Layout, eps: float, dtype: Any) -> tuple[jax.Array, Any, Any]:
    """Center, delta and rstd of statistics that are given, to broadcast against x."""
    mean, variance = (layout.expand(value.astype(dtype)) for value in moments)
    return mean, 0, lax.rsqrt(variance + eps)


def _fused(call: Call, x: jax.Array, *others: Any) -> tuple[jax.Array, xla.Statistics]:
    """normalize by a fused implementation, wherever x lies.

    Args:
      call: the static half.
      x, others: the arguments of derivatives.instance_norm.
    """
    if is_explicit(x):
        y, statistics = partitioning.over_explicit_axes(_fused, call, x, *others)
        return y, statistics
    is_whole = call.axis_name is None and not is_partly_manual(x)
    call = dataclasses.replace(call, device=target(x) if is_whole else None, split_by_jit=is_split_by_jit(x))
    if call.implementation == "pallas" and call.device is None:
        call = dataclasses.replace(call, device=_interpreted_device(call, x), split_by_jit=False)
    try:
        return derivatives.instance_norm(call, x, *others)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            f"{error} Pass implementation='reference' to jaxnorm for forward mode (jvp, jacfwd, hessian) straight "
            "through it. Forward mode of a gradient, as for Hessian-vector products, works with any."
        ) from error


def _interpreted_device(call: Call, x: jax.Array) -> Device:
    """The GPU that is played on a CPU, for a kernel that must run and has no GPU."""
    if call.axis_name is not None:
        reason = f"normalizes instances that lie on one device whole: these are spread over {call.axis_name!r}"
    elif is_partly_manual(x):
        mesh = jax.typeof(x).sharding.mesh
        reason = f"cannot be divided by jit inside shard_map: only {mesh.manual_axes} of {mesh.axis_names} are manual"
    else:
        device = choice.interpreted_device()
        if device is not None:
            return device
        reason = (
            "needs a CUDA GPU, or a CPU inside force_gpu_interpret_mode of jax.experimental.pallas.mosaic_gpu: the "
            "computation is for neither"
        )
    raise ValueError(f"implementation='pallas' {reason}. Pass implementation=None or 'xla'.")
