"""How the fused GPU kernel splits its work: a pure function of the shape, the dtype and the facts of a device.

A thread block holds its part of an instance in shared memory, so that x is read once and y written once. The
canonical view (B, R, K) of jaxnorm.layout is cut in one of three ways:

    "rows"   channels-last. Shared memory holds rows x lanes positions of one sample; each lane is an instance of its
             own, reduced over the rows. A cluster of blocks shares the rows of an instance.
    "both"   channels-first. An instance is contiguous and is seen as rows of `lanes` positions; all are reduced to
             one value. A cluster of blocks shares the rows.
    "lanes"  channels-first, small instances: each row of shared memory is one instance, reduced over its lanes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.ranking import is_full, microseconds

# The TMA unit, which copies tiles between global and shared memory, exists since Hopper.
_LEAST_CAPABILITY = (9, 0)
# TMA requires that rows of a tensor start at multiples of 16 bytes, and copies no narrower rows.
_ALIGNMENT = 16
# TMA copies at most 256 rows at once.
_BOX_ROWS = 256
# Several boxes per tile, so that the first are summed while the others are still on their way.
_BOXES = 4
# Around the mean of that part of the numbers, the sum of squares is at most 1 + 16 times that around their own mean.
_BOXES_PER_CENTER = 16
# Rows of shared memory, in bytes: 128 is a cache line. 32 is a sector, the least that DRAM gives out.
_ROW_BYTES = (128, 64, 32)
# Half a sector: two thread blocks read each sector, hopefully the second time from L2. For want of anything better.
_HALF_SECTOR = 16
# Clusters of up to 8 thread blocks run on every device that has clusters.
_CLUSTERS = (1, 2, 4, 8)
# A cluster meets once to merge its sums, which takes about as long as a block needs to copy this much (a microsecond
# or so at 25 KB per microsecond, the share of one SM). Smaller parts are not worth meeting for.
_LEAST_PART_BYTES = 16 * 1024
# What a cluster exchanges, up to 3 float32 per block and instance, stays under 1/40 of what its blocks read.
_LEAST_PART_OF_INSTANCE_BYTES = 512
# Channels-first instances up to this size share a thread block. Above it, the 16 blocks that an SM runs at once have
# 16 * 2 KB on their way, which is what memory latency (about a microsecond) times the share of one SM demands.
_SMALL_INSTANCE_BYTES = 2 * 1024
# A warpgroup of 128 threads with 4 elements each: the rows that one instruction covers are 512 // lanes.
_ELEMENTS_PER_STEP = 128 * 4
# Steps computed at a time, for instruction-level parallelism: up to 4 * 4 elements per thread and array.
_STEPS = (4, 2, 1)
# Sums across the warps of a thread block pass through this much shared memory.
REDUCTION_SCRATCH_BYTES = 2 * 1024
# An mbarrier takes 8 bytes; buffers start at multiples of 1024 bytes.
_BARRIER_BYTES = 8
_BUFFER_ALIGNMENT = 1024

Reduces = Literal["rows", "both", "lanes"]
# See jaxnorm.gpu.copies and jaxnorm.gpu.meeting.
Copies = Literal["bulk"]
Meeting = Literal["alone", "cluster"]


@dataclasses.dataclass(frozen=True)
class NoTile:
    """Why the kernel cannot run."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a thread block holds and how it goes through it.

    Attributes:
      reduces: "rows", "both" or "lanes", see the module.
      shape: of x as the kernel sees it, (outer, rows, lanes). "rows": (B, R, K). "both": (B, R // lanes, lanes).
        "lanes": (1, B, R).
      rows, lanes: of a box, which one bulk copy moves and one barrier guards.
      boxes: of a thread block; they follow each other along the lanes for "lanes", else along the rows.
      chunk: rows of a box that are computed at a time.
      parts: thread blocks that share the rows of an instance.
      arrays: x-sized arrays in shared memory.
      itemsize: bytes of an element of those.
      copies: how its part comes into shared memory and goes back.
      meeting: how the blocks that share an instance meet.
      streamed: further rows of a thread block, which it does not hold but reads twice.
    """

    reduces: Reduces
    shape: tuple[int, int, int]
    rows: int
    lanes: int
    boxes: int
    chunk: int
    parts: int
    arrays: int
    itemsize: int
    copies: Copies = "bulk"
    meeting: Meeting = "alone"
    streamed: int = 0

    @property
    def held_rows(self) -> int:
        """Rows of x that one thread block has in shared memory."""
        return self.rows if self.reduces == "lanes" else self.rows * self.boxes

    @property
    def first_boxes(self) -> int:
        """Boxes whose mean is the center of the sums: a sixteenth of what the block works on, at least."""
        of = self.boxes if self.reduces == "lanes" else -(-self.block_rows // self.rows)
        return min(self.boxes, -(-of // _BOXES_PER_CENTER))

    @property
    def block_rows(self) -> int:
        """Rows of x that one thread block works on."""
        return self.held_rows + self.streamed

    @property
    def blocks(self) -> int:
        """Thread blocks, or clusters of them, side by side for each of the outer."""
        _, rows, lanes = self.shape
        return {"rows": lanes // self.lanes, "both": 1, "lanes": -(-rows // self.block_rows)}[self.reduces]

    @property
    def thread_blocks(self) -> int:
        """In all."""
        return self.shape[0] * self.blocks * self.parts

    @property
    def extent(self) -> int:
        """Rows, for "lanes" lanes, of an instance."""
        return self.shape[2] if self.reduces == "lanes" else self.shape[1]

    @property
    def ragged(self) -> bool:
        """Whether the boxes of an instance reach beyond its end."""
        held = self.lanes * self.boxes if self.reduces == "lanes" else self.block_rows * self.parts
        return held != self.extent

    @property
    def positions(self) -> int:
        """Of an instance: the number that its sums are divided by."""
        return self.extent * (self.lanes if self.reduces == "both" else 1)

    @property
    def row_bytes(self) -> int:
        return self.lanes * self.itemsize

    @property
    def tile_bytes(self) -> int:
        """Shared memory of one array."""
        return self.boxes * self.rows * self.row_bytes

    @property
    def shared_memory(self) -> int:
        """Bytes per thread block, an upper bound: buffers, sums across warps, barriers."""
        buffer = -(-self.tile_bytes // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT
        barriers = (self.boxes + 1) * _BARRIER_BYTES
        return self.arrays * buffer + REDUCTION_SCRATCH_BYTES + barriers + _BUFFER_ALIGNMENT


def find_tile(shape: tuple[int, int, int], itemsize: int, arrays: int, device: Device) -> Tile | NoTile:
    """The tile for one pass of the kernel, or the reason why there is none.

    The one that jaxnorm.gpu.ranking takes for the fastest, of those that let every SM run two blocks at once, if any.

    Args:
      shape: (B, R, K), the canonical view.
      itemsize: bytes of an element of x.
      arrays: x-sized arrays that the pass keeps in shared memory: forward x, backward x and dy, and a residual.
      device: what runs it.
    """
    reason = _why_not(shape, itemsize, device)
    if reason:
        return NoTile(reason)
    for candidates in _candidates(shape, itemsize, arrays):
        fitting = [tile for tile in candidates if tile.shared_memory <= device.shared_memory]
        if fitting:
            # min keeps the first of equals, and they come widest and smallest cluster first.
            return min(fitting, key=lambda tile: (not is_full(tile, device), microseconds(tile, device)))
    return NoTile(_too_large(shape, itemsize, arrays, device))


def _why_not(shape: tuple[int, int, int], itemsize: int, device: Device) -> str | None:
    batch, positions, channels = shape
    major, minor = device.compute_capability
    if device.compute_capability < _LEAST_CAPABILITY:
        return f"the kernel needs compute capability 9.0 (Hopper) or newer for its bulk copies: this is {major}.{minor}"
    if itemsize not in (2, 4):
        return f"the kernel computes in float32, for 2- and 4-byte elements: these have {itemsize} bytes"
    if 0 in shape:
        return f"there is nothing to normalize: one of (B, R, K) = {(batch, positions, channels)} is 0"
    name, count = ("positions of an instance", positions) if channels == 1 else ("channels", channels)
    if count * itemsize % _ALIGNMENT:
        return (
            f"bulk copies need rows whose length is a multiple of {_ALIGNMENT} bytes: the {count} {name} take "
            f"{count * itemsize} bytes"
        )
    return None


def _too_large(shape: tuple[int, int, int], itemsize: int, arrays: int, device: Device) -> str:
    _, positions, channels = shape
    width = 1 if channels == 1 else _HALF_SECTOR // itemsize
    what = "an instance" if channels == 1 else f"{width} channels of a sample, the fewest that can be copied,"
    return (
        f"{what} of {positions} positions and {arrays} {'array' if arrays == 1 else 'arrays'} take "
        f"{arrays * positions * width * itemsize} bytes: the shared memory of {_CLUSTERS[-1]} thread blocks, the "
        f"largest cluster, has {_CLUSTERS[-1] * device.shared_memory}"
    )


def _candidates(shape: tuple[int, int, int], itemsize: int, arrays: int) -> Iterator[list[Tile]]:
    """Lists of tiles; a later list is a last resort. In a list wide rows come first, then small clusters."""
    batch, positions, channels = shape
    if channels == 1 and positions * itemsize <= _SMALL_INSTANCE_BYTES:
        yield [tile_of_instances(batch, positions, itemsize, arrays)]
    if channels == 1:
        # Rows are contiguous: their width only matters to the copies.
        lanes = next(n for n in _lanes(itemsize) if positions % n == 0)
        yield _clusters("both", (batch, positions // lanes, lanes), lanes, itemsize, arrays)
        return
    *wide, half_sector = _lanes(itemsize)
    for widths in ([n for n in wide if channels % n == 0], [half_sector]):
        yield [tile for lanes in widths for tile in _clusters("rows", shape, lanes, itemsize, arrays)]


def _clusters(reduces: Reduces, shape: tuple[int, int, int], lanes: int, itemsize: int, arrays: int) -> list[Tile]:
    tiles = [tile_of_rows(reduces, shape, lanes, cluster, itemsize, arrays) for cluster in _CLUSTERS]
    return [tile for tile in tiles if is_worth_meeting(tile)]


def is_worth_meeting(tile: Tile) -> bool:
    """Whether the parts of a cluster are large enough to pay for their exchange."""
    per_instance = tile.tile_bytes // (tile.lanes if tile.reduces == "rows" else 1)
    return tile.parts == 1 or (
        tile.arrays * tile.tile_bytes >= _LEAST_PART_BYTES and per_instance >= _LEAST_PART_OF_INSTANCE_BYTES
    )


def _lanes(itemsize: int) -> list[int]:
    return [n // itemsize for n in (*_ROW_BYTES, _HALF_SECTOR)]


def tile_of_rows(
    reduces: Reduces, shape: tuple[int, int, int], lanes: int, cluster: int, itemsize: int, arrays: int
) -> Tile:
    """A tile for "rows" or "both", whether it fits or not."""
    needed = -(-shape[1] // cluster)
    chunk = _chunk(needed, lanes)
    rows = _box_rows(needed, chunk)
    boxes = -(-needed // rows)
    meeting: Meeting = "cluster" if cluster > 1 else "alone"
    return Tile(reduces, shape, rows, lanes, boxes, chunk, cluster, arrays, itemsize, meeting=meeting)


def _box_rows(needed: int, chunk: int) -> int:
    """Rows of a box: in four boxes or more that reach little beyond the end, but few, since each costs an eighth of a
    chunk besides."""
    most = min(_BOX_ROWS, _round_up(-(-needed // _BOXES), chunk))

    def cost(rows: int) -> int:
        held = _round_up(needed, rows)
        return held + held // rows * chunk // 8

    return min(range(most, 0, -chunk), key=cost)


def _chunk(rows: int, lanes: int) -> int:
    """Rows computed at a time: many, unless rounding up to them would waste more than an eighth."""
    step = _ELEMENTS_PER_STEP // lanes
    chunks = [step * n for n in _STEPS if step * n <= _BOX_ROWS]
    return next((n for n in chunks if _round_up(rows, n) * 8 <= rows * 9), step)


def tile_of_instances(batch: int, positions: int, itemsize: int, arrays: int) -> Tile:
    """A tile for "lanes", whether it fits or not."""
    lanes = next(n for n in _lanes(itemsize) if n <= positions)
    rows = _ELEMENTS_PER_STEP // lanes
    boxes = -(-positions // lanes)
    return Tile("lanes", (1, batch, positions), rows, lanes, boxes, rows, 1, arrays, itemsize)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
