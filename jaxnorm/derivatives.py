"""The fused op with its derivatives: a custom_vjp, whose backward is a custom_vjp too.

first order    backward() of the implementation, from x and the small statistics
second order   JAX differentiates the plain formula, recomputed from x, and so on to any order
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import choice, reference, xla
from jaxnorm.arguments import Activation, Implementation
from jaxnorm.layout import Layout
from jaxnorm.tiling import Device, NoTile, Tile


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static half of a call; equal ones share what was compiled."""

    channel_axes: tuple[int, ...]
    eps: float
    activation: Activation | None
    has_residual: bool
    implementation: Implementation | None
    device: Device | None

    def tiles(self, shape: tuple[int, ...], dtype: Any) -> tuple[Tile | NoTile, Tile | NoTile]:
        """Of the kernel, forward and backward, for the canonical view."""
        return choice.find_tiles(
            shape, dtype, residual=self.has_residual, activation=self.activation, device=self.device
        )


def instance_norm(
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    residual: jax.Array | None,
    *,
    layout: Layout,
    eps: float,
    activation: Activation | None,
    implementation: Implementation | None,
    device: Device | None,
) -> jax.Array:
    """jaxnorm.instance_norm for checked arguments, by a fused implementation on the device."""
    call = _Call(layout.channel_axes, eps, _comparable(activation), residual is not None, implementation, device)
    y: jax.Array = _normalize(call, x, gamma, beta, residual)
    return y


@functools.partial(jax.jit, static_argnums=0)
def _normalize(
    call: _Call, x: jax.Array, gamma: jax.Array | None, beta: jax.Array | None, residual: jax.Array | None
) -> jax.Array:
    # One gamma and beta per instance from here on: the sum over the batch of a shared parameter's gradient is then
    # the transpose of this broadcast, and conditional norm no special case.
    instances = Layout(x.shape, call.channel_axes).instances
    dtype = reference.statistics_dtype(x.dtype)
    # Converted first, so that the sum is formed before it is rounded to the dtype of the parameter.
    gamma = jnp.broadcast_to(jnp.asarray(1 if gamma is None else gamma, dtype), instances)
    beta = jnp.broadcast_to(jnp.asarray(0 if beta is None else beta, dtype), instances)
    y, _ = _forward(call, *_vary_together(x, gamma, beta, residual))
    return y


