"""What selfcheck computes: random calls from a seed, and listed ones."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import dispatch
from jaxnorm.arguments import Activation, Implementation
from jaxnorm.call import Call, Operands
from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.tile import CopyKind, NoTile, SynchronizationKind, Tile

EPS = 1e-5
DTYPES = ("float32", "bfloat16", "float16")
# Groups of channels that the lanes of a thread block hold.
GROUP_SIZES = (4, 8, 16, 32)
ACTIVATIONS: dict[str, Activation | None] = {"none": None, "tanh": jnp.tanh}
# We give up on a case of one kind after this number of guesses.
_GUESSES = 1000

# Rows of 16 bytes, and samples that end inside a box with another sample after them: (shape, channel axis, dtype). A
# store that does not stop at the end of its sample overwrites the next one here. The interpreter does not show it.
ENDS = [
    ((4, 64, 34, 34), 1, "float32"),
    ((1, 3, 30, 30), 1, "float32"),
    ((8, 16, 34, 36), 1, "bfloat16"),
    ((5, 25, 10, 4), -1, "float32"),
    ((5, 20, 5, 8), -1, "float16"),
    ((6, 45, 77, 4), -1, "float32"),
]
# Feature maps of real networks: (shape, channel axis).
NETWORKS = {
    "CycleGAN residual block": ((8, 64, 64, 256), -1),
    "CycleGAN second layer": ((4, 128, 128, 128), -1),
    "fast style transfer": ((16, 32, 32, 512), -1),
    "nnU-Net, 32^3": ((2, 32, 32, 32, 128), -1),
    "nnU-Net, 8^3": ((64, 8, 8, 8, 320), -1),
    "ragged rows": ((64, 15, 15, 512), -1),
    "CycleGAN, (N, C, H, W)": ((8, 256, 64, 64), 1),
    "large maps": ((2, 64, 256, 256), 1),
    "small maps": ((256, 64, 28, 28), 1),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, forward and backward.

    Attributes:
      shape, channel_axis, dtype: of x.
      residual: whether there is one.
      activation: a key of ACTIVATIONS.
      offset: the mean of x, whose standard deviation is 2.
      x64: whether JAX has 64-bit numbers enabled.
      implementation: "pallas" for the kernel, "xla", or None for the default.
      device: None, or the GPU that the kernel's tile is found for. It has at most the SMs and the shared memory of the
        GPU that computes; with fewer, a small input gets a tile that only a larger one would get otherwise.
      group_size: how many neighboring channels share their statistics.
      seed: of the numbers.
    """

    shape: tuple[int, ...]
    channel_axis: int
    dtype: str
    residual: bool = False
    activation: str = "none"
    offset: float = 0.0
    x64: bool = False
    implementation: Implementation | None = None
    device: Device | None = None
    group_size: int = 1
    seed: int = 0

    @property
    def call(self) -> Call:
        return Call(
            (self.channel_axis % len(self.shape),),
            EPS,
            ACTIVATIONS[self.activation],
            implementation=self.implementation,
            group_size=self.group_size,
            device=self.device,
        )

    @property
    def tiles(self) -> tuple[Tile | NoTile, Tile | NoTile]:
        """Those of the forward and of the backward pass."""
        return self.forward_tile, self.backward_tile

    @functools.cached_property
    def forward_tile(self) -> Tile | NoTile:
        return self._tile(dispatch.FORWARD, self.residual)

    @functools.cached_property
    def backward_tile(self) -> Tile | NoTile:
        # Without an activation the gradients do not depend on the residual.
        return self._tile(dispatch.BACKWARD, self.residual and self.activation != "none")

    def _tile(self, one_pass: dispatch.Pass, residual: bool) -> Tile | NoTile:
        # Only their types matter.
        x: Any = jax.ShapeDtypeStruct(self.shape, self.dtype)
        value: Any = jax.ShapeDtypeStruct(self.call.layout(self.shape).instances, "float32")
        return one_pass.tile(self.call, Operands(x, value, value, x if residual else None), self.device)

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), "channels-first" if self.channel_axis == 1 else "channels-last"]
        parts += [self.dtype] + ["residual"] * self.residual + [self.activation] * (self.activation != "none")
        parts += [f"groups of {self.group_size}"] * (self.group_size > 1)
        parts += [f"offset {self.offset:g}"] * (self.offset != 0) + ["x64"] * self.x64
        return " ".join(parts)


