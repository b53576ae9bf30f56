"""What selfcheck tries, drawn by chance from a seed."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxnorm.arguments import Activation
from jaxnorm.gpu.cost import instructions
from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.tile import CopyKind, NoTile, SynchronizationKind, Tile, find_tile
from jaxnorm.layout import Layout

DTYPES = ("float32", "bfloat16", "float16")
_FUNCTIONS: dict[str, Activation | None] = {"none": None, "tanh": jnp.tanh}
ACTIVATIONS = tuple(_FUNCTIONS)
_OFFSETS = {"float32": (0.0, 3.0, 1e3), "bfloat16": (0.0, 3.0), "float16": (0.0, 3.0)}
# Draws until a shape and a device take a wanted way, and until their end is ragged too, or is not.
_DRAWS, _DRAWS_FOR_ENDS = 2000, 200
_LEAST_SHARED = 12 * 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, forward and backward.

    Attributes:
      shape, channel_axis, dtype: of x.
      residual: whether there is one.
      activation: of ACTIVATIONS.
      offset: of x, whose standard deviation is 2.
      x64: whether 64-bit numbers are on.
      device: that tiles are found for: the GPU, or one with fewer SMs and less shared memory, so that the tile is one
        which only larger inputs would take on the GPU.
      implementation: "pallas" or "xla".
      seed: of the numbers.
    """

    shape: tuple[int, ...]
    channel_axis: int
    dtype: str
    residual: bool
    activation: str
    offset: float
    x64: bool
    device: Device
    implementation: Literal["pallas", "xla"] = "pallas"
    seed: int = 0

    @staticmethod
    def of(data: dict[str, Any]) -> "Case":
        """The inverse of dataclasses.asdict, after JSON has made lists of tuples."""
        device = dict(data["device"])
        device["compute_capability"] = tuple(device["compute_capability"])
        return Case(**data | {"shape": tuple(data["shape"]), "device": Device(**device)})

    @property
    def positions(self) -> int:
        """Of an instance."""
        return math.prod(self.shape) // (self.shape[0] * self.shape[self.channel_axis])

    @property
    def tiles(self) -> tuple[Tile | NoTile, Tile | NoTile]:
        """Of the forward and the backward pass."""
        return self.forward_tile, self.backward_tile

    @functools.cached_property
    def forward_tile(self) -> Tile | NoTile:
        return self._tile("forward", 1 + self.residual)

    @functools.cached_property
    def backward_tile(self) -> Tile | NoTile:
        return self._tile("backward", 2 + (self.residual and self.activation != "none"))

    def _tile(self, name: str, arrays: int) -> Tile | NoTile:
        view = Layout(self.shape, (self.channel_axis % len(self.shape),)).view_shape
        itemsize = jnp.dtype(self.dtype).itemsize
        return find_tile(view, itemsize, arrays, self.device, _instructions(self.activation, name, itemsize < 4))

    def __str__(self) -> str:
        layout = "channels-first" if self.channel_axis == 1 else "channels-last"
        parts = ["x".join(map(str, self.shape)), layout, self.dtype]
        parts += ["residual"] * self.residual + [self.activation] * (self.activation != "none")
        parts += [f"offset {self.offset:g}"] * (self.offset != 0) + ["x64"] * self.x64
        return " ".join(parts)


@functools.cache
def _instructions(activation: str, name: str, narrow: bool) -> float:
    return instructions(_FUNCTIONS[activation], name, narrow=narrow)


class Wanted(NamedTuple):
    """A way of both passes; the forward pass has so many parts, where that is said."""

    copies: CopyKind
    synchronization: SynchronizationKind
    parts: int | None = None

    def __str__(self) -> str:
        of = f" of {self.parts}" if self.parts else ""
        return f"{self.copies}, {self.synchronization}{of}"

    def is_of(self, case: Case) -> bool:
        # One after the other: most cases that are drawn fail by the first.
        return self._takes(case.forward_tile, self.parts) and self._takes(case.backward_tile)

    def _takes(self, tile: Tile | NoTile, parts: int | None = None) -> bool:
        if isinstance(tile, NoTile):
            return False
        kind = (tile.copies, tile.synchronization)
        return kind == (self.copies, self.synchronization) and parts in (None, tile.blocks_per_instance)


_WAYS = (
    Wanted("bulk", "alone"),
    *(Wanted("bulk", "cluster", parts) for parts in (2, 4, 8)),
    Wanted("bulk", "group"),
    Wanted("plain", "alone"),
    Wanted("plain", "group"),
    Wanted("span", "alone"),
)


