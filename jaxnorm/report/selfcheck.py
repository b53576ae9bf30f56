"""python -m jaxnorm selfcheck: are the numbers right on this machine, and how fast are they?

With a CUDA GPU: the kernel and plain XLA against float64, then their times beside flax.linen.InstanceNorm. Without one:
the kernel in Pallas' interpreter, on small shapes.
"""

import contextlib
import dataclasses
import functools
import json
import math
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxnorm.arguments import Implementation
from jaxnorm.functional import instance_norm
from jaxnorm.gpu.devices import facts
from jaxnorm.report import stopwatch
from jaxnorm.version import __version__

EPS = 1e-5
_RESULTS = ("y", "dx", "dgamma")
_NO_GPU = """\
No CUDA GPU: the kernel runs in Pallas' interpreter, on small shapes.
Not checked: that it compiles for a GPU, that a GPU computes what the interpreter computes, and its speed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape from a real network. The offset keeps the mean away from zero."""

    name: str
    shape: tuple[int, ...]
    channel_axis: int
    dtype: str
    offset: float = 3.0

    @property
    def positions(self) -> int:
        return math.prod(self.shape) // (self.shape[0] * self.shape[self.channel_axis])

    def __str__(self) -> str:
        layout = "channels-last" if self.channel_axis == -1 else "channels-first"
        return f"{self.name}\n{'x'.join(map(str, self.shape))} {layout} {self.dtype}"


_SHAPES = {
    "CycleGAN residual block": ((8, 64, 64, 256), -1),
    "CycleGAN second layer": ((2, 128, 128, 128), -1),
    "fast style transfer": ((4, 32, 32, 512), -1),
    "nnU-Net, 32^3": ((2, 32, 32, 32, 128), -1),
    "nnU-Net, 8^3": ((2, 8, 8, 8, 320), -1),
    "ragged rows": ((4, 15, 15, 64), -1),
    "CycleGAN, (N, C, H, W)": ((8, 256, 64, 64), 1),
    "large maps": ((1, 64, 256, 256), 1),
    "small maps": ((32, 64, 28, 28), 1),
}
ON_GPU = [
    Case(name, shape, axis, dtype) for name, (shape, axis) in _SHAPES.items() for dtype in ("float32", "bfloat16")
]
INTERPRETED = [
    Case("two samples", (2, 8, 16, 32), -1, "float32"),
    Case("far from zero", (1, 16, 16, 32), -1, "float32", offset=1e4),
    Case("half precision", (1, 16, 16, 32), -1, "bfloat16"),
    Case("ragged rows", (1, 15, 15, 16), -1, "float32"),
    Case("large maps", (1, 4, 32, 32), 1, "float32"),
    Case("small maps", (2, 8, 8, 8), 1, "float32"),
]


def selfcheck(json_file: str | None = None) -> int:
    """Checks, times where there is a GPU, prints and optionally writes a JSON file.

    Returns:
      The exit status: 0, or 1 if a number was wrong.
    """
    console = Console()
    devices = jax.devices()
    gpu = facts(devices[0])
    console.print(f"jaxnorm {__version__}, jax {jax.__version__}, {platform.platform()}")
    console.print("devices: " + ", ".join(f"{device.id}: {device.device_kind}" for device in devices), highlight=False)
    if gpu is None:
        console.print(_NO_GPU)
        checks = _check(INTERPRETED, ["pallas"], interpreted_by_pallas())
        times: list[dict[str, Any]] = []
    else:
        checks = _check(ON_GPU, ["pallas", "xla"], contextlib.nullcontext())
        times = stopwatch.compare([(str(case), case.shape, case.channel_axis, case.dtype) for case in ON_GPU])
    console.print(_checks_table(checks))
    if times:
        console.print(_times_table(times))
    wrong = sum(_is_wrong(check) for check in checks)
    not_run = sum(not check["results"] for check in checks)
    console.print(f"{len(checks) - wrong - not_run} right, {wrong} wrong, {not_run} not run")
    if json_file is not None:
        with open(json_file, "w") as file:
            json.dump({"devices": [d.device_kind for d in devices], "checks": checks, "times": times}, file, indent=1)
    return 1 if wrong else 0


def _is_wrong(check: dict[str, Any]) -> bool:
    # A NaN is not within any tolerance.
    return not all(result["max error"] <= result["tolerance"] for result in check["results"].values())


