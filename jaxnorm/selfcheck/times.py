"""Time per call on the current GPU: jaxnorm's implementations next to Flax's layer and a plain copy.

One compiled function calls what is timed on every buffer of a list. The buffers together are larger than any cache, so
each call reads from memory; and the host launches once for all of them.
"""

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm.functional import instance_norm

# Four times as large as any GPU's cache.
BUFFER_BYTES = 512 * 2**20
# The most calls of one compiled function.
MOST_BUFFERS = 128
_ROUNDS = 5

Function = Callable[..., Any]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}
# Sizes of x that must be read and written: x and y forward; backward x, dy and dx, too.
UNITS = {"forward": 2, "training step": 5}


def compare(
    name: str,
    shape: tuple[int, ...],
    channel_axis: int,
    dtype: str,
    activation: str = "relu",
    *,
    buffer_bytes: int = BUFFER_BYTES,
) -> list[dict[str, Any]]:
    """Times forward and the training step of a case; the contenders take turns.

    Args:
      name: of the case.
      shape, channel_axis, dtype: of x.
      activation: a key of ACTIVATIONS.
      buffer_bytes: that the buffers have together, unless there would be too many.

    Returns:
      A dict per pass and contender: seconds per call (the median), low and high of the rounds, bytes per second (of
      UNITS), also as a share of those of a copy.
    """
    buffers = make_buffers(shape, dtype, buffer_bytes)
    functions: dict[tuple[str, str], Function] = {("forward", "copy"): jnp.negative}
    for contender, function in contenders(shape, channel_axis, activation).items():
        functions |= {("forward", contender): function, ("training step", contender): _training_step(function)}
    taken = _measure({key: over(function) for key, function in functions.items()}, buffers)
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    copied = statistics.median(taken["forward", "copy"]) / UNITS["forward"]
    rows = []
    for (pass_name, contender), rounds in taken.items():
        seconds = statistics.median(rounds)
        rows.append(
            {
                "case": name,
                "pass": pass_name,
                "contender": contender,
                "seconds": seconds / len(buffers),
                "low": min(rounds) / len(buffers),
                "high": max(rounds) / len(buffers),
                "bytes per second": UNITS[pass_name] * size * len(buffers) / seconds,
                "share of copy": UNITS[pass_name] * copied / seconds,
            }
        )
    return rows


def times(**case: Any) -> dict[str, Any]:
    """The rows of compare. Runs in a process of its own."""
    return {"outcome": "done", "times": compare(**case)}


def make_buffers(shape: tuple[int, ...], dtype: str, total: int) -> list[jax.Array]:
    """Random arrays that have more than that many bytes together, but at most MOST_BUFFERS."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    count = max(2, min(MOST_BUFFERS, total // size + 1))
    make = jax.jit(lambda key: jax.random.normal(key, shape, dtype))
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def over(function: Function) -> Function:
    """The function on each buffer of a list, compiled as one."""
    return jax.jit(lambda buffers: [function(buffer) for buffer in buffers])


def contenders(shape: tuple[int, ...], channel_axis: int, activation: str) -> dict[str, Function]:
    """x -> activation(norm(x)) in the dtype of x, with a scale and a bias per channel."""
    channels = shape[channel_axis]
    scale, bias, function = jnp.ones(channels), jnp.zeros(channels), ACTIVATIONS[activation]
    ours = functools.partial(
        instance_norm, gamma=scale, beta=bias, eps=1e-6, channel_axis=channel_axis, activation=function
    )

    def flax(x: jax.Array) -> jax.Array:
        layer = nn.InstanceNorm(feature_axes=channel_axis, dtype=x.dtype)
        y: Any = layer.apply({"params": {"scale": scale, "bias": bias}}, x)
        return function(y)

    kernel, plain = (functools.partial(ours, implementation=name) for name in ("pallas", "xla"))
    return {"jaxnorm, kernel": kernel, "jaxnorm, plain XLA": plain, "Flax": flax}


def _training_step(function: Function) -> Function:
    """Forward and the gradient of x, for a cotangent that XLA cannot foresee: x itself."""

    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(function, x)
        return y, pullback(x)[0]

    return step


def _measure(functions: dict[Any, Function], buffers: Any) -> dict[Any, list[float]]:
    """The seconds that each takes on the buffers, in rounds, in turns."""
    for function in functions.values():
        jax.block_until_ready(function(buffers))
    taken: dict[Any, list[float]] = {key: [] for key in functions}
    for _ in range(_ROUNDS):
        for key, function in functions.items():
            taken[key].append(_seconds(function, buffers))
    return taken


def _seconds(function: Function, buffers: Any) -> float:
    """Those of all kernels of the GPU together, from the profiler of Mosaic GPU."""
    from jax.experimental.mosaic.gpu import profiler

    _, kernels = profiler.measure(function, aggregate=False)(buffers)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel: is another one attached?")
    return sum(milliseconds for _, milliseconds in kernels) / 1e3
