"""Time per call on the current device: jaxnorm's implementations beside Flax's layer and a plain copy."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.progress import track

from jaxnorm.functional import instance_norm

# Calls in a row, so that launching them takes less time than computing them; and how often that is repeated.
_CALLS, _REPEATS, _WARM_UP = 30, 7, 3
# Together the buffers are larger than any GPU's cache, so that every call reads its input from memory.
_BUFFER_BYTES = 512 * 2**20

Step = Callable[..., Any]


def compare(cases: list[tuple[str, tuple[int, ...], int, str]]) -> list[dict[str, Any]]:
    """Times forward and the training step of every case, contenders taking turns.

    Args:
      cases: (name, shape, channel axis, dtype).

    Returns:
      A dict per case, pass and contender: seconds (median), bytes per second (of what the pass must read and write, 2
      sizes of x forward and 5 in a step), and the share of a copy's bytes per second.
    """
    return [row for case in track(cases, description="timing") for row in _compare_case(*case)]


def _compare_case(name: str, shape: tuple[int, ...], channel_axis: int, dtype: str) -> list[dict[str, Any]]:
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    count = max(2, min(64, _BUFFER_BYTES // size))
    make = jax.jit(lambda key: jax.random.normal(key, shape, dtype))
    buffers = [make(key) for key in jax.random.split(jax.random.key(0), count)]
    copy = measure({"copy": jax.jit(jnp.negative)}, buffers)["copy"]
    rows = []
    for pass_name, units, wrap in (("forward", 2, jax.jit), ("step", 5, _step)):
        steps = {contender: wrap(function) for contender, function in contenders(shape, channel_axis).items()}
        for contender, seconds in measure(steps, buffers).items():
            rows.append(
                {
                    "case": name,
                    "pass": pass_name,
                    "contender": contender,
                    "seconds": seconds,
                    "bytes per second": units * size / seconds,
                    "share of copy": (units * size / seconds) / (2 * size / copy),
                }
            )
    return rows


def contenders(shape: tuple[int, ...], channel_axis: int) -> dict[str, Step]:
    """x -> relu(norm(x)) in the dtype of x, with a scale and a bias per channel."""
    channels = shape[channel_axis]
    scale, bias = jnp.ones(channels), jnp.zeros(channels)
    ours = functools.partial(
        instance_norm, gamma=scale, beta=bias, eps=1e-6, channel_axis=channel_axis, activation=jax.nn.relu
    )

    def flax(x: jax.Array) -> jax.Array:
        layer = nn.InstanceNorm(feature_axes=channel_axis, dtype=x.dtype)
        y: Any = layer.apply({"params": {"scale": scale, "bias": bias}}, x)
        return jax.nn.relu(y)

    return {"jaxnorm": ours, "jaxnorm, xla": functools.partial(ours, implementation="xla"), "flax": flax}


def measure(steps: dict[str, Step], buffers: list[jax.Array]) -> dict[str, float]:
    """Median seconds per call of each, taking turns over the buffers."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(_WARM_UP + _REPEATS):
        for name, step in steps.items():
            start = time.perf_counter()
            results = [step(buffers[i % len(buffers)]) for i in range(_CALLS)]
            jax.block_until_ready(results)
            if repeat >= _WARM_UP:
                seconds[name].append((time.perf_counter() - start) / _CALLS)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _step(function: Step) -> Step:
    """Forward and the gradient of x, for a cotangent that XLA cannot foresee: x itself."""

    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(function, x)
        return y, pullback(x)[0]

    return jax.jit(step)
