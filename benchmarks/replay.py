"""How many cycles an SM takes for a piece of machine code, replayed as its schedulers would issue it.

An SM has four schedulers and a thread block one warp on each, so one scheduler is replayed. It issues one instruction
per cycle, from the warp that can go first: one whose stall count has run out, whose scoreboards are clear and whose
pipe is free. Loads from shared memory pass through a pipe that all four share. What is not modelled: bank conflicts
(there are none), register ports, the instruction cache, branches not taken.

Pipes and latencies are of Hopper, from its programming guide and from published microbenchmarks; Blackwell's are taken
to be the same. The results rank designs; they are no times.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.machine_code import Instruction

# Pipe of a scheduler, and the cycles for which an instruction keeps it: 32 lanes through 32, 16 or 4 units.
_PIPES = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA"), ("float", 1)),
    # Packed pairs, and integers on the same units at half the rate.
    **dict.fromkeys(("FADD2", "FMUL2", "FFMA2", "IMAD", "HFMA2"), ("float", 2)),
    "MUFU": ("special", 8),
    **dict.fromkeys(("BRA", "NOP", "SYNCS", "BAR"), ("none", 0)),
}
_INTEGER = ("integer", 2)
# Cycles from issue until the result can be used; what has none here is timed by the stall count alone.
_SPECIAL, _SHARED, _GLOBAL, _CONSTANT = 24, 30, 600, 30
_LATENCIES = {
    "MUFU": _SPECIAL,
    "LD": _GLOBAL,
    "LDG": _GLOBAL,
    "ATOMG": _GLOBAL,
    "DEPBAR": _GLOBAL,
    "LDC": _CONSTANT,
    "S2R": _CONSTANT,
    "S2UR": _CONSTANT,
    "LDCU": _CONSTANT,
    "SHFL": _SPECIAL,
}
_OTHER = 12
# Cycles from the last arrival at a barrier until all go on: of a thread block, and of a cluster. And until the memory
# has what was stored, which no scoreboard tells.
_BARRIERS = {"BAR": 20, "UCGABAR_WAIT": 200, "MEMBAR.ALL.GPU": _GLOBAL}
# Shared memory gives or takes 32 lanes of 4 bytes per cycle, for all four schedulers; so much may wait before it.
_SCHEDULERS = 4
_QUEUE = 24
# Executions of a loop, so that its first one counts little.
_REPEATS = 8


def cycles(body: Sequence[Instruction], thread_blocks: int) -> float:
    """Per execution of a loop body by each of so many thread blocks on an SM."""
    return _run(body, thread_blocks, _REPEATS) / _REPEATS


def latency(code: Sequence[Instruction]) -> float:
    """Cycles until one thread block has gone through the code once, with branches taken as if they were not there."""
    return _run(code, 1, 1) if code else 0.0


@dataclasses.dataclass
class _Warp:
    ready: float
    issued: float = 0.0
    position: int = 0
    done: int = 0
    boards: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))


def _run(body: Sequence[Instruction], thread_blocks: int, repeats: int) -> float:
    """When the last warp has done the body so often."""
    warps = [_Warp(ready=7.0 * i) for i in range(thread_blocks)]
    pipes: dict[str, float] = defaultdict(float)
    clock = end = 0.0
    while warps:
        # Of several that can go, the one that has waited longest.
        warp = min(warps, key=lambda w: (max(clock, _ready(w, body[w.position], pipes)), w.issued))
        instruction = body[warp.position]
        warp.issued = max(clock, _ready(warp, instruction, pipes))
        clock = warp.issued + 1
        _issue(warp, instruction, pipes)
        warp.position += 1
        if warp.position == len(body):
            warp.position, warp.done = 0, warp.done + 1
            if warp.done == repeats:
                end = max(end, clock, *warp.boards.values())
                warps.remove(warp)
    return end


def _ready(warp: _Warp, instruction: Instruction, pipes: dict[str, float]) -> float:
    pipe, _ = _pipe(instruction)
    free = pipes[pipe] - (_QUEUE if pipe == "shared" else 0)
    return max(warp.ready, free, *(warp.boards[board] for board in instruction.waits))


def _issue(warp: _Warp, instruction: Instruction, pipes: dict[str, float]) -> None:
    now = warp.issued
    pipe, occupied = _pipe(instruction)
    pipes[pipe] = max(pipes[pipe], now) + occupied
    read, written = now + _OTHER, now + _LATENCIES.get(instruction.base, _OTHER)
    if pipe == "shared":
        read, written = pipes[pipe], pipes[pipe] + _SHARED
    for board, time in ((instruction.reads, read), (instruction.writes, written)):
        if board is not None:
            warp.boards[board] = max(warp.boards[board], time)
    waiting = _BARRIERS.get(instruction.base, _BARRIERS.get(instruction.opcode, 0))
    warp.ready = now + max(1, instruction.stall, waiting)


def _pipe(instruction: Instruction) -> tuple[str, float]:
    if instruction.base in ("LDS", "STS"):
        return "shared", _SCHEDULERS * instruction.bytes / 4
    return _PIPES.get(instruction.base, _INTEGER)
