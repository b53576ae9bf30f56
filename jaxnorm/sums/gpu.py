"""Sums for GPUs, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

# Rows per partial sum on a GPU. XLA for GPU fuses a column reduction of up to 64 rows with the broadcast that
# feeds it; from 128 rows it splits the reduction itself and writes x-sized temporaries first. Fewer rows cost
# more partial sums. Beyond 256 lanes it fuses no more than 32 rows of a half-precision backward pass.
_CHUNK, _CHUNK_OF_WIDE_ROWS, _WIDE = 64, 32, 256


def sum_chunks(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Of views: chunks of rows first, all sums in one reduction, then the partial sums.

    Reduced in one step, a channels-last array makes XLA for GPU write x-sized float32 temporaries. The barrier keeps
    the two steps from being merged again.
    """
    partial = lax.optimization_barrier(_sum_together(tuple(map(_chunked, values)), axis=2))
    return tuple(value[:, None] for value in _sum_together(partial, axis=1))


def _chunked(value: jax.Array) -> jax.Array:
    """(B, R, K) to (B, chunks, chunk, K), filled up with zeros."""
    batch, rows, lanes = value.shape
    chunk = _CHUNK if lanes <= _WIDE else _CHUNK_OF_WIDE_ROWS
    chunks = -(-rows // chunk)
    padding = ((0, 0), (0, chunks * chunk - rows), (0, 0))
    return jnp.pad(value, padding).reshape(batch, chunks, chunk, lanes)


def _sum_together(values: tuple[jax.Array, ...], *, axis: int) -> tuple[jax.Array, ...]:
    zeros = tuple(jnp.zeros((), value.dtype) for value in values)
    sums: tuple[jax.Array, ...] = lax.reduce(
        values, zeros, lambda p, q: tuple(a + b for a, b in zip(p, q, strict=True)), (axis,)
    )
    return sums
