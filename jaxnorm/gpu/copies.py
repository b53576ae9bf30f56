"""How a thread block loads its part of an array into shared memory, reads and writes it there, and writes it back.

Bulk           bulk copies (the TMA unit of Hopper and newer), one box at a time
Plain          vector loads through registers; results go from registers to global memory
Asynchronous   the same, with boxes loaded by cp.async
Span           several channels-first instances, whose rows bulk copies cannot start at, as one contiguous span
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
    """Which part of x a thread block has.

    Attributes:
      outer: the first index of the array.
      index: of the block among those side by side.
      rank: of the block among those that share an instance.
    """

    outer: Any
    index: Any
    rank: Any


class Instance(NamedTuple):
    """The instance that a thread block works on, or the first of those that it works on side by side.

    Attributes:
      outer: where its values per instance are.
      first: the index of its first element in the array.
      begin: the position in a span where it begins; otherwise 0.
    """

    outer: Any
    first: tuple[Any, ...]
    begin: Any = 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is computed at a time.

    Attributes:
      box, row: where it is in shared memory.
      start: its first row in the array; for "lanes" its first lane.
      low, high: the positions along the instance that count, from low to high - 1; None is no bound.
    """

    box: Any
    row: Any
    start: Any
    low: Any = None
    high: Any = None


