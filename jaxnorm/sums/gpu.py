"""Sums for GPUs, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

# Rows per partial sum on a GPU. XLA for GPU fuses a column reduction of up to 64 rows with the broadcast that
# feeds it; from 128 rows it splits the reduction itself and writes x-sized temporaries first. Fewer rows cost
# more partial sums. More than two sums, those of what an activation captures, it fuses only where each thread adds up
# a few rows.
_CHUNK, _CHUNK_OF_MANY_SUMS = 64, 16
# Below so many lanes XLA does not fuse a column reduction at all, and writes x-sized temporaries first. Several rows
# side by side fill the lanes of a warp. A single lane is a sum of consecutive numbers, which it does fuse.
_NARROW, _WARP = 15, 32


def sum_chunks(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Of views: chunks of rows first, all sums in one reduction, then the partial sums.

    Reduced in one step, a channels-last array makes XLA for GPU write x-sized float32 temporaries. The barrier keeps
    the two steps from being merged again.
    """
    chunk = _CHUNK if len(values) <= 2 else _CHUNK_OF_MANY_SUMS
    partial = lax.optimization_barrier(_sum_together(tuple(_chunked(value, chunk) for value in values), axis=2))
    batch, chunks, _ = partial[0].shape
    lanes = values[0].shape[2]
    partial = tuple(value.reshape(batch, chunks * _side_by_side(lanes), lanes) for value in partial)
    return _sum_together(partial, axis=1)


def _chunked(value: jax.Array, chunk: int) -> jax.Array:
    """(B, R, K) to (B, chunks, chunk, lanes), filled up with zeros; lanes are those of one or several rows."""
    batch, rows, lanes = value.shape
    side_by_side = _side_by_side(lanes)
    chunk = min(chunk, -(-rows // side_by_side))
    chunks = -(-rows // (chunk * side_by_side))
    padding = ((0, 0), (0, chunks * chunk * side_by_side - rows), (0, 0))
    return jnp.pad(value, padding).reshape(batch, chunks, chunk, side_by_side * lanes)


def _side_by_side(lanes: int) -> int:
    return -(-_WARP // lanes) if 1 < lanes < _NARROW else 1


def _sum_together(values: tuple[jax.Array, ...], *, axis: int) -> tuple[jax.Array, ...]:
    zeros = tuple(jnp.zeros((), value.dtype) for value in values)
    sums: tuple[jax.Array, ...] = lax.reduce(
        values, zeros, lambda p, q: tuple(a + b for a, b in zip(p, q, strict=True)), (axis,)
    )
    return sums
