"""Sums for CPUs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Terms = Callable[..., tuple[jax.Array, ...]]

# The axis of the views, (B, R, K) or (R, K), along which the positions lie.
_ROWS = -2
# How many rows one loop adds up, the best first. LLVM unrolls a loop over so many completely and then computes
# neighbouring sums side by side, in vectors; where it does not, because there are more rows or the terms are long, it
# computes one after the other, at a fifth of the speed. Nor should there be fewer: the sums are written and read again.
_OF_TERMS, _OF_LONG_TERMS = (8, 9, 10, 7, 6), (2,)
# Operations. The backward pass of a ReLU has 10, of silu 13, of gelu 25 and more.
_LONG = 24
# The same of sums, which are but loaded and added, while they are so many that one loop would be too long, but not so
# many that the library pays: it takes as long over a sum as a loop over hundreds of numbers.
_OF_SUMS, _SHORT = (16, 15, 14, 13, 12, 11, 10, 9), 128
# Rows of sums that one loop adds up: LLVM unrolls over 32; of so few numbers that the library does not take them, any
# loop is fast enough.
_LAST, _LAST_OF_FEW = 32, 64
_FEW = 4096
# Rows of sums that are no loop of their own: whoever takes their sum adds them up again. Terms would be too much.
_ONE_BY_ONE = 4


def sum_tree(terms: Terms, *arrays: Any) -> tuple[jax.Array, ...]:
    """Of views: a few rows at a time, all terms in one reduction, and then their sums.

    A reduction of a single term XLA for CPU hands to a library (YNNPACK), and with it the term, which the library
    writes to memory before it adds it up. A reduction of several terms XLA compiles itself, into a loop that reads each
    array once. What the library does well are long sums of what is in memory already. So a single term, which should
    be of a small array, is written by a loop of XLA's.
    """
    traced = jax.make_jaxpr(terms)(*arrays)
    if len(traced.out_avals) == 1:
        return _sum_of_rows(lax.optimization_barrier(terms(*arrays)))
    return _sum(terms, arrays, _OF_LONG_TERMS if _operations(traced) > _LONG else _OF_TERMS)


def _sum(terms: Terms, arrays: tuple[Any, ...], ways: Sequence[int]) -> tuple[jax.Array, ...]:
    count = _count(arrays)
    if count <= max(ways):
        return _sum_rows(terms(*arrays))
    # Rows left over are one more loop, unless there are no more than two.
    way = min(ways, key=lambda way: count % way)
    # The rows that are added are far apart: so neighbours stay neighbours.
    far = count // way
    added = _sum_rows(tuple(map(_split(way), terms(*_rows(arrays, 0, far * way)))), axis=_ROWS - 1)
    # Else XLA computes the sums again for each of their uses.
    total = _sum_of_sums(lax.optimization_barrier(added))
    if count % way == 0:
        return total
    return tuple(map(jnp.add, total, _sum_rows(terms(*_rows(arrays, far * way, count)))))


def _sum_of_sums(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    if _most_of_a_loop(values) < values[0].shape[_ROWS] <= _SHORT:
        return _sum(lambda *sums: sums, values, _OF_SUMS)
    return _sum_of_rows(values)


def _sum_of_rows(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Over rows that are in memory: a loop where they are few, else by the library."""
    count = values[0].shape[_ROWS]
    if count <= _ONE_BY_ONE:
        return _added_one_by_one(values)
    if count <= _most_of_a_loop(values):
        return _sum_rows(values)
    # The barrier keeps what follows from the library, which takes that too where it has 4096 elements.
    totals = lax.optimization_barrier(tuple(jnp.sum(value, axis=_ROWS) for value in values))
    return tuple(totals)


def _most_of_a_loop(values: tuple[jax.Array, ...]) -> int:
    """Rows that are in memory."""
    return _LAST_OF_FEW if values[0].size < _FEW else _LAST


def _sum_rows(values: tuple[jax.Array, ...], axis: int = _ROWS) -> tuple[jax.Array, ...]:
    if values[0].shape[axis] <= 2:
        return _added_one_by_one(values, axis)
    zeros = tuple(jnp.zeros((), value.dtype) for value in values)
    axes = (values[0].ndim + axis,)
    sums: tuple[jax.Array, ...] = lax.reduce(values, zeros, lambda p, q: tuple(map(jnp.add, p, q)), axes)
    return sums


def _added_one_by_one(values: tuple[jax.Array, ...], axis: int = _ROWS) -> tuple[jax.Array, ...]:
    def rows(value: jax.Array) -> list[jax.Array]:
        return [row.squeeze(axis) for row in jnp.split(value, value.shape[axis], axis=axis)]

    return tuple(functools.reduce(jnp.add, rows(value)) for value in values)


def _split(way: int) -> Callable[[jax.Array], jax.Array]:
    """(..., R, K) to (..., way, R / way, K)."""

    def split(value: jax.Array) -> jax.Array:
        *batch, rows, lanes = value.shape
        return value.reshape(*batch, way, rows // way, lanes)

    return split


def _rows(arrays: tuple[Any, ...], start: int, stop: int) -> tuple[Any, ...]:
    rows: tuple[Any, ...] = jax.tree.map(lambda array: lax.slice_in_dim(array, start, stop, axis=_ROWS), arrays)
    return rows


def _count(arrays: tuple[Any, ...]) -> int:
    count: int = jax.tree.leaves(arrays)[0].shape[_ROWS]
    return count


def _operations(jaxpr: Any) -> int:
    """Of a jaxpr and all that it calls."""

    def of(equation: Any) -> int:
        called = [value for value in equation.params.values() if hasattr(value, "eqns")]
        return sum(map(_operations, called)) if called else 1

    return sum(map(of, jaxpr.eqns))
