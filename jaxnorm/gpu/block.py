"""What one thread block of the GPU kernels knows and does, whichever way the work is cut (see jaxnorm.gpu.tiling)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm.gpu.tiling import REDUCTION_SCRATCH_BYTES, Tile

# A reference to memory in a kernel.
Ref = Any


class Block:
    """A thread block: where its part of x lies, how it sums it and how it spreads a value per instance over it.

    A value per instance is a vector over the lanes of the tile ("rows"), over its rows ("lanes"), or a scalar ("both").
    """

    def __init__(self, tile: Tile) -> None:
        index = lax.axis_index("blocks")
        self.tile = tile
        self.rank = lax.axis_index("cluster")
        self.outer, self.index = lax.div(index, tile.blocks), lax.rem(index, tile.blocks)
        self.shape = (tile.chunk, tile.lanes)
        self.layout = _registers(tile.lanes)

    # Memory.

    def load_boxes(self, sources: Sequence[Ref], buffers: Sequence[Ref], loaded: Ref) -> None:
        """Starts all copies of the block's part into shared memory."""

        @pl.loop(0, self.tile.boxes)
        def _(box: Any) -> None:
            for source, buffer in zip(sources, buffers, strict=True):
                plgpu.copy_gmem_to_smem(self._box(source, box), buffer.at[box], loaded.at[box])

    def store_box(self, buffer: Ref, target: Ref, box: Any) -> None:
        """Starts the copy of a box back; those beyond the end of the array are clipped."""
        plgpu.copy_smem_to_gmem(buffer.at[box], self._box(target, box))

    def read(self, buffer: Ref, box: Any, row: Any) -> jax.Array:
        """A chunk, in float32."""
        chunk = plgpu.load(buffer.at[box, pl.ds(row, self.tile.chunk)], layout=self.layout, optimized=False)
        return chunk.astype(jnp.float32)

    def write(self, buffer: Ref, box: Any, row: Any, chunk: jax.Array) -> None:
        _store(buffer.at[box, pl.ds(row, self.tile.chunk)], chunk.astype(buffer.dtype))

    def read_values(self, ref: Ref, *leading: Any) -> jax.Array:
        """The values per instance of this block from a (outer, *leading, positions) array."""
        if self.tile.reduces == "both":
            value: jax.Array = ref[(self.outer, *leading, 0)]
            return value
        return plgpu.load(self._values(ref, leading), layout=self._vector, optimized=False)

    def write_values(self, ref: Ref, value: jax.Array, *leading: Any) -> None:
        if self.tile.reduces == "both":
            ref[(self.outer, *leading, 0)] = value
        else:
            _store(self._values(ref, leading), value)

    def first_values(self, x: Ref, buffer: Ref) -> jax.Array:
        """One element of each instance, the same in all blocks of a cluster. For "lanes" the boxes must have come."""
        match self.tile.reduces:
            case "both":
                first: jax.Array = x[self.outer, 0, 0]
            case "rows":
                first = plgpu.load(x.at[self.outer, 0, self._lanes], layout=self._vector, optimized=False)
            case "lanes":
                # From shared memory, where the rows beyond the last instance exist too. The sum is of one number.
                index = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=self.layout)
                first = self.total(jnp.where(index == 0, self.read(buffer, 0, 0), 0.0))
        return first.astype(jnp.float32)

    # Arithmetic.

    def sweep(
        self,
        step: Callable[[Any, Any, Any], Any],
        carry: Any = None,
        *,
        before: Callable[[Any], None] | None = None,
        after: Callable[[Any], None] | None = None,
    ) -> Any:
        """carry = step(box, row, carry) for all chunks; before and after see every box once."""
        chunks, chunk = self.tile.rows // self.tile.chunk, self.tile.chunk

        def go_through(box: Any, carry: Any) -> Any:
            if before is not None:
                before(box)
            carry = lax.fori_loop(0, chunks, lambda i, carry: step(box, pl.multiple_of(i * chunk, chunk), carry), carry)
            if after is not None:
                after(box)
            return carry

        return lax.fori_loop(0, self.tile.boxes, go_through, carry)

    def zeros(self) -> jax.Array:
        """A chunk to sum into."""
        zeros: jax.Array = plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)
        return zeros

    def inside(self, chunk: jax.Array, box: Any, row: Any) -> jax.Array:
        """The chunk with zeros where the tile reaches beyond the end of the instance."""
        tile = self.tile
        if not tile.ragged:
            return chunk
        if tile.reduces == "lanes":
            axis, start = 1, box * tile.lanes
        else:
            axis, start = 0, self.rank * tile.block_rows + box * tile.rows + row
        index = plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=self.layout)
        inside: jax.Array = jnp.where(index + start < tile.extent, chunk, 0.0)
        return inside

    def total(self, chunk: jax.Array) -> jax.Array:
        """The sum of a chunk per instance. One axis at a time: a full reduction does not compile."""
        if self.tile.reduces == "rows":
            return jnp.sum(chunk, axis=0)
        total = jnp.sum(chunk, axis=1)
        return jnp.sum(total, axis=0) if self.tile.reduces == "both" else total

    def spread(self, value: jax.Array) -> jax.Array:
        """A value per instance as something that a chunk can be combined with."""
        if self.tile.reduces == "both":
            return value
        axis = 1 if self.tile.reduces == "rows" else 0
        spread: jax.Array = plgpu.layout_cast(lax.broadcast_in_dim(value, self.shape, (axis,)), self.layout)
        return spread

    def count(self, rank: Any) -> jax.Array:
        """Positions of an instance that the block of that rank holds."""
        tile = self.tile
        if tile.cluster == 1:
            return jnp.float32(tile.positions)
        rows = jnp.clip(tile.extent - rank * tile.block_rows, 0, tile.block_rows)
        return (rows * (tile.lanes if tile.reduces == "both" else 1)).astype(jnp.float32)

    def exchange(self, values: Sequence[jax.Array], partials: Ref, met: Ref) -> list[tuple[jax.Array, ...]]:
        """The values of all blocks of the cluster, by rank, through global memory.

        The barrier is there for the interpreter, which checks it. It orders the blocks, but says nothing about memory:
        the PTX does, a release and an acquire by all threads at cluster scope, and the interpreter skips it.
        """
        for i, value in enumerate(values):
            self.write_values(partials, value, self.rank, i)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        _fence()
        return [
            tuple(self.read_values(partials, rank, i) for i in range(len(values))) for rank in range(self.tile.cluster)
        ]

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
        return ref.at[(self.outer, *leading, where)]

    def _box(self, ref: Ref, box: Any) -> Ref:
        tile = self.tile
        if tile.reduces == "lanes":
            rows, lanes = pl.ds(self.index * tile.rows, tile.rows), pl.ds(box * tile.lanes, tile.lanes)
        else:
            rows, lanes = pl.ds(self.rank * tile.block_rows + box * tile.rows, tile.rows), self._lanes
        return ref.at[self.outer, rows, lanes]


