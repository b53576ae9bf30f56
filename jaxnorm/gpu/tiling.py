"""Finds the tile of a pass: a pure function of the shape, the dtype and the facts of a device."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.tile import Copies, Meeting, NoTile, Reduces, Tile

# cp.async exists since Ampere; bulk copies, by the TMA unit, and clusters since Hopper.
_LEAST_CAPABILITY = (8, 0)
_BULK_CAPABILITY = (9, 0)
# Rows start at multiples of 16 bytes: bulk copies require it, and so do loads of 4 numbers by a thread.
_ALIGNMENT = 16
# TMA copies at most 256 rows at once.
_BOX_ROWS = 256
# More boxes than a thread block ever has.
_MANY_BOXES = 64
# Several boxes per tile, so that the first are summed while the others are still on their way.
_BOXES = 4
# Rows of shared memory, in bytes: 128 is a cache line. 32 is a sector, the least that DRAM gives out.
_ROW_BYTES = (128, 64, 32)
# Half a sector: two thread blocks read each sector, hopefully the second time from L2. For want of anything better.
_HALF_SECTOR = 16
# Clusters of up to 8 thread blocks run on every device that has clusters.
_CLUSTERS = (1, 2, 4, 8)
# Blocks that share an instance meet once to merge its sums, which takes about as long as a block needs to copy this
# much (a microsecond or so at 25 KB per microsecond, the share of one SM). Smaller parts are not worth meeting for.
_LEAST_PART_BYTES = 16 * 1024
# What a cluster exchanges, up to 3 float32 per block and instance, stays under 1/40 of what its blocks read.
_LEAST_PART_OF_INSTANCE_BYTES = 512
# Wide rows of groups are worth a quarter of the SMs, when the last round of groups does not fill the device.
_GROUP_EFFICIENCY = 3 / 4
# Instances that are held in part are read twice in part. Below this many arrays that need no second reading, plain
# XLA, which reads all of them twice, is as good.
_LEAST_HELD_ARRAYS = 0.4
# Channels-first instances up to this size share a thread block. Above it, the 16 blocks that an SM runs at once have
# 16 * 2 KB on their way, which is what memory latency (about a microsecond) times the share of one SM demands.
_SMALL_INSTANCE_BYTES = 2 * 1024
# A warpgroup of 128 threads with 4 elements each: the rows that one instruction covers are 512 // lanes.
_ELEMENTS_PER_STEP = 128 * 4
# Steps computed at a time, for instruction-level parallelism: up to 4 * 4 elements per thread and array.
_STEPS = (4, 2, 1)


def find_tile(shape: tuple[int, int, int], itemsize: int, arrays: int, device: Device) -> Tile | NoTile:
    """The tile for one pass of the kernel, or the reason why there is none.

    The order of preference: enough thread blocks to give every SM one, then wide rows, then small clusters. Where
    nothing gives every SM a block, the most blocks. Groups only where no cluster can hold an instance.

    Args:
      shape: (B, R, K), the canonical view.
      itemsize: bytes of an element of x.
      arrays: x-sized arrays that the pass keeps in shared memory: forward x, backward x and dy, and a residual.
      device: what runs it.
    """
    reason = _why_not(shape, itemsize, device)
    if reason:
        return NoTile(reason)
    for candidates in _candidates(shape, itemsize, arrays, device):
        fitting = [tile for tile in candidates if tile.shared_memory <= device.shared_memory]
        if fitting:
            # max keeps the first of equals, and they come widest and smallest cluster first.
            return max(fitting, key=lambda tile: _worth(tile, device))
    return NoTile(_too_large(shape, itemsize, arrays, device))


def _worth(tile: Tile, device: Device) -> tuple[float, ...]:
    """What the best tile of a list has most of."""
    if tile.meeting != "group":
        return (min(tile.thread_blocks, device.sm_count),)
    # Groups run as many at a time as the device has room for, and one SM has room for one block.
    groups = tile.thread_blocks // tile.parts
    rounds = -(-groups // (device.sm_count // tile.parts))
    busy = tile.thread_blocks / (rounds * device.sm_count)
    return (min(busy, _GROUP_EFFICIENCY), tile.row_bytes, busy, -tile.parts)


def _why_not(shape: tuple[int, int, int], itemsize: int, device: Device) -> str | None:
    batch, positions, channels = shape
    major, minor = device.compute_capability
    if device.compute_capability < _LEAST_CAPABILITY:
        return f"the kernel needs compute capability 8.0 (Ampere) or newer: this is {major}.{minor}"
    if itemsize not in (2, 4):
        return f"the kernel computes in float32, for 2- and 4-byte elements: these have {itemsize} bytes"
    if 0 in shape:
        return f"there is nothing to normalize: one of (B, R, K) = {(batch, positions, channels)} is 0"
    name, count = ("positions of an instance", positions) if channels == 1 else ("channels", channels)
    if count * itemsize % _ALIGNMENT:
        return f"rows must start at multiples of {_ALIGNMENT} bytes: the {count} {name} take {count * itemsize} bytes"
    return None


def _too_large(shape: tuple[int, int, int], itemsize: int, arrays: int, device: Device) -> str:
    _, positions, channels = shape
    width = 1 if channels == 1 else _ROW_BYTES[-1] // itemsize
    if channels * itemsize % _ROW_BYTES[-1] and channels > 1:
        width = _HALF_SECTOR // itemsize
    if positions * width < _ELEMENTS_PER_STEP:
        return (
            f"an instance of {positions} positions has fewer rows than a thread block computes at once, and only bulk "
            "copies (Hopper and newer) fill up the rest"
        )
    what = "an instance" if channels == 1 else f"{width} channels of a sample, the fewest that are worth copying,"
    return (
        f"{what} of {positions} positions and {arrays} {'array' if arrays == 1 else 'arrays'} take "
        f"{arrays * positions * width * itemsize} bytes: too much of it would be read twice, as the shared memory of "
        f"the whole device has {device.sm_count * device.shared_memory}"
    )


def _candidates(shape: tuple[int, int, int], itemsize: int, arrays: int, device: Device) -> Iterator[list[Tile]]:
    """Lists of tiles; a later list is a last resort. In a list wide rows come first, then few blocks per instance."""
    batch, positions, channels = shape
    bulk = device.compute_capability >= _BULK_CAPABILITY
    if bulk and channels == 1 and positions * itemsize <= _SMALL_INSTANCE_BYTES:
        yield [tile_of_instances(batch, positions, itemsize, arrays)]
    reduces: Reduces = "rows"
    widths = [n for n in _lanes(itemsize) if channels % n == 0]
    if channels == 1:
        # Rows are contiguous: their width only matters to the copies.
        reduces, widths = "both", [next(n for n in _lanes(itemsize) if positions % n == 0)]
        shape = (batch, positions // widths[0], widths[0])
    wide = [n for n in widths if n * itemsize != _HALF_SECTOR or channels == 1]
    narrow = [n for n in widths if n not in wide]
    make = functools.partial(_tiles, bulk, reduces, shape, itemsize, arrays)
    yield make(wide, _CLUSTERS if bulk else (1,))
    if bulk:
        yield make(narrow, _CLUSTERS)
    yield make(wide, _groups(device), "group")
    if wide:
        yield _held_in_part(reduces, shape, wide[-1], itemsize, arrays, device)
    if not bulk:
        yield make(narrow, (1,))


def _tiles(
    bulk: bool,
    reduces: Reduces,
    shape: tuple[int, int, int],
    itemsize: int,
    arrays: int,
    widths: Iterable[int],
    parts: Iterable[int],
    meeting: Meeting | None = None,
) -> list[Tile]:
    pairs = itertools.product(widths, parts)
    if bulk:
        tiles = (tile_of_rows(reduces, shape, lanes, n, itemsize, arrays, meeting) for lanes, n in pairs)
    else:
        found = (plain_tile_of_rows(reduces, shape, lanes, n, itemsize, arrays) for lanes, n in pairs)
        tiles = (tile for tile in found if tile is not None)
    return [tile for tile in tiles if is_worth_meeting(tile)]


def is_worth_meeting(tile: Tile) -> bool:
    """Whether the parts of an instance are large enough to pay for their exchange."""
    per_instance = tile.tile_bytes // (tile.lanes if tile.reduces == "rows" else 1)
    return tile.parts == 1 or (
        tile.arrays * tile.tile_bytes >= _LEAST_PART_BYTES and per_instance >= _LEAST_PART_OF_INSTANCE_BYTES
    )


def _groups(device: Device) -> list[int]:
    """Sizes with which 1, 2, 3 and so on groups fill the device, one block on each SM."""
    sizes = {device.sm_count // groups for groups in range(1, device.sm_count // 2 + 1)}
    return sorted(sizes)


def _held_in_part(
    reduces: Reduces, shape: tuple[int, int, int], lanes: int, itemsize: int, arrays: int, device: Device
) -> list[Tile]:
    """A group of all SMs that holds as much as there is room for, if that is worth it."""
    bulk = device.compute_capability >= _BULK_CAPABILITY
    copies: Copies = "bulk" if bulk else "plain"
    needed = -(-shape[1] // device.sm_count)
    nothing = Tile(reduces, shape, 0, lanes, _MANY_BOXES, 1, 1, arrays, itemsize, copies)
    room = (device.shared_memory - nothing.shared_memory) // arrays // nothing.row_bytes
    chunk = _chunk(min(needed, max(room // _BOXES, 1)), lanes)
    sizes = {min(room // boxes // chunk * chunk, _BOX_ROWS if bulk else room) for boxes in range(_BOXES, 2 * _BOXES)}
    rows = max(sizes, key=lambda rows: (room // rows * rows, rows) if rows else (0, 0))
    if rows == 0:
        return []
    # A buffer is rounded up to its alignment: one box less than there is room for may be needed.
    held = next(n * rows for n in range(room // rows, 0, -1) if _fits(nothing, rows, n, device))
    # The last block of an instance moves back what would reach beyond its end: it must have that much.
    for streamed in range(_round_up(max(needed - held, chunk), chunk), shape[1], chunk):
        parts = -(-shape[1] // (held + streamed))
        tile = dataclasses.replace(nothing, rows=rows, boxes=held // rows, chunk=chunk, parts=parts, streamed=streamed)
        if _last_has(tile, chunk if bulk else rows):
            tile = dataclasses.replace(tile, meeting="group" if parts > 1 else "alone")
            return [tile] if tile.share * arrays >= _LEAST_HELD_ARRAYS else []
    return []


def _fits(tile: Tile, rows: int, boxes: int, device: Device) -> bool:
    return dataclasses.replace(tile, rows=rows, boxes=boxes).shared_memory <= device.shared_memory


def _lanes(itemsize: int) -> list[int]:
    return [n // itemsize for n in (*_ROW_BYTES, _HALF_SECTOR)]


def tile_of_rows(
    reduces: Reduces,
    shape: tuple[int, int, int],
    lanes: int,
    parts: int,
    itemsize: int,
    arrays: int,
    meeting: Meeting | None = None,
) -> Tile:
    """A tile for "rows" or "both" with bulk copies, whether it fits or not; of a group, fewer parts where they do."""
    needed = -(-shape[1] // parts)
    chunk = _chunk(needed, lanes)
    rows = min(_BOX_ROWS, _round_up(-(-needed // _BOXES), chunk))
    boxes = -(-needed // rows)
    if meeting == "group":
        parts = -(-shape[1] // (rows * boxes))
    meeting = (meeting or "cluster") if parts > 1 else "alone"
    return Tile(reduces, shape, rows, lanes, boxes, chunk, parts, arrays, itemsize, meeting=meeting)


def plain_tile_of_rows(
    reduces: Reduces,
    shape: tuple[int, int, int],
    lanes: int,
    parts: int,
    itemsize: int,
    arrays: int,
) -> Tile | None:
    """The same with plain copies; None where an instance has less than a box."""
    needed = -(-shape[1] // parts)
    chunk = _chunk(needed, lanes)
    tiles = []
    for boxes in range(1, 2 * _BOXES + 1):
        least = _round_up(-(-needed // boxes), chunk)
        for rows in (least, least + chunk):
            parts = -(-shape[1] // (rows * boxes))
            meeting: Meeting = "group" if parts > 1 else "alone"
            tile = Tile(reduces, shape, rows, lanes, boxes, chunk, parts, arrays, itemsize, "plain", meeting)
            # The last block of an instance moves its last box back, to end where the instance does.
            if _last_has(tile, rows):
                tiles.append(tile)
    # As little beyond the end as a few boxes allow.
    return min(tiles, key=lambda tile: (tile.block_rows, abs(tile.boxes - _BOXES)), default=None)


def _last_has(tile: Tile, rows: int) -> bool:
    """Whether the last block of an instance has so many rows at least."""
    return tile.extent - (tile.parts - 1) * tile.block_rows >= rows


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
