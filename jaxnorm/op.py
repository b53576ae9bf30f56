"""The fused op with its derivatives: a custom_vjp whose rules call ops that are custom_jvp.

    first order     the backward pass, from x and the per-instance statistics
    higher orders   JAX differentiates the plain formula, recomputed from x, in reverse or forward (Hessian-vector
                    products, linearize and hessian of a gradient), to any order

JAX refuses forward mode straight through a custom_vjp. implementation="reference" has none.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from jaxnorm import reference
from jaxnorm.activation import is_staged
from jaxnorm.call import Arguments, Call, Gradients, Operands, Statistics
from jaxnorm.dispatch import BACKWARD, FORWARD
from jaxnorm.sharding import vary_together, with_whole_groups


def normalize(call: Call, arguments: Arguments) -> tuple[jax.Array, Statistics]:
    """jaxnorm.instance_norm by a fused implementation; and the statistics, as constants."""
    # Outside jit one program does all. Its cache keeps the call, which then has no function of the user's in it.
    y, statistics = (_normalize if is_staged(arguments.x) else _compiled)(call, arguments)
    return y, statistics


def _normalize(call: Call, arguments: Arguments) -> tuple[jax.Array, Statistics]:
    dtype = reference.statistics_dtype(arguments.x.dtype)
    # The rules of a custom_vjp want all arrays to vary over the same axes of shard_map. We do this before per-instance
    # values are broadcast, so that their gradients are summed over the batch first and over the devices then.
    x, gamma, beta, residual, where, mean, variance = vary_together(
        arguments._replace(
            gamma=jnp.asarray(1 if arguments.gamma is None else arguments.gamma, dtype),
            beta=jnp.asarray(0 if arguments.beta is None else arguments.beta, dtype),
        )
    )
    instances = call.layout(x.shape).instances
    # One of each per instance from here on: the sum over the batch in a shared parameter's gradient is then the
    # transpose of this broadcast, and conditional norm is no special case.
    gamma, beta = (jnp.broadcast_to(jnp.asarray(value), instances) for value in (gamma, beta))
    if mean is None or variance is None:
        y, statistics = _forward(call, Operands(x, gamma, beta, residual, where))
        # The rules below ignore the cotangents of the statistics.
        return y, lax.stop_gradient(statistics)
    mean, variance = (jnp.broadcast_to(value.astype(dtype), instances) for value in (mean, variance))
    rstd = lax.rsqrt(variance + call.eps)
    y, statistics = _forward(call, Operands(x, gamma * rstd, beta, residual, where, center=mean))
    return y, lax.stop_gradient(statistics._replace(center=mean, rstd=rstd, variance=variance))


_compiled = jax.jit(_normalize, static_argnums=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(call: Call, operands: Operands) -> tuple[jax.Array, Statistics]:
    y, statistics = _forward_pass(call, operands)
    return y, statistics


def _forward_fwd(call: Call, operands: Operands) -> tuple[Any, Any]:
    y, statistics = _forward_pass(call, operands)
    # Without an activation the gradients do not depend on the residual: only its type is kept.
    has_residual = operands.residual is not None
    if call.activation is None:
        operands = operands._replace(residual=None)
    return (y, statistics), (operands, statistics, () if has_residual else None)


def _forward_bwd(call: Call, saved: Any, cotangents: Any) -> tuple[Operands]:
    # The statistics leave the op as constants, so that their cotangents are zero.
    dy, _ = cotangents
    operands, statistics, residual = saved
    gradients = _backward_pass(call, operands, statistics, dy)
    if call.activation is None and residual is not None:
        gradients = gradients._replace(residual=dy)
    # z = (x - center) * gamma + beta
    dcenter = None if operands.center is None else -operands.gamma * gradients.beta
    return (Operands(*gradients, where=None, center=dcenter),)


_forward.defvjp(_forward_fwd, _forward_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward_pass(call: Call, operands: Operands) -> tuple[jax.Array, Statistics]:
    y, statistics = FORWARD.bind(call, operands)
    return y, statistics


@functools.partial(_forward_pass.defjvp, symbolic_zeros=True)
def _(call: Call, primals: tuple[Operands], tangents: tuple[Operands]) -> Any:
    y, statistics = _forward_pass(call, *primals)
    dy = _tangent(functools.partial(_plain_forward, call), primals, tangents)
    # Whoever uses the statistics ignores their tangents, since the plain formula computes them again from x.
    still = jax.tree.map(lambda value: zero_from_primal(value, symbolic_zeros=True), statistics)
    return (y, statistics), (dy, still)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward_pass(call: Call, operands: Operands, statistics: Statistics, dy: jax.Array) -> Gradients:
    gradients: Gradients = BACKWARD.bind(call, operands, statistics, dy)
    return gradients


@functools.partial(_backward_pass.defjvp, symbolic_zeros=True)
def _(call: Call, primals: Any, tangents: Any) -> Any:
    gradients = _backward_pass(call, *primals)
    (operands, _, dy), (of_operands, _, of_dy) = primals, tangents
    return gradients, _tangent(functools.partial(_plain_backward, call), (operands, dy), (of_operands, of_dy))


def _plain_forward(call: Call, operands: Operands) -> jax.Array:
    """y by the plain formula, differentiable in every mode."""
    if call.channel_axis_name is not None:
        return with_whole_groups(_plain_forward, call, operands)
    x, gamma, beta, residual, where, center = operands
    y, _ = reference.normalize(
        call.layout(x.shape),
        x,
        gamma,
        beta,
        residual,
        eps=call.eps,
        activation=call.activation,
        where=where,
        given=None if center is None else (center, 1, 1),
        axis_name=call.axis_name,
    )
    return y


def _plain_backward(call: Call, operands: Operands, dy: jax.Array) -> Gradients:
    """The backward pass by the plain formula, with the statistics computed again from x: differentiable."""
    x, gamma, beta, residual, where, center = operands

    def y_of(x: jax.Array, gamma: jax.Array, beta: jax.Array, residual: jax.Array | None) -> jax.Array:
        return _plain_forward(call, Operands(x, gamma, beta, residual, where, center))

    _, pullback = jax.vjp(y_of, x, gamma, beta, residual)
    return Gradients(*pullback(dy))


def _tangent(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """The tangent of function(*primals), differentiated only in what moves."""
    values, structure = jax.tree.flatten(primals)
    moves = jax.tree.leaves(tangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    moving = [i for i, move in enumerate(moves) if not isinstance(move, SymbolicZero)]

    def of_moving(*moved: Any) -> Any:
        given = dict(zip(moving, moved, strict=True))
        return function(*jax.tree.unflatten(structure, [given.get(i, value) for i, value in enumerate(values)]))

    return jax.jvp(of_moving, tuple(values[i] for i in moving), tuple(moves[i] for i in moving))[1]
