"""What a pass of the kernel costs: an estimate that ranks tiles. It is not a time.

Thread blocks run in waves, as many at once as the SMs have room for. A wave takes what its blocks must wait for, plus
what its bytes take at the bandwidth of the memory or of its fullest SM, plus part of what its arithmetic takes. The
constants are rough and are of an H100. None was timed on a GPU: where nothing else is said, they were chosen so that
the ranking agrees with a finer model, which replayed the machine code and is no longer part of the project.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxnorm.gpu import elementwise

if TYPE_CHECKING:
    from jaxnorm.gpu.devices import Device
    from jaxnorm.gpu.tile import Tile

# Registers let an SM run about 4 blocks with 16 elements of a chunk per thread, and 16 with 4.
_ELEMENTS_AT_ONCE = 64
# Of its shared memory an SM sets this much aside for every thread block (CUDA programming guide).
_RESERVED = 1024
# Microseconds of a block that does nothing: to start, fetch its first bytes, sum across its warps and end.
_START = 2.0
# And to synchronize: to write partial results, wait for the last block, read and merge. A group makes two more trips to
# the memory of a third of a microsecond each: for the ticket before the first copy, and for the counter.
_SYNCHRONIZATION = {"alone": 0.0, "cluster": 1.1, "group": 1.7}
# An SM moves 64 bytes per cycle, at this many cycles per microsecond.
_CYCLES = 1.7e3
_SM_BYTES = 64 * _CYCLES
# Cycles per instruction of a thread: of one block alone, and of each of several that fill each other's gaps. Half of
# them are hidden behind the copies.
_ALONE, _SHARED, _EXPOSED = 2.0, 1.2, 0.5
# Instructions of a thread besides those of its elements: to sum across warps and to finish the statistics. Counted on
# the smallest blocks of benchmarks/throughput.py, they are 190 to 330.
_INSTRUCTIONS_OF_A_BLOCK = 200.0
_THREADS = 128
# Share of the bandwidth that is left with rows of so many bytes: DRAM gives out 64 at a time, and another thread block
# reads their neighbors, soon enough for the cache if all goes well. Guessed.
_ROW_EFFICIENCY = {128: 1.0, 64: 0.97, 32: 0.9, 16: 0.75}

# Instructions of a thread per element of a pass without an activation: in 4-byte types, and in narrower ones, which are
# converted. Counted: 8.5 and 10.9 forward, 13.7 and 19.5 backward, with a ReLU (make throughput).
_INSTRUCTIONS = {"forward": (8.0, 11.0), "backward": (12.0, 18.0)}
# And of the primitives of an activation: in float32, and where the hardware's own functions do. Any other takes 1.
_TRANSCENDENTAL = {
    "tanh": (14, 5),
    "exp": (6, 3),
    "exp2": (5, 2),
    "logistic": (14, 9),
    "div": (7, 5),
    "log": (12, 3),
    "log1p": (30, 14),
    "expm1": (30, 14),
    "erf": (32, 20),
    "erfc": (32, 20),
    "sin": (20, 3),
    "cos": (20, 3),
    "sqrt": (8, 6),
    "rsqrt": (5, 5),
    "integer_pow": (2, 2),
}


def is_full(tile: Tile, device: Device) -> bool:
    """Whether SMs run two blocks at once, so that one moves while the other computes, or have too few for that."""
    return _blocks_that_fit(tile, device) >= 2 or tile.thread_blocks < 2 * device.sm_count


def microseconds(tile: Tile, device: Device, instructions: float) -> float:
    """The estimate.

    Args:
      tile, device: of one pass.
      instructions: of a thread per element, for all sweeps.
    """
    by_registers = _ELEMENTS_AT_ONCE * _THREADS // (tile.chunk * tile.lanes)
    per_sm = max(1, min(_blocks_that_fit(tile, device), by_registers))
    # The blocks of a group start one by one, wherever there is room.
    cluster = tile.blocks_per_instance if tile.synchronization == "cluster" else 1
    wave = device.resident(cluster, per_sm) * cluster
    waves, rest = divmod(tile.thread_blocks, wave)
    return waves * _wave(tile, device, wave, instructions) + (_wave(tile, device, rest, instructions) if rest else 0.0)


def _wave(tile: Tile, device: Device, blocks: int, instructions: float) -> float:
    on_fullest = math.ceil(blocks / device.sm_count)
    elements = tile.block_rows * tile.lanes if tile.reduces != "lanes" else tile.rows * tile.extent
    moved = elements * tile.itemsize * (tile.arrays + 1)
    memory = blocks * moved / (device.bytes_per_microsecond * _ROW_EFFICIENCY[tile.row_bytes])
    issued = elements / _THREADS * instructions + _INSTRUCTIONS_OF_A_BLOCK
    compute = issued * max(_ALONE, _SHARED * on_fullest) / _CYCLES
    waiting = _START + _SYNCHRONIZATION[tile.synchronization]
    return waiting + max(memory, on_fullest * moved / _SM_BYTES) + _EXPOSED * compute


def _blocks_that_fit(tile: Tile, device: Device) -> int:
    """Thread blocks whose shared memory an SM has."""
    return (device.shared_memory + _RESERVED) // (tile.shared_memory + _RESERVED)


def instructions(activation: Callable[..., Any] | None, pass_name: str, *, narrow: bool) -> float:
    """Instructions of a thread per element of the kernel, for all sweeps, estimated without a compiler.

    Args:
      activation: a function of z, or None.
      pass_name: "forward" or "backward".
      narrow: whether x is in bfloat16 or float16.
    """
    trace = elementwise.trace if pass_name == "forward" else elementwise.trace_pullback
    names = () if activation is None else elementwise.primitives(trace(activation))
    of_activation = sum(_TRANSCENDENTAL.get(name, (1, 1))[narrow] for name in names)
    return _INSTRUCTIONS[pass_name][narrow] + of_activation
