"""What one thread block of the GPU kernels knows and does, whichever way the work is cut (see jaxnorm.gpu.tiling)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm.gpu import copies, meeting, parts
from jaxnorm.gpu.copies import Chunk, Place, Ref
from jaxnorm.gpu.tile import REDUCTION_SCRATCH_BYTES, Tile


class Block:
    """A thread block: what it holds, how it sums it and how it spreads a value per instance over it.

    A value per instance is a vector over the lanes of the tile ("rows"), over its rows ("lanes"), or a scalar ("both").
    """

    def __init__(
        self, tile: Tile, scratch: Any, sources: Sequence[Ref], targets: Sequence[Ref], partials: Ref | None
    ) -> None:
        self.tile = tile
        # None where the block is alone.
        self.partials: Ref = partials
        self.meeting = meeting.way(tile)(tile, scratch["meeting"])
        self.rank = self.meeting.rank
        self.index = lax.rem(self.meeting.index, tile.blocks)
        place = Place(lax.div(self.meeting.index, tile.blocks), self.index, self.rank)
        self.copies = copies.way(tile)(tile, place, sources, targets, scratch["copies"])
        self.shape, self.layout = self.copies.shape, self.copies.layout
        self.copies.start()
        # Boxes that were waited for.
        self._came = 0

    def for_each_instance(self, body: Callable[[], None]) -> None:
        """Runs the body once, or where the block has several instances in turn, for each of them."""
        self.copies.for_each_instance(body)
        self.copies.finish()

    # Chunks.

    def read(self, number: int, chunk: Chunk) -> jax.Array:
        """A chunk of a source, in float32."""
        return self.copies.read(number, chunk)

    def write(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        """A chunk of a target."""
        self.copies.write(number, chunk, values)

    def keep(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        """Puts values where a chunk of a source is held, for the next sweep: if the block keeps the chunk."""
        if self.keeps(chunk):
            self.copies.keep(number, chunk, values)

    def keeps(self, chunk: Chunk) -> bool:
        """Whether the chunk has no parts that other chunks have too."""
        return chunk.low is None

    def sweep(
        self,
        step: Callable[[Chunk, Any], Any],
        carry: Any = None,
        *,
        only_first: bool = False,
        give_back: bool = False,
    ) -> Any:
        """carry = step(chunk, carry) for all chunks, or those of the first boxes; waits for boxes that it needs."""
        held, boxes, came = self.copies, self.tile.first_boxes if only_first else self.tile.boxes, self._came
        self._came = max(came, boxes)

        def go_through(box: Any, carry: Any) -> Any:
            if came < boxes:
                pl.when(box >= came)(functools.partial(held.wait, box))
            rows = self.tile.chunk

            def go(i: Any, carry: Any) -> Any:
                return step(held.chunk(box, pl.multiple_of(i * rows, rows)), carry)

            carry = lax.fori_loop(*held.chunks(box), go, carry)
            if give_back:
                held.give_back(box)
            return carry

        return lax.fori_loop(0, boxes, go_through, carry)

    def zeros(self) -> jax.Array:
        """A chunk to sum into."""
        zeros: jax.Array = plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)
        return zeros

    def inside(self, values: jax.Array, chunk: Chunk) -> jax.Array:
        """The values with zeros at positions that are not in the instance, or were seen before."""
        return self.copies.inside(values, chunk)

    # Values per instance.

    def read_values(self, ref: Ref, *leading: Any) -> jax.Array:
        """The values per instance of this block from a (outer, *leading, positions) array."""
        if self.tile.reduces == "both":
            value: jax.Array = ref[(self.copies.outer, *leading, 0)]
            return value
        return plgpu.load(self._values(ref, leading), layout=self._vector, optimized=False)

    def write_values(self, ref: Ref, value: jax.Array, *leading: Any) -> None:
        if self.tile.reduces == "both":
            ref[(self.copies.outer, *leading, 0)] = value
        else:
            copies.store(self._values(ref, leading), value)

    def first_values(self, x: Ref) -> jax.Array:
        """One element of each instance, the same in all blocks that share it; x is the first source."""
        match self.tile.reduces:
            case "both":
                first: jax.Array = x[self.copies.first]
            case "rows":
                first = plgpu.load(x.at[self.copies.outer, 0, self._lanes], layout=self._vector, optimized=False)
            case "lanes":
                # From shared memory, where the rows beyond the last instance exist too. The sum is of one number.
                self._wait_for_all()
                index = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=self.layout)
                first = self.total(jnp.where(index == 0, self.read(0, self.copies.chunk(0, 0)), 0.0))
        return first.astype(jnp.float32)

    def total(self, values: jax.Array) -> jax.Array:
        """The sum of a chunk per instance. One axis at a time: a full reduction does not compile."""
        # Threads add each other's values crosswise, and each keeps the sum. Without this barrier one of them may round
        # a product that it adds and another not, so that they would disagree.
        values = lax.optimization_barrier(values)
        if self.tile.reduces == "rows":
            return jnp.sum(values, axis=0)
        total = jnp.sum(values, axis=1)
        return jnp.sum(total, axis=0) if self.tile.reduces == "both" else total

    def spread(self, value: jax.Array, shape: tuple[int, int] | None = None) -> jax.Array:
        """A value per instance as something that a chunk, or what has another shape, can be combined with."""
        if self.tile.reduces == "both":
            return value
        axis = 1 if self.tile.reduces == "rows" else 0
        spread: jax.Array = plgpu.layout_cast(lax.broadcast_in_dim(value, shape or self.shape, (axis,)), self.layout)
        return spread

    def count(self, rank: Any) -> Any:
        """Positions of an instance that the block of that rank works on."""
        return self._count(rank, self.tile.boxes, self.tile.block_rows)

    def first_count(self) -> Any:
        """Positions of an instance that the first boxes of this block hold."""
        tile = self.tile
        return self._count(self.rank, tile.first_boxes, tile.first_boxes * tile.rows)

    def exchange(self, values: Sequence[jax.Array]) -> parts.Parts:
        """The values of all blocks that share the instances of this one."""
        tile, numbers = self.tile, range(len(values))
        if tile.parts == 1:
            return parts.Few([tuple(values)])
        for i, value in enumerate(values):
            self._write_part(value, i)
        self.meeting.meet()
        if parts.are_few(tile):
            ranks = range(tile.parts)
            return parts.Few([tuple(self.read_values(self.partials, i, rank) for i in numbers) for rank in ranks])
        lanes = self._lanes if tile.reduces == "rows" else pl.ds(0, tile.lanes)

        def read(i: int, start: int, rows: int) -> jax.Array:
            where = self.partials.at[self.copies.outer, i, pl.ds(start, rows), lanes]
            values: jax.Array = plgpu.load(where, layout=self.layout, optimized=False)
            return values

        first = tuple(self.read_values(self.partials, i, 0) for i in numbers)
        return parts.Many(tile, first, read=read, spread=self.spread, sum_up=self.total)

    def _write_part(self, value: jax.Array, i: int) -> None:
        if self.tile.reduces == "both" and not parts.are_few(self.tile):
            lanes = self.tile.lanes
            self.partials[self.copies.outer, i, lax.div(self.rank, lanes), lax.rem(self.rank, lanes)] = value
        else:
            self.write_values(self.partials, value, i, self.rank)

    def _count(self, rank: Any, boxes: int, rows: int) -> Any:
        """Positions in so many boxes or rows of the block of that rank, as far as there are."""
        tile = self.tile
        if tile.reduces == "lanes":
            return jnp.float32(min(boxes * tile.lanes, tile.positions))
        if tile.parts == 1 and rows >= min(tile.block_rows, tile.extent):
            return jnp.float32(tile.positions)
        there = jnp.clip(tile.extent - rank * tile.block_rows, 0, rows)
        return (there * (tile.lanes if tile.reduces == "both" else 1)).astype(jnp.float32)

    def _wait_for_all(self) -> None:
        pl.loop(self._came, self.tile.boxes)(self.copies.wait)
        self._came = self.tile.boxes

    # Where things are.

    @property
    def _vector(self) -> Any:
        """How a vector of values per instance lies in registers."""
        return self.layout.reduce(0 if self.tile.reduces == "rows" else 1)

    @property
    def _lanes(self) -> Any:
        return pl.ds(self.index * self.tile.lanes, self.tile.lanes)

    def _values(self, ref: Ref, leading: tuple[Any, ...]) -> Ref:
        rows = self.tile.block_rows
        where = self._lanes if self.tile.reduces == "rows" else pl.ds(self.index * rows, rows)
        return ref.at[(self.copies.outer, *leading, where)]


def launch(body: Callable[..., None], name: str, tile: Tile, inputs: Any, outputs: Any, dtype: Any) -> Any:
    """Runs body(*inputs, *outputs, scratch=) on every thread block of the tile."""
    way_to_copy, way_to_meet = copies.way(tile), meeting.way(tile)
    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types={"scratch": {"copies": way_to_copy.scratch(tile, dtype), "meeting": way_to_meet.scratch(tile)}},
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
            approx_math=approximates(dtype),
            # Otherwise the compiler puts two barriers around every store. The kernel orders its own stores: what one
            # thread writes and another reads passes through the barriers of jaxnorm.gpu.copies, of jaxnorm.gpu.meeting
            # and of sums across warps.
            unsafe_no_auto_barriers=True,
        ),
        **way_to_meet.grid(tile),
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
    """What blocks exchange: that many values per instance and block, None where each is alone."""
    if tile.parts == 1:
        return None
    outer, positions = values_shape(tile)
    return jax.ShapeDtypeStruct((outer, values, *parts.shape(tile, positions)), jnp.float32)
