"""What the emulator has to say: findings, and violations that end a run."""

from typing import NamedTuple

from emulator.parser import Kernel


class Place(NamedTuple):
    """An instruction, as a report names it."""

    text: str
    line: int
    source: tuple[str, int] | None

    def __str__(self) -> str:
        source = f"{self.source[0]}:{self.source[1]}" if self.source else ""
        return f"{self.text:<64}  PTX line {self.line:<5} {source}".rstrip()


def place(kernel: Kernel, instruction) -> Place:
    text = " ".join(kernel.lines[instruction.line - 1].split()).rstrip(";")
    return Place(text if len(text) <= 64 else text[:61] + "...", instruction.line, instruction.source)


class Finding(NamedTuple):
    """Something is wrong, or remarkable.

    Attributes:
      kind: what it is, in a sentence without a subject of its own.
      at, other: the instruction that found it, and the one that it conflicts with.
      detail: of the first time that it was seen.
      error: whether it is a fault of the kernel; else a remark, such as two stores of the same value to one place.
    """

    kind: str
    at: Place | None
    other: Place | None
    detail: str
    error: bool

    def __str__(self) -> str:
        lines = [f"{self.kind}" + (f" ({self.detail})" if self.detail else "")]
        lines += [f"    {self.at}"] if self.at else []
        lines += [f"    {self.other}"] if self.other else []
        return "\n".join(lines)


class KernelError(Exception):
    """What ends a run: an access out of bounds, a deadlock, a use that has no meaning."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail
