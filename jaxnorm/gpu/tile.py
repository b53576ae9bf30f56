"""A tile: how the fused GPU kernel splits its work among thread blocks. find_tile finds it.

A thread block holds its part of an instance in shared memory, so that x is read once and y written once. The
canonical view (B, R, K) of jaxnorm.layout is cut in one of three ways:

    "rows"   channels-last. Shared memory holds rows x lanes positions of one sample; each lane is an instance of its
             own, reduced over the rows, or neighboring lanes are one, for group norm. Several blocks may share the
             rows of an instance.
    "both"   channels-first. An instance is contiguous and is seen as rows of `lanes` positions; all are reduced to
             one value. Several blocks may share the rows.
    "lanes"  channels-first, small instances: each row of shared memory is one instance, reduced over its lanes.

Everything here is a pure function of the shape, the dtype and the facts of a device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from jaxnorm.gpu import cost

if TYPE_CHECKING:
    from jaxnorm.gpu.devices import Device

Reduces = Literal["rows", "both", "lanes"]
# See jaxnorm.gpu.copies and jaxnorm.gpu.synchronization.
CopyKind = Literal["bulk", "plain", "span"]
SynchronizationKind = Literal["alone", "cluster", "group"]
# (B, R, K)
View = tuple[int, int, int]

# Rows start at multiples of 16 bytes: bulk copies require it, and so do loads of 4 numbers by a thread.
ALIGNMENT = 16
# A warpgroup of 128 threads with 4 elements each: the rows that one instruction covers are 512 // lanes.
ELEMENTS_PER_STEP = 128 * 4
# Steps computed at a time, for instruction-level parallelism: up to 4 * 4 elements per thread and array. With fewer an
# SM has the registers for more thread blocks.
STEPS = (4, 2, 1)
# Sizes of clusters. Up to 8 thread blocks run on every device that has clusters.
CLUSTERS = (1, 2, 4, 8)
# Bulk copies have a barrier for each box, of which Mosaic GPU supports this many.
MOST_BOXES = 32
# Sums across the warps of a thread block pass through this much shared memory.
REDUCTION_SCRATCH_BYTES = 2 * 1024

# Rows of shared memory, in bytes: 128 is a cache line. 32 is a sector, the least that DRAM gives out. Of half a sector
# two thread blocks read each sector, the second time from L2 if all goes well: a last resort.
_ROW_BYTES, _HALF_SECTOR = (128, 64, 32, 16), 16
# TMA copies at most 256 rows at once.
_BOX_ROWS = 256
# Several boxes per tile, so that the first are summed while the others are still on their way.
_BOXES = 4
# The center of the sums is the mean of this part of the boxes: the sum of squares around it is then at most 1 + 16
# times that around the mean of all.
_BOXES_PER_CENTER = 16
# Elements of the instances in a span: enough to keep each thread busy for a few steps, and not so many that there are
# few blocks.
_SPAN_ELEMENTS, _MOST_SPAN_ELEMENTS = 4 * ELEMENTS_PER_STEP, 16 * ELEMENTS_PER_STEP
# Channels-first instances up to this size share a thread block. Above it, the 16 blocks that an SM runs at once have
# 16 * 2 KB on their way, which is what memory latency (about a microsecond) times the share of one SM demands.
_SMALL_INSTANCE_BYTES = 2 * 1024
# Blocks that share an instance synchronize once to merge its sums, which takes about as long as a block needs to copy
# this much (a microsecond or so at 25 KB per microsecond, the share of one SM). For less it is not worth it.
_LEAST_SHARE_BYTES = 16 * 1024
# What they exchange, up to 3 float32 per block and instance, stays under 1/40 of what a block of a cluster reads.
_LEAST_SHARE_OF_INSTANCE_BYTES = 512
# The blocks of a group wait for each other to start, which the hardware does for a cluster: a group must be faster than
# a cluster by this factor, estimated.
_GROUP_HANDICAP = 1.1
# Two kernels that run at once each have one incomplete group at most. If a group has no more than this part of the SMs,
# both fit.
_SIDE_BY_SIDE = 2
# Indices are signed numbers of 32 bits.
_LARGEST_INDEX = 2**31 - 1
# An mbarrier takes 8 bytes; buffers start at multiples of 1024 bytes.
_BARRIER_BYTES, _BUFFER_ALIGNMENT = 8, 1024
# The instructions of a thread per element that both passes have with a ReLU, roughly.
_WITH_RELU = 12.0


@dataclasses.dataclass(frozen=True)
class NoTile:
    """Why the kernel cannot run."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a thread block holds, how it goes through it and with which blocks it shares instances.

    Attributes:
      reduces: "rows", "both" or "lanes", see the module.
      shape: of x as the kernel sees it, (outer, rows, lanes). "rows": (B, R, K). "both": (B, R // lanes, lanes).
        "lanes": (1, B, R).
      rows, lanes: of a box, which is copied and waited for as a whole.
      boxes: of a thread block; they follow each other along the lanes for "lanes", otherwise along the rows.
      chunk: rows of a box that are computed at a time.
      blocks_per_instance: thread blocks that share the rows of an instance.
      arrays: x-sized arrays in shared memory.
      itemsize: bytes of an element of those.
      copies: how x is loaded into shared memory and results are written back.
      synchronization: how the blocks that share an instance wait for each other.
      span: how many instances a thread block holds one after the other, and the positions of each. The shape is
        (1, B * R // lanes, lanes) then, and the one box has whole chunks, which may be more rows than the span has.
      group_size: how many neighboring lanes are one instance: a group of channels. Only "rows" has more than one.
    """

    reduces: Reduces
    shape: tuple[int, int, int]
    rows: int
    lanes: int
    boxes: int
    chunk: int
    blocks_per_instance: int
    arrays: int
    itemsize: int
    copies: CopyKind = "bulk"
    synchronization: SynchronizationKind = "alone"
    span: tuple[int, int] | None = None
    group_size: int = 1

    @property
    def first_boxes(self) -> int:
        """The boxes whose mean is the center of the sums: a sixteenth of all, at least."""
        return -(-self.boxes // _BOXES_PER_CENTER)

    @property
    def block_rows(self) -> int:
        """The rows of x that one thread block holds."""
        if self.span is not None:
            return math.prod(self.span) // self.lanes
        return self.rows if self.reduces == "lanes" else self.rows * self.boxes

    @property
    def blocks(self) -> int:
        """Thread blocks, or clusters or groups of them, side by side for each of the outer."""
        _, rows, lanes = self.shape
        side_by_side = rows // self.block_rows if self.span else 1
        return {"rows": lanes // self.lanes, "both": side_by_side, "lanes": -(-rows // self.block_rows)}[self.reduces]

    @property
    def thread_blocks(self) -> int:
        """All thread blocks of the kernel."""
        return self.shape[0] * self.blocks * self.blocks_per_instance

    @property
    def largest_index(self) -> int:
        """No number that the kernel computes to find its place in an array is larger; it has 32 bits for each."""
        count = self.blocks_per_instance if self.span is None and self.reduces != "lanes" else self.blocks
        rows, instances = count * self.block_rows, self.blocks * self.span[0] if self.span else 0
        return max(*self.shape, rows, instances, self.boxes * self.lanes, self.thread_blocks)

    @property
    def extent(self) -> int:
        """The rows, for "lanes" the lanes, of an instance."""
        return self.shape[2] if self.reduces == "lanes" else self.shape[1]

    @property
    def ragged(self) -> bool:
        """Whether the boxes of an instance reach beyond its end."""
        covered = self.lanes * self.boxes if self.reduces == "lanes" else self.block_rows * self.blocks_per_instance
        return covered != self.extent

    @property
    def positions(self) -> int:
        """The positions of an instance, by which its sums are divided."""
        if self.span is not None:
            return self.span[1]
        return self.extent * (self.lanes if self.reduces == "both" else self.group_size)

    @property
    def row_bytes(self) -> int:
        return self.lanes * self.itemsize

    @property
    def tile_bytes(self) -> int:
        """The shared memory of one array."""
        return self.boxes * self.rows * self.row_bytes

    @property
    def shared_memory(self) -> int:
        """Bytes per thread block, an upper bound: buffers, sums across warps, barriers."""
        buffer = -(-self.tile_bytes // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT
        barriers = (self.boxes + 1) * _BARRIER_BYTES
        return self.arrays * buffer + REDUCTION_SCRATCH_BYTES + barriers + _BUFFER_ALIGNMENT


def find_tile(
    view: View,
    itemsize: int,
    arrays: int,
    device: Device,
    instructions: float = _WITH_RELU,
    group_size: int = 1,
) -> Tile | NoTile:
    """The tile for one pass of the kernel, or the reason why there is none.

    It is the one that jaxnorm.gpu.cost takes for the fastest, of those that let every SM run two blocks at once, if
    any; a group only where it is clearly faster than clusters, or where no cluster can hold an instance.

    Args:
      view: (B, R, K), the canonical view.
      itemsize: bytes of an element of x.
      arrays: x-sized arrays that the pass keeps in shared memory: forward x, backward x and dy, and a residual.
      device: the GPU that runs it.
      instructions: of a thread per element, for all sweeps: jaxnorm.gpu.cost.instructions.
      group_size: how many neighboring channels share their statistics.
    """
    reason = _why_not_in_groups(view, itemsize, group_size) or _why_not(view, itemsize, device)
    if reason:
        return NoTile(reason)

    def advantage(tile: Tile) -> tuple[bool, float]:
        handicap = _GROUP_HANDICAP if tile.synchronization == "group" else 1.0
        return cost.is_full(tile, device), -handicap * cost.microseconds(tile, device, instructions)

    for candidates in _candidates(view, itemsize, arrays, device, group_size):
        fitting = [tile for tile in candidates if fits(tile, device)]
        if fitting:
            # max keeps the first of equals: the widest, then the one with the fewest blocks and the most steps.
            tile = dataclasses.replace(max(fitting, key=advantage), group_size=group_size)
            return tile if tile.largest_index <= _LARGEST_INDEX else NoTile(_too_many(tile))
    return NoTile(_nothing_fits(view, itemsize, arrays, device, group_size))


def fits(tile: Tile, device: Device) -> bool:
    """Whether a thread block has the shared memory, and the barriers."""
    return tile.shared_memory <= device.shared_memory and (tile.copies != "bulk" or tile.boxes <= MOST_BOXES)


def is_worth_sharing(tile: Tile) -> bool:
    """Whether the blocks that share an instance read enough to pay for their exchange."""
    per_instance = tile.tile_bytes // (tile.lanes if tile.reduces == "rows" else 1)
    return tile.blocks_per_instance == 1 or (
        tile.arrays * tile.tile_bytes >= _LEAST_SHARE_BYTES and per_instance >= _LEAST_SHARE_OF_INSTANCE_BYTES
    )


# Which tiles there are, and why there may be none.


def _candidates(view: View, itemsize: int, arrays: int, device: Device, group_size: int) -> Iterator[list[Tile]]:
    """Lists of tiles, of which the first with a tile that fits is taken; inside a list the cost decides."""
    batch, positions, channels = view
    bulk = device.has_bulk_copies
    reduces: Reduces = "rows"
    lanes = [n for n in _widths(itemsize) if channels % n == 0 and n % group_size == 0]
    wide = [n for n in lanes if n * itemsize != _HALF_SECTOR]
    if channels == 1:
        aligned, small = positions * itemsize % ALIGNMENT == 0, positions * itemsize <= _SMALL_INSTANCE_BYTES
        if not aligned or (small and not bulk):
            yield _present(span_tile(batch, positions, itemsize, arrays))
        if not aligned:
            return
        if small and bulk:
            yield [instances_tile(batch, positions, itemsize, arrays)]
        # Rows are contiguous: their width only matters to the copies, and half a sector is not read twice.
        reduces, wide = "both", [next(n for n in _widths(itemsize) if positions % n == 0)]
        view, lanes = (batch, positions // wide[0], wide[0]), wide
    narrow = [n for n in lanes if n not in wide]
    tiles = functools.partial(_tiles, bulk, reduces, view, itemsize, arrays)
    # Sizes with which 1, 2, 3 and so on groups fill the device, one block on each SM.
    groups = sorted({device.sm_count // count for count in range(1, device.sm_count // 2 + 1)})
    if bulk:
        # Clusters, or groups with which another kernel can run at the same time.
        yield tiles(wide, CLUSTERS) + tiles(wide, [n for n in groups if n * _SIDE_BY_SIDE <= device.sm_count], "group")
        yield tiles(narrow, CLUSTERS)
    else:
        yield tiles(wide, (1,))
    # Half a sector is for blocks that run side by side, which those of two groups may not: groups have wide rows only.
    yield tiles(wide, groups, "group")
    if not bulk:
        yield tiles(narrow, (1,))


def _tiles(
    bulk: bool,
    reduces: Reduces,
    shape: tuple[int, int, int],
    itemsize: int,
    arrays: int,
    lanes: Iterable[int],
    blocks: Iterable[int],
    synchronization: SynchronizationKind | None = None,
) -> list[Tile]:
    """Tiles of all these widths and numbers of blocks per instance that are worth it."""
    tiles: list[Tile] = []
    for width, number, steps in itertools.product(lanes, blocks, STEPS):
        if bulk:
            tiles.append(bulk_tile(reduces, shape, width, number, itemsize, arrays, synchronization, steps))
        else:
            tiles += _present(plain_tile(reduces, shape, width, number, itemsize, arrays, steps))
    return [tile for tile in tiles if is_worth_sharing(tile)]


def _present(tile: Tile | None) -> list[Tile]:
    return [] if tile is None else [tile]


def _widths(itemsize: int) -> list[int]:
    """Lanes of a row, wide rows first."""
    return [n // itemsize for n in _ROW_BYTES]


def _why_not(view: View, itemsize: int, device: Device) -> str | None:
    batch, positions, channels = view
    major, minor = device.compute_capability
    # cp.async came with Ampere.
    if device.compute_capability < (8, 0):
        return f"the kernel needs compute capability 8.0 (Ampere) or newer: this is {major}.{minor}"
    if itemsize not in (2, 4):
        return f"the kernel computes in float32, for 2- and 4-byte elements: these have {itemsize} bytes"
    if 0 in view:
        return f"there is nothing to normalize: one of (B, R, K) = {view} is 0"
    if channels > 1 and channels * itemsize % ALIGNMENT:
        return (
            f"rows must start at multiples of {ALIGNMENT} bytes: {channels} channels take {channels * itemsize} bytes"
        )
    together = _instances_aligned(positions, itemsize)
    if channels == 1 and batch % together:
        return (
            f"instances must start at multiples of {ALIGNMENT} bytes, alone or several together: {together} of "
            f"{positions} positions do, and {together} does not divide the {batch} instances"
        )
    return None


def _why_not_in_groups(view: View, itemsize: int, group_size: int) -> str | None:
    _, _, channels = view
    most_lanes = _widths(itemsize)[0]
    if channels < group_size:
        return "the kernel sums groups over the lanes of a block: the channels must be the last axis"
    if most_lanes % group_size:
        return f"{group_size} channels per group do not divide the {most_lanes} lanes of a block"
    return None


def _too_many(tile: Tile) -> str:
    return (
        f"the kernel counts rows, instances and thread blocks with 32 bits, up to {_LARGEST_INDEX}: here it would have "
        f"to count up to {tile.largest_index}"
    )


def _nothing_fits(view: View, itemsize: int, arrays: int, device: Device, group_size: int) -> str:
    """The reason, from the tile that comes closest."""
    _, positions, channels = view
    candidates = [tile for tiles in _candidates(view, itemsize, arrays, device, group_size) for tile in tiles]
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
    blocks = tile.blocks_per_instance
    if tile.shared_memory <= device.shared_memory:
        return (
            f"{what} has {tile.boxes} boxes of {tile.rows} rows in each of {blocks} thread blocks: bulk copies have "
            f"barriers for {MOST_BOXES}"
        )
    if blocks > max(CLUSTERS):
        blocks = device.sm_count
    needed, there = (_bytes(size * blocks) for size in (tile.shared_memory, device.shared_memory))
    if blocks == device.sm_count:
        return f"{what} needs {needed} of shared memory: the GPU has {there} in all"
    holder = "a thread block has" if blocks == 1 else f"a cluster of {blocks} thread blocks has"
    return f"{what} needs {needed} of shared memory: {holder} {there}"


def _bytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**19 else f"{size / 2**10:.0f} KiB"


# The tile of each way to cut an instance, whether it fits or not. Tests and the selfcheck make them too.


def bulk_tile(
    reduces: Reduces,
    shape: tuple[int, int, int],
    lanes: int,
    blocks: int,
    itemsize: int,
    arrays: int,
    synchronization: SynchronizationKind | None = None,
    steps: int = STEPS[0],
) -> Tile:
    """For "rows" or "both", with bulk copies, and at most so many steps at a time.

    Where fewer blocks than asked for hold an instance, a group has fewer; a cluster has the size that was asked for.
    """
    needed, step = -(-shape[1] // blocks), ELEMENTS_PER_STEP // lanes
    chunk = _chunk(needed, lanes, most=min(_BOX_ROWS, steps * step, max(needed // _BOXES, step)))
    rows = _box_rows(needed, chunk, step)
    boxes = -(-needed // rows)
    if synchronization == "group":
        blocks = -(-shape[1] // (rows * boxes))
    kind: SynchronizationKind = (synchronization or "cluster") if blocks > 1 else "alone"
    return Tile(reduces, shape, rows, lanes, boxes, chunk, blocks, arrays, itemsize, "bulk", kind)


def plain_tile(
    reduces: Reduces,
    shape: tuple[int, int, int],
    lanes: int,
    blocks: int,
    itemsize: int,
    arrays: int,
    steps: int = STEPS[0],
) -> Tile | None:
    """For "rows" or "both", with plain copies; None where an instance has fewer rows than a box.

    We take the number of boxes, about 4, that reaches least beyond the end.
    """
    needed = -(-shape[1] // blocks)
    chunk = _chunk(needed, lanes, most=min(_BOX_ROWS, steps * ELEMENTS_PER_STEP // lanes, needed))
    tiles = []
    for boxes in range(1, 2 * _BOXES + 1):
        least = _round_up(-(-needed // boxes), chunk)
        for rows in (least, least + chunk):
            blocks = -(-shape[1] // (rows * boxes))
            kind: SynchronizationKind = "group" if blocks > 1 else "alone"
            tile = Tile(reduces, shape, rows, lanes, boxes, chunk, blocks, arrays, itemsize, "plain", kind)
            # The last box is moved back to end with the instance, and must stay inside its own block.
            if tile.extent - (blocks - 1) * tile.block_rows >= rows:
                tiles.append(tile)
    return min(tiles, key=lambda tile: (tile.block_rows, abs(tile.boxes - _BOXES)), default=None)


def instances_tile(batch: int, positions: int, itemsize: int, arrays: int) -> Tile:
    """For "lanes"."""
    lanes = next(n for n in _widths(itemsize) if n <= positions)
    rows = ELEMENTS_PER_STEP // lanes
    boxes = -(-positions // lanes)
    return Tile("lanes", (1, batch, positions), rows, lanes, boxes, rows, 1, arrays, itemsize)


def span_tile(batch: int, positions: int, itemsize: int, arrays: int) -> Tile | None:
    """For channels-first instances that start at no multiple of 16 bytes, or are small; None where they are too few."""
    together, lanes = _instances_aligned(positions, itemsize), ALIGNMENT // itemsize
    numbers = range(together, max(together, _MOST_SPAN_ELEMENTS // positions) + 1, together)
    fitting = [n for n in numbers if batch % n == 0 and n * positions >= ELEMENTS_PER_STEP]
    if not fitting:
        return None
    instances = next((n for n in fitting if n * positions >= _SPAN_ELEMENTS), fitting[-1])
    rows = instances * positions // lanes
    chunk = _chunk(positions // lanes, lanes, most=min(rows, _BOX_ROWS))
    shape, span = (1, batch * positions // lanes, lanes), (instances, positions)
    return Tile("both", shape, _round_up(rows, chunk), lanes, 1, chunk, 1, arrays, itemsize, "span", span=span)


def _instances_aligned(positions: int, itemsize: int) -> int:
    """How many channels-first instances take a multiple of 16 bytes together."""
    return ALIGNMENT // math.gcd(ALIGNMENT, positions * itemsize)


def _box_rows(needed: int, chunk: int, step: int) -> int:
    """The height of a box: at least four boxes, as little padding as possible, then few boxes.

    Each box costs about half a step.
    """
    most = min(_BOX_ROWS, _round_up(-(-needed // _BOXES), chunk))

    def cost_of(rows: int) -> int:
        padded = _round_up(needed, rows)
        return padded + padded // rows * step // 2

    return min(range(most, 0, -chunk), key=cost_of)


def _chunk(rows: int, lanes: int, most: int) -> int:
    """Rows computed at a time: many, unless rounding up to them would waste more than an eighth."""
    step = ELEMENTS_PER_STEP // lanes
    chunks = [step * n for n in STEPS if step * n <= most]
    return next((n for n in chunks if _round_up(rows, n) * 8 <= rows * 9), step)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
