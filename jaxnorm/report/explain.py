"""What a call would run on a GPU, and why."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxnorm import activations, arguments, choice, reference
from jaxnorm.arguments import Activation, Axes, Implementation
from jaxnorm.functional import instance_norm
from jaxnorm.gpu.devices import DEVICES, Device, current, facts, named
from jaxnorm.gpu.tile import NoTile, Tile
from jaxnorm.layout import Layout

# What plain XLA reads and writes, in sizes of x: a sixteenth for the provisional center, then x for the sums, x and y
# for the result; backward x and dy for the sums, x, dy and dx for the result.
_XLA_FORWARD = 3 + 1 / 16
_XLA_BACKWARD = 5

# Sizes of x that each implementation moves.
_Units = dict[Implementation, float]


@dataclasses.dataclass(frozen=True, repr=False)
class Pass:
    """How one pass would be computed. Its repr is text to be read.

    Attributes:
      name: "forward" or "backward".
      implementation: "pallas", "xla" or "reference".
      tile: of the kernel, or the reason why it does not run. With implementation="pallas" the call raises it.
      bytes_moved: x-sized arrays read and written, caches and the small statistics ignored; None where the call raises
        and for "reference", where it depends on what XLA makes of the formula.
    """

    name: str
    implementation: Implementation
    tile: Tile | NoTile
    bytes_moved: int | None

    def __repr__(self) -> str:
        head = f"{self.name}: {self.implementation}"
        if self.bytes_moved is not None:
            head += f", moves {_size(self.bytes_moved)}"
        if isinstance(self.tile, NoTile):
            why_not = "raises" if self.implementation == "pallas" else "why not the kernel"
            return f"{head}\n  {why_not}: {self.tile.reason}"
        tile = self.tile
        shared = {
            "alone": "no clusters",
            "cluster": f"clusters of {tile.blocks_per_instance}",
            "group": f"groups of {tile.blocks_per_instance} that meet in global memory",
        }[tile.synchronization]
        return (
            f"{head}\n"
            f"  thread blocks: {tile.thread_blocks}, {shared}\n"
            f"  each holds: {tile.arrays} x {tile.boxes} boxes of {tile.rows} rows of {tile.row_bytes} bytes\n"
            f"  shared memory: {_size(tile.shared_memory)} per thread block, {tile.copies} copies"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What a call would run on a device. Its repr is text to be read.

    Attributes:
      device_name: the product name of the device, such as "NVIDIA H100 80GB HBM3", or "CPU".
      device: what was assumed of the GPU, or None if it is not a CUDA GPU.
      forward, backward: the passes.
    """

    device_name: str
    device: Device | None
    forward: Pass
    backward: Pass

    def __repr__(self) -> str:
        facts = "not a CUDA GPU"
        if self.device is not None:
            major, minor = self.device.compute_capability
            facts = f"compute capability {major}.{minor}, {self.device.sm_count} SMs"
        return f"device: {self.device_name}, {facts}\n{self.forward}\n{self.backward}"