class Kind(NamedTuple):
    """How the kernel copies and synchronizes.

    Attributes:
      copies, synchronization: as in Tile.
      blocks: how many thread blocks share an instance; None if that is not specified, and for one.
    """

    copies: CopyKind
    synchronization: SynchronizationKind
    blocks: int | None = None

    def __str__(self) -> str:
        return f"{self.copies}, {self.synchronization}" + (f" of {self.blocks}" if self.blocks else "")

    def is_of(self, case: Case) -> bool:
        """Whether both passes are of this kind; the number of blocks is that of the forward pass."""
        # We look at the forward pass first, since most random cases fail there.
        return _has(case.forward_tile, self) and _has(case.backward_tile, self._replace(blocks=None))


def _has(tile: Tile | NoTile, kind: Kind) -> bool:
    if isinstance(tile, NoTile):
        return False
    return kind_of(tile)[:2] == kind[:2] and kind.blocks in (None, tile.blocks_per_instance)


def kind_of(tile: Tile) -> Kind:
    blocks = tile.blocks_per_instance if tile.blocks_per_instance > 1 else None
    return Kind(tile.copies, tile.synchronization, blocks)


def kinds(device: Device) -> list[Kind]:
    """All kinds that a GPU runs."""
    if not device.has_bulk_copies:
        return [Kind("plain", "alone"), Kind("plain", "group"), Kind("span", "alone")]
    clusters = [Kind("bulk", "cluster", blocks) for blocks in (2, 4, 8)]
    return [Kind("bulk", "alone"), *clusters, Kind("bulk", "group"), Kind("span", "alone")]


class Size(NamedTuple):
    """How large a case is: elements of x, and thread blocks of each pass; each the least and the most."""

    elements: tuple[int, int]
    thread_blocks: tuple[int, int]

    def is_of(self, case: Case) -> bool:
        low, high = self.thread_blocks
        return all(isinstance(tile, Tile) and low <= tile.thread_blocks <= high for tile in case.tiles)


def draw_kinds(
    rng: np.random.Generator, wanted: list[Kind], count: int, device: Device, size: Size
) -> list[tuple[Kind, Case | None]]:
    """That many random cases of each kind, one of each first; None where none was found.

    Dtypes, activations and residuals take turns from a random start, so a few cases of a kind have them all.
    """
    turns = rng.integers(12, size=len(wanted))
    drawn = []
    for i in range(count):
        for kind, turn in zip(wanted, turns + i, strict=True):
            options = _options(rng, int(turn))
            guesses = (guess(rng, kind, options, device, size) for _ in range(_GUESSES))
            drawn.append((kind, next((case for case in guesses if kind.is_of(case) and size.is_of(case)), None)))
    return drawn


