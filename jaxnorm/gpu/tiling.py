"""Finds the tile of a pass: a pure function of the shape, the dtype and the facts of a device."""

import functools
import itertools
from collections.abc import Iterable, Iterator

from jaxnorm.gpu.cutting import (
    ALIGNMENT,
    HALF_SECTOR,
    MOST_BOXES,
    STEPS,
    plain_tile_of_rows,
    tile_of_instances,
    tile_of_rows,
    tile_of_span,
    together_aligned,
    widths,
)
from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.ranking import is_full, microseconds
from jaxnorm.gpu.tile import Copies, Meeting, NoTile, Reduces, Tile

# cp.async exists since Ampere; bulk copies, by the TMA unit, and clusters since Hopper.
_LEAST_CAPABILITY = (8, 0)
_BULK_CAPABILITY = (9, 0)
# Clusters of up to 8 thread blocks run on every device that has clusters.
_CLUSTERS = (1, 2, 4, 8)
# Blocks that share an instance meet once to merge its sums, which takes about as long as a block needs to copy this
# much (a microsecond or so at 25 KB per microsecond, the share of one SM). Smaller parts are not worth meeting for.
_LEAST_PART_BYTES = 16 * 1024
# What they exchange, up to 3 float32 per block and instance, stays under 1/40 of what a block of a cluster reads.
_LEAST_PART_OF_INSTANCE_BYTES = 512
# Groups wait for blocks that start when there is room, which a cluster has from the hardware: so much slower by the
# estimate, a cluster is still preferred.
_GROUP_HANDICAP = 1.1
# Indices are signed numbers of 32 bits.
_LARGEST_INDEX = 2**31 - 1
# Two kernels that run at once each have one incomplete group at most. With so many SMs as parts, they fit side by side.
_SIDE_BY_SIDE = 2
# Instructions of a thread per element: so many have both passes about, with a ReLU.
_WITH_RELU = 12.0
# Channels-first instances up to this size share a thread block. Above it, the 16 blocks that an SM runs at once have
# 16 * 2 KB on their way, which is what memory latency (about a microsecond) times the share of one SM demands.
_SMALL_INSTANCE_BYTES = 2 * 1024


def find_tile(
    shape: tuple[int, int, int], itemsize: int, arrays: int, device: Device, instructions: float = _WITH_RELU
) -> Tile | NoTile:
    """The tile for one pass of the kernel, or the reason why there is none.

    The one that jaxnorm.gpu.ranking takes for the fastest, of those that let every SM run two blocks at once, if any.
    Groups where they are faster beyond doubt than clusters, or no cluster can hold an instance.

    Args:
      shape: (B, R, K), the canonical view.
      itemsize: bytes of an element of x.
      arrays: x-sized arrays that the pass keeps in shared memory: forward x, backward x and dy, and a residual.
      device: what runs it.
      instructions: of a thread per element, for all sweeps: jaxnorm.gpu.worth.instructions of the activation.
    """
    reason = _why_not(shape, itemsize, device)
    if reason:
        return NoTile(reason)
    for candidates in _candidates(shape, itemsize, arrays, device):
        fitting = [tile for tile in candidates if fits(tile, device)]
        if fitting:
            # max keeps the first of equals, and they come widest, smallest cluster and most steps first.
            tile = max(fitting, key=lambda tile: _worth(tile, device, instructions))
            return tile if tile.largest_index <= _LARGEST_INDEX else NoTile(_too_many(tile))
    return NoTile(_nothing_fits(shape, itemsize, arrays, device))


def _worth(tile: Tile, device: Device, instructions: float) -> tuple[bool, float]:
    """What the best tile of a list has most of."""
    handicap = _GROUP_HANDICAP if tile.meeting == "group" else 1.0
    return is_full(tile, device), -handicap * microseconds(tile, device, instructions)


