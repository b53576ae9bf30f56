"""The machine code of a kernel, from the listing that nvdisasm prints: its instructions and its sweeps.

A sweep goes through what the thread block holds in shared memory: a loop, or a piece of code without one.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

_KERNEL = re.compile(r"^\.text\.(\w+?)(?:_mosaic_gpu_kernel)?:$")
_LABEL = re.compile(r"^(\.L_\w+):$")
# What the compiler tells the scheduler, the address and the text: "2&1:-:3:Y:04  /*0010*/  @P0 LDS R1, [R2]".
_INSTRUCTION = re.compile(r"^\s*([\d&-]+):([\d-]):([\d-]):([Y-]):(\d+)\s+/\*[0-9a-f]+\*/\s+(.*?)\s*$")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_ADDRESS = re.compile(r"\[.*?\]")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


class Instruction(NamedTuple):
    """One instruction of a warp, with what the compiler tells the scheduler.

    Attributes:
      text: without the predicate.
      waits: scoreboards that must be clear before it is issued.
      reads, writes: scoreboard that it clears when it has read its operands, or written its result.
      stall: cycles until the next instruction of the warp.
    """

    text: str
    waits: tuple[str, ...]
    reads: str | None
    writes: str | None
    stall: int

    @property
    def opcode(self) -> str:
        """Such as "LDS.128"."""
        return self.text.split()[0]

    @property
    def base(self) -> str:
        """Such as "LDS"."""
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """That a load or store moves per thread."""
        width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", self.opcode)
        return {"128": 16, "64": 8, "16": 2, "8": 1}[width[1].strip("US")] if width else 4


class Span(NamedTuple):
    """Instructions first <= i < end."""

    first: int
    end: int

    def holds(self, other: "Span") -> bool:
        return self.first <= other.first and other.end <= self.end


class Code:
    """The instructions of one kernel."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        self.instructions = instructions
        self._labels = labels

    def __getitem__(self, span: Span) -> list[Instruction]:
        return self.instructions[span.first : span.end]

    @functools.cached_property
    def loops(self) -> list[Span]:
        """From the target of every branch backwards. One that passes an exit comes back from a slow path: no loop."""
        ends: dict[int, int] = {}
        for i, instruction in enumerate(self.instructions):
            target = _TARGET.search(instruction.text) if instruction.base == "BRA" else None
            first = self._labels[target[1]] if target else i
            if first < i and not any(passed.base == "EXIT" for passed in self.instructions[first:i]):
                ends[first] = max(ends.get(first, 0), i + 1)
        return sorted(Span(first, end) for first, end in ends.items())

    @functools.cached_property
    def end(self) -> int:
        """After the exit: what follows are slow paths."""
        return max((i for i, instruction in enumerate(self.instructions) if instruction.base == "EXIT"), default=0) + 1

    @functools.cached_property
    def sweeps(self) -> list[Span]:
        """In order: the innermost loops that load from shared memory, and what such loops were unrolled to.

        Without any loop the registers may keep what was loaded once. Then all from the first load on counts, cut where
        the last box has come and where what an instance has in common is known.
        """
        loading = [loop for loop in self.loops if self.loaded(loop)]
        innermost = [loop for loop in loading if not any(loop != other and loop.holds(other) for other in loading)]
        looped = [loop for loop in innermost if next(self._data(loop), None) is not None]
        if looped:
            return sorted([*looped, *self._unrolled(looped)])
        first = next(self._data(Span(0, self.end)), self.end)
        cuts = sorted({first, max(first, self.last_wait), max(first, self._exchanged), self.end})
        return [Span(*both) for both in itertools.pairwise(cuts)]

    @functools.cached_property
    def last_wait(self) -> int:
        """For what is loaded; the one that follows an arrival is for the other thread blocks of the cluster."""
        waits = (
            i
            for i, instruction in enumerate(self.instructions[: self.end])
            if "TRYWAIT" in instruction.text and ".RED" not in self.instructions[i - 1].text
        )
        return max(waits, default=0)

    @property
    def _exchanged(self) -> int:
        """After the last exchange: between lanes, which two barriers end, or between thread blocks."""
        opcodes = [instruction.opcode for instruction in self.instructions[: self.end]]
        between_lanes = max((i for i, opcode in enumerate(opcodes) if ".BFLY" in opcode), default=0)
        barriers = (i + 1 for i, opcode in enumerate(opcodes) if opcode.startswith("BAR") and i > between_lanes)
        between_blocks = max(
            (i + 1 for i, opcode in enumerate(opcodes) if opcode.startswith(("CCTL", "UCGABAR_WAIT"))), default=0
        )
        return max(between_blocks, next(itertools.islice(barriers, 1, 2), self.end))

    def loaded(self, span: Span) -> int:
        """Bytes that a thread loads from shared memory there."""
        return sum(i.bytes for i in self[span] if i.base == "LDS")

    def stores_elsewhere(self, span: Span) -> int:
        """Stores to shared memory at other addresses than the thread loads from in that span."""
        loaded, stored = ([_ADDRESS.search(i.text)[0] for i in self[span] if i.base == base] for base in ("LDS", "STS"))
        return sum(address not in loaded for address in stored)

    def _data(self, span: Span) -> Iterator[int]:
        """Where data is loaded from shared memory, and not what sums across warps pass through it.

        Those are exchanged between lanes, stored, and loaded after a barrier; another barrier follows. Sums within a
        warp are only exchanged. Data is stored only where some was loaded since the last barrier or exchange.
        """
        barriers_to_come, has_data = 0, False
        for i, instruction in enumerate(self[span], span.first):
            if ".BFLY" in instruction.opcode:
                has_data = False
            elif instruction.base == "STS" and not has_data:
                barriers_to_come = 2
            elif instruction.base == "BAR":
                barriers_to_come, has_data = max(0, barriers_to_come - 1), False
            elif instruction.base == "LDS" and not barriers_to_come:
                has_data = True
                yield i

    def _unrolled(self, loops: list[Span]) -> Iterator[Span]:
        """Pieces of code outside of these loops: from where data is loaded to the next exchange or barrier."""
        for piece in pieces(loops, self.end):
            end = 0
            for first in self._data(piece):
                if first >= end:
                    rest = range(first, piece.end)
                    end = next((i for i in rest if self.instructions[i].base in ("SHFL", "BAR")), piece.end)
                    yield Span(first, end)


def pieces(spans: list[Span], end: int) -> list[Span]:
    """What lies before, between and after the spans."""
    firsts, ends = [0, *(span.end for span in spans)], [*(span.first for span in spans), end]
    return [Span(*both) for both in zip(firsts, ends, strict=True)]


def parse(listing: str) -> dict[str, Code]:
    """All kernels of a listing, by name."""
    return {name: _code(lines) for name, lines in _sections(listing)}


def _sections(listing: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in listing.splitlines():
        start = _KERNEL.match(line)
        if start:
            if name is not None:
                yield name, lines
            name, lines = start[1], []
        lines.append(line)
    if name is not None:
        yield name, lines


def _code(lines: list[str]) -> Code:
    instructions: list[Instruction] = []
    labels = {}
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            waits, reads, writes, _, stall, text = found.groups()
            instructions.append(
                Instruction(
                    _PREDICATE.sub("", text),
                    () if waits == "-" else tuple(waits.split("&")),
                    None if reads == "-" else reads,
                    None if writes == "-" else writes,
                    int(stall),
                )
            )
    return Code(instructions, labels)
