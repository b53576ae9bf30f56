"""The fused op with its derivatives: a custom_vjp, whose backward is a custom_vjp too.

first order    backward() of the implementation, from x and the small statistics
second order   JAX differentiates the plain formula, recomputed from x, and so on to any order
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm import partitioning, passes, reference, xla
from jaxnorm.layout import Layout
from jaxnorm.passes import Call
from jaxnorm.placement import vary_together


def instance_norm(
    call: Call, x: jax.Array, gamma: jax.Array | None, beta: jax.Array | None, residual: jax.Array | None
) -> jax.Array:
    """jaxnorm.instance_norm for checked arguments, by a fused implementation."""
    y: jax.Array = _normalize(call, x, gamma, beta, residual)
    return y


@functools.partial(jax.jit, static_argnums=0)
def _normalize(
    call: Call, x: jax.Array, gamma: jax.Array | None, beta: jax.Array | None, residual: jax.Array | None
) -> jax.Array:
    dtype = reference.statistics_dtype(x.dtype)
    # Converted first, so that the sum is formed before it is rounded to the dtype of the parameter.
    gamma = jnp.asarray(1 if gamma is None else gamma, dtype)
    beta = jnp.asarray(0 if beta is None else beta, dtype)
    # As the rules of a custom_vjp must; and before gamma and beta are broadcast, so that their gradients are summed
    # over the batch first and over the devices then.
    x, gamma, beta, residual = vary_together(x, gamma, beta, residual)
    # One gamma and beta per instance from here on: the sum over the batch of a shared parameter's gradient is then
    # the transpose of this broadcast, and conditional norm no special case.
    instances = Layout(x.shape, call.channel_axes).instances
    gamma, beta = jnp.broadcast_to(gamma, instances), jnp.broadcast_to(beta, instances)
    y, _ = _forward(call, x, gamma, beta, residual)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(
    call: Call, x: jax.Array, gamma: jax.Array, beta: jax.Array, residual: jax.Array | None
) -> tuple[jax.Array, xla.Statistics]:
    y, statistics = partitioning.run(passes.forward, call, x, gamma, beta, residual)
    return y, statistics


def _forward_fwd(
    call: Call, x: jax.Array, gamma: jax.Array, beta: jax.Array, residual: jax.Array | None
) -> tuple[Any, Any]:
    # The op itself, not its body: at second order JAX differentiates this rule.
    y, statistics = _forward(call, x, gamma, beta, residual)
    # Without an activation the gradients do not depend on the residual.
    saved_residual = None if call.activation is None else residual
    return (y, statistics), (x, statistics, gamma, beta, saved_residual)


def _forward_bwd(call: Call, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    # The statistics leave the op only to be saved here, so that their cotangents are zero.
    dy, _ = cotangents
    gradients = _backward(call, *saved, dy)
    if call.activation is None and call.has_residual:
        gradients = gradients._replace(residual=dy)
    return tuple(gradients)


_forward.defvjp(_forward_fwd, _forward_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(
    call: Call,
    x: jax.Array,
    statistics: xla.Statistics,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
) -> xla.Gradients:
    gradients: xla.Gradients = partitioning.run(passes.backward, call, x, statistics, gamma, beta, residual, dy)
    return gradients


def _backward_fwd(call: Call, x: Any, statistics: Any, gamma: Any, beta: Any, residual: Any, dy: Any) -> Any:
    return _backward(call, x, statistics, gamma, beta, residual, dy), (x, gamma, beta, residual, dy)


def _backward_bwd(call: Call, saved: Any, cotangents: xla.Gradients) -> tuple[Any, ...]:
    _, pullback = jax.vjp(functools.partial(passes.plain_backward, call), *saved)
    x, gamma, beta, residual, dy = pullback(cotangents)
    # The plain formula recomputes the statistics from x: all that depends on them is in the cotangent of x already.
    return x, None, gamma, beta, residual, dy


_backward.defvjp(_backward_fwd, _backward_bwd)
