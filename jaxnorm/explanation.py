"""What a call would run on a GPU, and why."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxnorm import arguments, dispatch, reference
from jaxnorm.activation import Resolved, is_known, resolve
from jaxnorm.arguments import Activation, Axes, Implementation
from jaxnorm.call import Call, Operands
from jaxnorm.functional import group_norm, instance_norm
from jaxnorm.gpu.devices import DEVICES, Device, current, facts, named
from jaxnorm.gpu.tile import NoTile, Tile
from jaxnorm.platforms import SLAB

# Sizes of x that each implementation moves. Plain XLA reads the slab, then x for the sums, and x again for y, which
# it writes; backward it reads x and dy twice, and writes dx.
_UNITS = {"forward": {"pallas": 2.0, "xla": 3 + 1 / SLAB}, "backward": {"pallas": 3.0, "xla": 5.0}}
# A residual: the kernel reads it once, and backward writes its gradient. Plain XLA reads it in both passes over x.
_UNITS_OF_RESIDUAL = {"forward": {"pallas": 1.0, "xla": 1.0}, "backward": {"pallas": 2.0, "xla": 3.0}}

# GPUs before Ampere.
_TOO_OLD = re.compile(r"\b(K\d+|M\d+|P\d+|V100\w*|T4|TITAN|GTX|RTX 20\d\d|QUADRO)\b", re.IGNORECASE)


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
        return f"{self.head}\n  {self.details}"

    @property
    def head(self) -> str:
        """The implementation, in a line."""
        moved = "" if self.bytes_moved is None else f", moves {_size(self.bytes_moved)}"
        return f"{self.name}: {self.implementation}{moved}"

    @property
    def details(self) -> str:
        """The tile of the kernel, or the reason why there is none."""
        if isinstance(self.tile, NoTile):
            return f"{'raises' if self.implementation == 'pallas' else 'kernel'}: {self.tile.reason}"
        tile = self.tile
        shared = {
            "alone": "no clusters",
            "cluster": f"clusters of {tile.blocks_per_instance}",
            "group": f"groups of {tile.blocks_per_instance} that synchronize in global memory",
        }[tile.synchronization]
        return (
            f"thread blocks: {tile.thread_blocks}, {shared}\n"
            f"  each holds: {tile.arrays} x {tile.boxes} boxes of {tile.rows} rows of {tile.row_bytes} bytes\n"
            f"  shared memory: {_size(tile.shared_memory)} per thread block, {tile.copies} copies"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What a call would run on a device. Its repr is text to be read.

    Attributes:
      device_name: the product name of the device, such as "NVIDIA H100 80GB HBM3", or "CPU".
      device: what was assumed of the GPU, or None if it is not a CUDA GPU.
      activation: how it is computed, in words; None where there is none.
      forward, backward: the passes.
    """

    device_name: str
    device: Device | None
    activation: str | None
    forward: Pass
    backward: Pass

    def __repr__(self) -> str:
        facts = "not a CUDA GPU"
        if self.device is not None:
            major, minor = self.device.compute_capability
            facts = f"compute capability {major}.{minor}, {self.device.sm_count} SMs"
        lines = [f"device: {self.device_name}, {facts}"]
        lines += [] if self.activation is None else [f"activation: {self.activation}"]
        if isinstance(self.forward.tile, NoTile) and self.forward.details == self.backward.details:
            # One reason for both passes is said once.
            lines += [self.forward.head, self.backward.head, self.forward.details]
        else:
            lines += [str(self.forward), str(self.backward)]
        return "\n".join(lines)


