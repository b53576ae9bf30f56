"""What a call consists of, on its way from the public function to a pass: the static half, and the arrays by name.

Per-instance values (gamma, beta, the statistics) have one number per sample and channel, (N, *channels), in the dtype
of the statistics: at least float32.
"""

import dataclasses
from typing import NamedTuple, Self

import jax

from jaxnorm.arguments import Activation, AxisName, Implementation
from jaxnorm.gpu.devices import Device
from jaxnorm.layout import Layout


class Arguments(NamedTuple):
    """The arrays as the user gave them, after the checks.

    Attributes:
      x: the input.
      gamma, beta: None, or of shape (*channels) or (N, *channels).
      residual: None, or like x.
      where: None, or bool with the rank of x and size 1 where it is repeated: the positions that count.
      mean, variance: None, or statistics to normalize with, each of a shape that gamma can have.
    """

    x: jax.Array
    gamma: jax.Array | None = None
    beta: jax.Array | None = None
    residual: jax.Array | None = None
    where: jax.Array | None = None
    mean: jax.Array | None = None
    variance: jax.Array | None = None


class Operands(NamedTuple):
    """The arrays of a pass.

    Attributes:
      x: the input.
      gamma, beta: per instance.
      residual, where: as in Arguments.
      center: None, or per instance: what is subtracted from x instead of its mean, where the statistics are given.
        Nothing is divided by then; gamma contains the factor.
    """

    x: jax.Array
    gamma: jax.Array
    beta: jax.Array
    residual: jax.Array | None = None
    where: jax.Array | None = None
    center: jax.Array | None = None


class Statistics(NamedTuple):
    """What is known of every instance after the forward pass, per instance.

    With groups, all of them but the center are those of the group: its mean is center + delta for each channel.

    Attributes:
      center, delta: the mean is center + delta, kept in two parts since their sum would be rounded.
      rstd: 1 / sqrt(variance + eps).
      variance: biased; infinite where it overflows.
      counted: how many positions the statistics are taken of.
    """

    center: jax.Array
    delta: jax.Array
    rstd: jax.Array
    variance: jax.Array
    counted: jax.Array


class Gradients(NamedTuple):
    """The gradients of Operands: of gamma and beta per instance, and None for a residual that is not there."""

    x: jax.Array
    gamma: jax.Array
    beta: jax.Array
    residual: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call. Equal ones share what was compiled.

    Attributes:
      channel_axes, eps, axis_name, implementation: as in jaxnorm.instance_norm, checked.
      activation: None, or a pointwise function that is fused: see jaxnorm.activation.
      group_size: how many neighboring channels share their statistics: 1 for instance norm.
      channel_axis_name: None, or the mapped axes over which the channels of groups are spread, by jit.
      batch_axes: how many of the first axes are batch. Every vmap adds one.
      device: None, or the GPU that the kernel is cut for instead of the one that computes, for checks of the kernel.
    """

    channel_axes: tuple[int, ...]
    eps: float
    activation: Activation | None = None
    axis_name: AxisName | None = None
    implementation: Implementation | None = None
    group_size: int = 1
    channel_axis_name: AxisName | None = None
    batch_axes: int = 1
    device: Device | None = None

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Where the channels of an x of that shape are."""
        return Layout(shape, self.channel_axes, self.batch_axes, self.group_size)

    def with_mapped_axis(self) -> Self:
        """The call under vmap, whose axis becomes the first of all batch axes."""
        channel_axes = tuple(axis + 1 for axis in self.channel_axes)
        return dataclasses.replace(self, channel_axes=channel_axes, batch_axes=self.batch_axes + 1)
