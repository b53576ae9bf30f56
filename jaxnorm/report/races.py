"""Races: the same two inputs again and again, which must give the same bits. Runs in a process of its own."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm.report import check
from jaxnorm.report.cases import Case
from jaxnorm.report.driver import Driver

_BITS = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def races(case: dict[str, Any], repeats: int, busy: bool = True) -> dict[str, Any]:
    """Runs a case on two inputs in turns: alone, and then beside a stream that keeps changing parts of the GPU busy.

    Args:
      case: of jaxnorm.report.cases.Case.
      repeats: how often, of both inputs together.
      busy: whether to do it again with the other stream.

    Returns:
      The outcome, "right", "wrong" or "race"; how many repeats differed in a bit from the first, and how many there
      were, by what ran beside them; the errors of the first results.
    """
    chosen = Case.of(case)
    jax.config.update("jax_enable_x64", chosen.x64)
    inputs = [check.draw(chosen), check.draw(_other(chosen))]
    stacked = jax.tree.map(lambda *both: jnp.stack(both), *inputs)
    # The repeats are an argument: the loop is compiled once.
    run = jax.jit(lambda stacked, repeats: repeat(check.step(chosen), stacked, repeats))
    differing, found = {}, None
    for beside in ("nothing", *(["another stream"] if busy else [])):
        with Driver().busy() if beside == "another stream" else contextlib.nullcontext():
            first, wrong = jax.block_until_ready(run(stacked, repeats))
        found = found or [check.compare(chosen, given, _at(first, i)) for i, given in enumerate(inputs)]
        differing[beside] = int(wrong)
    results = {"repeats": repeats, "differing": differing, "results": found[0]["results"] if found else {}}
    if any(differing.values()):
        return results | {"outcome": "race", "reason": f"results differ between repeats of the same: {differing}"}
    wrong_numbers = [numbers for numbers in found or [] if numbers["outcome"] != "right"]
    return results | (wrong_numbers[0] if wrong_numbers else {"outcome": "right"})


def repeat(step: Callable[[Any], Any], stacked: Any, repeats: Any) -> tuple[Any, jax.Array]:
    """Runs step on stacked[0], stacked[1], stacked[0] and so on, at the same addresses.

    Returns:
      The results of the first two, stacked; and how many of the later ones differ from them, compared bit by bit.
    """

    def body(i: jax.Array, carry: Any) -> Any:
        first, wrong = carry
        # What is computed depends on i: it is not moved out of the loop.
        got = step(_at(stacked, i % 2))
        kept = jax.tree.map(lambda first, new: jnp.where(i < 2, new, first), _at(first, i % 2), got)
        first = jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, i % 2, 0), first, kept)
        return first, wrong + _differ(got, kept)

    shapes = jax.eval_shape(step, jax.eval_shape(lambda: _at(stacked, 0)))
    nothing = jax.tree.map(lambda shape: jnp.zeros((2, *shape.shape), shape.dtype), shapes)
    first, wrong = lax.fori_loop(0, repeats, body, (nothing, jnp.int32(0)))
    return first, wrong


def _differ(some: Any, others: Any) -> jax.Array:
    """1 if any bit differs, else 0; a NaN equals itself."""

    def bits(value: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(value, _BITS[value.dtype.itemsize])

    pairs = zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True)
    return jnp.any(jnp.stack([jnp.any(bits(a) != bits(b)) for a, b in pairs])).astype(jnp.int32)


def _at(stacked: Any, i: Any) -> Any:
    return jax.tree.map(lambda value: lax.dynamic_index_in_dim(value, i, keepdims=False), stacked)


def _other(case: Case) -> Case:
    return dataclasses.replace(case, seed=int(np.random.default_rng(case.seed).integers(2**31)))