def guess(rng: np.random.Generator, kind: Kind, options: dict[str, Any], device: Device, size: Size) -> Case:
    """A random case that is likely to be of a kind. Whether it is must be verified."""
    # Rows must start at multiples of 16 bytes; a span is for instances that do not.
    itemsize = jnp.dtype(options["dtype"]).itemsize
    is_span, aligned = kind.copies == "span", 16 // itemsize
    channels_last = bool(rng.integers(2)) and not is_span
    group_size = int(rng.choice(GROUP_SIZES)) if channels_last and rng.integers(2) else 1
    most_blocks = size.thread_blocks[1]
    blocks = kind.blocks or (
        _between(rng, 2, min(device.sm_count, most_blocks)) if kind.synchronization == "group" else 1
    )
    # An instance, or 8 times as many channels as are aligned, takes that many blocks.
    elements, batch = _between(rng, *size.elements), _between(rng, 1, min(8, most_blocks // blocks))
    most = max(1, most_blocks // (blocks * batch))
    channels = aligned * _between(rng, 1, min(32, 8 * most)) if channels_last else _between(rng, 1, min(64, most))
    channels = -(-channels // group_size) * group_size
    if is_span:
        # A thread block has several instances, so they must be small and many.
        channels = aligned * max(1, elements // (batch * aligned * _between(rng, 16, 2048)))
    # Powers of two fill whole boxes; odd sizes have ragged ends.
    rounded = _to_odd if rng.integers(3) else _to_power_of_two
    spatial = [rounded(_between(rng, 1, 64))] if rng.integers(2) else []
    row = 1 if channels_last or is_span else aligned * int(rng.choice([1, 2, 8]))
    spatial.append(rounded(elements // (batch * channels * math.prod(spatial) * row)) * row)
    # With about this much shared memory an instance takes the wanted number of blocks. Groups fill all SMs or a part.
    instance_bytes = math.prod(spatial) * (max(32, group_size * itemsize) if channels_last else 4)
    shared = max(12 * 1024, 8 * 1024 + int(instance_bytes / blocks * rng.uniform(0.5, 4)))
    return Case(
        shape=(batch, *spatial, channels) if channels_last else (batch, channels, *spatial),
        channel_axis=-1 if channels_last else 1,
        implementation="pallas",
        device=dataclasses.replace(
            device,
            sm_count=min(blocks * _between(rng, 2, 8), device.sm_count),
            shared_memory=device.shared_memory if is_span else min(shared, device.shared_memory),
        ),
        group_size=group_size,
        **options,
    )


def draw_listed(rng: np.random.Generator, listed: list[tuple[tuple[int, ...], int, str]], device: Device) -> list[Case]:
    """The listed (shape, channel axis, dtype) by the kernel, with the tiles of the GPU itself, where it has some."""
    found = []
    for shape, axis, dtype in listed:
        options = _options(rng, int(rng.integers(12))) | {"dtype": dtype}
        case = Case(shape, axis, implementation="pallas", device=device, **options)
        found += [case] * all(isinstance(tile, Tile) for tile in case.tiles)
    return found


def draw_plain(rng: np.random.Generator, count: int, implementation: Implementation | None) -> list[Case]:
    """That many random cases of any layout, without the kernel; every other one is group norm."""
    found = []
    for turn in range(count):
        batch, channels = _between(rng, 1, 8), _between(rng, 1, 256)
        spatial = [_to_odd(_between(rng, 4, 64)) for _ in range(rng.integers(1, 3))]
        shapes = {1: (batch, channels, *spatial), -1: (batch, *spatial, channels)}
        axis = int(rng.choice(list(shapes)))
        size = (
            int(rng.choice([size for size in range(min(2, channels), channels + 1) if channels % size == 0]))
            if turn % 2
            else 1
        )
        options = _options(rng, turn)
        found.append(Case(shapes[axis], axis, implementation=implementation, group_size=size, **options))
    return found


def _options(rng: np.random.Generator, turn: int) -> dict[str, Any]:
    """What any case may have, whatever its shape."""
    return {
        "dtype": DTYPES[turn % 3],
        "activation": list(ACTIVATIONS)[turn % 2],
        "residual": turn // 2 % 2 == 0,
        "offset": float(rng.choice([0.0, 3.0] if turn % 3 else [0.0, 3.0, 1e3])),
        "x64": bool(rng.integers(4) == 0),
        "seed": int(rng.integers(2**31)),
    }


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    """A number from low to high, both included; small ones are as likely as large ones."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def _to_odd(number: int) -> int:
    return number | 1


def _to_power_of_two(number: int) -> int:
    return 1 << max(number, 1).bit_length() - 1