def explain(
    x: ArrayLike | jax.ShapeDtypeStruct,
    *,
    channel_axis: Axes = 1,
    residual: ArrayLike | jax.ShapeDtypeStruct | bool | None = None,
    activation: Activation | None = None,
    implementation: Implementation | None = None,
    device: str | None = None,
) -> Explanation:
    """Says what a call of jaxnorm.instance_norm would run on a GPU: the kernel, with its tile, or what else and why.

    Nothing is run or printed, and no GPU need be there.

    Args:
      x: an array, or a jax.ShapeDtypeStruct.
      channel_axis, activation, implementation: as in jaxnorm.instance_norm.
      residual: as in jaxnorm.instance_norm, or a jax.ShapeDtypeStruct; or True for one like x, and False for none.
      device: a product name such as "H100" or "NVIDIA H100 80GB HBM3"; None for the device that x is on, or JAX's
        default device.

    Returns:
      The explanation, whose repr and str are text to be read.

    Raises:
      TypeError: as instance_norm, or the device is not a name.
      ValueError: as instance_norm, or the device is not a known one.

    >>> import jax, jax.numpy as jnp
    >>> import jaxnorm
    >>> x = jax.ShapeDtypeStruct((8, 64, 64, 256), jnp.bfloat16)
    >>> relu_norm = {"channel_axis": -1, "activation": jax.nn.relu}
    >>> explanation = jaxnorm.explain(x, **relu_norm, implementation="pallas", device="H100")
    >>> explanation
    device: H100, compute capability 9.0, 132 SMs
    forward: pallas, moves 32.0 MiB
    ...
    >>> jaxnorm.explain(x, **relu_norm, device="H100").forward.implementation
    'xla'
    """
    name, gpu = _device(device, x)
    y = _check_call(x, channel_axis=channel_axis, residual=residual, activation=activation)
    arguments.check_implementation(implementation)
    prepared = activations.prepare(activation, reference.statistics_dtype(y.dtype))
    find_tiles = functools.partial(
        choice.find_tiles,
        Layout(y.shape, arguments.check_channel_axes(y.shape, channel_axis)).view_shape,
        y.dtype,
        residual=_is_given(residual),
        activation=prepared.function,
        captures=len(prepared.captures),
        device=gpu,
    )
    # Where the kernel cannot run at all, that is the reason and not that it is not proven.
    taken, by_name = find_tiles(implementation=implementation), find_tiles(implementation="pallas")
    tiles = [named if isinstance(named, NoTile) else tile for tile, named in zip(taken, by_name, strict=True)]
    size = y.size * y.dtype.itemsize
    # Read and written besides: the residual forward, the residual and its gradient backward. Plain XLA reads the
    # residual once for each of its two passes.
    more = (1, 2 if activation is not None else 0) if _is_given(residual) else (0, 0)
    forward: _Units = {"pallas": 2 + more[0], "xla": _XLA_FORWARD + more[0]}
    backward: _Units = {"pallas": 3 + more[1], "xla": _XLA_BACKWARD + 1.5 * more[1]}
    return Explanation(
        name,
        gpu,
        _pass("forward", implementation, tiles[0], size, forward),
        _pass("backward", implementation, tiles[1], size, backward),
    )


def _check_call(x: Any, *, residual: Any, **options: Any) -> jax.ShapeDtypeStruct:
    """What the call would return, after the checks of instance_norm itself."""
    shape = getattr(x, "shape", ())
    if any(size < 0 for size in shape):
        raise ValueError(f"x must have sizes of at least 0: got shape {shape}. Give the sizes of an array.")
    if isinstance(residual, (bool, np.bool_)):
        residual = x if residual else None
    given = {"x": x, "residual": residual}
    # Only arrays can be traced; instance_norm says what is wrong with the rest.
    arrays = {name: value for name, value in given.items() if arguments.is_array(value)}
    rest = {name: value for name, value in given.items() if name not in arrays}
    call = functools.partial(instance_norm, implementation="reference", **rest, **options)
    y: jax.ShapeDtypeStruct = jax.eval_shape(call, **arrays)
    return y


def _is_given(residual: Any) -> bool:
    return bool(residual) if isinstance(residual, (bool, np.bool_)) else residual is not None


def _pass(name: str, named: Implementation | None, tile: Tile | NoTile, size: int, units: _Units) -> Pass:
    chosen: Implementation = named or ("xla" if isinstance(tile, NoTile) else "pallas")
    if chosen != "pallas":
        reason = tile if named is None else NoTile(f"implementation={named!r} was named")
        return Pass(name, chosen, reason, round(units[chosen] * size) if chosen in units else None)
    return Pass(name, chosen, tile, None if isinstance(tile, NoTile) else round(units[chosen] * size))


def _device(name: str | None, x: Any) -> tuple[str, Device | None]:
    """The name to show, and the facts."""
    if name is None:
        device = current(x)
        kind: str = device.device_kind
        # The kind of a CPU is "cpu".
        return kind.upper() if kind == device.platform else kind, facts(device)
    if not isinstance(name, str):
        raise TypeError(
            f"device must be None or a product name: got {type(name).__name__}. Of a jax.Device, pass the device_kind."
        )
    known = named(name)
    if known is None:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, or None for the current one: got {name!r}.")
    return name, known


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