def interpreted_by_pallas() -> contextlib.AbstractContextManager[None]:
    """Inside, Pallas GPU kernels run on the CPU."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # The interpreter has no inline PTX: the kernels have a cluster fence there, beside a barrier that it does check.
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore"))


def _check(
    cases: list[Case], implementations: list[Implementation], mode: contextlib.AbstractContextManager[None]
) -> list[dict[str, Any]]:
    pairs = [(case, implementation) for case in cases for implementation in implementations]
    with mode:
        return [_check_case(*pair) for pair in track(pairs, description="checking against float64")]


def _check_case(case: Case, implementation: Implementation) -> dict[str, Any]:
    """The errors of the results, or the reason why there are none."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(case.shape) * 2 + case.offset, case.dtype)
    dy = jnp.asarray(rng.standard_normal(case.shape), case.dtype)
    gamma = jnp.asarray(rng.uniform(0.5, 2.0, case.shape[case.channel_axis]), jnp.float32)
    function = functools.partial(
        instance_norm, eps=EPS, channel_axis=case.channel_axis, activation=jnp.tanh, implementation=implementation
    )
    described = {"case": str(case), "implementation": implementation}
    try:
        y, pullback = jax.vjp(function, x, gamma)
        dx, dgamma = pullback(dy)
    except ValueError as reason:
        return described | {"results": {}, "reason": str(reason)}
    want, tolerances = _exact(case, x, gamma, dy)
    results = {}
    for name, got in zip(_RESULTS, (y, dx, dgamma), strict=True):
        error = float(np.abs(np.asarray(got, np.float64) - want[name]).max())
        results[name] = {"max error": error, "tolerance": tolerances[name]}
    return described | {"results": results}


def _exact(case: Case, x: Any, gamma: Any, dy: Any) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """tanh(xhat * gamma) and its gradients in float64, with the error that float32 arithmetic may make of them."""
    axes = tuple(a for a in range(1, len(case.shape)) if a != case.channel_axis % len(case.shape))
    gamma = np.asarray(gamma, np.float64).reshape(
        [-1 if a == case.channel_axis % len(case.shape) else 1 for a in range(len(case.shape))]
    )
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    deviation = x - x.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt((deviation**2).mean(axes, keepdims=True) + EPS)
    xhat = deviation * rstd
    y = np.tanh(xhat * gamma)
    dz = dy * (1 - y**2)
    dbeta, dgamma = dz.sum(axes, keepdims=True), (dz * xhat).sum(axes, keepdims=True)
    dx = gamma * rstd * (dz - (dbeta + xhat * dgamma) / case.positions)
    want = {"y": y, "dx": dx, "dgamma": dgamma.sum(0).reshape(-1)}
    # Roundings of sums of M numbers in blocks, of the variance around a provisional center, of a few operations; the
    # result is rounded once more to the dtype of x, and so is what the kernel keeps of dz.
    arithmetic = (21 + math.log2(case.positions)) * 2.0**-24
    rounding = float(jnp.finfo(case.dtype).eps) / 2
    terms = float(np.abs(dz * xhat).sum(axes).sum(0).max())
    return want, {
        "y": arithmetic * float(np.abs(xhat * gamma).max()) + rounding,
        "dx": 2 * arithmetic * float((gamma * rstd).max() * np.abs(dy).max() * (2 + np.abs(xhat).max()))
        + rounding * float(np.abs(dx).max() + (gamma * rstd).max() * np.abs(dz).max()),
        "dgamma": 2 * arithmetic * terms * 2,
    }


def _checks_table(checks: list[dict[str, Any]]) -> Table:
    """A row per case and implementation: the error of each result as a share of what float32 may make."""
    table = Table("case", "by", *_RESULTS, title="max error against float64 (and what it may be)")
    for check in checks:
        cells = [_cell(check["results"][name]) for name in _RESULTS] if check["results"] else [check["reason"]]
        table.add_row(check["case"], check["implementation"], *cells)
    return table


def _cell(result: dict[str, float]) -> str:
    text = f"{result['max error']:.1e}\n({result['tolerance']:.1e})"
    within = result["max error"] <= result["tolerance"]
    return text if within else f"[red]WRONG {text}[/red]"


def _times_table(times: list[dict[str, Any]]) -> Table:
    table = Table("case", "pass", "contender", "µs", "GB/s", "of a copy", title="time per call")
    for row in times:
        table.add_row(
            row["case"],
            row["pass"],
            row["contender"],
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['bytes per second'] / 1e9:.0f}",
            f"{row['share of copy']:.0%}",
        )
    return table
