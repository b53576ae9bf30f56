"""Time per call on the current device: jaxnorm's implementations beside Flax's layer and a plain copy.

One compiled function calls what is timed on every buffer of a list. Together the buffers are larger than any cache, so
each call reads from memory; and the host launches once, not once a call.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm.functional import instance_norm

# Larger than any GPU's cache by a factor of four.
BUFFER_BYTES = 512 * 2**20
# Of small arrays so many are compiled at most.
_MOST_BUFFERS = 128
_ROUNDS = 5

Step = Callable[..., Any]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}
# Sizes of x that a pass must read and write: a step has the forward and the backward pass.
UNITS = {"forward": 2, "step": 5, "backward": 3}


class Taken(NamedTuple):
    """What the calls on all buffers took.

    Attributes:
      seconds: of the device's kernels together; of the host's clock where there is no profiler.
      kernels: (name, seconds) of each, in the order in which they ran; None by the host's clock.
    """

    seconds: float
    kernels: list[tuple[str, float]] | None


def compare(
    cases: list[tuple[str, tuple[int, ...], int, str]], activation: str = "relu", *, buffer_bytes: int = BUFFER_BYTES
) -> list[dict[str, Any]]:
    """Times forward and the training step of every case, contenders taking turns.

    Args:
      cases: (name, shape, channel axis, dtype).
      activation: of ACTIVATIONS.
      buffer_bytes: that the buffers of a case have at least together, if there are not too many.

    Returns:
      A dict per case, pass and contender: seconds per call (median), low and high of the rounds, bytes per second (of
      what the pass must read and write, UNITS), the share of a copy's bytes per second, and the clock. "backward" is
      the kernel of that name within the step.
    """
    return [row for case in cases for row in _compare_case(*case, activation, buffer_bytes)]


def _compare_case(
    name: str, shape: tuple[int, ...], channel_axis: int, dtype: str, activation: str, buffer_bytes: int
) -> list[dict[str, Any]]:
    buffers = make_buffers(shape, dtype, buffer_bytes)
    functions = contenders(shape, channel_axis, activation)
    steps = {("forward", contender): over(function) for contender, function in functions.items()}
    steps |= {("step", contender): over(_step(function)) for contender, function in functions.items()}
    taken = measure({("forward", "copy"): over(jnp.negative)} | steps, buffers)
    of_backward = [_of_kernel(each, "jaxnorm_backward") for each in taken.get(("step", "jaxnorm, kernel"), [])]
    if any(each.kernels for each in of_backward):
        taken["backward", "jaxnorm, kernel"] = of_backward
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    copied = statistics.median(each.seconds for each in taken["forward", "copy"])
    rows = []
    for (pass_name, contender), rounds in taken.items():
        seconds = statistics.median(each.seconds for each in rounds)
        rows.append(
            {
                "case": name,
                "activation": activation,
                "pass": pass_name,
                "contender": contender,
                "seconds": seconds / len(buffers),
                "low": min(each.seconds for each in rounds) / len(buffers),
                "high": max(each.seconds for each in rounds) / len(buffers),
                "bytes per second": UNITS[pass_name] * size * len(buffers) / seconds,
                "share of copy": UNITS[pass_name] / 2 * copied / seconds,
                "clock": "host" if rounds[0].kernels is None else "device",
            }
        )
    return rows


def make_buffers(shape: tuple[int, ...], dtype: str, total: int = BUFFER_BYTES) -> list[jax.Array]:
    """Random arrays that take so many bytes together, or as many arrays as can be compiled."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    count = max(2, min(_MOST_BUFFERS, total // size + 1))
    make = jax.jit(lambda key: jax.random.normal(key, shape, dtype))
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def over(function: Step) -> Step:
    """The function on each buffer of a list, compiled as one."""
    return jax.jit(lambda buffers: [function(buffer) for buffer in buffers])


def contenders(shape: tuple[int, ...], channel_axis: int, activation: str) -> dict[str, Step]:
    """x -> activation(norm(x)) in the dtype of x, with a scale and a bias per channel; the kernel where a GPU is."""
    channels = shape[channel_axis]
    scale, bias, function = jnp.ones(channels), jnp.zeros(channels), ACTIVATIONS[activation]
    ours = functools.partial(
        instance_norm, gamma=scale, beta=bias, eps=1e-6, channel_axis=channel_axis, activation=function
    )

    def flax(x: jax.Array) -> jax.Array:
        layer = nn.InstanceNorm(feature_axes=channel_axis, dtype=x.dtype)
        y: Any = layer.apply({"params": {"scale": scale, "bias": bias}}, x)
        return function(y)

    found: dict[str, Step] = {}
    if jax.default_backend() == "gpu":
        found["jaxnorm, kernel"] = functools.partial(ours, implementation="pallas")
    return found | {"jaxnorm, xla": functools.partial(ours, implementation="xla"), "flax": flax}


def measure(steps: dict[Any, Step], buffers: Any) -> dict[Any, list[Taken]]:
    """What each takes on the buffers, in rounds, taking turns."""
    clock = _clock()
    for step in steps.values():
        jax.block_until_ready(step(buffers))
    taken: dict[Any, list[Taken]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            taken[name].append(clock(step, buffers))
    return taken


def _clock() -> Callable[[Step, Any], Taken]:
    """By the profiler of Mosaic GPU, which sees every kernel of the device; without a GPU by the host."""
    if jax.default_backend() != "gpu":
        return _by_host
    from jax.experimental.mosaic.gpu import profiler

    def by_device(step: Step, buffers: Any) -> Taken:
        _, kernels = profiler.measure(step, aggregate=False)(buffers)
        if not kernels:
            raise RuntimeError("the profiler saw no kernel: is another one attached?")
        seconds = [(name, milliseconds / 1e3) for name, milliseconds in kernels]
        return Taken(sum(each for _, each in seconds), seconds)

    return by_device


def _by_host(step: Step, buffers: Any) -> Taken:
    start = time.perf_counter()
    jax.block_until_ready(step(buffers))
    return Taken(time.perf_counter() - start, None)


def _of_kernel(taken: Taken, name: str) -> Taken:
    kernels = [(kernel, seconds) for kernel, seconds in taken.kernels or [] if name in kernel]
    return Taken(sum(seconds for _, seconds in kernels), kernels)


def _step(function: Step) -> Step:
    """Forward and the gradient of x, for a cotangent that XLA cannot foresee: x itself."""

    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(function, x)
        return y, pullback(x)[0]

    return step
