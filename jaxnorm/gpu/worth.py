"""Whether the kernel is likely to be faster than plain XLA: from estimates, which rank. They are no times.

Both are estimated from the bytes, the launches and the instructions; those of the activation from its equations, which
needs no compiler. benchmarks/throughput.py counts them on the compiled kernel: docs/throughput.md says how far off the
estimates are.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxnorm.gpu import elementwise
from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.ranking import microseconds
from jaxnorm.gpu.tile import NoTile, Tile

# Instructions of a thread per element, in float32 and where the hardware's own functions do; 1 for any other primitive.
_TRANSCENDENTAL = {
    "tanh": (14, 5),
    "exp": (6, 3),
    "exp2": (5, 2),
    "logistic": (14, 9),
    "div": (7, 5),
    "log": (12, 3),
    "log1p": (30, 14),
    "expm1": (30, 14),
    "erf": (32, 20),
    "erfc": (32, 20),
    "sin": (20, 3),
    "cos": (20, 3),
    "sqrt": (8, 6),
    "rsqrt": (5, 5),
    "integer_pow": (2, 2),
}
# Of a pass without its activation, in 4-byte and in narrower types.
_FORWARD, _BACKWARD = (8.0, 11.0), (12.0, 18.0)
# Of plain XLA, which evaluates the pullback twice.
_XLA_FORWARD, _XLA_BACKWARD = 10.0, 20.0
# Microseconds that a kernel takes at least, and those of plain XLA: for the center, the sums, the result.
_LAUNCH, _XLA_FORWARD_KERNELS, _XLA_BACKWARD_KERNELS = 2.0, 3, 2
# Sizes of x that plain XLA moves; the residual once more each time it is read, and its gradient.
_XLA_FORWARD_UNITS, _XLA_BACKWARD_UNITS, _XLA_RESIDUAL_BACKWARD = 3 + 1 / 16, 5, 3
_LANES, _CYCLES_PER_INSTRUCTION, _CYCLES = 128, 1.2, 1.7e3
# Where the estimates are wrong, it is by a fifth or so each way: what is left to plain XLA must be slower beyond doubt.
_MARGIN = 1.6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one pass, in microseconds.

    Attributes:
      kernel, xla: what each takes.
      instructions: of a thread per element, in the kernel.
    """

    kernel: float
    xla: float
    instructions: float


def unless_slower(
    tile: Tile, device: Device, activation: Callable[..., Any] | None, captures: int, name: str
) -> Tile | NoTile:
    """The tile, or the reason why plain XLA is taken for faster: see estimate."""
    found = estimate(tile, device, activation, captures, name)
    if found.kernel <= _MARGIN * found.xla:
        return tile
    return NoTile(
        f"plain XLA is estimated to be faster: {found.xla:.0f} microseconds against {found.kernel:.0f} of the kernel, "
        f"with {tile.thread_blocks} thread blocks and {found.instructions:.0f} instructions per element. "
        "implementation='pallas' takes the kernel"
    )


def estimate(tile: Tile, device: Device, activation: Callable[..., Any] | None, captures: int, name: str) -> Estimate:
    """Both estimates for a pass.

    Args:
      tile, device: of the pass.
      activation: a function of z and so many captures, or None.
      name: "forward" or "backward".
    """
    size = math.prod(tile.shape)
    inside = instructions(activation, captures, name, narrow=tile.itemsize < 4)
    outside = instructions(activation, captures, name, narrow=False)
    if name == "forward":
        units, kernels = _XLA_FORWARD_UNITS + (tile.arrays - 1), _XLA_FORWARD_KERNELS
        issued = _XLA_FORWARD + outside - _FORWARD[0]
    else:
        units, kernels = _XLA_BACKWARD_UNITS + _XLA_RESIDUAL_BACKWARD * (tile.arrays - 2), _XLA_BACKWARD_KERNELS
        issued = _XLA_BACKWARD + 2 * (outside - _BACKWARD[0])
    memory = units * size * tile.itemsize / device.bandwidth
    issue = size * issued * _CYCLES_PER_INSTRUCTION / (_LANES * device.sm_count * _CYCLES)
    kernel = _LAUNCH + microseconds(tile, device, inside)
    return Estimate(kernel, _LAUNCH * kernels + max(memory, issue), inside)


def instructions(activation: Callable[..., Any] | None, captures: int, name: str, *, narrow: bool) -> float:
    """Of a thread per element of the kernel, for all sweeps; narrow: in bfloat16 or float16."""
    trace, base = (elementwise.trace, _FORWARD) if name == "forward" else (elementwise.trace_pullback, _BACKWARD)
    if activation is None:
        return base[narrow]
    names = elementwise.primitives(trace(activation, captures))
    return base[narrow] + sum(_TRANSCENDENTAL.get(primitive, (1, 1))[narrow] for primitive in names)
