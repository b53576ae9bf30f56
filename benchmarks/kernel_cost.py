"""What a compiled kernel costs an SM: counted on its machine code, and a model of how fast that makes it."""

import dataclasses
import math
from typing import Any, NamedTuple

import replay
import timeline
from machine_code import Code, Instruction, Span, pieces
from timeline import Chip, Sweep, Work

_THREADS = 128
# Of an SM, for Hopper and data center Blackwell: shared memory, of which the system takes some for every thread block,
# registers, which a warp gets 256 at a time, and threads.
_SHARED, _SHARED_PER_BLOCK = 228 * 1024, 1024
_REGISTERS, _REGISTERS_AT_ONCE = 64 * 1024, 8
_THREADS_PER_SM = 2048
# A bound explains the modeled time if it reaches that much of it; else the phases of the thread blocks do.
_EXPLAINS = 0.85
# Where there is a loop: the last sweep reads all again. 1 would be without the sums; registers may keep a part of them.
_LEAST_SWEEPS = 1.5


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one pass.

    Attributes:
      instructions: of a warp per 32 elements, in all sweeps over shared memory.
      sweeps: over shared memory; a center from one of four boxes is a quarter. 1 where all is one piece without a loop:
        then everything from the first load on is counted.
      registers, spilled: per thread, and bytes.
      stores_elsewhere: stores in its loops where the thread has not loaded in the same round.
      per_sm: thread blocks that an SM holds at once.
      waves: how often they fill the chip.
      share: of the speed of a copy that moves as many bytes, modeled.
      attainable: the share of a kernel that moves as many bytes and does nothing else.
      limit: "memory", "issue", "waves" or "phases".
    """

    instructions: float
    sweeps: float
    registers: int
    spilled: int
    stores_elsewhere: int
    per_sm: int
    waves: float
    share: float
    attainable: float
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
    sweeps = _sweeps(code, tile)
    work = _work(code, tile, sweeps, per_sm, moved, chip)
    time, bounds = timeline.microseconds(work, chip), timeline.bounds(work, chip)
    limit = max(bounds, key=lambda name: bounds[name])
    held = tile.boxes * tile.rows * tile.lanes / _THREADS
    return Cost(
        sum(len(code[sweep.span]) * sweep.times for sweep in sweeps) / held,
        sum(sweep.part for sweep in sweeps),
        registers,
        spilled,
        sum(code.stores_elsewhere(sweep) for sweep in code.sweeps if sweep in code.loops),
        per_sm,
        timeline.waves(work, chip),
        timeline.copy_microseconds(work, chip) / time,
        timeline.attainable(*moved, chip),
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


class _Sweep(NamedTuple):
    """A sweep in the machine code.

    Attributes:
      span: where it is.
      times: that a thread goes through the span.
      part: of what the thread block holds that this covers.
    """

    span: Span
    times: float
    part: float


def _sweeps(code: Code, tile: Any) -> list[_Sweep]:
    per_box = tile.rows * tile.lanes / _THREADS
    found: list[_Sweep] = []
    elements_before = 0.0
    if not set(code.sweeps) & set(code.loops):
        return [_Sweep(span, times=1.0, part=float(span == code.sweeps[-1])) for span in code.sweeps]
    for span in code.sweeps:
        # A sweep loads all arrays that the pass holds: it is told of passes without a residual only.
        elements = code.loaded(span) / (tile.itemsize * tile.arrays)
        in_a_loop = any(loop.holds(span) and loop != span for loop in code.loops)
        if in_a_loop or (span in code.loops and elements >= per_box):
            covered = per_box * tile.boxes
        else:
            covered = per_box if span in code.loops else elements
        if span in code.loops and found and found[-1].span.end == span.first and found[-1].times == 1.0:
            # The first rounds of the loop stand before it.
            covered -= elements_before
        found.append(_Sweep(span, covered / elements, covered / (per_box * tile.boxes)))
        elements_before = elements
    total = sum(sweep.part for sweep in found)
    if total < _LEAST_SWEEPS:
        raise ValueError(
            f"a pass sweeps over what it holds at least twice, once for its sums; found were {total:.2f} sweeps in "
            f"{found}: machine_code.py does not understand what the compiler made of {tile}"
        )
    return found


def _work(code: Code, tile: Any, sweeps: list[_Sweep], per_sm: int, moved: tuple[float, float], chip: Chip) -> Work:
    loaded, stored = (total / tile.thread_blocks for total in moved)
    together = min(per_sm, math.ceil(tile.thread_blocks / chip.sms))
    replayed = [_replayed(code[sweep.span], sweep.times, together) for sweep in sweeps]
    # The last sweep is the one that what is stored comes from. Those until the last wait go on while boxes come.
    last = len(sweeps) - 1
    while last > 0 and sum(sweep.part for sweep in sweeps[last:]) < 0.99:
        last -= 1
    in_one_piece = not sweeps[0].part
    loops = [loop for loop in code.loops if loop.first <= code.last_wait < loop.end and not in_one_piece]
    waited = max((loop.end for loop in loops), default=code.last_wait)
    first = sum(sweep.span.first < waited for sweep in sweeps[:last])
    if not loops and first < last and not in_one_piece:
        first += 1
    _, *between, end = pieces([sweep.span for sweep in sweeps], code.end)
    return Work(
        tile.thread_blocks,
        tile.blocks_per_instance,
        per_sm,
        loaded,
        stored,
        tile.boxes,
        _sum(replayed[:first]),
        _sum(replayed[first:last]),
        _sum(replayed[last:]),
        meeting=sum(replay.latency(code[piece]) for piece in between),
        ending=replay.latency(code[end]),
        together=tile.synchronization != "group",
        ticket=sum(replay.latency([i]) for i in code.instructions if i.base == "ATOMG"),
    )


def _replayed(body: list[Instruction], times: float, together: int) -> Sweep:
    """More than a few thread blocks fill the schedulers no better."""
    alone, blocks = replay.cycles(body, 1), min(together, 8)
    shared = replay.cycles(body, blocks) / blocks if blocks > 1 else alone
    return Sweep(times * alone, times * shared)


def _sum(sweeps: list[Sweep]) -> Sweep:
    return Sweep(sum(sweep.alone for sweep in sweeps), sum(sweep.shared for sweep in sweeps))