def _candidates(shape: tuple[int, int, int], itemsize: int, arrays: int, device: Device) -> Iterator[list[Tile]]:
    """Lists of tiles; a later list is a last resort. In a list wide rows come first, then few blocks per instance."""
    batch, positions, channels = shape
    copies: Copies = "bulk" if device.compute_capability >= _BULK_CAPABILITY else "plain"
    reduces: Reduces = "rows"
    lanes = [n for n in widths(itemsize) if channels % n == 0]
    if channels == 1:
        aligned, small = positions * itemsize % ALIGNMENT == 0, positions * itemsize <= _SMALL_INSTANCE_BYTES
        if not aligned or (small and copies == "plain"):
            yield _present(tile_of_span(batch, positions, itemsize, arrays))
        if not aligned:
            return
        if small and copies == "bulk":
            yield [tile_of_instances(batch, positions, itemsize, arrays)]
        # Rows are contiguous: their width only matters to the copies.
        reduces, lanes = "both", [next(n for n in widths(itemsize) if positions % n == 0)]
        shape = (batch, positions // lanes[0], lanes[0])
    wide = [n for n in lanes if n * itemsize != HALF_SECTOR or channels == 1]
    narrow = [n for n in lanes if n not in wide]
    tiles = functools.partial(_tiles, copies, reduces, shape, itemsize, arrays)
    groups = _groups(device)
    if copies == "bulk":
        yield tiles(wide, _CLUSTERS) + tiles(wide, [n for n in groups if n * _SIDE_BY_SIDE <= device.sm_count], "group")
        yield tiles(narrow, _CLUSTERS)
    else:
        yield tiles(wide, (1,))
    # Half a sector is for blocks that run side by side, which those of two groups may not.
    yield tiles(wide, groups, "group")
    if copies == "plain":
        yield tiles(narrow, (1,))


def _tiles(
    copies: Copies,
    reduces: Reduces,
    shape: tuple[int, int, int],
    itemsize: int,
    arrays: int,
    lanes: Iterable[int],
    parts: Iterable[int],
    meeting: Meeting | None = None,
) -> list[Tile]:
    tiles: list[Tile] = []
    for width, number, steps in itertools.product(lanes, parts, STEPS):
        if copies == "bulk":
            tiles.append(tile_of_rows(reduces, shape, width, number, itemsize, arrays, meeting, steps))
        else:
            tiles += _present(plain_tile_of_rows(reduces, shape, width, number, itemsize, arrays, steps))
    return [tile for tile in tiles if is_worth_meeting(tile)]


def _present(tile: Tile | None) -> list[Tile]:
    return [] if tile is None else [tile]


def fits(tile: Tile, device: Device) -> bool:
    """Whether a thread block has the shared memory, and the barriers."""
    return tile.shared_memory <= device.shared_memory and (tile.copies != "bulk" or tile.boxes <= MOST_BOXES)


def is_worth_meeting(tile: Tile) -> bool:
    """Whether the parts of an instance are large enough to pay for their exchange."""
    per_instance = tile.tile_bytes // (tile.lanes if tile.reduces == "rows" else 1)
    return tile.parts == 1 or (
        tile.arrays * tile.tile_bytes >= _LEAST_PART_BYTES and per_instance >= _LEAST_PART_OF_INSTANCE_BYTES
    )


def _groups(device: Device) -> list[int]:
    """Sizes with which 1, 2, 3 and so on groups fill the device, one block on each SM."""
    return sorted({device.sm_count // groups for groups in range(1, device.sm_count // 2 + 1)})


def _why_not(shape: tuple[int, int, int], itemsize: int, device: Device) -> str | None:
    batch, positions, channels = shape
    major, minor = device.compute_capability
    if device.compute_capability < _LEAST_CAPABILITY:
        return f"the kernel needs compute capability 8.0 (Ampere) or newer: this is {major}.{minor}"
    if itemsize not in (2, 4):
        return f"the kernel computes in float32, for 2- and 4-byte elements: these have {itemsize} bytes"
    if 0 in shape:
        return f"there is nothing to normalize: one of (B, R, K) = {(batch, positions, channels)} is 0"
    if channels > 1 and channels * itemsize % ALIGNMENT:
        return (
            f"rows must start at multiples of {ALIGNMENT} bytes: {channels} channels take {channels * itemsize} bytes"
        )
    together = together_aligned(positions, itemsize)
    if channels == 1 and batch % together:
        return (
            f"instances must start at multiples of {ALIGNMENT} bytes, alone or several together: {together} of "
            f"{positions} positions do, and {together} does not divide the {batch} instances"
        )
    return None


def _too_many(tile: Tile) -> str:
    return (
        f"the kernel counts rows, instances and thread blocks with 32 bits, up to {_LARGEST_INDEX}: here it would have "
        f"to count up to {tile.largest_index}"
    )


def _nothing_fits(shape: tuple[int, int, int], itemsize: int, arrays: int, device: Device) -> str:
    """The reason, from the tile that comes closest."""
    _, positions, channels = shape
    candidates = [tile for tiles in _candidates(shape, itemsize, arrays, device) for tile in tiles]
    if not candidates:
        return (
            f"an instance of {positions} positions is less than a thread block computes at once, and only bulk copies "
            "(Hopper and newer) fill up the rest"
        )
    tile = min(candidates, key=lambda tile: tile.shared_memory)
    if tile.span is not None:
        what = f"a span of {tile.span[0]} instances of {positions} positions"
    elif channels == 1:
        what = f"an instance of {positions} positions"
    else:
        what = f"a slice of {positions} positions and {tile.lanes} channels"
    what += " in an array" if arrays == 1 else f" in {arrays} arrays"
    blocks = tile.parts
    if tile.shared_memory <= device.shared_memory:
        return (
            f"{what} has {tile.boxes} boxes of {tile.rows} rows in each of {blocks} thread blocks: bulk copies have "
            f"barriers for {MOST_BOXES}"
        )
    holder = "a thread block has" if blocks == 1 else f"{blocks} thread blocks have"
    if blocks > device.sm_count // 2:
        holder, blocks = "the GPU has", device.sm_count
    needed, there = (_bytes(size * blocks) for size in (tile.shared_memory, device.shared_memory))
    return f"{what} needs {needed} of shared memory: {holder} {there}" + " in all" * (holder == "the GPU has")


def _bytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB" if size >= 2**19 else f"{size / 2**10:.3g} KiB"