def ways(device: Device) -> list[Wanted]:
    """All that a device can run."""
    # Mosaic GPU has cp.async, for plain copies, only before Hopper.
    other = "plain" if device.has_bulk_copies else "bulk"
    return [way for way in _WAYS if way.copies != other]


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a case is: elements of x, and thread blocks of each pass."""

    elements: tuple[int, int]
    thread_blocks: tuple[int, int]

    def is_of(self, case: Case) -> bool:
        low, high = self.thread_blocks
        return all(isinstance(tile, Tile) and low <= tile.thread_blocks <= high for tile in case.tiles)


def draw_each(rng: np.random.Generator, wanted: list[Wanted], count: int, device: Device, size: Size) -> list[Any]:
    """(way, case) or (way, None) where none was found: so many of each way, one of each first.

    Dtypes, activations, residual, ragged ends and x64 take turns, from a start that is drawn, so that a few cases of
    each way have them all.
    """
    drawn = []
    starts = rng.integers(12, size=(len(wanted), 5))
    for i in range(count):
        for way, start in zip(wanted, starts, strict=True):
            dtype, activation, residual, ragged, x64 = (start + i).tolist()
            options = {
                "dtype": DTYPES[dtype % 3],
                "activation": ACTIVATIONS[activation % 2],
                "residual": residual % 2 == 0,
                "x64": x64 % 4 == 0,
            }
            drawn.append((way, _draw(rng, way, ragged % 2 == 0, options, device, size)))
    return drawn


def _draw(
    rng: np.random.Generator, way: Wanted, ragged: bool, options: dict[str, Any], device: Device, size: Size
) -> Case | None:
    # What fills its tiles exactly, or does not, is hard to find in some ways: then either will do.
    either = None
    for draws in range(_DRAWS):
        if either is not None and draws >= _DRAWS_FOR_ENDS:
            break
        case = _any(rng, way, ragged, options, device, size)
        if way.is_of(case) and size.is_of(case):
            if case.tiles[0].ragged == ragged:  # type: ignore[union-attr]
                return case
            either = either or case
    return either


def _any(
    rng: np.random.Generator, way: Wanted, ragged: bool, options: dict[str, Any], device: Device, size: Size
) -> Case:
    """Any case at all, on any device that is not larger than the given one.

    A ragged one has odd sizes, times what rows must be a multiple of, since powers of two fill whole boxes.
    """
    dtype = options["dtype"]
    # Channels, or positions, such that rows start at multiples of 16 bytes; spans are for instances that do not.
    aligned, is_span = 16 // jnp.dtype(dtype).itemsize, way.copies == "span"
    elements = _between(rng, *size.elements)
    batch = _between(rng, 1, 8)
    channels_last = bool(rng.integers(2)) and not is_span
    channels = aligned * _between(rng, 1, 32) if channels_last else _between(rng, 1, 64)
    if is_span:
        # A thread block holds several instances: they are small and many.
        channels = aligned * max(1, elements // (batch * aligned * _between(rng, 16, 2048)))
    positions = max(1, elements // (batch * channels))
    odd = 1 if ragged else 0
    spatial = [_between(rng, 1, 64) | odd] if rng.integers(2) else []
    last = max(1, positions // math.prod(spatial))
    row = 1 if channels_last or is_span else aligned * int(rng.choice([1, 2, 8]))
    spatial.append((-(-last // row) | odd) * row)
    parts = {"alone": 1, "cluster": way.parts or 1, "group": _between(rng, 2, device.sm_count)}[way.synchronization]
    # About as much shared memory as makes the way likely: what comes of it is looked at.
    instances = (last if channels_last else spatial[-1]) * math.prod(spatial[:-1]) * (32 if channels_last else 4)
    about = int(instances / parts * rng.uniform(0.5, 4)) + 2 * _LEAST_SHARED // 3
    about = device.shared_memory if is_span else about
    made_up = Device(
        device.compute_capability,
        _between(rng, 2, device.sm_count),
        min(max(about, _LEAST_SHARED), device.shared_memory),
    )
    return Case(
        shape=(batch, *spatial, channels) if channels_last else (batch, channels, *spatial),
        channel_axis=-1 if channels_last else 1,
        offset=float(rng.choice(_OFFSETS[dtype])),
        device=made_up,
        seed=int(rng.integers(2**31)),
        **options,
    )


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    """Both included; small ones as likely as large ones."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


# Rows of 16 bytes, samples that end inside a box, and another sample behind that end: (shape, channel axis, dtype). A
# store that does not end with its sample overwrites the next one here, which the interpreter does not show.
ENDS = [
    ((4, 64, 34, 34), 1, "float32"),
    ((1, 3, 30, 30), 1, "float32"),
    ((8, 16, 34, 36), 1, "bfloat16"),
    ((5, 25, 10, 4), -1, "float32"),
    ((5, 20, 5, 8), -1, "float16"),
    ((6, 45, 77, 4), -1, "float32"),
]


def draw_ends(rng: np.random.Generator, count: int, device: Device) -> list[Case]:
    """So many of ENDS, the first two always, as the GPU itself would run them."""
    rest = 2 + rng.permutation(len(ENDS) - 2)
    found = []
    for shape, axis, dtype in [*ENDS[:2], *(ENDS[i] for i in rest)][:count]:
        residual, activation = bool(rng.integers(2)), str(rng.choice(ACTIVATIONS))
        found.append(Case(shape, axis, dtype, residual, activation, 3.0, False, device))
    return [case for case in found if all(isinstance(tile, Tile) for tile in case.tiles)]


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


def draw_networks(rng: np.random.Generator, count: int, device: Device) -> list[Case]:
    """The kernel and plain XLA on so many of NETWORKS, as they are chosen for the GPU itself."""
    found = []
    for name in rng.choice(list(NETWORKS), count, replace=False):
        shape, axis = NETWORKS[name]
        dtype, activation = str(rng.choice(DTYPES[:2])), str(rng.choice(ACTIVATIONS))
        case = Case(shape, axis, dtype, bool(rng.integers(2)), activation, 3.0, False, device)
        found += [dataclasses.replace(case, implementation="xla")]
        found += [case] * all(isinstance(tile, Tile) for tile in case.tiles)
    return found