class Copies(abc.ABC):
    """The interface: start everything, wait for a box, read and write its chunks, write the box back, finish.

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

    @staticmethod
    @abc.abstractmethod
    def scratch(tile: Tile, dtype: Any) -> Any:
        """What start, wait and the rest need in shared memory."""

    @abc.abstractmethod
    def start(self) -> None:
        """Starts the copies of all boxes of all sources."""

    @abc.abstractmethod
    def wait(self, box: Any) -> None:
        """Waits until a box of all sources is loaded. Every box is waited for once."""

    @abc.abstractmethod
    def write_back(self, box: Any) -> None:
        """Starts the copies of a box to all targets, after its last write."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Waits until the thread block may end."""

    @abc.abstractmethod
    def chunk(self, instance: Instance, box: Any, row: Any) -> Chunk:
        """The chunk at that row of a box."""

    @abc.abstractmethod
    def write(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        """Writes a chunk of a target, perhaps to where the source of that number was."""

    def for_each_instance(self, body: Callable[[Instance], None]) -> None:
        """Runs the body once for all instances that are computed side by side."""
        body(Instance(self.place.outer, (self.place.outer, 0, 0)))

    def chunks(self, instance: Instance, box: Any) -> tuple[Any, Any]:
        """The half-open range (start, stop) of chunk indices of a box."""
        return 0, self.tile.rows // self.tile.chunk

    def read(self, number: int, chunk: Chunk) -> jax.Array:
        """A chunk of a source, in float32."""
        where = self.buffers[number].at[chunk.box, pl.ds(chunk.row, self.tile.chunk)]
        return plgpu.load(where, layout=self.layout, optimized=False).astype(jnp.float32)

    def keep(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        """Overwrites a chunk of a source in shared memory."""
        buffer = self.buffers[number]
        store(buffer.at[chunk.box, pl.ds(chunk.row, self.tile.chunk)], values.astype(buffer.dtype))

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
        """The positions of a chunk along the instance."""
        axis = 1 if self.tile.reduces == "lanes" else 0
        index: jax.Array = plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=self.layout) + chunk.start
        return index

    def _rows(self, start: Any, rows: int) -> tuple[Any, ...]:
        """The index of those rows of an array, and of the lanes that the block has."""
        lanes = self.tile.lanes
        return self.place.outer, pl.ds(start, rows), pl.ds(self.place.index * lanes, lanes)


class Bulk(Copies):
    """One copy and one barrier per box. A load fills what is beyond the end of the sample with zeros."""

    def __init__(self, tile: Tile, place: Place, sources: Any, targets: Any, scratch: Any) -> None:
        super().__init__(tile, place, sources, targets, scratch["buffers"])
        self.loaded = scratch["loaded"]

    @staticmethod
    def scratch(tile: Tile, dtype: Any) -> Any:
        # Mosaic GPU takes swizzled rows in any number. A swizzle moves 16 bytes at a time, so rows of 16 have none.
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

    def write_back(self, box: Any) -> None:
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
        # Shared memory must be read before the block ends. That the stores arrive, the end of the kernel waits for.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def chunk(self, instance: Instance, box: Any, row: Any) -> Chunk:
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
    """Nothing here checks bounds.

    So a box that would reach beyond the end of the instance is moved back to end there, and the rows that another box
    has too do not count in it. Their results are the same in both, so it does no harm to store them twice.
    """

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
        """Does nothing: start has loaded everything."""

    def write_back(self, box: Any) -> None:
        """Does nothing: write has stored everything."""

    def finish(self) -> None:
        """Does nothing: write has stored everything."""

    def chunk(self, instance: Instance, box: Any, row: Any) -> Chunk:
        low = self._unmoved(box) if self.tile.ragged else None
        return Chunk(box, row, self._first_row(box) + row, low=low)

    def write(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        target = self.targets[number]
        store(target.at[self._rows(chunk.start, self.tile.chunk)], values.astype(target.dtype))

    def _unmoved(self, box: Any) -> Any:
        return self.place.rank * self.tile.block_rows + box * self.tile.rows

    def _first_row(self, box: Any) -> Any:
        return jnp.minimum(self._unmoved(box), self.tile.extent - self.tile.rows)


class Asynchronous(Plain):
    """With cp.async all boxes are loaded at the same time, and the block waits until enough of them are complete."""

    @staticmethod
    def scratch(tile: Tile, dtype: Any) -> Any:
        # With tiles cp.async takes some lanes of an array. Without them Mosaic assumes that the rows are contiguous.
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
                # Empty copies, so that wait counts as many for this box as for others.
                for _ in self.sources:
                    _empty_copy()

    def _asynchronously(self, box: Any) -> None:
        where = self._rows(self._unmoved(box), self.tile.rows)
        for source, buffer in zip(self.sources, self.buffers, strict=True):
            mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(source.at[where], buffer.at[box], oob_mode=mode)

    def wait(self, box: Any) -> None:
        for known in range(self.tile.boxes):
            # How many copies may be incomplete is part of the instruction. A barrier of the block follows it.
            later = (self.tile.boxes - 1 - known) * self.tile.arrays
            pl.when(box == known)(functools.partial(plgpu.wait_gmem_to_smem, later))


class Span(Copies):
    """Instances that follow each other in memory, computed one after the other. Chunks may have parts of several.

    The span starts and ends at multiples of 16 bytes, which its instances do not.
    """

    @staticmethod
    def scratch(tile: Tile, dtype: Any) -> Any:
        return [plgpu.SMEM((tile.rows, tile.lanes), dtype)] * tile.arrays

    def start(self) -> None:
        self._through_registers(self.sources, self.buffers, into=True)
        # Other threads may have loaded the last rows than those that compute with them, and write them back in finish.
        _block_barrier()

    def wait(self, box: Any) -> None:
        """Does nothing: start has loaded everything."""

    def write_back(self, box: Any) -> None:
        """Does nothing: the chunks at its ends belong to other instances too, and finish writes everything back."""

    def finish(self) -> None:
        _block_barrier()
        self._through_registers(self.targets, self.buffers, into=False)

    def for_each_instance(self, body: Callable[[Instance], None]) -> None:
        """Runs the body for one instance after the other."""
        instances, positions = self.tile.span or (0, 0)

        @pl.loop(0, instances)
        def _(number: Any) -> None:
            index, begin = self.place.index, number * positions
            body(Instance(index * instances + number, first_of_span(self.tile, index, begin), begin))

    def chunks(self, instance: Instance, box: Any) -> tuple[Any, Any]:
        size = self.tile.chunk * self.tile.lanes
        end = instance.begin + self.tile.positions
        return lax.div(instance.begin, size), lax.div(end + (size - 1), size)

    def chunk(self, instance: Instance, box: Any, row: Any) -> Chunk:
        return Chunk(box, row, row, low=instance.begin, high=instance.begin + self.tile.positions)

    def read(self, number: int, chunk: Chunk) -> jax.Array:
        # What is not finite in one instance must not get into the sums of the next.
        return self.inside(self._resident(number, chunk).astype(jnp.float32), chunk)

    def write(self, number: int, chunk: Chunk, values: jax.Array) -> None:
        others, buffer = self._resident(number, chunk), self.buffers[number]
        own = jnp.where(self._counts(chunk), values.astype(buffer.dtype), others)
        store(buffer.at[pl.ds(chunk.row, self.tile.chunk)], own)

    def _resident(self, number: int, chunk: Chunk) -> jax.Array:
        """A chunk as it is in shared memory, with what belongs to other instances."""
        where = self.buffers[number].at[pl.ds(chunk.row, self.tile.chunk)]
        values: jax.Array = plgpu.load(where, layout=self.layout, optimized=False)
        return values

    def _positions(self, chunk: Chunk) -> jax.Array:
        rows, lanes = (plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=self.layout) for axis in (0, 1))
        index: jax.Array = (rows + chunk.start) * self.tile.lanes + lanes
        return index

    def _through_registers(self, arrays: Sequence[Ref], buffers: Sequence[Ref], *, into: bool) -> None:
        """Copies all rows of the span; the last chunk is moved back to end where the span does."""
        rows, chunk = self.tile.block_rows, self.tile.chunk

        def move(row: Any) -> None:
            for array, buffer in zip(arrays, buffers, strict=False):
                there, here = array.at[0, pl.ds(self.place.index * rows + row, chunk)], buffer.at[pl.ds(row, chunk)]
                source, target = (there, here) if into else (here, there)
                store(target, plgpu.load(source, layout=self.layout, optimized=False))

        pl.loop(0, rows // chunk * chunk, step=chunk)(move)
        if rows % chunk:
            # Some of its rows were written by other threads, with the same values.
            _block_barrier()
            move(rows - chunk)


def strategy(tile: Tile) -> type[Copies]:
    """The class for a tile."""
    if tile.copies in ("bulk", "span"):
        return Bulk if tile.copies == "bulk" else Span
    # cp.async moves 16 bytes per thread, 4 warps side by side; the interpreter and JAX before 0.12 do not have it.
    whole = tile.rows % 32 == 0 and tile.row_bytes > 16
    return Asynchronous if whole and not interpreted() and hasattr(plgpu, "wait_gmem_to_smem") else Plain


def first_of_span(tile: Tile, index: Any, begin: Any) -> tuple[Any, Any, Any]:
    """Where the instance that begins at that position of that span begins in the array.

    We count whole rows, which fit into 32 bits (Tile.largest_index); the array may have more than 2^31 positions.
    """
    return 0, index * tile.block_rows + lax.div(begin, tile.lanes), lax.rem(begin, tile.lanes)


def registers(lanes: int) -> Any:
    """How a chunk lies in the registers of a warpgroup: 4 neighboring lanes per thread, whole rows per warp."""
    if lanes == 4:
        tiling = plgpu.Tiling(((128, 4), (32, 4)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
    rows = 128 // lanes
    tiling = plgpu.Tiling(((4 * rows, lanes), (rows, lanes), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def store(ref: Ref, value: jax.Array) -> None:
    """Stores to shared or global memory, in the dtype of the reference."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # before JAX 0.12
        ref[...] = value


def _block_barrier() -> None:
    """Waits until all threads of the block are here, and see what the others wrote to shared memory."""

    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def wait(_: Any) -> None:
        warpgroup_barrier()

    wait()


def _empty_copy() -> None:
    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def commit(_: Any) -> None:
        inline_ptx("cp.async.commit_group;", has_side_effects=True)

    commit()
