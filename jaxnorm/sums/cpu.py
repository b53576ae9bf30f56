"""Sums for CPUs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Terms = Callable[..., tuple[jax.Array, ...]]

# How many rows one loop adds up, the best first. LLVM unrolls a loop over so many completely and then computes
# neighbouring sums side by side, in vectors; where it does not, because there are more rows or the terms are long, it
# computes one after the other, at a fifth of the speed. Nor should there be fewer: the sums are written and read again.
_OF_TERMS, _OF_LONG_TERMS, _OF_SUMS = (8, 9, 10, 7, 6), (2,), (16, 15, 14, 13, 12, 11, 10, 9)
# Operations. The backward pass of a ReLU has 10, of silu 13, of gelu 25 and more.
_LONG = 24


def sum_tree(terms: Terms, *arrays: Any) -> tuple[jax.Array, ...]:
    """Of views: a tree of sums of a few rows each, all terms in one reduction.

    A reduction of a single term XLA for CPU hands to a library, and with it what surrounds it, if that has 4096
    elements: the library writes each intermediate result to memory, and is slow where rows are short. A reduction of
    several terms XLA compiles itself, into a loop that reads each array once.
    """
    is_long = _operations(jax.make_jaxpr(terms)(*arrays)) > _LONG
    return _sum_tree(terms, arrays, _OF_LONG_TERMS if is_long else _OF_TERMS)


def _sum_tree(terms: Terms, arrays: tuple[Any, ...], ways: Sequence[int]) -> tuple[jax.Array, ...]:
    def of_rows(start: int, stop: int) -> tuple[jax.Array, ...]:
        return terms(*jax.tree.map(lambda array: lax.slice_in_dim(array, start, stop, axis=1), arrays))

    count = jax.tree.leaves(arrays)[0].shape[1]
    if count <= max(ways):
        return _sum_rows(terms(*arrays))
    # Rows left over are one more loop, unless there are no more than two.
    way = min(ways, key=lambda way: count % way)
    # The rows that are added are far apart: so neighbours stay neighbours.
    far = count // way
    added = _sum_rows(tuple(map(_split(way), of_rows(0, far * way))))
    added = tuple(value.squeeze(1) for value in added)
    if far > 1:
        # Else XLA computes the sums again for each of their uses.
        added = _sum_tree(lambda *sums: sums, lax.optimization_barrier(added), _OF_SUMS)
    if count % way == 0:
        return added
    return tuple(map(jnp.add, added, _sum_rows(of_rows(far * way, count))))


def _split(way: int) -> Callable[[jax.Array], jax.Array]:
    """(B, R, K) to (B, way, R / way, K)."""
    return lambda value: value.reshape(value.shape[0], way, value.shape[1] // way, *value.shape[2:])


def _sum_rows(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Over axis 1, which is kept at size 1."""
    count = values[0].shape[1]
    if count <= 2:
        return values if count == 1 else tuple(value[:, :1] + value[:, 1:] for value in values)
    if len(values) == 1:
        # In two halves, and so no reduction of a single term.
        (value,) = values
        half = count // 2
        first, second = _sum_rows((value[:, :half], value[:, half : 2 * half]))
        return (first + second + value[:, -1:],) if count % 2 else (first + second,)
    zeros = tuple(jnp.zeros((), value.dtype) for value in values)
    sums = lax.reduce(values, zeros, lambda p, q: tuple(map(jnp.add, p, q)), (1,))
    return tuple(jnp.expand_dims(value, 1) for value in sums)


def _operations(jaxpr: Any) -> int:
    """Of a jaxpr and all that it calls."""

    def of(equation: Any) -> int:
        called = [value for value in equation.params.values() if hasattr(value, "eqns")]
        return sum(map(_operations, called)) if called else 1

    return sum(map(of, jaxpr.eqns))
