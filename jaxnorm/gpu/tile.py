"""A tile: how the fused GPU kernel splits its work among thread blocks. jaxnorm.gpu.tiling finds it.

A thread block holds its part of an instance in shared memory, so that x is read once and y written once. The
canonical view (B, R, K) of jaxnorm.layout is cut in one of three ways:

    "rows"   channels-last. Shared memory holds rows x lanes positions of one sample; each lane is an instance of its
             own, reduced over the rows. Several blocks may share the rows of an instance.
    "both"   channels-first. An instance is contiguous and is seen as rows of `lanes` positions; all are reduced to
             one value. Several blocks may share the rows.
    "lanes"  channels-first, small instances: each row of shared memory is one instance, reduced over its lanes.
"""

import dataclasses
import math
from typing import Literal

Reduces = Literal["rows", "both", "lanes"]
# See jaxnorm.gpu.copies and jaxnorm.gpu.meeting.
Copies = Literal["bulk", "plain", "span"]
Meeting = Literal["alone", "cluster", "group"]

# Sums across the warps of a thread block pass through this much shared memory.
REDUCTION_SCRATCH_BYTES = 2 * 1024
# Around the mean of that part of the numbers, the sum of squares is at most 1 + 16 times that around their own mean.
_BOXES_PER_CENTER = 16
# An mbarrier takes 8 bytes; buffers start at multiples of 1024 bytes.
_BARRIER_BYTES = 8
_BUFFER_ALIGNMENT = 1024


@dataclasses.dataclass(frozen=True)
class NoTile:
    """Why the kernel cannot run."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a thread block holds, how it goes through it and with whom it shares instances.

    Attributes:
      reduces: "rows", "both" or "lanes", see the module.
      shape: of x as the kernel sees it, (outer, rows, lanes). "rows": (B, R, K). "both": (B, R // lanes, lanes).
        "lanes": (1, B, R).
      rows, lanes: of a box, which is copied and waited for as a whole.
      boxes: of a thread block; they follow each other along the lanes for "lanes", else along the rows.
      chunk: rows of a box that are computed at a time.
      parts: thread blocks that share the rows of an instance.
      arrays: x-sized arrays in shared memory.
      itemsize: bytes of an element of those.
      copies: how its part comes into shared memory and goes back.
      meeting: how the blocks that share an instance meet.
      span: how many instances a thread block holds one after the other, and the positions of each. The shape is
        (1, B * R // lanes, lanes) then, and the one box has whole chunks, which may be more rows than the span has.
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
    span: tuple[int, int] | None = None

    @property
    def first_boxes(self) -> int:
        """Boxes whose mean is the center of the sums: a sixteenth of what the block works on, at least."""
        of = self.boxes if self.reduces == "lanes" else -(-self.block_rows // self.rows)
        return min(self.boxes, -(-of // _BOXES_PER_CENTER))

    @property
    def block_rows(self) -> int:
        """Rows of x that one thread block works on."""
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
        """In all."""
        return self.shape[0] * self.blocks * self.parts

    @property
    def largest_index(self) -> int:
        """No number that the kernel computes to find its place in an array is larger; it has 32 bits for each."""
        count = self.parts if self.span is None and self.reduces != "lanes" else self.blocks
        rows, instances = count * self.block_rows, self.blocks * self.span[0] if self.span else 0
        return max(*self.shape, rows, instances, self.boxes * self.lanes, self.thread_blocks)

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
        if self.span is not None:
            return self.span[1]
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
