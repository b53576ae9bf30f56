"""Sums for CPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Parts of the rows that are added element by element on a CPU.
_PARTS = 16


def sum_parts(terms: Callable[..., tuple[jax.Array, ...]], *arrays: Any) -> tuple[jax.Array, ...]:
    """Of views: sixteen equal parts of the rows are added up element by element first, then their rows.

    XLA for CPU writes what it sums to memory before it sums it, except for sums of the plain input. Here it computes
    the terms of all parts in one loop and writes a sixteenth. The parts are cut from the arrays, not from the terms:
    cut from the terms, all are computed before.
    """

    def of_rows(start: int, stop: int) -> tuple[jax.Array, ...]:
        rows = jax.tree.map(lambda array: lax.slice_in_dim(array, start, stop, axis=1), arrays)
        return terms(*rows)

    def add(*terms: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(functools.reduce(jnp.add, same) for same in zip(*terms, strict=True))

    def total(terms: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jnp.sum(term, axis=1, keepdims=True) for term in terms)

    count = arrays[0].shape[1]
    part = count // _PARTS
    rest = total(of_rows(part * _PARTS, count))
    if part == 0:
        return rest
    added = lax.optimization_barrier(add(*(of_rows(i * part, (i + 1) * part) for i in range(_PARTS))))
    return add(total(added), rest) if count % _PARTS else total(added)
