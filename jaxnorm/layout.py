"""How an N-d array becomes the canonical view (B, R, K) of the implementations, and back."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the channels of an array stand; the first axis is the batch, all other axes are spatial.

    Per-instance values (gamma, beta, the statistics) have shape (N, *channels) beside the array and (B, K) beside
    its view. Each vmap around a call puts one more batch axis in front: N is then several axes.

    Attributes:
      shape: of the array.
      channel_axes: sorted and non-negative.
      batch_axes: how many of the first axes are batch.
    """

    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    batch_axes: int = 1

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(self.batch_axes, len(self.shape)) if axis not in self.channel_axes)

    @property
    def instance_axes(self) -> tuple[int, ...]:
        """The axes of the array that a per-instance value has."""
        return (*range(self.batch_axes), *self.channel_axes)

    @property
    def instances(self) -> tuple[int, ...]:
        """(N, *channels)."""
        return tuple(self.shape[axis] for axis in self.instance_axes)

    @property
    def expanded(self) -> tuple[int, ...]:
        """(N, *channels) with size 1 on the spatial axes."""
        return tuple(1 if axis in self.spatial_axes else size for axis, size in enumerate(self.shape))

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the lanes K of the view; else each channel of each sample is a B of its own."""
        return self.channel_axes[-1] == len(self.shape) - 1

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """(B, R, K)."""

        def size(axes: Iterable[int]) -> int:
            return math.prod(self.shape[axis] for axis in axes)

        batch, channels = size(range(self.batch_axes)), size(self.channel_axes)
        batch, lanes = (batch, channels) if self.channels_last else (batch * channels, 1)
        return batch, size(self.spatial_axes), lanes

    @property
    def view_axes(self) -> tuple[int, ...]:
        """The axes of the view along which the positions of an instance lie."""
        return (1,)

    def expand(self, value: jax.Array) -> jax.Array:
        """(*channels) or (N, *channels) to a shape that broadcasts against the array."""
        if value.ndim == len(self.channel_axes):
            value = jnp.expand_dims(value, tuple(range(self.batch_axes)))
        return jnp.expand_dims(value, self.spatial_axes)

    def to_view(self, x: jax.Array) -> jax.Array:
        """The array as (B, R, K): no copy where the channels stand last or directly after the batch."""
        return x.transpose(self._order).reshape(self.view_shape)

    def mask_to_view(self, where: jax.Array) -> jax.Array:
        """An array of the rank of x, of size 1 where it is repeated, as a view that broadcasts against that of x."""
        shape = list(self.shape)
        if self.channels_last and all(where.shape[axis] == 1 for axis in self.channel_axes):
            for axis in self.channel_axes:
                shape[axis] = 1
        whole = jnp.broadcast_to(where, shape)
        return dataclasses.replace(self, shape=tuple(shape)).to_view(whole)

    def from_view(self, view: jax.Array) -> jax.Array:
        """The inverse of to_view."""
        order = self._order
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        return view.reshape(tuple(self.shape[axis] for axis in order)).transpose(inverse)

    def instances_to_view(self, value: jax.Array) -> jax.Array:
        """(N, *channels) to (B, K)."""
        batch, _, lanes = self.view_shape
        return value.reshape(batch, lanes)

    def instances_from_view(self, value: jax.Array) -> jax.Array:
        """(B, K) to (N, *channels)."""
        return value.reshape(self.instances)

    @property
    def _order(self) -> tuple[int, ...]:
        batch = tuple(range(self.batch_axes))
        if self.channels_last:
            return (*batch, *self.spatial_axes, *self.channel_axes)
        return (*batch, *self.channel_axes, *self.spatial_axes)


class OneSampleLayout(Layout):
    """One sample, channels-last, as (R, K), with per-instance values (K,).

    XLA for CPU reshapes what has an axis of size one before and after every step: a tenth of all instructions.
    """

    @property
    def view_axes(self) -> tuple[int, ...]:
        return (0,)

    def to_view(self, x: jax.Array) -> jax.Array:
        return super().to_view(x).squeeze(0)

    def instances_to_view(self, value: jax.Array) -> jax.Array:
        return super().instances_to_view(value).squeeze(0)


class UnmergedLayout(Layout):
    """The array is its own view, for arrays that jit may have split: merging two axes would move them between devices.

    Per-instance values are (N, *channels) there too.
    """

    @property
    def view_axes(self) -> tuple[int, ...]:
        return self.spatial_axes

    def to_view(self, x: jax.Array) -> jax.Array:
        return x

    def mask_to_view(self, where: jax.Array) -> jax.Array:
        return where

    def from_view(self, view: jax.Array) -> jax.Array:
        return view

    def instances_to_view(self, value: jax.Array) -> jax.Array:
        return value

    def instances_from_view(self, value: jax.Array) -> jax.Array:
        return value
