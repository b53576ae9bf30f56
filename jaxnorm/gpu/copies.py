"""How a thread block's part of an array comes into shared memory, is read and written there, and goes back.

Bulk      bulk copies (the TMA unit of Hopper and newer), one box at a time
Plain     cp.async, or vector loads through registers; results go from registers to global memory
Span      several channels-first instances, whose rows bulk copies cannot start at, as one contiguous span
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import inline_ptx, warpgroup_barrier
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm.gpu.devices import interpreted
from jaxnorm.gpu.tile import Tile

# A reference to memory in a kernel.
Ref = Any


class Place(NamedTuple):
    """Which part of x a thread block has: of the outer, of the blocks side by side, of those that share an instance."""

    outer: Any
    index: Any
    rank: Any


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is computed at a time.

    Attributes:
      box, row: where it is held.
      start: its first row in the array; for "lanes" its first lane.
      low, high: the positions along the instance that count, from low to high - 1; None is no bound.
    """

    box: Any
    row: Any
    start: Any
    low: Any = None
    high: Any = None


class Copies(abc.ABC):
    """The interface: start everything, wait for a box, read and write its chunks, give the box back, finish.

    The compiler adds no barriers around stores to shared memory (see jaxnorm.gpu.block.launch). A chunk lies in the
    same registers each time, so a thread reads what it wrote itself. What one thread writes and another thread or a
    copy reads passes through a barrier that a class here places.
    """

    def __init__(
        self, tile: Tile, place: Place, sources: Sequence[Ref], targets: Sequence[Ref], buffers: Sequence[Ref]
    ) -> None:
        self.tile, self.place = tile, place
        self.sources, self.targets, self.buffers = sources, targets, buffers
        self.shape, self.layout = (tile.chunk, tile.lanes), registers(tile.lanes)
        # Which of the outer, and where the instance begins.
        self.outer = place.outer
        self.first: tuple[Any, ...] = (place.outer, 0, 0)

    @staticmethod
    @abc.abstractmethod
    def scratch(tile: Tile, dtype: Any) -> Any:
        """What start, wait and the rest need in shared memory."""

    @abc.abstractmethod
    def start(self) -> None:
        """Starts the copies of all boxes of all sources."""

    @abc.abstractmethod
    def wait(self, box: Any) -> None:
        """Until a box of all sources has come."""

    @abc.abstractmethod
    def give_back(self, box: Any) -> None:
        """Starts the copies of a box to all targets, after its last write."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Until all that was given back may be left."""

    @abc.abstractmethod
    def chunk(self, box: Any, row: Any) -> Chunk:
        """The chunk at that row of a box."""

    @abc.abstractmethod
    def write(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        """A chunk of a target; the source of that number may be gone then."""

    def read(self, number: int, chunk: Chunk) -> jax.Array:
        """A chunk of a source, in float32."""
        where = self.buffers[number].at[chunk.box, pl.ds(chunk.row, self.tile.chunk)]
        return plgpu.load(where, layout=self.layout, optimized=False).astype(jnp.float32)

    def keep(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        """Puts values where a chunk of a source is held."""
        buffer = self.buffers[number]
        store(buffer.at[chunk.box, pl.ds(chunk.row, self.tile.chunk)], values.astype(buffer.dtype))

    def for_each_instance(self, body: Callable[[], None]) -> None:
        """Runs the body once for all instances that are computed side by side."""
        body()

    def chunks(self, box: Any) -> tuple[Any, Any]:
        """The first and the last but one of the chunks of a box."""
        return 0, self.tile.rows // self.tile.chunk

    def inside(self, values: jax.Array, chunk: Chunk) -> jax.Array:
        """The values with zeros at positions that do not count."""
        if chunk.low is None and chunk.high is None:
            return values
        inside: jax.Array = jnp.where(self._counts(chunk), values, 0.0)
        return inside

    def _counts(self, chunk: Chunk) -> jax.Array:
        index = self._positions(chunk)
        bounds = [] if chunk.low is None else [index >= chunk.low]
        bounds += [] if chunk.high is None else [index < chunk.high]
        counts: jax.Array = bounds[0] if len(bounds) == 1 else bounds[0] & bounds[1]
        return counts

    def _positions(self, chunk: Chunk) -> jax.Array:
        """Along the instance."""
        axis = 1 if self.tile.reduces == "lanes" else 0
        index: jax.Array = plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=self.layout) + chunk.start
        return index

    def _rows(self, start: Any, rows: int) -> tuple[Any, ...]:
        """Those rows of an array, and the lanes that the block has."""
        lanes = self.tile.lanes
        return self.place.outer, pl.ds(start, rows), pl.ds(self.place.index * lanes, lanes)


class Bulk(Copies):
    """One copy and one barrier per box; beyond the end of the array zeros come, and what is stored there is dropped."""

    def __init__(self, tile: Tile, place: Place, sources: Any, targets: Any, scratch: Any) -> None:
        super().__init__(tile, place, sources, targets, scratch["buffers"])
        self.loaded = scratch["loaded"]

    @staticmethod
    def scratch(tile: Tile, dtype: Any) -> Any:
        # Swizzled rows are what Mosaic GPU accepts for any number of rows; 16 bytes is the swizzle's own width.
        swizzle = () if tile.row_bytes == 16 else (plgpu.SwizzleTransform(tile.row_bytes),)  # type: ignore[abstract]
        return {
            "buffers": [plgpu.SMEM((tile.boxes, tile.rows, tile.lanes), dtype, transforms=swizzle)] * tile.arrays,
            "loaded": plgpu.Barrier(num_arrivals=tile.arrays, num_barriers=tile.boxes),
        }

    def start(self) -> None:
        @pl.loop(0, self.tile.boxes)
        def _(box: Any) -> None:
            for source, buffer in zip(self.sources, self.buffers, strict=True):
                plgpu.copy_gmem_to_smem(source.at[self._box(box)], buffer.at[box], self.loaded.at[box])

    def wait(self, box: Any) -> None:
        plgpu.barrier_wait(self.loaded.at[box])

    def give_back(self, box: Any) -> None:
        plgpu.commit_smem()
        tile = self.tile
        if not tile.ragged or tile.reduces == "lanes":
            self._store_box(box)
            return
        # A copy of contiguous rows that are not swizzled is not a tensor copy, and so not clipped at the end of its
        # sample, only at the end of the array: it would overwrite the next sample. So every box stores its own rows.
        first = self._first_row(box)
        pl.when(first + tile.rows <= tile.extent)(functools.partial(self._store_box, box))
        last_rows = tile.extent % tile.rows
        if last_rows:
            pl.when(first + last_rows == tile.extent)(functools.partial(self._store_box, box, last_rows))

    def _store_box(self, box: Any, rows: int | None = None) -> None:
        """Starts the copies of the first rows of a box to all targets."""
        for target, buffer in zip(self.targets, self.buffers, strict=False):
            if rows is None:
                plgpu.copy_smem_to_gmem(buffer.at[box], target.at[self._box(box)])
            else:
                where = self._rows(self._first_row(box), rows)
                plgpu.copy_smem_to_gmem(buffer.at[box, pl.ds(0, rows)], target.at[where])

    def finish(self) -> None:
        # Shared memory must be read before the block leaves; that the stores arrive, the end of the kernel waits for.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def chunk(self, box: Any, row: Any) -> Chunk:
        tile = self.tile
        high = tile.extent if tile.ragged else None
        if tile.reduces == "lanes":
            return Chunk(box, row, box * tile.lanes, high=high)
        return Chunk(box, row, self._first_row(box) + row, high=high)

    def write(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        self.keep(number, chunk, values)

    def _first_row(self, box: Any) -> Any:
        return self.place.rank * self.tile.block_rows + box * self.tile.rows

    def _box(self, box: Any) -> tuple[Any, ...]:
        tile = self.tile
        if tile.reduces == "lanes":
            lanes = pl.ds(box * tile.lanes, tile.lanes)
            return self.place.outer, pl.ds(self.place.index * tile.rows, tile.rows), lanes
        return self._rows(self._first_row(box), tile.rows)


class Plain(Copies):
    """Into shared memory box by box; results go to global memory from registers.

    Nothing here checks bounds. So a box that would reach beyond the end of the array is moved back to end there, and
    what was seen before does not count in it.
    """

    def __init__(self, tile: Tile, place: Place, sources: Any, targets: Any, scratch: Any) -> None:
        super().__init__(tile, place, sources, targets, scratch)

    @staticmethod
    def scratch(tile: Tile, dtype: Any) -> Any:
        return [plgpu.SMEM((tile.boxes, tile.rows, tile.lanes), dtype)] * tile.arrays

    def start(self) -> None:
        pl.loop(0, self.tile.boxes)(self._through_registers)

    def _through_registers(self, box: Any) -> None:
        @pl.loop(0, self.tile.rows, step=self.tile.chunk)
        def _(row: Any) -> None:
            where = self._rows(self._first_row(box) + row, self.tile.chunk)
            values = [plgpu.load(source.at[where], layout=self.layout, optimized=False) for source in self.sources]
            for buffer, value in zip(self.buffers, values, strict=True):
                store(buffer.at[box, pl.ds(row, self.tile.chunk)], value)

    def wait(self, box: Any) -> None:
        """Everything is there after start."""

    def give_back(self, box: Any) -> None:
        """Everything is there after write."""

    def finish(self) -> None:
        """Everything is there after write."""

    def chunk(self, box: Any, row: Any) -> Chunk:
        low = self._unmoved(box) if self.tile.ragged else None
        return Chunk(box, row, self._first_row(box) + row, low=low)

    def write(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        target = self.targets[number]
        store(target.at[self._rows(chunk.start, self.tile.chunk)], values.astype(target.dtype))

    def _unmoved(self, box: Any) -> Any:
        return self.place.rank * self.tile.block_rows + box * self.tile.rows

    def _first_row(self, box: Any) -> Any:
        return jnp.minimum(self._unmoved(box), self.tile.extent - self.tile.rows)


class Span(Copies):
    """Instances that follow each other in memory, one after the other: each has a part of the chunks that it begins in.

    The span starts and ends at multiples of 16 bytes, which its instances do not.
    """

    def __init__(self, tile: Tile, place: Place, sources: Any, targets: Any, scratch: Any) -> None:
        super().__init__(tile, place, sources, targets, scratch)
        self.begin: Any = 0

    @staticmethod
    def scratch(tile: Tile, dtype: Any) -> Any:
        return [plgpu.SMEM((tile.rows, tile.lanes), dtype)] * tile.arrays

    def start(self) -> None:
        self._through_registers(self.sources, self.buffers, into=True)
        # The last rows lie in other threads here than in the chunks, and so in finish.
        _block_barrier()

    def wait(self, box: Any) -> None:
        """Everything is there after start."""

    def give_back(self, box: Any) -> None:
        """The chunks at its ends belong to other instances too: everything goes back at last."""

    def finish(self) -> None:
        _block_barrier()
        self._through_registers(self.targets, self.buffers, into=False)

    def for_each_instance(self, body: Callable[[], None]) -> None:
        instances, positions = self.tile.span or (0, 0)

        @pl.loop(0, instances)
        def _(instance: Any) -> None:
            self.begin, self.outer = instance * positions, self.place.index * instances + instance
            self.first = first_of_span(self.tile, self.place.index, self.begin)
            body()

    def chunks(self, box: Any) -> tuple[Any, Any]:
        size = self.tile.chunk * self.tile.lanes
        end = self.begin + self.tile.positions
        return lax.div(self.begin, size), lax.div(end + (size - 1), size)

    def chunk(self, box: Any, row: Any) -> Chunk:
        return Chunk(box, row, row, low=self.begin, high=self.begin + self.tile.positions)

    def read(self, number: int, chunk: Chunk) -> jax.Array:
        # What is not finite in one instance must not get into the sums of the next.
        return self.inside(self._held(number, chunk).astype(jnp.float32), chunk)

    def write(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        others, buffer = self._held(number, chunk), self.buffers[number]
        own = jnp.where(self._counts(chunk), values.astype(buffer.dtype), others)
        store(buffer.at[pl.ds(chunk.row, self.tile.chunk)], own)

    def _held(self, number: int, chunk: Chunk) -> jax.Array:
        where = self.buffers[number].at[pl.ds(chunk.row, self.tile.chunk)]
        held: jax.Array = plgpu.load(where, layout=self.layout, optimized=False)
        return held

    def _positions(self, chunk: Chunk) -> jax.Array:
        rows, lanes = (plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=self.layout) for axis in (0, 1))
        index: jax.Array = (rows + chunk.start) * self.tile.lanes + lanes
        return index

    def _through_registers(self, arrays: Sequence[Ref], buffers: Sequence[Ref], *, into: bool) -> None:
        """Copies all rows of the span; the last chunk is moved back to end where the span does."""
        rows, chunk = self.tile.block_rows, self.tile.chunk

        def move(row: Any) -> None:
            for array, buffer in zip(arrays, buffers, strict=False):
                where = array.at[0, pl.ds(self.place.index * rows + row, chunk)]
                held = buffer.at[pl.ds(row, chunk)]
                source, target = (where, held) if into else (held, where)
                store(target, plgpu.load(source, layout=self.layout, optimized=False))

        pl.loop(0, rows // chunk * chunk, step=chunk)(move)
        if rows % chunk:
            # Some of its rows were written by other threads, with the same values.
            _block_barrier()
            move(rows - chunk)


def first_of_span(tile: Tile, index: Any, begin: Any) -> tuple[Any, Any, Any]:
    """Where the instance that begins at that position of that span begins in the array.

    We count whole rows, which fit into 32 bits (Tile.largest_index); the array may have more than 2^31 positions.
    """
    return 0, index * tile.block_rows + lax.div(begin, tile.lanes), lax.rem(begin, tile.lanes)


class Asynchronous(Plain):
    """With cp.async: the boxes are on their way all at once, and counted as they come."""

    @staticmethod
    def scratch(tile: Tile, dtype: Any) -> Any:
        # Tiles are how cp.async takes some lanes of an array; without, Mosaic takes the rows to be contiguous.
        transforms = (plgpu.TilingTransform((8, tile.lanes)), plgpu.SwizzleTransform(tile.row_bytes))  # type: ignore[abstract]
        return [plgpu.SMEM((tile.boxes, tile.rows, tile.lanes), dtype, transforms=transforms)] * tile.arrays

    def start(self) -> None:
        @pl.loop(0, self.tile.boxes)
        def _(box: Any) -> None:
            if not self.tile.ragged:
                self._asynchronously(box)
                return
            # Mosaic's cp.async starts at multiples of 8 rows, which a box that is moved back does not.
            whole = self._unmoved(box) + self.tile.rows <= self.tile.extent

            @pl.when(whole)
            def _() -> None:
                self._asynchronously(box)

            @pl.when(~whole)
            def _() -> None:
                self._through_registers(box)
                # So that this box counts as much as others.
                for _ in self.sources:
                    _nothing_asynchronously()

    def _asynchronously(self, box: Any) -> None:
        where = self._rows(self._unmoved(box), self.tile.rows)
        for source, buffer in zip(self.sources, self.buffers, strict=True):
            mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(source.at[where], buffer.at[box], oob_mode=mode)

    def wait(self, box: Any) -> None:
        for known in range(self.tile.boxes):
            # How many may still be on their way is part of the instruction.
            later = (self.tile.boxes - 1 - known) * self.tile.arrays
            pl.when(box == known)(functools.partial(plgpu.wait_gmem_to_smem, later))


def _block_barrier() -> None:
    """Until all threads of the block are here and see what the others wrote to shared memory."""

    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def wait(_: Any) -> None:
        warpgroup_barrier()

    wait()


def _nothing_asynchronously() -> None:
    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def commit(_: Any) -> None:
        inline_ptx("cp.async.commit_group;", has_side_effects=True)

    commit()


def way(tile: Tile) -> type[Copies]:
    """The class for a tile."""
    if tile.copies in ("bulk", "span"):
        return Bulk if tile.copies == "bulk" else Span
    # cp.async moves 16 bytes per thread, 4 warps side by side; the interpreter and JAX before 0.12 do not have it.
    whole = tile.rows % 32 == 0 and tile.row_bytes > 16
    return Asynchronous if whole and not interpreted() and hasattr(plgpu, "wait_gmem_to_smem") else Plain


def registers(lanes: int) -> Any:
    """How a chunk lies in the registers of a warpgroup: 4 neighbouring lanes per thread, whole rows per warp."""
    if lanes == 4:
        tiling = plgpu.Tiling(((128, 4), (32, 4)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
    rows = 128 // lanes
    tiling = plgpu.Tiling(((4 * rows, lanes), (rows, lanes), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def store(ref: Ref, value: jax.Array) -> None:
    """To shared or global memory, in the dtype of the reference."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # before JAX 0.12
        ref[...] = value
