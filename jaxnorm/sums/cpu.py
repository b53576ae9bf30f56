"""Sums for CPUs."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.activations.cost import steps

Terms = Callable[..., tuple[jax.Array, ...]]

# How many rows one loop adds up, the best first. LLVM unrolls a loop over so many completely and then computes
# neighbouring sums side by side, in vectors; where it does not, because there are more rows or the terms are long (see
# activations.cost), it computes one after the other, at a fifth of the speed. Nor should there be fewer: the sums are
# written and read again.
_OF_SHORT_TERMS, _OF_TERMS = (16, 15, 14, 13, 12, 11, 10, 9), (8, 9, 10, 7, 6)
# Of short terms. Forward it is 5, and 6 in half precision; backward 21 and 24 of a ReLU.
_FEW_STEPS = 8
# Elements and rows from which it pays to write half as many sums: of less XLA computes them on fewer threads.
_LARGE, _LARGE_ROWS = 2**18, 512
# Sums are but loaded and added: by loops while there are so few rows of them that the library does not pay, which takes
# as long over a sum as a loop over hundreds of numbers; and while they are so many elements that the library divides
# them among threads, and yet so few that it takes twice as long as loops.
_SHORT, _DIVIDED = 128, range(2**15, 2**19)
# Rows of sums that one loop adds up: LLVM unrolls over 32; of few numbers any loop is fast enough.
_LAST, _LAST_OF_FEW = 32, 128
_FEW = 2**13
# Rows of sums that are no loop of their own: whoever takes their sum adds them up again. Terms would be too much.
_ONE_BY_ONE = 4


def sum_tree(terms: Terms, *arrays: Any, axis: int) -> tuple[jax.Array, ...]:
    """Over that axis of views, a few rows at a time, all terms in one reduction, and then their sums.

    A reduction of a single term XLA for CPU hands to a library (YNNPACK), and with it the term, which the library
    writes to memory before it adds it up. A reduction of several terms XLA compiles itself, into a loop that reads each
    array once. So a single term of few rows becomes two, of half of them each. What the library does well are long sums
    of what is in memory already.
    """
    traced, shape = jax.make_jaxpr(terms)(*arrays), jax.tree.leaves(arrays)[0].shape
    if len(traced.out_avals) == 1:
        if shape[axis] <= _SHORT:
            return _sum_in_halves(terms, arrays, axis)
        # Loops would be several, a tenth more instructions of a network. It should be a small array.
        return _sum_of_rows(lax.optimization_barrier(terms(*arrays)), axis)
    is_large = shape[axis] >= _LARGE_ROWS and math.prod(shape) >= _LARGE
    is_short = len(steps(traced)) <= _FEW_STEPS
    return _sum(terms, arrays, axis, _OF_SHORT_TERMS if is_large and is_short else _OF_TERMS)


def _sum_in_halves(terms: Terms, arrays: tuple[Any, ...], axis: int) -> tuple[jax.Array, ...]:
    count = _count(arrays, axis)
    if count <= _ONE_BY_ONE:
        return _added_one_by_one(terms(*arrays), axis)
    half = count // 2
    low, high, rest = (_rows(arrays, axis, *ends) for ends in ((0, half), (half, 2 * half), (2 * half, count)))

    def both(*arrays: Any) -> tuple[jax.Array, ...]:
        return *terms(*arrays[: len(low)]), *terms(*arrays[len(low) :])

    total = functools.reduce(jnp.add, _sum(both, (*low, *high), axis, _OF_TERMS))
    return (total if count % 2 == 0 else total + terms(*rest)[0].squeeze(axis),)


def _sum(terms: Terms, arrays: tuple[Any, ...], axis: int, ways: Sequence[int]) -> tuple[jax.Array, ...]:
    count = _count(arrays, axis)
    if count <= max(ways):
        return _sum_rows(terms(*arrays), axis)
    # Rows left over are one more loop, unless there are no more than two.
    way = min(ways, key=lambda way: count % way)
    # The rows that are added are far apart: so neighbours stay neighbours.
    far = count // way
    added = _sum_rows(tuple(_split(value, axis, way) for value in terms(*_rows(arrays, axis, 0, far * way))), axis)
    # Else XLA computes the sums again for each of their uses.
    total = _sum_of_sums(lax.optimization_barrier(added), axis)
    if count % way == 0:
        return total
    return tuple(map(jnp.add, total, _sum_rows(terms(*_rows(arrays, axis, far * way, count)), axis)))


def _sum_of_sums(values: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
    is_for_loops = values[0].shape[axis] <= _SHORT or values[0].size in _DIVIDED
    if is_for_loops and values[0].shape[axis] > _most_of_a_loop(values):
        return _sum(lambda *sums: sums, values, axis, _OF_SHORT_TERMS)
    return _sum_of_rows(values, axis)


def _sum_of_rows(values: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
    """Over rows that are in memory: a loop where they are few, else by the library."""
    count = values[0].shape[axis]
    if count <= _ONE_BY_ONE:
        return _added_one_by_one(values, axis)
    if count <= _most_of_a_loop(values):
        return _sum_rows(values, axis)
    # The barrier keeps what follows from the library, which takes that too where it has 4096 elements.
    totals = lax.optimization_barrier(tuple(jnp.sum(value, axis=axis) for value in values))
    return tuple(totals)


def _most_of_a_loop(values: tuple[jax.Array, ...]) -> int:
    """Rows that are in memory."""
    return _LAST_OF_FEW if values[0].size <= _FEW else _LAST


def _sum_rows(values: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
    if values[0].shape[axis] <= 2:
        return _added_one_by_one(values, axis)
    zeros = tuple(jnp.zeros((), value.dtype) for value in values)
    sums: tuple[jax.Array, ...] = lax.reduce(values, zeros, lambda p, q: tuple(map(jnp.add, p, q)), (axis,))
    return sums


def _added_one_by_one(values: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
    def rows(value: jax.Array) -> list[jax.Array]:
        return [row.squeeze(axis) for row in jnp.split(value, value.shape[axis], axis=axis)]

    return tuple(functools.reduce(jnp.add, rows(value)) for value in values)


def _split(value: jax.Array, axis: int, way: int) -> jax.Array:
    """(B, R, K) to (B, way, R / way, K)."""
    shape = list(value.shape)
    shape[axis : axis + 1] = way, shape[axis] // way
    return value.reshape(shape)


def _rows(arrays: tuple[Any, ...], axis: int, start: int, stop: int) -> tuple[Any, ...]:
    rows: tuple[Any, ...] = jax.tree.map(lambda array: lax.slice_in_dim(array, start, stop, axis=axis), arrays)
    return rows


def _count(arrays: tuple[Any, ...], axis: int) -> int:
    count: int = jax.tree.leaves(arrays)[0].shape[axis]
    return count
