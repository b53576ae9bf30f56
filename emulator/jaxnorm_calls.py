"""Calls of jaxnorm's kernel, forward and backward, executed by the emulator and compared with float64.

This file alone knows jaxnorm. It goes through public calls with `implementation="pallas"`, and lets jaxnorm believe
that the GPU is smaller than it is, so that small arrays take every kind of copies and synchronization. It needs the
folder tests/ in the path of modules, for the oracle.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import tolerance

import jaxnorm
from benchmarks.aot import Compiler
from emulator.launch import Result
from emulator.machine import Policy
from emulator.mosaic import Function
from jaxnorm.gpu.devices import DEVICES, Device
from jaxnorm.selfcheck import cases

# Relative error of the hardware's tanh, which the kernel takes in bfloat16 (PTX ISA 9.7.3, tanh.approx).
_APPROXIMATE_TANH = 2.0**-11
_SIZE = cases.Size(elements=(2**9, 2**13), thread_blocks=(1, 12))
# Several blocks share only large instances.
_SIZE_FOR_SHARING = cases.Size(elements=(2**13, 2**16), thread_blocks=(2, 40))


class Call(NamedTuple):
    """A call of instance_norm, or of group_norm.

    Attributes:
      activation: of tests/oracle.py.
      offset: of x, whose standard deviation is 2.
      device: that jaxnorm finds tiles for; None: the GPU itself.
      group_size: how many neighboring channels share their statistics; 1 is instance_norm.
    """

    shape: tuple[int, ...]
    channel_axis: int
    dtype: str = "float32"
    residual: bool = False
    activation: str = "relu"
    offset: float = 3.0
    device: Device | None = None
    group_size: int = 1

    def __str__(self) -> str:
        layout = "channels-last" if self.channel_axis == -1 else "channels-first"
        words = ["x".join(map(str, self.shape)), layout, self.dtype, self.activation, "residual" * self.residual]
        words += [f"groups of {self.group_size}"] * (self.group_size > 1)
        return " ".join(filter(None, words))


# Rows of 16 bytes with a ragged end, and more than one sample: the stores of version 0.2 ran over it on these GPUs.
_ONCE_WRONG = (Call((1, 3, 30, 30), 1), Call((2, 100, 8), -1, "bfloat16", residual=True, activation="silu"))


def calls(gpu: str, seed: int) -> Iterator[Call]:
    """What went wrong once, group norm; then random calls, one of each kind of copies and synchronization, and again.

    Spans, groups and large clusters come first, as they are what is easiest to get wrong.
    """
    rng, device = np.random.default_rng(seed), DEVICES[gpu]
    if device.compute_capability >= (9, 0):
        yield from _ONCE_WRONG
    yield Call((2, 151, 32), -1, residual=True, activation="silu", group_size=8)
    activations = [name for name in oracle.ACTIVATIONS if name not in ("none", "own")]
    while True:
        for kind in reversed(cases.kinds(device)):
            size = _SIZE if kind.synchronization == "alone" else _SIZE_FOR_SHARING
            ((_, case),) = cases.draw_kinds(rng, [kind], 1, device, size)
            if case is not None:
                activation = "none" if case.activation == "none" else str(rng.choice(activations))
                offset = min(case.offset, 3.0)
                drawn = Call(case.shape, case.channel_axis, case.dtype, case.residual, activation, offset)
                yield drawn._replace(device=case.device, group_size=case.group_size)


class Executable:
    """A call compiled for a GPU that is not there: run() executes it and compares."""

    def __init__(self, compiler: Compiler, gpu: str, call: Call, seed: int = 0):
        self.call, self.device = call, call.device or DEVICES[gpu]
        self.given = _draw(call, seed)
        with mock.patch.dict(DEVICES, {gpu: self.device}):
            self.function = Function(compiler, functools.partial(_step, call), self.given)

    def run(self, seed: int) -> tuple[list[str], list[Result]]:
        """What is wrong, and the results of the kernels, with the adversary of a seed."""
        policy = Policy.draw(seed)
        # jaxnorm relies on as many thread blocks at once as there are SMs, and on no more.
        policy.resident = self.device.sm_count if seed % 2 else None
        got, results = self.function(self.given, seed=seed, policy=policy)
        problems = [str(error) for result in results for error in result.errors]
        if len(results) != 2:
            problems.append(f"{len(results)} kernels ran, not one forward and one backward")
        return problems + compare(self.call, self.given, got), results


def _draw(call, seed):
    rng = np.random.default_rng(seed)
    channels = call.shape[call.channel_axis]
    given = {
        "x": jnp.asarray(rng.standard_normal(call.shape) * 2 + call.offset, call.dtype),
        "gamma": jnp.asarray(rng.uniform(0.5, 2.0, channels), jnp.float32),
        "beta": jnp.asarray(rng.standard_normal(channels), jnp.float32),
        "dy": jnp.asarray(rng.standard_normal(call.shape), call.dtype),
    }
    return given | ({"residual": jnp.asarray(rng.standard_normal(call.shape), call.dtype)} if call.residual else {})


def _step(call: Call, given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """y, and the gradients by the names of what they belong to."""

    def norm(moving):
        groups = {"group_size": call.group_size} if call.group_size > 1 else {}
        return (jaxnorm.group_norm if groups else jaxnorm.instance_norm)(
            **moving,
            **groups,
            channel_axis=call.channel_axis,
            activation=oracle.ACTIVATIONS[call.activation].jax,
            implementation="pallas",
        )

    y, pullback = jax.vjp(norm, {name: value for name, value in given.items() if name != "dy"})
    return {"y": y} | pullback(given["dy"])[0]


def compare(call: Call, given: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Results that are further from float64 than the arithmetic of the dtypes explains."""
    exact = {name: np.asarray(value, np.float64) for name, value in given.items()}
    dy = exact.pop("dy")
    options = {"channel_axes": (call.channel_axis,), "group_size": call.group_size, "activation": call.activation}
    y, magnitude = oracle.instance_norm(**exact, **options)
    want = {"y": y} | oracle.gradients(dy, **exact, **options)
    problems = []
    for name, bound in _tolerances(call, exact, dy, want, magnitude).items():
        error = np.abs(np.asarray(got[name], np.float64) - want[name]).max()
        if not error <= bound:
            problems.append(f"{name} is off by {error:.3g} where {bound:.3g} is allowed")
    return problems


