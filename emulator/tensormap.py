"""Boxes of tensors as the TMA unit moves them: coordinates, swizzle, zeros beyond the end. PTX ISA 5.5.

A copy without a tensor map is a box of its own, of rows of 16 bytes, of which nothing is clipped.
"""

import math
from typing import NamedTuple

import numpy as np

from emulator.report import KernelError

# Which of the address bits 7 to 9 change bits 4 to 6, by the width of the swizzle in bytes; 16 is none.
_SWIZZLES = {16: 0, 32: 1, 64: 3, 128: 7}


class TensorMap(NamedTuple):
    """As cuTensorMapEncodeTiled takes it: the innermost dimension first, strides in bytes."""

    address: int
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def check(self) -> None:
        """Raises KernelError for what the driver would refuse."""
        row = self.box[0] * self.itemsize
        rules = {
            f"its rank is 1 to 5, not {len(self.sizes)}": 1 <= len(self.sizes) <= 5,
            f"its address {self.address:#x} is a multiple of 16": self.address % 16 == 0,
            f"its sizes are 1 to 2^32, not {self.sizes}": all(0 < n <= 2**32 for n in self.sizes),
            f"its innermost stride is one element, not {self.strides[0]} bytes": self.strides[0] == self.itemsize,
            f"its other strides are multiples of 16 below 2^40, not {self.strides[1:]}": all(
                stride % 16 == 0 and 0 <= stride < 2**40 for stride in self.strides[1:]
            ),
            f"a box has 1 to 256 elements in each dimension, not {self.box}": all(0 < n <= 256 for n in self.box),
            f"rows of a box are multiples of 16 bytes, not {row}": row % 16 == 0,
            f"its swizzle is one of {tuple(_SWIZZLES)}, not {self.swizzle}": self.swizzle in _SWIZZLES,
            f"rows of a box fit the swizzle of {self.swizzle} bytes, not {row}": self.swizzle == 16
            or row <= self.swizzle,
        }
        for rule, holds in rules.items():
            if not holds:
                raise KernelError("tensor map", rule)

    @property
    def last(self) -> int:
        """The address behind its last element."""
        return self.address + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True)) + self.itemsize


class Box:
    """The rows of one copy.

    Attributes:
      inner: bytes of a row in shared memory, of which first <= i < last are in the tensor.
      starts: the global address of each row.
      inside: whether a row is in the tensor.
    """

    def __init__(self, inner: int, starts: np.ndarray, inside: np.ndarray, first: int, last: int, swizzle: int):
        self.inner, self.starts, self.inside, self.first, self.last = inner, starts, inside, first, last
        self.swizzle = swizzle

    @property
    def rows(self) -> int:
        return len(self.starts)

    @property
    def is_empty(self) -> bool:
        return self.first >= self.last or not self.inside.any()

    def places(self, address: int, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Shared addresses of the pieces of 16 bytes of rows: (rows, pieces)."""
        number = np.arange(self.rows)[rows]
        linear = address + number[:, None] * self.inner + 16 * np.arange(self.inner // 16)
        return swizzled(linear, self.swizzle)


def swizzled(addresses: np.ndarray, swizzle: int) -> np.ndarray:
    """Where the 16 bytes that belong at a shared address lie."""
    return addresses ^ (((addresses >> 7) & _SWIZZLES[swizzle]) << 4)


def box_at(tensor: TensorMap, coordinates: list[int]) -> Box:
    """The box of a tensor copy."""
    if len(coordinates) != len(tensor.sizes):
        raise KernelError("tensor map", f"{len(coordinates)} coordinates for one of rank {len(tensor.sizes)}")
    rows = math.prod(tensor.box[1:])
    index, inside = np.arange(rows), np.ones(rows, bool)
    starts = np.full(rows, tensor.address + coordinates[0] * tensor.itemsize)
    for n, coordinate, size, stride in zip(
        tensor.box[1:], coordinates[1:], tensor.sizes[1:], tensor.strides[1:], strict=True
    ):
        along = index % n + coordinate
        index = index // n
        inside &= (along >= 0) & (along < size)
        starts += along * stride
    inner = tensor.box[0] * tensor.itemsize
    first = min(max(0, -coordinates[0]) * tensor.itemsize, inner)
    last = max(min(inner, (tensor.sizes[0] - coordinates[0]) * tensor.itemsize), first)
    return Box(inner, starts, inside, first, last, tensor.swizzle)


def contiguous(start: int, size: int) -> Box:
    """The box of a copy without a tensor map."""
    if start % 16 or size % 16:
        raise KernelError("misaligned", f"a bulk copy of {size} bytes at {start:#x}: both must be multiples of 16")
    rows = size // 16
    return Box(16, start + 16 * np.arange(rows), np.ones(rows, bool), 0, 16, 16)
