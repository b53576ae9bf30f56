"""How an N-d array becomes the canonical view (B, R, K) of the implementations, and back."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the channels of an array stand; axis 0 is the batch, all other axes are spatial.

    Per-instance values (gamma, beta, the statistics) have shape (N, *channels) beside the array and (B, 1, K) beside
    its view.

    Attributes:
      shape: of the array.
      channel_axes: sorted and non-negative.
    """

    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(1, len(self.shape)) if axis not in self.channel_axes)

    @property
    def instances(self) -> tuple[int, ...]:
        """(N, *channels)."""
        return tuple(self.shape[axis] for axis in (0, *self.channel_axes))

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the lanes K of the view; else each channel of each sample is a B of its own."""
        return self.channel_axes[-1] == len(self.shape) - 1

    def expand(self, value: jax.Array) -> jax.Array:
        """(*channels) or (N, *channels) to a shape that broadcasts against the array."""
        if value.ndim == len(self.channel_axes):
            value = value[None]
        return jnp.expand_dims(value, self.spatial_axes)

    def to_view(self, x: jax.Array) -> jax.Array:
        """The array as (B, R, K): no copy where the channels stand last or directly after the batch."""
        rows = math.prod(self.shape[axis] for axis in self.spatial_axes)
        batch, lanes = self._batch_and_lanes
        return x.transpose(self._order).reshape(batch, rows, lanes)

    def from_view(self, view: jax.Array) -> jax.Array:
        """The inverse of to_view."""
        order = self._order
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        return view.reshape(tuple(self.shape[axis] for axis in order)).transpose(inverse)

    def instances_to_view(self, value: jax.Array) -> jax.Array:
        """(N, *channels) to (B, 1, K)."""
        batch, lanes = self._batch_and_lanes
        return value.reshape(batch, 1, lanes)

    def instances_from_view(self, value: jax.Array) -> jax.Array:
        """(B, 1, K) to (N, *channels)."""
        return value.reshape(self.instances)

    @property
    def _order(self) -> tuple[int, ...]:
        if self.channels_last:
            return (0, *self.spatial_axes, *self.channel_axes)
        return (0, *self.channel_axes, *self.spatial_axes)

    @property
    def _batch_and_lanes(self) -> tuple[int, int]:
        batch, *channels = self.instances
        return (batch, math.prod(channels)) if self.channels_last else (batch * math.prod(channels), 1)
