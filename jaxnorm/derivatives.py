"""The fused op with its derivatives: a custom_vjp, whose rules call ops that are custom_jvp.

first order     backward() of the implementation, from x and the small statistics
higher orders   JAX differentiates the plain formula, recomputed from x, in reverse or forward (Hessian-vector products,
                linearize and hessian of a gradient), to any order

Forward mode straight through the custom_vjp is refused by JAX; implementation="reference" has none.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from jaxnorm import partitioning, passes, reference, xla
from jaxnorm.layout import Layout
from jaxnorm.passes import Call, Operands
from jaxnorm.placement import vary_together

Moments = tuple[jax.Array, jax.Array]


def instance_norm(
    call: Call,
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    captures: tuple[jax.Array, ...],
    residual: jax.Array | None,
    where: jax.Array | None,
    moments: Moments | None,
) -> tuple[jax.Array, xla.Statistics]:
    """jaxnorm.instance_norm for checked arguments, by a fused implementation; and the statistics, as constants."""
    y, statistics = _normalize(call, x, gamma, beta, captures, residual, where, moments)
    return y, statistics


@functools.partial(jax.jit, static_argnums=0)
def _normalize(
    call: Call,
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    captures: tuple[jax.Array, ...],
    residual: jax.Array | None,
    where: jax.Array | None,
    moments: Moments | None,
) -> tuple[jax.Array, xla.Statistics]:
    dtype = reference.statistics_dtype(x.dtype)
    # Converted first, so that the sum is formed before it is rounded to the dtype of the parameter.
    gamma = jnp.asarray(1 if gamma is None else gamma, dtype)
    beta = jnp.asarray(0 if beta is None else beta, dtype)
    captures, moments = jax.tree.map(lambda value: value.astype(dtype), (captures, moments))
    if where is not None:
        where = jnp.expand_dims(where, tuple(range(x.ndim - where.ndim)))
    instances = Layout(x.shape, call.channel_axes).instances
    given = None if moments is None else _given(call, instances, moments)
    # As the rules of a custom_vjp must; and before per-instance values are broadcast, so that their gradients are
    # summed over the batch first and over the devices then.
    x, gamma, beta, captures, residual, where, moments = vary_together(
        x, gamma, beta, captures, residual, where, moments
    )
    # One of each per instance from here on: the sum over the batch of a shared parameter's gradient is then the
    # transpose of this broadcast, and conditional norm no special case.
    gamma, beta, captures, moments = jax.tree.map(
        lambda value: jnp.broadcast_to(value, instances), (gamma, beta, captures, moments)
    )
    center = None
    if moments is not None:
        center, variance = moments
        gamma = gamma * lax.rsqrt(variance + call.eps)
    y, statistics = _forward(call, Operands(x, gamma, beta, captures, residual, where, center))
    # The rules below ignore the cotangents of the statistics.
    return y, lax.stop_gradient(given or statistics)


def _given(call: Call, instances: tuple[int, ...], moments: Moments) -> xla.Statistics:
    mean, variance = (jnp.broadcast_to(value, instances) for value in moments)
    return xla.Statistics(mean, jnp.zeros_like(mean), lax.rsqrt(variance + call.eps))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(call: Call, operands: Operands) -> tuple[jax.Array, xla.Statistics]:
    y, statistics = _forward_pass(call, operands)
    return y, statistics


def _forward_fwd(call: Call, operands: Operands) -> tuple[Any, Any]:
    y, statistics = _forward_pass(call, operands)
    if call.activation is None:
        # Without an activation the gradients do not depend on the residual.
        operands = operands._replace(residual=None)
    return (y, statistics), (operands, statistics)


def _forward_bwd(call: Call, saved: Any, cotangents: Any) -> tuple[Operands]:
    # The statistics leave the op as constants, so that their cotangents are zero.
    dy, _ = cotangents
    operands, statistics = saved
    gradients = _backward_pass(call, operands, statistics, dy)
    if call.activation is None and call.has_residual:
        gradients = gradients._replace(residual=dy)
    # z = (x - center) * gamma + beta
    dcenter = None if operands.center is None else -operands.gamma * gradients.beta
    return (Operands(*gradients, where=None, center=dcenter),)


_forward.defvjp(_forward_fwd, _forward_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward_pass(call: Call, operands: Operands) -> tuple[jax.Array, xla.Statistics]:
    y, statistics = partitioning.run(passes.forward, call, operands)
    return y, statistics


@functools.partial(_forward_pass.defjvp, symbolic_zeros=True)
def _(call: Call, primals: tuple[Operands], tangents: tuple[Operands]) -> Any:
    y, statistics = _forward_pass(call, *primals)
    dy = _tangent(functools.partial(passes.plain_forward, call), primals, tangents)
    # The rules of those who use the statistics ignore their tangents: the plain formula computes them again from x.
    still = jax.tree.map(lambda value: zero_from_primal(value, symbolic_zeros=True), statistics)
    return (y, statistics), (dy, still)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward_pass(call: Call, operands: Operands, statistics: xla.Statistics, dy: jax.Array) -> xla.Gradients:
    gradients: xla.Gradients = partitioning.run(passes.backward, call, operands, statistics, dy)
    return gradients


@functools.partial(_backward_pass.defjvp, symbolic_zeros=True)
def _(call: Call, primals: Any, tangents: Any) -> Any:
    gradients = _backward_pass(call, *primals)
    (operands, _, dy), (of_operands, _, of_dy) = primals, tangents
    return gradients, _tangent(functools.partial(passes.plain_backward, call), (operands, dy), (of_operands, of_dy))


def _tangent(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """The tangent of function(*primals), differentiated in what moves alone."""
    values, structure = jax.tree.flatten(primals)
    moves = jax.tree.leaves(tangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    moving = [i for i, move in enumerate(moves) if not isinstance(move, SymbolicZero)]

    def of_moving(*moved: Any) -> Any:
        given = dict(zip(moving, moved, strict=True))
        return function(*jax.tree.unflatten(structure, [given.get(i, value) for i, value in enumerate(values)]))

    return jax.jvp(of_moving, tuple(values[i] for i in moving), tuple(moves[i] for i in moving))[1]
