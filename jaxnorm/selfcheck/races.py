"""Races: the same two inputs again and again must give the same bits. Runs in a process of its own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import compute_on

from jaxnorm.selfcheck import numbers
from jaxnorm.selfcheck.cases import Case

_BITS = {2: jnp.uint16, 4: jnp.uint32}
# What runs on the other stream, one kernel after the other: (thread blocks of 1024 numbers, roots of each number).
_OTHER = ((1, 200), (64, 10), (8, 60), (32, 25))


def races(case: Case, repeats: int) -> dict[str, Any]:
    """Runs a case on two inputs in turns: alone, and then next to a second stream that keeps parts of the GPU busy.

    Args:
      case: the call.
      repeats: how often, both inputs together.

    Returns:
      The outcome, "right", "wrong" or "race"; how many repeats differed in a bit from the first, by what ran next to
      them; how many there were; the errors of the first results.
    """
    jax.config.update("jax_enable_x64", case.x64)
    other = dataclasses.replace(case, seed=int(np.random.default_rng(case.seed).integers(2**31)))
    inputs = [numbers.draw(case), numbers.draw(other)]
    stacked = jax.tree.map(lambda *both: jnp.stack(both), *inputs)
    differing, found = {}, []
    for neighbor, busy in (("nothing", False), ("another stream", True)):
        run = jax.jit(functools.partial(repeat, numbers.training_step(case), busy=busy))
        first, differed, _ = run(stacked, repeats)
        differing[neighbor] = int(differed)
        found += [numbers.compare(case, given, _at(first, i)) for i, given in enumerate(inputs)]
    row = next((each for each in found if each["outcome"] != "right"), found[0])
    row |= {"repeats": repeats, "differing": differing}
    if any(differing.values()):
        row |= {"outcome": "race", "reason": f"results differ between repeats of the same: {differing}"}
    return row


def repeat(step: Callable[[Any], Any], stacked: Any, repeats: jax.typing.ArrayLike, *, busy: bool) -> Any:
    """Runs step on stacked[0], stacked[1], stacked[0] and so on, at the same addresses.

    Returns:
      The results of the first two, stacked; how many of the later ones differ from them, compared bit by bit; and what
      the other stream computed, since XLA would remove it otherwise.
    """

    def body(i: jax.Array, carry: Any) -> Any:
        first, differed, noise = carry
        noise = _on_another_stream(noise) if busy else noise
        # What is computed depends on i, so XLA does not move it out of the loop.
        got = step(_at(stacked, i % 2))
        kept = jax.tree.map(lambda first, new: jnp.where(i < 2, new, first), _at(first, i % 2), got)
        first = jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, i % 2, 0), first, kept)
        return first, differed + _differ(got, kept), noise

    types = jax.eval_shape(step, jax.eval_shape(lambda: _at(stacked, 0)))
    nothing = jax.tree.map(lambda of: jnp.zeros((2, *of.shape), of.dtype), types)
    noise = jnp.ones((max(blocks for blocks, _ in _OTHER), 1024), jnp.float32)
    return lax.fori_loop(0, repeats, body, (nothing, jnp.int32(0), noise))


def _on_another_stream(noise: jax.Array) -> jax.Array:
    """Kernels that XLA starts on a stream of their own and awaits at the end of the loop's body.

    A GPU has one compute stream in JAX, so a program from another thread would run before or after this one. XLA would
    also wait for several results at once; there is one.
    """

    def work(noise: jax.Array) -> jax.Array:
        for blocks, roots in _OTHER:
            # A sum is a kernel of its own, and what follows it has fewer thread blocks.
            part = noise.reshape(-1, blocks, 1024).sum(0)
            for _ in range(roots):
                part = jnp.sqrt(part + 1)
            noise = noise + jnp.tile(part, (len(noise) // blocks, 1))
        return noise

    # The name differs between versions of JAX.
    on: Any = getattr(compute_on, "compute_on2", None) or compute_on.compute_on
    result: jax.Array = on(work, compute_type="gpu_stream:1", out_memory_spaces=jax.memory.Space.Device)(noise)
    return result


def _differ(some: Any, others: Any) -> jax.Array:
    """1 if any bit differs, otherwise 0; a NaN equals itself."""

    def bits(value: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(value, _BITS[value.dtype.itemsize])

    pairs = zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True)
    return jnp.any(jnp.stack([jnp.any(bits(a) != bits(b)) for a, b in pairs])).astype(jnp.int32)


def _at(stacked: Any, i: Any) -> Any:
    return jax.tree.map(lambda value: lax.dynamic_index_in_dim(value, i, keepdims=False), stacked)
