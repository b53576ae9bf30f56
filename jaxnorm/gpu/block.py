"""One thread block of the GPU kernels: what it knows and does, however jaxnorm.gpu.tile cuts the work."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm.gpu import copies, synchronization
from jaxnorm.gpu.copies import Chunk, Copies, Instance, Place, Ref
from jaxnorm.gpu.synchronization import PartialResults, Synchronization
from jaxnorm.gpu.tile import ELEMENTS_PER_STEP, REDUCTION_SCRATCH_BYTES, Tile


def for_each_instance(
    body: Callable[["Block"], None],
    tile: Tile,
    scratch: Any,
    sources: Sequence[Ref],
    targets: Sequence[Ref],
    partials: Ref | None,
) -> None:
    """Runs the body in a thread block: once, or in turn for each of the instances that are not computed side by side.

    Args:
      body: takes the block, which loads the sources, and writes the targets.
      tile, scratch: of the kernel, see launch.
      sources, targets: x-sized arrays; a target may take the place of the source of that number.
      partials: of partials_type.
    """
    order = synchronization.strategy(tile)(tile, scratch["synchronization"])
    place = Place(lax.div(order.index, tile.blocks), lax.rem(order.index, tile.blocks), order.rank)
    moves = copies.strategy(tile)(tile, place, sources, targets, scratch["copies"])
    moves.start()
    moves.for_each_instance(lambda instance: body(Block(tile, place, order, moves, instance, partials)))
    moves.finish()


class Block:
    """A thread block and an instance: how it goes through it, sums it and spreads a value per instance over it.

    A value per instance is a vector over the lanes of the tile ("rows"), over its rows ("lanes"), or a scalar ("both").

    Args:
      tile, partials: see for_each_instance; partials is None where the block is alone.
      place: of the block.
      order: waits for other blocks.
      moves: loads and stores.
      instance: that the block works on, or the first of several side by side.
    """

    def __init__(
        self,
        tile: Tile,
        place: Place,
        order: Synchronization,
        moves: Copies,
        instance: Instance,
        partials: Ref | None,
    ) -> None:
        self.tile, self.rank = tile, place.rank
        self.shape, self.layout = moves.shape, moves.layout
        self._place, self._order, self._copies, self._instance = place, order, moves, instance
        self._partials: Ref = partials

    # Chunks.

    def read(self, number: int, chunk: Chunk) -> jax.Array:
        """A chunk of a source, in float32."""
        return self._copies.read(number, chunk)

    def write(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        """Writes a chunk of a target."""
        self._copies.write(number, chunk, values)

    def keep(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        """Overwrites a chunk of a source for the next sweep, if the block keeps the chunk."""
        if self.keeps(chunk):
            self._copies.keep(number, chunk, values)

    def keeps(self, chunk: Chunk) -> bool:
        """Whether no other chunk, and no other instance, has some of the same rows."""
        return chunk.low is None

    def sweep(
        self,
        step: Callable[[Chunk, Any], Any],
        carry: Any = None,
        *,
        loaded: int,
        boxes: int | None = None,
        write_back: bool = False,
    ) -> Any:
        """carry = step(chunk, carry) for all chunks.

        Args:
          step: sees the chunks in order.
          carry: at the start.
          loaded: this many boxes are in shared memory; the sweep waits for each of the others.
          boxes: this many boxes have the chunks; None is all.
          write_back: whether to write each box back after its last step.
        """
        boxes, rows = self.tile.boxes if boxes is None else boxes, self.tile.chunk

        def box_step(box: Any, carry: Any) -> Any:
            if loaded < boxes:
                pl.when(box >= loaded)(functools.partial(self._copies.wait, box))

            def chunk_step(i: Any, carry: Any) -> Any:
                return step(self._copies.chunk(self._instance, box, pl.multiple_of(i * rows, rows)), carry)

            carry = lax.fori_loop(*self._copies.chunks(self._instance, box), chunk_step, carry)
            if write_back:
                self._copies.write_back(box)
            return carry

        return lax.fori_loop(0, boxes, box_step, carry)

    def zeros(self) -> jax.Array:
        """A chunk to sum into."""
        zeros: jax.Array = plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)
        return zeros

    def inside(self, values: jax.Array, chunk: Chunk) -> jax.Array:
        """The values with zeros at positions that are not in the instance, or were seen before."""
        return self._copies.inside(values, chunk)

    # Values per instance.

    def read_values(self, ref: Ref, *leading: Any) -> jax.Array:
        """The values per instance of this block from a (outer, *leading, positions) array."""
        if self.tile.reduces == "both":
            value: jax.Array = ref[(self._instance.outer, *leading, 0)]
            return value
        return plgpu.load(self._values(ref, leading), layout=self._vector, optimized=False)

    def write_values(self, ref: Ref, value: jax.Array, *leading: Any) -> None:
        """Writes them to such an array."""
        if self.tile.reduces == "both":
            ref[(self._instance.outer, *leading, 0)] = value
        else:
            copies.store(self._values(ref, leading), value)

    def load_first_boxes(self, x: Ref) -> jax.Array:
        """Waits for the first boxes, and returns a number near each instance, the same in all blocks that share it.

        Args:
          x: the first source.
        """
        if self.tile.reduces == "lanes":
            self._wait_for_first_boxes()
            # From shared memory, where the rows beyond the last instance exist too. The sum is of one number.
            index = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=self.layout)
            chunk = self._copies.chunk(self._instance, 0, 0)
            return self.total(jnp.where(index == 0, self.read(0, chunk), 0.0))
        if self.tile.reduces == "both":
            first: jax.Array = x[self._instance.first]
        else:
            first = plgpu.load(x.at[self._instance.outer, 0, self._lanes], layout=self._vector, optimized=False)
        self._wait_for_first_boxes()
        # Of a group it is the mean of one element of each channel. Its size is a power of two.
        return self.group_sum(first.astype(jnp.float32) * (1 / self.tile.group_size))

    def _wait_for_first_boxes(self) -> None:
        pl.loop(0, self.tile.first_boxes)(self._copies.wait)

    def total(self, values: jax.Array) -> jax.Array:
        """The sum of a chunk per instance. One axis at a time, since a full reduction does not compile."""
        # Threads add each other's values crosswise, and each keeps the sum. Without this barrier one of them may round
        # a product that it adds and another not, so that they would disagree.
        values = lax.optimization_barrier(values)
        if self.tile.reduces == "rows":
            return jnp.sum(values, axis=0)
        total = jnp.sum(values, axis=1)
        return jnp.sum(total, axis=0) if self.tile.reduces == "both" else total

    def instance_total(self, values: jax.Array) -> jax.Array:
        """The sum of a chunk over all that is of the same instance, where several lanes may be."""
        return self.group_sum(self.total(values))

    def group_sum(self, value: jax.Array) -> jax.Array:
        """The sum of a value per lane over the lanes of each group: all of them have the result."""
        tile, shape = self.tile, (ELEMENTS_PER_STEP // self.tile.lanes, self.tile.lanes)
        if tile.group_size == 1:
            return value
        # The lanes of a group are registers of several threads. We sum them along a chunk that has one group in each
        # row, and then spread the sums over the rows and choose in each lane that of its own group.
        row, lane = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=self.layout) for axis in (0, 1))
        group, values = lax.div(lane, tile.group_size), self.spread(value, shape)
        chosen = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), self.layout)
        for first in range(0, tile.lanes // tile.group_size, shape[0]):
            is_own = group == row + first
            sums = jnp.sum(jnp.where(is_own, values, 0.0), axis=1)
            spread = plgpu.layout_cast(lax.broadcast_in_dim(sums, shape, (0,)), self.layout)
            chosen = chosen + jnp.where(is_own, spread, 0.0)
        return self.total(chosen)

    def spread(self, value: jax.Array, shape: tuple[int, int] | None = None) -> jax.Array:
        """A value per instance in a form that a chunk, or an array of that shape, can be combined with."""
        if self.tile.reduces == "both":
            return value
        axis = 1 if self.tile.reduces == "rows" else 0
        spread: jax.Array = plgpu.layout_cast(lax.broadcast_in_dim(value, shape or self.shape, (axis,)), self.layout)
        return spread

    def count(self, rank: Any) -> Any:
        """The positions of an instance that the block of that rank works on."""
        return self._count(rank, self.tile.boxes)

    def first_count(self) -> Any:
        """The positions of an instance in the first boxes of this block."""
        return self._count(self.rank, self.tile.first_boxes)

    def _count(self, rank: Any, boxes: int) -> Any:
        tile = self.tile
        if tile.reduces == "lanes":
            return jnp.float32(min(boxes * tile.lanes, tile.positions))
        if tile.blocks_per_instance == 1 and (boxes == tile.boxes or boxes * tile.rows >= tile.extent):
            return jnp.float32(tile.positions)
        rows = jnp.clip(tile.extent - rank * tile.block_rows, 0, boxes * tile.rows)
        return (rows * (tile.lanes if tile.reduces == "both" else tile.group_size)).astype(jnp.float32)

    def exchange(self, values: Sequence[jax.Array]) -> PartialResults:
        """Gives the values to all blocks that share the instances of this one, and returns theirs."""
        tile, numbers = self.tile, range(len(values))
        if tile.blocks_per_instance == 1:
            return synchronization.Few([tuple(values)])
        for i, value in enumerate(values):
            self._write_partial(value, i)
        self._order.wait_for_all()
        if synchronization.are_few(tile):
            ranks = range(tile.blocks_per_instance)
            return synchronization.Few(
                [tuple(self.read_values(self._partials, i, rank) for i in numbers) for rank in ranks]
            )
        lanes = self._lanes if tile.reduces == "rows" else pl.ds(0, tile.lanes)

        def read(i: int, start: int, rows: int) -> jax.Array:
            where = self._partials.at[self._instance.outer, i, pl.ds(start, rows), lanes]
            values: jax.Array = plgpu.load(where, layout=self.layout, optimized=False)
            return values

        first = tuple(self.read_values(self._partials, i, 0) for i in numbers)
        return synchronization.Many(tile, first, read=read, spread=self.spread, sum_up=self.total)

    def _write_partial(self, value: jax.Array, i: int) -> None:
        if self.tile.reduces == "both" and not synchronization.are_few(self.tile):
            row, lane = lax.div(self.rank, self.tile.lanes), lax.rem(self.rank, self.tile.lanes)
            self._partials[self._instance.outer, i, row, lane] = value
        else:
            self.write_values(self._partials, value, i, self.rank)

    # Where things are.

    @property
    def _vector(self) -> Any:
        """How a vector of values per instance lies in registers."""
        return self.layout.reduce(0 if self.tile.reduces == "rows" else 1)

    @property
    def _lanes(self) -> Any:
        return pl.ds(self._place.index * self.tile.lanes, self.tile.lanes)

    def _values(self, ref: Ref, leading: tuple[Any, ...]) -> Ref:
        rows = self.tile.block_rows
        where = self._lanes if self.tile.reduces == "rows" else pl.ds(self._place.index * rows, rows)
        return ref.at[(self._instance.outer, *leading, where)]


def launch(body: Callable[..., None], name: str, tile: Tile, inputs: Any, outputs: Any, dtype: Any) -> Any:
    """Runs body(*inputs, *outputs, scratch=) on every thread block of the tile."""
    move, order = copies.strategy(tile), synchronization.strategy(tile)
    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types={"scratch": {"copies": move.scratch(tile, dtype), "synchronization": order.scratch(tile)}},
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
            approx_math=approximates(dtype),
            # Otherwise the compiler puts two barriers around every store. The kernel orders its own stores: what one
            # thread writes and another reads passes through the barriers of jaxnorm.gpu.copies, of
            # jaxnorm.gpu.synchronization and of sums across warps.
            unsafe_no_auto_barriers=True,
        ),
        **order.grid(tile),
    )
    # Python numbers are 64 bits wide under jax_enable_x64: its indices would not mix with those of the grid.
    with jax.enable_x64(False):
        return kernel(*inputs)


def approximates(dtype: Any) -> bool:
    """Whether the activation is computed by the hardware's own functions.

    They are good to 2^-22 (exp, log) or 2^-11 (tanh) of themselves, a half unit in the last place of bfloat16 is 2^-8.
    """
    return bool(dtype == jnp.bfloat16)


def values_to_kernel(tile: Tile, value: jax.Array) -> jax.Array:
    """Values per instance, (B, K), as (outer, positions), padded to whole thread blocks.

    Vectors are read and written without a check of bounds, unlike boxes.
    """
    outer, positions = values_shape(tile)
    value = value.reshape(outer, -1)
    return jnp.pad(value, ((0, 0), (0, positions - value.shape[1])))


def values_from_kernel(tile: Tile, value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse, to (B, K)."""
    return value[:, : tile.shape[1]].reshape(shape) if tile.reduces == "lanes" else value.reshape(shape)


def values_shape(tile: Tile) -> tuple[int, int]:
    outer, _, lanes = tile.shape
    match tile.reduces:
        case "rows":
            return outer, lanes
        case "lanes":
            return outer, tile.blocks * tile.block_rows
        case "both":
            return (outer if tile.span is None else tile.blocks * tile.span[0]), 1


def values_type(tile: Tile) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(values_shape(tile), jnp.float32)


def partials_type(tile: Tile, values: int) -> jax.ShapeDtypeStruct | None:
    """The array in which blocks exchange that many values per instance; None where each block is alone."""
    if tile.blocks_per_instance == 1:
        return None
    outer, positions = values_shape(tile)
    shape = (outer, values, *synchronization.partials_shape(tile, positions))
    return jax.ShapeDtypeStruct(shape, jnp.float32)
