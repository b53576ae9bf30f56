"""Where the batch, the channels and the positions of an array are."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """The first axes of an array are its batch, some are its channels, and all others are spatial.

    Attributes:
      shape: of the array.
      channel_axes: sorted and non-negative.
      batch_axes: how many of the first axes are batch: one, and one more for every vmap around the call.
      group_size: how many neighboring channels share their statistics. With more than 1 there is one channel axis.
    """

    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    batch_axes: int = 1
    group_size: int = 1

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(self.batch_axes, len(self.shape)) if axis not in self.channel_axes)

    @property
    def instance_axes(self) -> tuple[int, ...]:
        """The axes of the array that a per-instance value has."""
        return (*range(self.batch_axes), *self.channel_axes)

    @property
    def instances(self) -> tuple[int, ...]:
        """The shape of a per-instance value, (N, *channels)."""
        return self._sizes(self.instance_axes)

    @property
    def expanded(self) -> tuple[int, ...]:
        """The shape of a per-instance value that broadcasts against the array: size 1 on the spatial axes."""
        return tuple(1 if axis in self.spatial_axes else size for axis, size in enumerate(self.shape))

    @property
    def positions(self) -> int:
        """How many positions an instance has."""
        return math.prod(self._sizes(self.spatial_axes))

    @property
    def channels_last(self) -> bool:
        return self.channel_axes[-1] == len(self.shape) - 1

    @property
    def order(self) -> tuple[int, ...]:
        """The axes in the order of the canonical view."""
        batch = tuple(range(self.batch_axes))
        if self.channels_last:
            return (*batch, *self.spatial_axes, *self.channel_axes)
        return (*batch, *self.channel_axes, *self.spatial_axes)

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """The canonical view (B, R, K) of the kernel and of plain XLA on GPUs, with one instance per (b, k).

        channels-last  (N, *spatial, C): B = N, R = positions, K = C
        channels-first (N, C, *spatial): B = N * C, R = positions, K = 1
        """
        batch = math.prod(self._sizes(range(self.batch_axes)))
        channels = math.prod(self._sizes(self.channel_axes))
        if self.channels_last:
            return batch, self.positions, channels
        return batch * channels, self.positions, 1

    def expand(self, value: jax.Array) -> jax.Array:
        """A value of shape (*channels) or (N, *channels), such that it broadcasts against the array."""
        if value.ndim == len(self.channel_axes):
            value = jnp.expand_dims(value, tuple(range(self.batch_axes)))
        return jnp.expand_dims(value, self.spatial_axes)

    def by_groups(self, value: jax.Array) -> jax.Array:
        """An array of the rank of this one, its channel axis split into (groups, group_size), or size 1 into (1, 1).

        The statistics of group norm are taken over the spatial axes of the split layout, which its second part is one
        of: see split.
        """
        (axis,) = self.channel_axes
        size = value.shape[axis]
        parts = (1, 1) if size == 1 != self.shape[axis] else (size // self.group_size, self.group_size)
        return value.reshape(*value.shape[:axis], *parts, *value.shape[axis + 1 :])

    @property
    def split(self) -> "Layout":
        """The layout of by_groups(x), whose channels are the groups."""
        (axis,) = self.channel_axes
        groups = self.shape[axis] // self.group_size
        shape = (*self.shape[:axis], groups, self.group_size, *self.shape[axis + 1 :])
        return Layout(shape, self.channel_axes, self.batch_axes)

    def _sizes(self, axes: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)
