"""Which of several tiles is the fastest: an estimate to rank them by. It is not a time.

Thread blocks run in waves, as many at once as the SMs have room for. A wave takes what its blocks must wait for, plus
what its bytes take at the bandwidth of the memory or of its fullest SM, plus part of what its arithmetic takes. The
numbers are rough, of an H100; benchmarks/throughput.py models what is left out here, on the compiled kernels.
"""

import math

from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.tile import Tile

# Registers let an SM run about 4 blocks with 16 elements of a chunk per thread, and 16 with 4.
_ELEMENTS_AT_ONCE = 64
# Of shared memory an SM sets this much aside for every thread block.
_RESERVED = 1024
# Microseconds of a block that does nothing: to start, fetch its first bytes, sum across its warps and end.
_START = 2.0
# And to meet: to wait until all can see what was written, for the last one, for what they wrote, and to merge it. In a
# group two more trips to the memory of a third each: for the ticket before the first copy, and for the counter.
_MEETING = {"alone": 0.0, "cluster": 1.1, "group": 1.7}
# Bytes that one SM moves in a microsecond: 64 per cycle.
_SM_BYTES = 110e3
# Cycles per instruction of a thread: of one block alone, and of each of several that fill each other's gaps. Half of
# them are hidden behind the copies.
_ALONE, _SHARED, _EXPOSED = 2.0, 1.2, 0.5
_CYCLES = 1.7e3
# Of a thread besides those of its elements: to sum across warps and to finish the statistics. Counted on the smallest
# blocks of benchmarks/throughput.py it is 190 to 330.
_INSTRUCTIONS_OF_A_BLOCK = 200.0
_THREADS = 128
# Share of the bandwidth that is left with rows of so many bytes: DRAM gives out 64 at a time, and their neighbours are
# read by another thread block, hopefully soon enough. Guessed.
_ROW_EFFICIENCY = {128: 1.0, 64: 0.97, 32: 0.9, 16: 0.75}


def is_full(tile: Tile, device: Device) -> bool:
    """Whether SMs run two blocks at once, so that one moves while the other computes, or have too few for that."""
    return _fitting(tile, device) >= 2 or tile.thread_blocks < 2 * device.sm_count


def microseconds(tile: Tile, device: Device, instructions: float) -> float:
    """The estimate.

    Args:
      tile, device: of one pass.
      instructions: of a thread per element, for all sweeps.
    """
    at_once = max(1, min(_fitting(tile, device), _ELEMENTS_AT_ONCE * _THREADS // (tile.chunk * tile.lanes)))
    # The blocks of a group start one by one, wherever there is room.
    together = tile.parts if tile.meeting == "cluster" else 1
    wave = device.resident(together, at_once) * together
    full, rest = divmod(tile.thread_blocks, wave)
    return full * _wave(tile, device, wave, instructions) + (_wave(tile, device, rest, instructions) if rest else 0.0)


def _wave(tile: Tile, device: Device, blocks: int, instructions: float) -> float:
    on_fullest = math.ceil(blocks / device.sm_count)
    elements = tile.block_rows * tile.lanes if tile.reduces != "lanes" else tile.rows * tile.extent
    moved = elements * tile.itemsize * (tile.arrays + 1)
    memory = blocks * moved / (device.bandwidth * _ROW_EFFICIENCY[tile.row_bytes])
    issued = elements / _THREADS * instructions + _INSTRUCTIONS_OF_A_BLOCK
    compute = issued * max(_ALONE, _SHARED * on_fullest) / _CYCLES
    waiting = _START + _MEETING[tile.meeting]
    return waiting + max(memory, on_fullest * moved / _SM_BYTES) + _EXPOSED * compute


def _fitting(tile: Tile, device: Device) -> int:
    """Thread blocks whose shared memory an SM has."""
    return (device.shared_memory + _RESERVED) // (tile.shared_memory + _RESERVED)
