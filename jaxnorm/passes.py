"""The forward and the backward pass of a call on N-d arrays: into a view, through an implementation, and back."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax

from jaxnorm import choice, lowering, reference, sums, xla
from jaxnorm.arguments import Activation, AxisName, Implementation
from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.tile import NoTile, Tile
from jaxnorm.layout import CpuLayout, Layout, UnmergedLayout
from jaxnorm.placement import vary_together
from jaxnorm.sums import Platform, Positions


class Operands(NamedTuple):
    """The arrays of a call; per-instance values are (N, *channels), in the dtype of the statistics.

    Attributes:
      x: as the user gave it.
      gamma, beta: per instance.
      captures: scalars that the activation closes over, one per instance each.
      residual: None or like x.
      where: None, or bool with the rank of x and size 1 where it is repeated: the positions that count.
      center: None, or per instance: what is subtracted from x instead of its mean. Nothing is divided by then: what x
        is to be multiplied by is in gamma.
    """

    x: jax.Array
    gamma: jax.Array
    beta: jax.Array
    captures: tuple[jax.Array, ...] = ()
    residual: jax.Array | None = None
    where: jax.Array | None = None
    center: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call; equal ones share what was compiled.

    Attributes:
      channel_axes, eps, axis_name, implementation: as in jaxnorm.instance_norm, checked.
      activation: None, or an elementwise function of z and of what the user's activation captures.
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
        return Layout(shape, self.channel_axes, self.batch_axes)

    def plain_form(self, shape: tuple[int, ...], platform: Platform) -> tuple[Layout, Positions]:
        """Of plain XLA. A TPU tiles the last two axes: to merge axes is to copy x there."""
        kind = {"cpu": CpuLayout, "gpu": Layout, "tpu": UnmergedLayout}["tpu" if self.split_by_jit else platform]
        layout = kind(shape, self.channel_axes, self.batch_axes)
        return layout, Positions(layout.view_axes, self.axis_name, self.split_by_jit, platform)

    def with_mapped_axis(self) -> "Call":
        """Under vmap, with the mapped axis in front of all others."""
        channel_axes = tuple(axis + 1 for axis in self.channel_axes)
        return dataclasses.replace(self, channel_axes=channel_axes, batch_axes=self.batch_axes + 1)

    def tiles(self, operands: Operands) -> tuple[Tile | NoTile, Tile | NoTile]:
        """Of the kernel, forward and backward."""
        needless = _no_kernel_for(operands)
        if needless is not None:
            return needless, needless
        shape = operands.x.shape
        return choice.find_tiles(
            self.layout(shape).view_shape,
            operands.x.dtype,
            residual=operands.residual is not None,
            activation=self.activation,
            captures=len(operands.captures),
            device=self.device,
            implementation=self.implementation,
        )

    def may_run_kernel(self, operands: Operands) -> bool:
        return self.implementation != "xla" and not all(isinstance(tile, NoTile) for tile in self.tiles(operands))


@dataclasses.dataclass(frozen=True)
class _Pass:
    """A pass of a call in one layout, by one implementation; see jaxnorm.lowering.PlainPass."""

    call: Call

    def with_mapped_axis(self) -> Self:
        return dataclasses.replace(self, call=self.call.with_mapped_axis())


class _Forward(_Pass):
    """passes.forward."""

    def __call__(self, platform: Platform, operands: Operands) -> Any:
        layout, positions = self.call.plain_form(operands.x.shape, platform)
        corner = sums.corner_of(operands.x, layout.spatial_axes, split_by_jit=self.call.split_by_jit)
        corner = dataclasses.replace(layout, shape=corner.shape).to_view(corner)
        return self._in_layout(layout, functools.partial(xla.forward, corner=corner, positions=positions), operands)

    def kernel(self, operands: Operands, *, tile: Tile) -> Any:
        layout = self.call.layout(operands.x.shape)
        return self._in_layout(layout, functools.partial(_kernel_forward, tile=tile), operands)

    def _in_layout(self, layout: Layout, implementation: Callable[..., Any], operands: Operands) -> Any:
        options = {"eps": self.call.eps, "activation": self.call.activation}
        y, statistics = implementation(*_to_views(layout, operands), **options)
        # Without an activation users compute their own, which is to be fused.
        y = layout.from_view(y, is_final=self.call.activation is not None)
        return y, jax.tree.map(layout.instances_from_view, statistics)

    def like(self, operands: Operands) -> tuple[Any, xla.Statistics]:
        x, value = operands.x, operands.gamma
        is_counted = operands.where is not None and operands.center is None
        return x, xla.Statistics(value, value, value, value if is_counted else None)


class _Backward(_Pass):
    """passes.backward."""

    def __call__(self, platform: Platform, operands: Operands, *arguments: Any) -> xla.Gradients:
        layout, positions = self.call.plain_form(operands.x.shape, platform)
        return self._in_layout(layout, functools.partial(xla.backward, positions=positions), operands, *arguments)

    def kernel(self, operands: Operands, *arguments: Any, tile: Tile) -> xla.Gradients:
        layout = self.call.layout(operands.x.shape)
        return self._in_layout(layout, functools.partial(_kernel_backward, tile=tile), operands, *arguments)

    def _in_layout(
        self,
        layout: Layout,
        implementation: Callable[..., Any],
        operands: Operands,
        statistics: xla.Statistics,
        dy: jax.Array,
    ) -> xla.Gradients:
        gradients = implementation(
            *_to_views(layout, operands),
            jax.tree.map(layout.instances_to_view, statistics),
            layout.to_view(dy),
            activation=self.call.activation,
        )
        return xla.Gradients(
            layout.from_view(gradients.x, is_final=True),
            layout.instances_from_view(gradients.gamma),
            layout.instances_from_view(gradients.beta),
            tuple(map(layout.instances_from_view, gradients.captures)),
            None if gradients.residual is None else layout.from_view(gradients.residual, is_final=True),
        )

    def like(self, operands: Operands, *_: Any) -> xla.Gradients:
        return xla.Gradients(operands.x, operands.gamma, operands.beta, operands.captures, operands.residual)


# Traced once per call, for y alone and under grad, and for every layer that equals another.
@functools.partial(jax.jit, static_argnums=0)
def forward(call: Call, operands: Operands) -> tuple[jax.Array, xla.Statistics]:
    """y, and the statistics for the backward pass, per instance."""
    y, statistics = _run(_Forward(call), call.tiles(operands)[0], operands)
    return y, statistics


@functools.partial(jax.jit, static_argnums=0)
def backward(call: Call, operands: Operands, statistics: xla.Statistics, dy: jax.Array) -> xla.Gradients:
    """The gradients of forward for the cotangent dy of y.

    Args:
      call: the static half.
      operands: of forward; residual is None where the gradients do not depend on it.
      statistics: of forward.
      dy: like x.
    """
    gradients: xla.Gradients = _run(_Backward(call), call.tiles(operands)[1], operands, statistics, dy)
    return gradients


def _run(one_pass: _Forward | _Backward, tile: Tile | NoTile, *arguments: Any) -> Any:
    """A pass by the implementation that was chosen."""
    call = one_pass.call

    def plain(*arguments: Any) -> Any:
        if call.split_by_jit:
            return one_pass("tpu", *arguments)
        # Over a mapped axis JAX must see the sums that travel.
        run = lowering.for_its_platform if call.axis_name is None else lowering.for_every_platform
        return run(one_pass, *arguments)

    return choice.run(tile, one_pass.kernel, plain, *arguments, implementation=call.implementation)


def plain_forward(call: Call, operands: Operands) -> jax.Array:
    """y by the plain formula, differentiable in every mode."""
    layout = call.layout(operands.x.shape)
    x, gamma, beta, captures, residual, where, center = operands

    def activation(z: jax.Array) -> jax.Array:
        y: jax.Array = z if call.activation is None else call.activation(z, *map(layout.expand, captures))
        return y

    y, _ = reference.normalize(
        x,
        layout.expand(gamma),
        layout.expand(beta),
        residual,
        axes=layout.spatial_axes,
        eps=call.eps,
        activation=activation,
        where=where,
        given=None if center is None else (layout.expand(center), 0, 1),
        axis_name=call.axis_name,
    )
    return y


def plain_backward(call: Call, operands: Operands, dy: jax.Array) -> xla.Gradients:
    """backward by the plain formula, with the statistics computed again from x: differentiable."""
    x, gamma, beta, captures, residual, *_ = operands

    def y_of(*moving: Any) -> jax.Array:
        return plain_forward(call, Operands(*moving, *operands[len(moving) :]))

    _, pullback = jax.vjp(y_of, x, gamma, beta, captures, residual)
    return xla.Gradients(*pullback(dy))


def _to_views(layout: Layout, operands: Operands) -> Operands:
    x, gamma, beta, captures, residual, where, center = operands
    return Operands(
        layout.to_view(x),
        layout.instances_to_view(gamma),
        layout.instances_to_view(beta),
        tuple(map(layout.instances_to_view, captures)),
        None if residual is None else layout.to_view(residual),
        None if where is None else layout.mask_to_view(where),
        None if center is None else layout.instances_to_view(center),
    )


def _no_kernel_for(operands: Operands) -> NoTile | None:
    if operands.where is not None:
        return NoTile("the kernel computes no masks (where=)")
    if operands.center is not None:
        return NoTile("statistics that are given (moments=) leave nothing to reduce, and plain XLA reads x once too")
    return None


def _kernel_forward(x: jax.Array, *operands: Any, **options: Any) -> Any:
    # Imported where it is wanted: Mosaic GPU takes a while, and a JAX without it still has the rest.
    from jaxnorm import pallas_kernel

    gamma, beta, _captures, residual, _where, _center = operands
    y, moments = pallas_kernel.forward(x, gamma, beta, residual, **options)
    # The results of a kernel are typed as the same on every device.
    return vary_together((y, xla.Statistics(moments.center, moments.delta, moments.rstd)), x)[0]


def _kernel_backward(
    x: jax.Array,
    gamma: Any,
    beta: Any,
    captures: Any,
    residual: Any,
    where: Any,
    center: Any,
    statistics: Any,
    dy: Any,
    **options: Any,
) -> Any:
    from jaxnorm import pallas_kernel

    found = pallas_kernel.backward(x, statistics, gamma, beta, residual, dy, **options)
    return vary_together(xla.Gradients(found.x, found.gamma, found.beta, (), found.residual), x)[0]
