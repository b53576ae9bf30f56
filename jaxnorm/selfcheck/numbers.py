"""Numbers: a case against float64, forward and every gradient. Runs in a process of its own."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import op
from jaxnorm.call import Arguments
from jaxnorm.selfcheck.cases import EPS, Case

# Relative error of the hardware's tanh, which the kernel takes in bfloat16 (PTX ISA, tanh.approx).
_APPROXIMATE = 2.0**-11
# A sum of independent errors stays within this many of its standard deviations.
_DEVIATIONS = 8

Arrays = dict[str, Any]


def numbers(case: Case, interpreted: bool = False) -> dict[str, Any]:
    """The error of each result and its limit; the outcome is "right", "wrong" or "race"."""
    jax.config.update("jax_enable_x64", case.x64)
    given = draw(case)
    with _interpreter() if interpreted else contextlib.nullcontext():
        got = jax.block_until_ready(jax.jit(training_step(case))(given))
        if interpreted and _races_found():
            return {"outcome": "race", "reason": "the interpreter saw a race"}
    return compare(case, given, got)


def draw(case: Case) -> Arrays:
    """x, gamma, beta, dy, and the residual where the case has one."""
    rng = np.random.default_rng(case.seed)
    channels = case.shape[case.channel_axis]
    given: Arrays = {
        "x": jnp.asarray(rng.standard_normal(case.shape, np.float32) * 2 + case.offset, case.dtype),
        "gamma": jnp.asarray(rng.uniform(0.5, 2.0, channels), jnp.float32),
        "beta": jnp.asarray(rng.standard_normal(channels), jnp.float32),
        "dy": jnp.asarray(rng.standard_normal(case.shape, np.float32), case.dtype),
    }
    if case.residual:
        given["residual"] = jnp.asarray(rng.standard_normal(case.shape, np.float32), case.dtype)
    return given


def training_step(case: Case) -> Callable[[Arrays], Arrays]:
    """A function of what draw returns, to y and the gradients: "dx" and so on."""

    def run(given: Arrays) -> Arrays:
        differentiated = {name: value for name, value in given.items() if name != "dy"}
        y, pullback = jax.vjp(lambda values: forward(case, values), differentiated)
        (gradients,) = pullback(given["dy"])
        return {"y": y} | {f"d{name}": value for name, value in gradients.items()}

    return run


def forward(case: Case, given: Arrays) -> jax.Array:
    """y, as instance_norm computes it after its checks of the arguments."""
    y, _ = op.normalize(case.call, Arguments(given["x"], given["gamma"], given["beta"], given.get("residual")))
    return y


def compare(case: Case, given: Arrays, got: Arrays) -> dict[str, Any]:
    """The largest error of each result and its limit, and the outcome."""
    want, terms = exact(case, given)
    limits = _limits(case, want, terms)
    results: dict[str, Any] = {}
    right = True
    for name, value in got.items():
        error = float(np.abs(_view(case, value) - want[name]).max())
        # A NaN is not within any limit.
        right = right and error <= limits[name]
        # JSON has no NaN and no infinity.
        results[name] = {"error": error if math.isfinite(error) else str(error), "limit": limits[name]}
    return {"outcome": "right" if right else "wrong", "results": results}


def _view(case: Case, value: Any) -> np.ndarray:
    """An array like x as (batch, positions, groups, channels of a group), one like gamma as (groups, channels)."""
    array, groups = np.asarray(value, np.float64), (-1, case.group_size)
    if array.ndim == 1:
        return array.reshape(groups)
    last = np.moveaxis(array, case.channel_axis, -1)
    return last.reshape(case.shape[0], math.prod(last.shape[1:-1]), *groups)


# Axes of a view: those of an instance, and those that gamma does not have.
_INSTANCE, _BATCH = (1, 3), (0, 1)


class Terms(NamedTuple):
    """What the results are made of, in float64. The magnitude is that of what is added up in z."""

    gamma: np.ndarray
    rstd: np.ndarray
    xhat: np.ndarray
    magnitude: np.ndarray
    dy: np.ndarray
    dz: np.ndarray


def exact(case: Case, given: Arrays) -> tuple[Arrays, Terms]:
    """The results in float64 by NumPy, as _view has them."""
    x, gamma, beta, dy = (_view(case, given[name]) for name in ("x", "gamma", "beta", "dy"))
    residual = _view(case, given["residual"]) if case.residual else np.float64(0)
    mean = functools.partial(np.mean, axis=_INSTANCE, keepdims=True)
    deviation = x - mean(x)
    rstd = 1 / np.sqrt(mean(deviation**2) + EPS)
    xhat = deviation * rstd
    z = xhat * gamma + beta + residual
    y = np.tanh(z) if case.activation == "tanh" else z
    dz = dy * (1 - y**2) if case.activation == "tanh" else dy
    dxhat = dz * gamma
    want = {
        "y": y,
        "dx": rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)),
        "dgamma": (dz * xhat).sum(_BATCH),
        "dbeta": dz.sum(_BATCH),
        "dresidual": dz,
    }
    return want, Terms(gamma, rstd, xhat, np.abs(xhat * gamma) + np.abs(beta) + np.abs(residual), dy, dz)


def _limits(case: Case, want: Arrays, terms: Terms) -> dict[str, float]:
    """The errors that the arithmetic of the dtypes allows."""
    gamma, rstd, xhat, magnitudes, dy, dz = terms
    # A sum of M numbers in blocks, the variance around a provisional center (17, see jaxnorm/xla.py), a few operations.
    count = xhat.shape[1] * case.group_size
    arithmetic = (21 + math.log2(max(count, 2))) * 2.0**-24
    rounding, tiny = float(jnp.finfo(case.dtype).eps) / 2, float(jnp.finfo(case.dtype).smallest_subnormal)
    is_tanh, magnitude = case.activation == "tanh", float(magnitudes.max())
    of_tanh = _APPROXIMATE if is_tanh and case.dtype == "bfloat16" and case.implementation != "xla" else 0.0
    # The derivative is 1 - tanh^2, and |tanh''| < 0.77.
    of_derivative = arithmetic * (2 + magnitude) + 2 * of_tanh if is_tanh else 0.0
    # dz is kept in the dtype of x, after its sums are formed.
    largest_dz = float(np.abs(dz).max())
    of_dz = float(np.abs(dy).max()) * of_derivative + rounding * largest_dz
    scale = float(gamma.max() * rstd.max()) * (2 + float(np.abs(xhat).max()))

    def of_sum(factor: Any) -> float:
        """Of the sum of dz * factor: rounding errors add up; dy has random signs, and so have the errors of dz."""
        summed = 4 * arithmetic * np.abs(dz * factor).sum(_BATCH)
        random = _DEVIATIONS * of_derivative * np.sqrt(((dy * factor) ** 2).sum(_BATCH))
        return float((summed + random).max()) + tiny

    return {
        "y": arithmetic * magnitude + of_tanh + rounding * float(np.abs(want["y"]).max()) + tiny,
        "dx": scale * (of_dz + 2 * arithmetic * largest_dz) + rounding * float(np.abs(want["dx"]).max()) + tiny,
        "dgamma": of_sum(xhat),
        "dbeta": of_sum(1.0),
        "dresidual": of_dz + tiny,
    }


def _interpreter() -> contextlib.AbstractContextManager[None]:
    """Inside, Pallas GPU kernels run on the CPU, with a search for races."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # The interpreter has no inline PTX: the kernels have a cluster fence there, next to a barrier that it does check.
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore"))


def _races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    # It raises if no kernel ran.
    return bool(interpret_pallas_call.get_races().races_found)