def launch(body: Callable[..., None], name: str, tile: Tile, inputs: Sequence[Any], outputs: Any, dtype: Any) -> Any:
    """Runs body(*inputs, *outputs, buffers=, loaded=, met=) on every thread block of the tile."""
    scratch: Any = {
        "buffers": [_buffer(tile, dtype)] * tile.arrays,
        "loaded": plgpu.Barrier(num_arrivals=tile.arrays, num_barriers=tile.boxes),
        "met": plgpu.ClusterBarrier(collective_axes=("cluster",)) if tile.cluster > 1 else None,
    }
    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(tile.shape[0] * tile.blocks,),
        grid_names=("blocks",),
        cluster=(tile.cluster,),
        cluster_names=("cluster",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES),
    )
    # Python numbers are 64 bits wide under jax_enable_x64: its indices would not mix with those of the grid.
    with jax.enable_x64(False):
        return kernel(*inputs)


def values_to_kernel(tile: Tile, value: jax.Array) -> jax.Array:
    """Values per instance, (B, 1, K), as (outer, positions), padded to whole thread blocks.

    Vectors are read and written without a check of bounds, unlike boxes.
    """
    outer, positions = values_shape(tile)
    value = value.reshape(outer, -1)
    return jnp.pad(value, ((0, 0), (0, positions - value.shape[1])))


def values_from_kernel(tile: Tile, value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse, to (B, 1, K)."""
    return value[:, : tile.shape[1]].reshape(shape) if tile.reduces == "lanes" else value.reshape(shape)


def values_shape(tile: Tile) -> tuple[int, int]:
    outer, _, lanes = tile.shape
    return outer, {"rows": lanes, "both": 1, "lanes": tile.blocks * tile.block_rows}[tile.reduces]


def values_type(tile: Tile, *leading: int) -> jax.ShapeDtypeStruct:
    outer, positions = values_shape(tile)
    return jax.ShapeDtypeStruct((outer, *leading, positions), jnp.float32)


def _buffer(tile: Tile, dtype: Any) -> Any:
    # Swizzled rows are what Mosaic GPU accepts for any number of rows; 16 bytes is the width of the swizzle itself.
    transforms = () if tile.row_bytes == 16 else (plgpu.SwizzleTransform(tile.row_bytes),)  # type: ignore[abstract]
    return plgpu.SMEM((tile.boxes, tile.rows, tile.lanes), dtype, transforms=transforms)


def _registers(lanes: int) -> Any:
    """How a chunk lies in the registers of a warpgroup: 4 neighbouring lanes per thread, whole rows per warp."""
    if lanes == 4:
        tiling = plgpu.Tiling(((128, 4), (32, 4)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
    rows = 128 // lanes
    tiling = plgpu.Tiling(((4 * rows, lanes), (rows, lanes), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _store(ref: Ref, value: jax.Array) -> None:
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # before JAX 0.12
        ref[...] = value


def _fence() -> None:
    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def fence(_: Any) -> None:
        for instruction in ("arrive.release.aligned", "wait.acquire.aligned"):
            inline_ptx(f"barrier.cluster.{instruction};", has_side_effects=True, convergent=True)

    fence()
