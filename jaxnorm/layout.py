"""How an N-d array becomes the canonical view (B, R, K) of the implementations, and back."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax


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

    def from_view(self, view: jax.Array, *, is_final: bool = False) -> jax.Array:
        """The inverse of to_view; is_final: whether an operation that XLA should fuse with it hardly follows."""
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


class CpuLayout(Layout):
    """The view without an axis of size one: (B, R) channels-first, or (R, K) of a single sample, channels-last.

    XLA for CPU reshapes what has such an axis before and after every step: a tenth of all instructions. Per-instance
    values are (B,) and (K,) then.
    """

    @property
    def view_axes(self) -> tuple[int, ...]:
        return (0,) if self._dropped == 0 else (1,)

    def to_view(self, x: jax.Array) -> jax.Array:
        return self._squeezed(super().to_view(x))

    def from_view(self, view: jax.Array, *, is_final: bool = False) -> jax.Array:
        """The inverse of to_view; what is final is in memory before it is used, where that costs no copy.

        Else XLA computes it again for each of its uses, such as the copies that both derivatives of a convolution take
        of it, in another order than that of memory. It is written as the view: of an array XLA writes a loop per axis,
        and LLVM unrolls the innermost ones completely where they are short, and then computes numbers one by one, a
        relu in two to four times the time, an exponential function in five to eight times.
        """
        in_memory = is_final and not self._is_copied_from_view
        return super().from_view(lax.optimization_barrier(view) if in_memory else view)

    def instances_to_view(self, value: jax.Array) -> jax.Array:
        return self._squeezed(super().instances_to_view(value))

    def _squeezed(self, value: jax.Array) -> jax.Array:
        """Of a (B, R, K) or a (B, K)."""
        return value if self._dropped is None else value.squeeze(self._dropped)

    @property
    def _dropped(self) -> int | None:
        """The axis. A single channel that stands last stays: XLA would copy what gets its axis back."""
        if not self.channels_last:
            return -1
        return 0 if self.view_shape[0] == 1 else None

    @property
    def _is_copied_from_view(self) -> bool:
        """Whether XLA copies a view that is in memory to make it the array: where axes move or have size one."""
        return 1 in self.shape[1:] or self._order != tuple(range(len(self.shape)))


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

    def from_view(self, view: jax.Array, *, is_final: bool = False) -> jax.Array:
        return view

    def instances_to_view(self, value: jax.Array) -> jax.Array:
        return value

    def instances_from_view(self, value: jax.Array) -> jax.Array:
        return value