def explain(
    x: ArrayLike | jax.ShapeDtypeStruct,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
    channel_axis: Axes = 1,
    residual: ArrayLike | jax.ShapeDtypeStruct | bool | None = None,
    activation: Activation | None = None,
    implementation: Implementation | None = None,
    device: str | None = None,
) -> Explanation:
    """Says what a call of instance_norm or group_norm runs on a GPU: the kernel, with its tile, or what else and why.

    Nothing is run or printed, and no GPU need be there.

    Args:
      x: an array, or a jax.ShapeDtypeStruct.
      num_groups, group_size: one of them for group_norm, as there; none for instance_norm.
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
    activation: fused
    forward: pallas, moves 32.0 MiB
    ...
    >>> jaxnorm.explain(x, **relu_norm, device="H100").forward.implementation
    'xla'
    """
    name, gpu = _device(device, x)
    has_groups = num_groups is not None or group_size is not None
    groups = {"num_groups": num_groups, "group_size": group_size} if has_groups else {}
    norm = group_norm if has_groups else instance_norm
    y: Any = _check_call(norm, x, channel_axis=channel_axis, residual=residual, activation=activation, **groups)
    arguments.check_implementation(implementation)
    resolved = _resolve(activation, y)
    channel_axes = arguments.check_channel_axes(y.shape, channel_axis)
    # What runs depends neither on eps nor on the values, so any will do.
    size = arguments.check_groups(num_groups, group_size, y.shape, channel_axes) if has_groups else 1
    call = Call(channel_axes, 1.0, resolved.fused, implementation=implementation, group_size=size)
    per_instance: Any = jax.ShapeDtypeStruct(call.layout(y.shape).instances, reference.statistics_dtype(y.dtype))
    operands = Operands(y, per_instance, per_instance, y if _is_given(residual) else None)
    return Explanation(
        name,
        gpu,
        _described(activation, resolved),
        _pass(dispatch.FORWARD, call, operands, gpu),
        # Without an activation, the gradients do not depend on the residual.
        _pass(dispatch.BACKWARD, call, operands if resolved.fused else operands._replace(residual=None), gpu),
    )


def _check_call(norm: Callable[..., Any], x: Any, *, residual: Any, **options: Any) -> jax.ShapeDtypeStruct:
    """What the call would return, after the checks of the norm itself."""
    shape = getattr(x, "shape", ())
    if any(size < 0 for size in shape):
        raise ValueError(f"x must have sizes of at least 0: got shape {shape}. Give the sizes of an array.")
    if isinstance(residual, (bool, np.bool_)):
        residual = x if residual else None
    given = {"x": x, "residual": residual}
    # Only arrays can be traced. The norm itself says what is wrong with the rest.
    arrays = {name: value for name, value in given.items() if arguments.is_array(value)}
    rest = {name: value for name, value in given.items() if name not in arrays}
    call = functools.partial(norm, implementation="reference", **rest, **options)
    y: jax.ShapeDtypeStruct = jax.eval_shape(call, **arrays)
    return y


def _resolve(activation: Activation | None, x: jax.ShapeDtypeStruct) -> Resolved:
    """What becomes of the activation inside jit."""
    found = []

    def inside(x: jax.Array) -> None:
        found.append(resolve(activation, x, reference.statistics_dtype(x.dtype)))

    jax.eval_shape(inside, x)
    return found[0]


def _described(activation: Activation | None, resolved: Resolved) -> str | None:
    if activation is None:
        return None
    if resolved.after is not None:
        return f"applied after the norm: {resolved.why_after}"
    return "fused" if is_known(activation) else "fused inside jax.jit, applied after the norm outside"


def _is_given(residual: Any) -> bool:
    return bool(residual) if isinstance(residual, (bool, np.bool_)) else residual is not None


def _pass(one_pass: dispatch.Pass, call: Call, operands: Operands, gpu: Device | None) -> Pass:
    name, named = one_pass.name, call.implementation
    # Where the kernel cannot run at all, that is the reason, and not that it is not proven.
    tile = one_pass.tile(dataclasses.replace(call, implementation="pallas"), operands, gpu)
    if isinstance(tile, Tile):
        tile = one_pass.tile(call, operands, gpu)
    chosen: Implementation = named or ("xla" if isinstance(tile, NoTile) else "pallas")
    if named in ("xla", "reference"):
        tile = NoTile(f"implementation={named!r} was named")
    moved = None
    if chosen != "reference" and not (chosen == "pallas" and isinstance(tile, NoTile)):
        units = _UNITS[name][chosen] + (_UNITS_OF_RESIDUAL[name][chosen] if operands.residual is not None else 0)
        moved = round(units * operands.x.size * operands.x.dtype.itemsize)
    return Pass(name, chosen, tile, moved)


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
        reason = f"device must be None, for the current one, or the name of a known GPU: got {name!r}"
        if _TOO_OLD.search(name):
            reason = f"{name} is too old: compute capability 8.0 is needed"
        nearest = difflib.get_close_matches(name.upper(), DEVICES, n=3, cutoff=0)
        raise ValueError(f"{reason}. The nearest names are {', '.join(nearest)}.")
    return name, known


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