def _tolerances(call, exact, dy, want, magnitude):
    """As tests/checked_call.py, and what the approximate tanh adds in bfloat16."""
    positions = dy.size // (dy.shape[0] * dy.shape[call.channel_axis]) * call.group_size
    mean, var = oracle.moments(exact["x"], (call.channel_axis,), group_size=call.group_size)
    rstd = 1 / np.sqrt(var + 1e-5)
    xhat = np.abs(exact["x"] - mean) * rstd
    rough = _APPROXIMATE_TANH * (1 + magnitude) if call.dtype == "bfloat16" and call.activation != "none" else 0.0
    # Derivatives of activations stay below 2, and so do theirs; an error of tanh counts twice in tanh'.
    dz = 2 * np.abs(dy).max()
    of_dz = dz * (2 * tolerance.arithmetic(call.dtype, positions) * magnitude + tolerance.unit(call.dtype) + rough)
    scale = float(rstd.max() * exact["gamma"].max())
    sizes = {"scale": scale, "dz": dz, "xhat": float(xhat.max()), "keeps_dz": call.activation != "none"}
    all_but_channels = tuple(a for a in range(dy.ndim) if a != call.channel_axis % dy.ndim)
    bounds = {
        "y": tolerance.forward(call.dtype, positions, magnitude) + rough,
        "x": tolerance.input_gradient(call.dtype, positions, want["x"], **sizes) + scale * (2 + sizes["xhat"]) * of_dz,
    }
    for name, factor in (("gamma", xhat), ("beta", np.ones_like(xhat))):
        terms = (2 * np.abs(dy) * factor).sum(all_but_channels).max()
        bounds[name] = tolerance.parameter_gradient(call.dtype, "float32", positions, float(terms)) + rough * terms
    return bounds | ({"residual": of_dz} if call.residual else {})