def _vary_together(*arrays: jax.Array | None) -> list[jax.Array | None]:
    """Inside shard_map: lets all vary over the axes that any varies over, as the rules of a custom_vjp must.

    The transpose sums a gradient over the axes that its array did not vary over before.
    """

    def varying(array: jax.Array | None) -> frozenset[Any]:
        return frozenset() if array is None else jax.typeof(array).manual_axis_type.varying

    axes = frozenset().union(*map(varying, arrays))

    def vary(array: jax.Array | None) -> jax.Array | None:
        missing = axes - varying(array)
        return array if array is None or not missing else lax.pcast(array, tuple(missing), to="varying")

    return [vary(array) for array in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(
    call: _Call, x: jax.Array, gamma: jax.Array, beta: jax.Array, residual: jax.Array | None
) -> tuple[jax.Array, xla.Statistics]:
    """x and residual as the user gave them, gamma, beta and the statistics (N, *channels)."""
    layout = Layout(x.shape, call.channel_axes)
    view = layout.to_view(x)
    y, statistics = choice.run(
        call.tiles(view.shape, x.dtype)[0],
        functools.partial(_kernel_forward, eps=call.eps, activation=call.activation),
        functools.partial(xla.forward, eps=call.eps, activation=call.activation),
        view,
        layout.instances_to_view(gamma),
        layout.instances_to_view(beta),
        None if residual is None else layout.to_view(residual),
        implementation=call.implementation,
    )
    return layout.from_view(y), xla.Statistics(*map(layout.instances_from_view, statistics))


def _forward_fwd(
    call: _Call, x: jax.Array, gamma: jax.Array, beta: jax.Array, residual: jax.Array | None
) -> tuple[Any, Any]:
    # The op itself, not its body: at second order JAX differentiates this rule.
    y, statistics = _forward(call, x, gamma, beta, residual)
    # Without an activation the gradients do not depend on the residual.
    saved_residual = None if call.activation is None else residual
    return (y, statistics), (x, statistics, gamma, beta, saved_residual)


def _forward_bwd(call: _Call, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    # The statistics leave the op only to be saved here, so that their cotangents are zero.
    dy, _ = cotangents
    gradients = _backward(call, *saved, dy)
    if call.activation is None and call.has_residual:
        gradients = gradients._replace(residual=dy)
    return tuple(gradients)


_forward.defvjp(_forward_fwd, _forward_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(
    call: _Call,
    x: jax.Array,
    statistics: xla.Statistics,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
) -> xla.Gradients:
    layout = Layout(x.shape, call.channel_axes)
    view = layout.to_view(x)
    dx, dgamma, dbeta, dresidual = choice.run(
        call.tiles(view.shape, x.dtype)[1],
        functools.partial(_kernel_backward, activation=call.activation),
        functools.partial(xla.backward, activation=call.activation),
        view,
        xla.Statistics(*map(layout.instances_to_view, statistics)),
        layout.instances_to_view(gamma),
        layout.instances_to_view(beta),
        None if residual is None else layout.to_view(residual),
        layout.to_view(dy),
        implementation=call.implementation,
    )
    return xla.Gradients(
        layout.from_view(dx),
        layout.instances_from_view(dgamma),
        layout.instances_from_view(dbeta),
        None if dresidual is None else layout.from_view(dresidual),
    )


def _backward_fwd(call: _Call, x: Any, statistics: Any, gamma: Any, beta: Any, residual: Any, dy: Any) -> Any:
    return _backward(call, x, statistics, gamma, beta, residual, dy), (x, gamma, beta, residual, dy)


def _backward_bwd(call: _Call, saved: Any, cotangents: xla.Gradients) -> tuple[Any, ...]:
    def plain_backward(x: Any, gamma: Any, beta: Any, residual: Any, dy: Any) -> xla.Gradients:
        _, pullback = jax.vjp(functools.partial(_plain_forward, call), x, gamma, beta, residual)
        return xla.Gradients(*pullback(dy))

    _, pullback = jax.vjp(plain_backward, *saved)
    x, gamma, beta, residual, dy = pullback(cotangents)
    # The plain formula recomputes the statistics from x: all that depends on them is in the cotangent of x already.
    return x, None, gamma, beta, residual, dy


_backward.defvjp(_backward_fwd, _backward_bwd)


def _plain_forward(call: _Call, x: Any, gamma: Any, beta: Any, residual: Any) -> jax.Array:
    layout = Layout(x.shape, call.channel_axes)
    return reference.instance_norm(
        x,
        layout.expand(gamma),
        layout.expand(beta),
        residual,
        axes=layout.spatial_axes,
        eps=call.eps,
        activation=call.activation,
    )


def _kernel_forward(*arguments: Any, **options: Any) -> Any:
    # Imported where it is wanted: Mosaic GPU takes a while, and a JAX without it still has the rest.
    from jaxnorm import pallas_kernel

    return pallas_kernel.forward(*arguments, **options)


def _kernel_backward(*arguments: Any, **options: Any) -> Any:
    from jaxnorm import pallas_kernel

    return pallas_kernel.backward(*arguments, **options)


@dataclasses.dataclass(frozen=True)
class _ComparablePartial:
    """A functools.partial that equals another one of the same function and arguments."""

    function: Callable[..., jax.Array]
    args: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.function(*self.args, z, **dict(self.keywords))


def _comparable(activation: Activation | None) -> Activation | None:
    """Keeps functools.partial(jax.nn.leaky_relu, ...) written into the call from compiling anew at every call."""
    if not isinstance(activation, functools.partial):
        return activation
    comparable = _ComparablePartial(activation.func, activation.args, tuple(sorted(activation.keywords.items())))
    try:
        hash(comparable)
    except TypeError:
        return activation
    return comparable
