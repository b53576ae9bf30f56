"""The forward and the backward pass of a call on N-d arrays: into a view, through an implementation, and back."""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax

from jaxnorm import choice, reference, xla
from jaxnorm.arguments import Activation, AxisName, Implementation
from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.tiling import NoTile, Tile
from jaxnorm.layout import Layout, UnmergedLayout
from jaxnorm.placement import vary_together
from jaxnorm.sums import Positions


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call; equal ones share what was compiled.

    Attributes:
      channel_axes, eps, activation, axis_name, implementation: as in jaxnorm.instance_norm, checked.
      has_residual: whether there is one.
      device: the CUDA GPU that computes, if it is known and instances lie on one such GPU or are divided by jit.
      split_by_jit: whether jit may split x over several devices.
      batch_axes: how many of the first axes are batch; every vmap adds one.
    """

    channel_axes: tuple[int, ...]
    eps: float
    activation: Activation | None
    has_residual: bool
    axis_name: AxisName | None = None
    implementation: Implementation | None = None
    device: Device | None = None
    split_by_jit: bool = False
    batch_axes: int = 1

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Of an x of that shape."""
        return (UnmergedLayout if self.split_by_jit else Layout)(shape, self.channel_axes, self.batch_axes)

    def tiles(self, x: jax.Array) -> tuple[Tile | NoTile, Tile | NoTile]:
        """Of the kernel, forward and backward."""
        view = Layout(x.shape, self.channel_axes, self.batch_axes).view_shape
        return choice.find_tiles(
            view, x.dtype, residual=self.has_residual, activation=self.activation, device=self.device
        )

    def may_run_kernel(self, x: jax.Array) -> bool:
        return self.implementation != "xla" and not all(isinstance(tile, NoTile) for tile in self.tiles(x))

    def positions(self, layout: Layout) -> Positions:
        return Positions(layout.view_axes, self.axis_name, self.split_by_jit)


def forward(
    call: Call, x: jax.Array, gamma: jax.Array, beta: jax.Array, residual: jax.Array | None
) -> tuple[jax.Array, xla.Statistics]:
    """y, and the statistics for the backward pass.

    Args:
      call: the static half.
      x, residual: as the user gave them.
      gamma, beta: (N, *channels) in the dtype of the statistics, as the statistics are too.
    """
    layout = call.layout(x.shape)
    positions = call.positions(layout)
    y, statistics = choice.run(
        call.tiles(x)[0],
        functools.partial(_kernel_forward, eps=call.eps, activation=call.activation),
        functools.partial(xla.forward, eps=call.eps, activation=call.activation, positions=positions),
        layout.to_view(x),
        layout.instances_to_view(gamma),
        layout.instances_to_view(beta),
        None if residual is None else layout.to_view(residual),
        implementation=call.implementation,
    )
    return layout.from_view(y), xla.Statistics(*map(layout.instances_from_view, statistics))


def backward(
    call: Call,
    x: jax.Array,
    statistics: xla.Statistics,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
) -> xla.Gradients:
    """The gradients of forward for the cotangent dy of y; residual is None where they do not depend on it."""
    layout = call.layout(x.shape)
    dx, dgamma, dbeta, _, dresidual = choice.run(
        call.tiles(x)[1],
        functools.partial(_kernel_backward, activation=call.activation),
        functools.partial(xla.backward, activation=call.activation, positions=call.positions(layout)),
        layout.to_view(x),
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
        (),
        None if dresidual is None else layout.from_view(dresidual),
    )


def plain_forward(
    call: Call,
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    *,
    where: jax.Array | None = None,
) -> tuple[jax.Array, xla.Statistics]:
    """forward by the plain formula; of the positions only those count that are in where."""
    layout = call.layout(x.shape)
    options: dict[str, Any] = {"axes": layout.spatial_axes, "where": where, "axis_name": call.axis_name}
    y = reference.instance_norm(
        x, layout.expand(gamma), layout.expand(beta), residual, eps=call.eps, activation=call.activation, **options
    )
    center, delta, variance = reference.moments(x, **options)
    statistics = xla.Statistics(center, delta, lax.rsqrt(variance + call.eps))
    return y, xla.Statistics(*(value.squeeze(layout.spatial_axes) for value in statistics))


def plain_backward(
    call: Call,
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
    *,
    where: jax.Array | None = None,
) -> xla.Gradients:
    """backward by the plain formula, with the statistics computed again from x: differentiable."""

    def y_of(*arguments: Any) -> jax.Array:
        return plain_forward(call, *arguments, where=where)[0]

    _, pullback = jax.vjp(y_of, x, gamma, beta, residual)
    dx, dgamma, dbeta, dresidual = pullback(dy)
    return xla.Gradients(dx, dgamma, dbeta, (), dresidual)


def _kernel_forward(x: jax.Array, gamma: Any, beta: Any, residual: Any, **options: Any) -> Any:
    # Imported where it is wanted: Mosaic GPU takes a while, and a JAX without it still has the rest.
    from jaxnorm import pallas_kernel

    # The results of a kernel are typed as the same on every device.
    return vary_together(pallas_kernel.forward(x, gamma, beta, (), residual, **options), x)[0]


def _kernel_backward(x: Any, statistics: Any, gamma: Any, beta: Any, residual: Any, dy: Any, **options: Any) -> Any:
    from jaxnorm import pallas_kernel

    gradients = pallas_kernel.backward(x, statistics, gamma, beta, (), residual, dy, **options)
    return vary_together(gradients, x)[0]
