"""Sums for GPUs, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

# Rows per partial sum. XLA for GPU fuses a column reduction of that many rows with the broadcast that feeds it; of much
# longer ones it splits some itself and writes x-sized temporaries first. Fewer rows cost more partial sums. More than
# two sums, those of what an activation captures, it fuses only where each thread adds up a few rows.
_CHUNKS, _CHUNK_OF_MANY_SUMS = (256, 128, 64, 32), 16
# Thread blocks, a warp wide. XLA takes a reduction of fewer for slow, and what feeds it for better computed
# elsewhere, which then goes through memory.
_ENOUGH_BLOCKS = 256
# With fewer lanes XLA writes x-sized temporaries before a column reduction of up to a few million numbers, with fewer
# than 15 before any. Several rows side by side fill a warp. A single lane is a sum of consecutive numbers, which it
# does fuse.
_WARP = 32


def sum_chunks(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Of views: chunks of rows first, all sums in one reduction, then the partial sums.

    Reduced in one step, a channels-last array makes XLA for GPU write x-sized float32 temporaries. The barrier keeps
    the two steps from being merged again.
    """
    if len(values) == 2:
        # What two operands of a reduction have in common, such as the cotangent before the activation, XLA counts twice
        # when it asks whether to fuse it; it then writes it to memory, in float32. The parts of a complex number are
        # added like two real ones.
        (pair,) = sum_chunks((lax.complex(*values),))
        return pair.real, pair.imag
    batch, _, lanes = values[0].shape
    chunked = tuple(_chunked(value, _CHUNKS if len(values) == 1 else (_CHUNK_OF_MANY_SUMS,)) for value in values)
    partial = lax.optimization_barrier(_sum_together(chunked, axis=2))
    chunks = partial[0].shape[1] * _side_by_side(lanes)
    return _sum_together(tuple(value.reshape(batch, chunks, lanes) for value in partial), axis=1)


def _chunked(value: jax.Array, chunks: tuple[int, ...]) -> jax.Array:
    """(B, R, K) to (B, chunks, chunk, lanes), filled up with zeros; lanes are those of one or several rows."""
    batch, rows, lanes = value.shape
    side_by_side = _side_by_side(lanes)
    steps, width = -(-rows // side_by_side), side_by_side * lanes
    blocks = {chunk: batch * -(-steps // chunk) * -(-width // _WARP) for chunk in chunks}
    # The longest that leaves enough thread blocks, else the shortest.
    chunk = min(steps, next((chunk for chunk in chunks if blocks[chunk] >= _ENOUGH_BLOCKS), chunks[-1]))
    count = -(-steps // chunk)
    padding = ((0, 0), (0, count * chunk * side_by_side - rows), (0, 0))
    return jnp.pad(value, padding).reshape(batch, count, chunk, width)


def _side_by_side(lanes: int) -> int:
    return -(-_WARP // lanes) if lanes > 1 else 1


def _sum_together(values: tuple[jax.Array, ...], *, axis: int) -> tuple[jax.Array, ...]:
    zeros = tuple(jnp.zeros((), value.dtype) for value in values)
    sums: tuple[jax.Array, ...] = lax.reduce(
        values, zeros, lambda p, q: tuple(a + b for a, b in zip(p, q, strict=True)), (axis,)
    )
    return sums
