"""What a call would run on a GPU, and why."""

import dataclasses
import math
from typing import Any

import jax

from jaxnorm import activations, arguments, choice, reference
from jaxnorm.arguments import Activation, Axes
from jaxnorm.gpu.devices import DEVICES, Device, facts, named
from jaxnorm.gpu.tiling import NoTile, Tile
from jaxnorm.layout import Layout

# What plain XLA reads and writes, in sizes of x: a sixteenth for the provisional center, then x for the sums, x and y
# for the result; backward x and dy for the sums, x, dy and dx for the result.
_XLA_FORWARD = 3 + 1 / 16
_XLA_BACKWARD = 5


@dataclasses.dataclass(frozen=True)
class Pass:
    """How one pass would be computed.

    Attributes:
      name: "forward" or "backward".
      implementation: "pallas" or "xla".
      tile: of the kernel, or the reason why it cannot run.
      bytes_moved: x-sized arrays read and written, caches and the small statistics ignored.
    """

    name: str
    implementation: str
    tile: Tile | NoTile
    bytes_moved: int

    def __str__(self) -> str:
        head = f"{self.name}: {self.implementation}, moves {_size(self.bytes_moved)}"
        if isinstance(self.tile, NoTile):
            return f"{head}\n  why not the kernel: {self.tile.reason}"
        tile = self.tile
        cluster = f"clusters of {tile.parts}" if tile.parts > 1 else "no clusters"
        return (
            f"{head}\n"
            f"  thread blocks: {tile.thread_blocks}, {cluster}\n"
            f"  each holds: {tile.arrays} x {tile.boxes} boxes of {tile.rows} rows of {tile.row_bytes} bytes\n"
            f"  shared memory: {_size(tile.shared_memory)} per thread block"
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would run on a device.

    Attributes:
      device: what was assumed of the GPU, or None.
      forward, backward: the passes.
    """

    device: Device | None
    forward: Pass
    backward: Pass

    def __str__(self) -> str:
        device = "no CUDA GPU"
        if self.device is not None:
            major, minor = self.device.compute_capability
            device = f"compute capability {major}.{minor}, {self.device.sm_count} SMs"
        return f"device: {device}\n{self.forward}\n{self.backward}"


def explain(
    x: Any,
    *,
    channel_axis: Axes = 1,
    residual: bool = False,
    activation: Activation | None = None,
    device: str | None = None,
) -> Explanation:
    """Says which implementation jaxnorm.instance_norm would choose for a call on a GPU, with its tile or the reason.

    Nothing is run, and no GPU need be there.

    Args:
      x: an array, or a jax.ShapeDtypeStruct.
      channel_axis, activation: as in jaxnorm.instance_norm.
      residual: whether the call has one.
      device: a product name such as "H100", or None for JAX's default device.

    Returns:
      The explanation, which is printed too.

    Raises:
      ValueError: the device is not a known one, or an argument breaks a rule of jaxnorm.instance_norm.

    >>> import jax, jax.numpy as jnp
    >>> import jaxnorm
    >>> x = jax.ShapeDtypeStruct((8, 64, 64, 256), jnp.bfloat16)
    >>> explanation = jaxnorm.explain(x, channel_axis=-1, activation=jax.nn.relu, device="H100")
    device: compute capability 9.0, 132 SMs
    forward: pallas, moves 32.0 MiB
    ...
    >>> explanation.forward.implementation
    'pallas'
    """
    shape, dtype = tuple(x.shape), jax.numpy.dtype(x.dtype)
    channel_axes = arguments.check_channel_axes(shape, channel_axis)
    arguments.check_spatial(shape, channel_axes)
    prepared = activations.prepare(activation, reference.statistics_dtype(dtype))
    view = Layout(shape, channel_axes).view_shape
    gpu = _device(device)
    tiles = choice.find_tiles(
        view,
        dtype,
        residual=residual,
        activation=prepared.function,
        captures=len(prepared.captures),
        device=gpu,
    )
    size = math.prod(shape) * dtype.itemsize
    differentiated = residual and activation is not None
    # Read and written besides: the residual forward, the residual and its gradient backward.
    more = (1 if residual else 0, 2 if differentiated else 0)
    forward = _pass("forward", tiles[0], size, kernel=2 + more[0], xla=_XLA_FORWARD + more[0])
    # Plain XLA reads the residual once for each of its two passes.
    backward = _pass("backward", tiles[1], size, kernel=3 + more[1], xla=_XLA_BACKWARD + 1.5 * more[1])
    explanation = Explanation(gpu, forward, backward)
    print(explanation)
    return explanation


def _pass(name: str, tile: Tile | NoTile, size: int, *, kernel: float, xla: float) -> Pass:
    if isinstance(tile, NoTile):
        return Pass(name, "xla", tile, round(xla * size))
    return Pass(name, "pallas", tile, round(kernel * size))


def _device(name: str | None) -> Device | None:
    if name is None:
        return facts(jax.devices()[0])
    device = named(name)
    if device is None:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, or None for the current one: got {name!r}.")
    return device


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
