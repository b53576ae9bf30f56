"""What plain XLA is given on each platform: how arrays are viewed, how they are summed, and what is kept in memory.

jaxnorm.xla is the formula, the same on every platform. All that makes one platform's compiler produce good code of it
is here, with the reason.

    Cpu       views without axes of size 1, sums of 8 rows side by side, x-sized values in memory once
    Gpu       the canonical view, sums by chunks of rows
    Generic   the N-d array: TPUs, which tile the last two axes, so merging axes would copy x
    Divided   the N-d array, for what jit may have split over devices: nothing is merged or sliced along an axis

Rules that we learned by looking at what XLA compiles stand beside the code that follows them.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.arguments import AxisName
from jaxnorm.layout import Layout

Terms = Callable[..., tuple[jax.Array, ...]]

# The slab whose mean is the provisional center holds at least one in so many positions of an instance. With a smaller
# share we would read less and cancel more: see numerics.provisional_center.
SLAB = 16


class Platform(abc.ABC):
    """The arrays of one call as a platform wants them. The methods take and return views unless they say otherwise.

    Attributes:
      axes: the axes of a view along which the positions of an instance lie. Per-instance values do not have them.
      keeps_cotangent: whether the backward pass writes the cotangent before the activation to memory and reads it
        twice, rather than compute it twice.
    """

    axes: tuple[int, ...]
    keeps_cotangent: ClassVar[bool] = False

    def __init__(
        self, layout: Layout, axis_name: AxisName | None = None, channel_axis_name: AxisName | None = None
    ) -> None:
        self.layout, self.axis_name, self.channel_axis_name = layout, axis_name, channel_axis_name

    # Views.

    @abc.abstractmethod
    def view(self, x: jax.Array) -> jax.Array:
        """An array of the layout's shape as a view."""

    @abc.abstractmethod
    def view_mask(self, where: jax.Array) -> jax.Array:
        """An array of size 1 where it is repeated, as a view that broadcasts against that of x."""

    @abc.abstractmethod
    def view_instances(self, value: jax.Array) -> jax.Array:
        """A per-instance value (N, *channels), such that spread() fits it to a view."""

    @abc.abstractmethod
    def array(self, view: jax.Array, *, final: bool) -> jax.Array:
        """The inverse of view. It is final unless an operation is likely to follow that XLA should fuse with it."""

    def instances(self, value: jax.Array) -> jax.Array:
        """The inverse of view_instances."""
        return value.reshape(self.layout.instances)

    def spread(self, value: jax.Array) -> jax.Array:
        """A per-instance value, to broadcast against views."""
        return jnp.expand_dims(value, self.axes)

    def first(self, view: jax.Array) -> jax.Array:
        """The first position of each instance."""
        for axis in self.axes:
            view = lax.slice_in_dim(view, 0, 1, axis=axis)
        return view.squeeze(self.axes)

    def slab(self, x: jax.Array) -> jax.Array:
        """The view of a slab in the middle of an array: at least one in SLAB of the positions of each instance.

        We cut the first spatial axes, since a slab lies in one piece and is read without the rest; the next axes only
        as far as the first ones are too short. We take the middle, since the edge of an image is more often unlike the
        rest. We cut the array and not its view, since from a view XLA for CPU makes a loop over all of it.
        """
        left = math.prod(x.shape[axis] for axis in self.layout.spatial_axes)
        wanted = -(-left // SLAB)
        for axis in self.layout.spatial_axes:
            # Half as many again are less trouble than rows that are cut, which do not lie in one piece.
            if left <= wanted * 3 // 2:
                break
            size = x.shape[axis]
            kept = -(-size * wanted // left)
            start = (size - kept) // 2
            x = lax.slice_in_dim(x, start, start + kept, axis=axis)
            left = left // size * kept
        return type(self)(dataclasses.replace(self.layout, shape=x.shape)).view(x)

    # Sums.

    @abc.abstractmethod
    def sum(self, terms: Terms, *arrays: Any) -> tuple[jax.Array, ...]:
        """The sums of terms(*arrays) over the positions of this device, per instance.

        Args:
          terms: two, elementwise in the arrays, and in per-instance values that it closes over and spreads.
          arrays: views, or None.
        """

    @abc.abstractmethod
    def sum_one(self, term: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        """The same of a single term of one array."""

    def add_up[Values: (jax.Array, tuple[jax.Array, ...])](self, values: Values) -> Values:
        """The sum over the devices that share an instance."""
        return values if self.axis_name is None else lax.psum(values, self.axis_name)

    def group_sum(self, value: jax.Array) -> jax.Array:
        """The sum of a per-instance value over the channels of each group: all of them have the result."""
        size = self.layout.group_size
        if size == 1:
            return value
        values = self.instances(value)
        own, axis = values.shape[-1], values.ndim - 1
        if self.channel_axis_name is not None:
            values = lax.all_gather(values, self.channel_axis_name, axis=axis, tiled=True)
        whole = values.shape[-1] // size * size
        grouped = values[..., :whole].reshape(*values.shape[:-1], whole // size, size)
        sums = jnp.sum(grouped, axis=-1, keepdims=True)
        sums = jnp.broadcast_to(sums, grouped.shape).reshape(*values.shape[:-1], whole)
        if self.channel_axis_name is not None:
            # XLA pads channels that its devices do not divide, and what is padded has no group.
            sums = jnp.pad(sums, ((0, 0),) * axis + ((0, values.shape[-1] - whole),))
            sums = lax.dynamic_slice_in_dim(sums, lax.axis_index(self.channel_axis_name) * own, own, axis)
        return self.view_instances(sums)

    @property
    def devices(self) -> int:
        """How many devices share an instance."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def count(self, view: jax.Array) -> int:
        """How many positions of an instance a view has, in all channels of a group."""
        return self.layout.group_size * math.prod(view.shape[axis] for axis in self.axes)

    # What is kept in memory.

    def materialize[Values](self, values: Values) -> Values:
        """The values, where the platform would otherwise compute them at each of their uses."""
        return values

    def apart[Values](self, values: Values) -> Values:
        """The values, where the platform would otherwise compute across the start of the backward pass."""
        return values


class Cpu(Platform):
    """XLA compiles a reduction of several operands itself, into one loop that reads each array once.

    A reduction of one operand it hands to a library, and with it what is added up, which the library writes to memory
    first. What the library does well are sums of what is in memory already.
    """

    keeps_cotangent = True

    # LLVM unrolls a loop over so few rows completely and then computes neighboring sums side by side, in vectors. We
    # take the first of these numbers that leaves the fewest rows over, which are one more loop.
    _ROWS = (8, 9, 10, 7, 6)
    # So many rows our own loop adds up sooner than the library does. Of more the library is faster, in vectors.
    _FEW = 32

    @property
    def axes(self) -> tuple[int, ...]:  # type: ignore[override]
        return (0,) if self._dropped == 0 else (1,)

    def view(self, x: jax.Array) -> jax.Array:
        return self._squeezed(_canonical(self.layout, x))

    def view_mask(self, where: jax.Array) -> jax.Array:
        return self._squeezed(_canonical_mask(self.layout, where))

    def view_instances(self, value: jax.Array) -> jax.Array:
        batch, _, lanes = self.layout.view_shape
        return self._squeezed(value.reshape(batch, lanes))

    def array(self, view: jax.Array, *, final: bool) -> jax.Array:
        # What is final is written once. Otherwise XLA computes it again for each of its uses, such as the copies that
        # the derivatives of a convolution take, in another order than that of memory. We write the view, since XLA
        # makes one loop per axis of an array, and LLVM computes numbers one by one where the innermost axis is short.
        # Where the array is a copy of the view anyway, it would be written twice.
        is_copied = 1 in self.layout.shape[1:] or self.layout.order != tuple(range(len(self.layout.shape)))
        return _from_canonical(self.layout, lax.optimization_barrier(view) if final and not is_copied else view)

    def sum(self, terms: Terms, *arrays: Any) -> tuple[jax.Array, ...]:
        (axis,) = self.axes
        rows = arrays[0].shape[axis]

        def part(start: int, stop: int) -> Any:
            return jax.tree.map(lambda array: lax.slice_in_dim(array, start, stop, axis=axis), arrays)

        if rows <= self._FEW:
            return self.materialize(_sum_together(terms(*arrays), axis))
        together = min(self._ROWS, key=lambda together: rows % together)
        far = rows // together
        # The rows that one loop adds up are far apart, so that neighbors stay neighbors.
        values = tuple(_split(value, axis, together) for value in terms(*part(0, far * together)))
        # The barriers keep the first loop, and what is computed of the sums, out of the second loop or the library.
        sums = self.materialize(_sum_together(values, axis))
        few = far <= self._FEW
        sums = _sum_together(sums, axis) if few else tuple(jnp.sum(value, axis=axis) for value in sums)
        sums = self.materialize(sums)
        if rows % together == 0:
            return sums
        return tuple(map(jnp.add, sums, _sum_together(terms(*part(far * together, rows)), axis)))

    def sum_one(self, term: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        (axis,) = self.axes
        rows = array.shape[axis]
        if rows == 1:
            return term(array).squeeze(axis)
        half = rows // 2

        def part(start: int, stop: int) -> jax.Array:
            return lax.slice_in_dim(array, start, stop, axis=axis)

        # Two halves are two operands; they leave a row over or none.
        first, second = self.sum(lambda *halves: tuple(map(term, halves)), part(0, half), part(half, 2 * half))
        total = first + second
        return total if rows == 2 * half else total + term(part(2 * half, rows)).squeeze(axis)

    def materialize[Values](self, values: Values) -> Values:
        held: Values = lax.optimization_barrier(values)
        return held

    def _squeezed(self, value: jax.Array) -> jax.Array:
        """Without the axis of size 1 of a (B, R, K) or (B, K), which XLA would reshape before and after every step."""
        return value if self._dropped is None else value.squeeze(self._dropped)

    @property
    def _dropped(self) -> int | None:
        # A single channel that stands last keeps its axis, since XLA would copy what gets it back.
        if not self.layout.channels_last:
            return -1
        return 0 if self.layout.view_shape[0] == 1 else None


class Gpu(Platform):
    """XLA fuses a reduction of a few rows with what is added up; before one of many it may write that to memory."""

    axes = (1,)

    # Rows per partial sum; the most that leave enough thread blocks are taken. Of longer ones XLA splits some itself
    # and writes temporaries as large as x first. Fewer rows cost more partial sums.
    _CHUNKS = (256, 128, 64, 32)
    # A reduction of fewer thread blocks XLA takes for slow, and computes what is added up elsewhere, through memory.
    _ENOUGH_BLOCKS = 256
    # With fewer lanes XLA writes temporaries before a reduction over rows, so several rows stand side by side. A single
    # lane is a sum of consecutive numbers, which it does fuse.
    _WARP = 32

    def view(self, x: jax.Array) -> jax.Array:
        return _canonical(self.layout, x)

    def view_mask(self, where: jax.Array) -> jax.Array:
        return _canonical_mask(self.layout, where)

    def view_instances(self, value: jax.Array) -> jax.Array:
        batch, _, lanes = self.layout.view_shape
        return value.reshape(batch, lanes)

    def array(self, view: jax.Array, *, final: bool) -> jax.Array:
        return _from_canonical(self.layout, view)

    def sum(self, terms: Terms, *arrays: Any) -> tuple[jax.Array, ...]:
        # XLA counts what two operands of a reduction have in common twice when it decides whether to fuse it, and then
        # writes it to memory. The two parts of a complex number are added like two real numbers, as one operand.
        first, second = terms(*arrays)
        pair = self._sum_by_chunks(lax.complex(first, second))
        return pair.real, pair.imag

    def sum_one(self, term: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        return self._sum_by_chunks(term(array))

    def apart[Values](self, values: Values) -> Values:
        # Otherwise XLA may write what both passes compute of x, such as the mask of a ReLU, in the forward pass.
        held: Values = lax.optimization_barrier(values)
        return held

    def _sum_by_chunks(self, value: jax.Array) -> jax.Array:
        batch, rows, lanes = value.shape
        side_by_side = -(-self._WARP // lanes) if lanes > 1 else 1
        steps, width = -(-rows // side_by_side), side_by_side * lanes

        def blocks(chunk: int) -> int:
            return batch * -(-steps // chunk) * -(-width // self._WARP)

        enough = (chunk for chunk in self._CHUNKS if blocks(chunk) >= self._ENOUGH_BLOCKS)
        chunk = min(steps, next(enough, self._CHUNKS[-1]))
        count = -(-steps // chunk)
        padded = jnp.pad(value, ((0, 0), (0, count * chunk * side_by_side - rows), (0, 0)))
        (partial,) = _sum_together((padded.reshape(batch, count, chunk, width),), axis=2)
        # The barrier keeps XLA from merging the two steps.
        partial = lax.optimization_barrier(partial).reshape(batch, count * side_by_side, lanes)
        (total,) = _sum_together((partial,), axis=1)
        return total


class Generic(Platform):
    """The array is its own view."""

    @property
    def axes(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.layout.spatial_axes

    def view(self, x: jax.Array) -> jax.Array:
        return x

    def view_mask(self, where: jax.Array) -> jax.Array:
        return where

    def view_instances(self, value: jax.Array) -> jax.Array:
        return value

    def array(self, view: jax.Array, *, final: bool) -> jax.Array:
        return view

    def sum(self, terms: Terms, *arrays: Any) -> tuple[jax.Array, ...]:
        return tuple(jnp.sum(term, axis=self.axes) for term in terms(*arrays))

    def sum_one(self, term: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        return jnp.sum(term(array), axis=self.axes)


class Divided(Generic):
    """For arrays that jit may have split over devices along any axis, and for symbolic sizes.

    XLA makes the sums of each device, and adds up a few numbers per instance. A slab would lie on some devices only.
    """

    def slab(self, x: jax.Array) -> jax.Array:
        return x


def _canonical(layout: Layout, x: jax.Array) -> jax.Array:
    """The array as (B, R, K): no copy where the channels stand last or directly after the batch."""
    return x.transpose(layout.order).reshape(layout.view_shape)


def _canonical_mask(layout: Layout, where: jax.Array) -> jax.Array:
    """The mask as (B, R, K), or (B, R, 1) where it is the same for all channels."""
    shape = list(layout.shape)
    if layout.channels_last and all(where.shape[axis] == 1 for axis in layout.channel_axes):
        for axis in layout.channel_axes:
            shape[axis] = 1
    return _canonical(dataclasses.replace(layout, shape=tuple(shape)), jnp.broadcast_to(where, shape))


def _from_canonical(layout: Layout, view: jax.Array) -> jax.Array:
    order = layout.order
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    return view.reshape(tuple(layout.shape[axis] for axis in order)).transpose(inverse)


def _split(value: jax.Array, axis: int, rows: int) -> jax.Array:
    """(B, R, K) as (B, rows, R / rows, K)."""
    shape = list(value.shape)
    shape[axis : axis + 1] = rows, shape[axis] // rows
    return value.reshape(shape)


def _sum_together(values: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
    """The sums along an axis, in one reduction."""
    zeros = tuple(jnp.zeros((), value.dtype) for value in values)
    sums: tuple[jax.Array, ...] = lax.reduce(values, zeros, lambda p, q: tuple(map(jnp.add, p, q)), (axis,))
    return sums
