"""The tiles of each way to cut an instance, whether they fit into shared memory or not: jaxnorm.gpu.tiling chooses."""

import math

from jaxnorm.gpu.tile import Meeting, Reduces, Tile

# Rows start at multiples of 16 bytes: bulk copies require it, and so do loads of 4 numbers by a thread.
ALIGNMENT = 16
# Rows of shared memory, in bytes: 128 is a cache line. 32 is a sector, the least that DRAM gives out.
ROW_BYTES = (128, 64, 32)
# Half a sector: two thread blocks read each sector, hopefully the second time from L2. For want of anything better.
HALF_SECTOR = 16
# A warpgroup of 128 threads with 4 elements each: the rows that one instruction covers are 512 // lanes.
ELEMENTS_PER_STEP = 128 * 4
# Steps computed at a time, for instruction-level parallelism: up to 4 * 4 elements per thread and array. With fewer an
# SM has the registers for more thread blocks.
STEPS = (4, 2, 1)
# TMA copies at most 256 rows at once.
_BOX_ROWS = 256
# Several boxes per tile, so that the first are summed while the others are still on their way.
_BOXES = 4
# Bulk copies have a barrier for each box: Mosaic GPU supports so many.
MOST_BOXES = 32
# Instances in a span: as many as keep each thread busy for a few steps, and not so many that blocks become few.
_SPAN_ELEMENTS = (4 * ELEMENTS_PER_STEP, 16 * ELEMENTS_PER_STEP)


def widths(itemsize: int) -> list[int]:
    """Lanes of a row, wide rows first."""
    return [n // itemsize for n in (*ROW_BYTES, HALF_SECTOR)]


def tile_of_rows(
    reduces: Reduces,
    shape: tuple[int, int, int],
    lanes: int,
    parts: int,
    itemsize: int,
    arrays: int,
    meeting: Meeting | None = None,
    steps: int = STEPS[0],
) -> Tile:
    """For "rows" or "both", with bulk copies, and so many steps at a time at most.

    A group has fewer parts than asked for where fewer do.
    """
    needed, step = -(-shape[1] // parts), ELEMENTS_PER_STEP // lanes
    chunk = _chunk(needed, lanes, most=min(_BOX_ROWS, steps * step, max(needed // _BOXES, step)))
    rows = _box_rows(needed, chunk, step)
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
    steps: int = STEPS[0],
) -> Tile | None:
    """For "rows" or "both", with plain copies; None where an instance has fewer rows than a box.

    As little as possible reaches beyond the end, with 4 boxes or a few more or less.
    """
    needed = -(-shape[1] // parts)
    chunk = _chunk(needed, lanes, most=min(_BOX_ROWS, steps * ELEMENTS_PER_STEP // lanes, needed))
    tiles = []
    for boxes in range(1, 2 * _BOXES + 1):
        least = _round_up(-(-needed // boxes), chunk)
        for rows in (least, least + chunk):
            parts = -(-shape[1] // (rows * boxes))
            meeting: Meeting = "group" if parts > 1 else "alone"
            tile = Tile(reduces, shape, rows, lanes, boxes, chunk, parts, arrays, itemsize, "plain", meeting)
            if _last_has(tile, rows):
                tiles.append(tile)
    return min(tiles, key=lambda tile: (tile.block_rows, abs(tile.boxes - _BOXES)), default=None)


def tile_of_instances(batch: int, positions: int, itemsize: int, arrays: int) -> Tile:
    """For "lanes"."""
    lanes = next(n for n in widths(itemsize) if n <= positions)
    rows = ELEMENTS_PER_STEP // lanes
    boxes = -(-positions // lanes)
    return Tile("lanes", (1, batch, positions), rows, lanes, boxes, rows, 1, arrays, itemsize)


def tile_of_span(batch: int, positions: int, itemsize: int, arrays: int) -> Tile | None:
    """For channels-first instances that start at no multiple of 16 bytes, or are small; None where they are too few."""
    together, lanes = together_aligned(positions, itemsize), ALIGNMENT // itemsize
    enough, most = _SPAN_ELEMENTS
    numbers = range(together, max(together, most // positions) + 1, together)
    fitting = [n for n in numbers if batch % n == 0 and n * positions >= ELEMENTS_PER_STEP]
    if not fitting:
        return None
    instances = next((n for n in fitting if n * positions >= enough), fitting[-1])
    rows = instances * positions // lanes
    chunk = _chunk(positions // lanes, lanes, most=min(rows, _BOX_ROWS))
    shape, span = (1, batch * positions // lanes, lanes), (instances, positions)
    return Tile("both", shape, _round_up(rows, chunk), lanes, 1, chunk, 1, arrays, itemsize, "span", span=span)


def together_aligned(positions: int, itemsize: int) -> int:
    """Channels-first instances that take a multiple of 16 bytes together."""
    return ALIGNMENT // math.gcd(ALIGNMENT, positions * itemsize)


def _last_has(tile: Tile, rows: int) -> bool:
    """Whether the last block of an instance has that many rows at least, for copies that move back so many."""
    return tile.extent - (tile.parts - 1) * tile.block_rows >= rows


def _box_rows(needed: int, chunk: int, step: int) -> int:
    """Rows of a box: of four or more that reach little beyond the end, but of few.

    Each box costs about half a step besides.
    """
    most = min(_BOX_ROWS, _round_up(-(-needed // _BOXES), chunk))

    def cost(rows: int) -> int:
        held = _round_up(needed, rows)
        return held + held // rows * step // 2

    return min(range(most, 0, -chunk), key=cost)


def _chunk(rows: int, lanes: int, most: int = _BOX_ROWS) -> int:
    """Rows computed at a time: many, unless rounding up to them would waste more than an eighth."""
    step = ELEMENTS_PER_STEP // lanes
    chunks = [step * n for n in STEPS if step * n <= most]
    return next((n for n in chunks if _round_up(rows, n) * 8 <= rows * 9), step)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
