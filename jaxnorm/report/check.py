"""Numbers: a case against float64, forward and every gradient. Runs in a process of its own."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import activations, derivatives
from jaxnorm.functional import instance_norm
from jaxnorm.passes import Call
from jaxnorm.report.cases import Case

EPS = 1e-5
# Relative error of the hardware's tanh, which the kernel takes in bfloat16 (PTX ISA, tanh.approx).
_APPROXIMATE = 2.0**-11
# Sums of errors that are independent stay within so many of their standard deviations.
_DEVIATIONS = 8

Arrays = dict[str, Any]


def numbers(case: dict[str, Any], interpreted: bool = False) -> dict[str, Any]:
    """The errors of a case beside what float32 may make of them; the outcome is "right", "wrong" or "race"."""
    chosen = Case.of(case)
    jax.config.update("jax_enable_x64", chosen.x64)
    given = draw(chosen)
    with _interpreter() if interpreted else contextlib.nullcontext():
        got = jax.block_until_ready(jax.jit(step(chosen))(given))
        if interpreted and _races_found():
            return {"outcome": "race", "reason": "the interpreter saw a race"}
    return compare(chosen, given, got)


def draw(case: Case) -> Arrays:
    """x, gamma, beta, dy and, where the case has them, the slope of its activation and the residual."""
    rng = np.random.default_rng(case.seed)
    channels = case.shape[case.channel_axis]
    given: Arrays = {
        "x": jnp.asarray(rng.standard_normal(case.shape, np.float32) * 2 + case.offset, case.dtype),
        "gamma": jnp.asarray(rng.uniform(0.5, 2.0, channels), jnp.float32),
        "beta": jnp.asarray(rng.standard_normal(channels), jnp.float32),
        "dy": jnp.asarray(rng.standard_normal(case.shape, np.float32), case.dtype),
    }
    if case.activation == "learned":
        given["slope"] = jnp.asarray(rng.uniform(0.5, 1.5), jnp.float32)
    if case.residual:
        given["residual"] = jnp.asarray(rng.standard_normal(case.shape, np.float32), case.dtype)
    return given


def step(case: Case) -> Callable[[Arrays], Arrays]:
    """From what draw returns to y and the gradients, "dx" and so on."""

    def run(given: Arrays) -> Arrays:
        moving = {name: value for name, value in given.items() if name != "dy"}
        y, pullback = jax.vjp(lambda moving: forward(case, moving), moving)
        (gradients,) = pullback(given["dy"])
        return {"y": y} | {f"d{name}": value for name, value in gradients.items()}

    return run


def forward(case: Case, given: Arrays) -> jax.Array:
    """y, by the tile that the case was drawn for."""
    x, gamma, beta, residual = given["x"], given["gamma"], given["beta"], given.get("residual")
    activation = _activation(case, given.get("slope"))
    if case.implementation == "xla":
        return instance_norm(
            x,
            gamma,
            beta,
            EPS,
            channel_axis=case.channel_axis,
            residual=residual,
            activation=activation,
            implementation="xla",
        )
    # As jaxnorm.functional, but for a device that is not asked for.
    prepared = activations.prepare(activation, jnp.float32)
    call = Call(
        (case.channel_axis % len(case.shape),),
        EPS,
        prepared.function,
        residual is not None,
        implementation="pallas",
        device=case.device,
    )
    y, _ = derivatives.instance_norm(call, x, gamma, beta, prepared.captures, residual, None, None)
    return y


def _activation(case: Case, slope: Any) -> Any:
    match case.activation:
        case "none":
            return None
        case "tanh":
            return jnp.tanh
        case _:
            return lambda z: jnp.tanh(slope * z)


def compare(case: Case, given: Arrays, got: Arrays) -> dict[str, Any]:
    """The largest error of each result, what it may be, and the outcome."""
    want, tolerances = exact(case, given)
    results: dict[str, Any] = {}
    shares = []
    for name, value in got.items():
        error = float(np.abs(np.asarray(value, np.float64) - want[name]).max())
        shares.append(error / tolerances[name])
        results[name] = {"error": _for_json(error), "tolerance": tolerances[name]}
    # A NaN is not within any tolerance.
    right = all(share <= 1 for share in shares)
    return {"outcome": "right" if right else "wrong", "results": results}


def _for_json(number: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return number if math.isfinite(number) else str(number)


def exact(case: Case, given: Arrays) -> tuple[Arrays, dict[str, float]]:
    """The results in float64, by NumPy, and the errors that the arithmetic of the dtypes may make of them."""
    axis = case.channel_axis % len(case.shape)
    axes = tuple(a for a in range(1, len(case.shape)) if a != axis)
    all_but_channels = tuple(a for a in range(len(case.shape)) if a != axis)
    x, dy = (np.asarray(given[name], np.float64) for name in ("x", "dy"))
    gamma, beta = (np.expand_dims(np.asarray(given[n], np.float64), all_but_channels) for n in ("gamma", "beta"))
    residual = np.asarray(given["residual"], np.float64) if case.residual else np.float64(0)
    slope = float(given["slope"]) if case.activation == "learned" else 1.0

    deviation = x - x.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt((deviation**2).mean(axes, keepdims=True) + EPS)
    xhat = deviation * rstd
    z = xhat * gamma + beta + residual
    y, slope_of_y = (z, np.ones_like(z)) if case.activation == "none" else _tanh(slope * z, slope)
    dz = dy * slope_of_y
    sums = (dz.sum(axes, keepdims=True), (dz * xhat).sum(axes, keepdims=True))
    want = {
        "y": y,
        "dx": gamma * rstd * (dz - (sums[0] + xhat * sums[1]) / case.positions),
        "dgamma": sums[1].sum(0).reshape(-1),
        "dbeta": sums[0].sum(0).reshape(-1),
        "dresidual": dz,
        "dslope": (dy * (slope_of_y / slope) * z).sum(),
    }

    # Sums of M numbers in blocks, the variance around a provisional center (17, see jaxnorm/xla.py), a few operations.
    arithmetic = (21 + math.log2(max(case.positions, 2))) * 2.0**-24
    rounding = float(jnp.finfo(case.dtype).eps) / 2
    magnitude = float((np.abs(xhat * gamma) + np.abs(beta) + np.abs(residual)).max())
    of_tanh = _APPROXIMATE if case.dtype == "bfloat16" and case.activation != "none" else 0.0
    # Of dz, in units of dy: |tanh''| < 0.77, and the derivative is 1 - tanh^2.
    of_derivative = slope * (arithmetic * (2 + slope * magnitude) + 2 * of_tanh)
    of_dz = float(np.abs(dy).max()) * of_derivative
    # The kernel keeps dz in the dtype of x between its sweeps: after its sums are formed.
    kept = rounding * float(np.abs(dz).max())
    scale = float((gamma * rstd).max())
    widest = 2 + float(np.abs(xhat).max())
    tiny = float(jnp.finfo(case.dtype).smallest_subnormal)

    def of_sum(factor: Any, total: np.ndarray, over: tuple[int, ...]) -> float:
        """Rounding errors of the sum of total add up; dy has random signs, and so have the errors of its factors."""
        summed = 4 * arithmetic * np.abs(total).sum(over)
        random = _DEVIATIONS * of_derivative * np.sqrt(((dy * factor) ** 2).sum(over))
        return float((summed + random).max())

    tolerances = {
        "y": arithmetic * magnitude * max(1.0, slope) + of_tanh + rounding * float(np.abs(y).max()) + tiny,
        "dx": scale * widest * (of_dz + kept + 2 * arithmetic * float(np.abs(dz).max()))
        + rounding * float(np.abs(want["dx"]).max())
        + tiny,
        "dgamma": of_sum(xhat, dz * xhat, all_but_channels),
        "dbeta": of_sum(1.0, dz, all_but_channels),
        "dresidual": of_dz + kept + tiny,
        "dslope": of_sum(z / slope, dy * slope_of_y / slope * z, (*range(z.ndim),)),
    }
    return want, tolerances


def _tanh(z: np.ndarray, slope: float) -> tuple[np.ndarray, np.ndarray]:
    t = np.tanh(z)
    return t, slope * (1 - t * t)


def _interpreter() -> contextlib.AbstractContextManager[None]:
    """Inside, Pallas GPU kernels run on the CPU, with a search for races."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # The interpreter has no inline PTX: the kernels have a cluster fence there, beside a barrier that it does check.
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore"))


def _races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    # Raises where no kernel ran.
    return bool(interpret_pallas_call.get_races().races_found)
