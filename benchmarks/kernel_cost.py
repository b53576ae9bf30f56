"""What a compiled kernel costs an SM: counted on its machine code, and a model of how fast that makes it."""

import dataclasses
import math
from typing import Any

import replay
import timeline
from machine_code import Code, Instruction, Span
from timeline import Chip, Sweep, Work

_THREADS = 128
# Of an SM, for Hopper and data center Blackwell: shared memory, of which the system takes some for every thread block,
# registers, which a warp gets 256 at a time, and threads.
_SHARED, _SHARED_PER_BLOCK = 228 * 1024, 1024
_REGISTERS, _REGISTERS_AT_ONCE = 64 * 1024, 8
_THREADS_PER_SM = 2048
# A bound explains the modelled time if it reaches that much of it; else the phases of the thread blocks do.
_EXPLAINS = 0.85


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one pass.

    Attributes:
      instructions: of a warp per 32 elements, in all sweeps over shared memory.
      sweeps: loops over shared memory; 0 where some are unrolled, so that all instructions of the kernel are counted.
      registers, spilled: per thread, and bytes.
      per_sm: thread blocks that an SM holds at once.
      waves: how often they fill the chip.
      share: of the speed of a copy that moves as many bytes, modelled.
      limit: "memory", "issue", "waves" or "phases".
    """

    instructions: float
    sweeps: int
    registers: int
    spilled: int
    per_sm: int
    waves: float
    share: float
    limit: str


def cost(code: Code, tile: Any, *, registers: int, spilled: int, moved: tuple[float, float], chip: Chip) -> Cost:
    """The cost of one pass.

    Args:
      code, registers, spilled: what the compiler made of it, and said.
      tile: how the work is cut.
      moved: bytes that the whole kernel reads and writes.
      chip: what would run it.
    """
    per_sm = thread_blocks_per_sm(tile.shared_memory, registers)
    per_sm = min(per_sm, max(1, math.ceil(tile.thread_blocks / chip.sms)))
    work = _work(code, tile, per_sm, moved)
    time, bounds = timeline.microseconds(work, chip), timeline.bounds(work, chip)
    limit = max(bounds, key=lambda name: bounds[name])
    instructions, sweeps = count(code, tile)
    return Cost(
        instructions,
        sweeps,
        registers,
        spilled,
        thread_blocks_per_sm(tile.shared_memory, registers),
        timeline.waves(work, chip),
        timeline.copy_microseconds(work, chip) / time,
        limit if bounds[limit] >= _EXPLAINS * time else "phases",
    )


def thread_blocks_per_sm(shared_memory: int, registers: int) -> int:
    """That an SM holds at once."""
    per_thread = math.ceil(registers / _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
    return min(
        _SHARED // (shared_memory + _SHARED_PER_BLOCK),
        _REGISTERS // (per_thread * _THREADS),
        _THREADS_PER_SM // _THREADS,
    )


def count(code: Code, tile: Any) -> tuple[float, int]:
    """Warp instructions per 32 elements, and the sweeps that were counted: see Cost."""
    held = _elements(tile)
    looped = [len(code[sweep]) / _elements_per_iteration(code, tile, sweep) for sweep in code.sweeps]
    between = [i for piece in _pieces(code) for i in piece]
    # What is loaded beside the loops are sums across warps, or sweeps without a loop.
    unrolled = sum(i.bytes for i in between if i.base == "LDS") >= 2 * held * tile.itemsize
    if looped and not unrolled:
        return sum(looped), len(looped)
    return sum(looped) + len(between) / held, 0


def _elements(tile: Any) -> float:
    """Of one array, per thread."""
    return tile.boxes * tile.rows * tile.lanes / _THREADS


def _elements_per_iteration(code: Code, tile: Any, sweep: Span) -> float:
    """A sweep loads all arrays that the pass holds: it is told of passes without a residual only."""
    return code.loaded(sweep) / (tile.itemsize * tile.arrays)


def _pieces(code: Code) -> list[list[Instruction]]:
    """What is executed once: before, between and after the sweeps."""
    starts = [0, *(sweep.end for sweep in code.sweeps)]
    ends = [*(sweep.first for sweep in code.sweeps), code.end]
    return [code[Span(start, end)] for start, end in zip(starts, ends, strict=True)]


def _work(code: Code, tile: Any, per_sm: int, moved: tuple[float, float]) -> Work:
    loaded, stored = (total / tile.thread_blocks for total in moved)
    common = (tile.thread_blocks, tile.cluster, per_sm, loaded, stored, tile.boxes)
    if not code.sweeps:
        # All in one piece, after what it loads has come.
        (piece,) = _pieces(code)
        return Work(*common, Sweep(), _replayed(piece, per_sm), Sweep(), meeting=0.0, ending=0.0)
    *others, last = [_sweep(code, tile, span, per_sm) for span in code.sweeps]
    if not code.stores(code.sweeps[-1]):
        others, last = [*others, last], Sweep()
    first, *middle = others or [Sweep()]
    _, *between, end = _pieces(code)
    return Work(
        *common,
        first,
        Sweep(sum(s.alone for s in middle), sum(s.shared for s in middle)),
        last,
        meeting=sum(map(replay.latency, between)),
        ending=replay.latency(end),
    )


def _sweep(code: Code, tile: Any, span: Span, per_sm: int) -> Sweep:
    once = _replayed(code[span], per_sm)
    iterations = _elements(tile) / _elements_per_iteration(code, tile, span)
    return Sweep(iterations * once.alone, iterations * once.shared)


def _replayed(body: list[Instruction], per_sm: int) -> Sweep:
    """Once; more than a few thread blocks fill the schedulers no better."""
    alone, blocks = replay.cycles(body, 1), min(per_sm, 8)
    return Sweep(alone, replay.cycles(body, blocks) / blocks if blocks > 1 else alone)
