"""The loops of a kernel that go through shared memory, from the listing that nvdisasm prints."""

import dataclasses
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop of machine code that loads from shared memory."""

    instructions: tuple[str, ...]

    @property
    def bytes_loaded(self) -> int:
        """Per thread, in one iteration."""
        return sum(_width(i) for i in self.instructions if i.startswith("LDS"))

    @property
    def stores_elsewhere(self) -> int:
        """Stores to shared memory at addresses that the loop does not load from."""
        loaded = {_address(i) for i in self.instructions if i.startswith("LDS")}
        return sum(i.startswith("STS") and _address(i) not in loaded for i in self.instructions)


def loops_of(listing: str) -> dict[str, list[Loop]]:
    """The loops of each kernel, by its name, in order."""
    kernels = re.findall(r"^\.text\.(\w+):$(.*?)(?=^\.text\.|\Z)", listing, re.MULTILINE | re.DOTALL)
    return {name.removesuffix("_mosaic_gpu_kernel"): list(_loops(body)) for name, body in kernels}


def _loops(body: str) -> Iterator[Loop]:
    """A branch backwards is a loop, unless it passes an exit: then it comes back from a slow path."""
    code: list[str] = []
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    # A line is a label, or the address of an instruction, a predicate and the text.
    for label, text in re.findall(r"^(\.L_\w+):$|/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*$", body, re.MULTILINE):
        if label:
            labels[label] = len(code)
            continue
        code.append(text)
        branch = re.match(r"BRA.*`\((\.L_\w+)\)", text)
        # The target of a branch forwards has no label yet.
        first = labels.get(branch[1]) if branch else None
        if first is not None and not any(passed.startswith("EXIT") for passed in code[first:]):
            ends[first] = len(code)
    spans = [(first, end) for first, end in sorted(ends.items()) if any(i.startswith("LDS") for i in code[first:end])]
    for first, end in spans:
        if not any(first < f and e <= end for f, e in spans):
            yield Loop(tuple(code[first:end]))


def _address(instruction: str) -> str:
    return re.search(r"\[.*?\]", instruction)[0]


def _width(instruction: str) -> int:
    """Bytes that a load moves per thread."""
    width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", instruction.split(maxsplit=1)[0])
    return {"128": 16, "64": 8, "16": 2, "8": 1}[width[1].strip("US")] if width else 4
