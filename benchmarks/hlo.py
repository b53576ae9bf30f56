"""Counts on an optimized HLO module, as text, the bytes that its operations read and write in main memory."""

import math
import re
from typing import NamedTuple

_ITEMSIZE = {
    "c128": 16,
    "c64": 8,
    "f64": 8,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "pred": 1,
    "s8": 1,
    "u8": 1,
}
_FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "copy-done", "slice-done")
# Asynchronous copies: the result has the target and the source, in the order that this index of the target says.
_TARGETS = {"copy-start": 0, "slice-start": 1}


class Operation(NamedTuple):
    """One line of ENTRY that moves bytes."""

    name: str
    opcode: str
    written: int
    read: int
    line: str

    @property
    def moved(self):
        return self.written + self.read


def operations(text):
    """The operations of ENTRY. If a fusion only slices a parameter, we count the slices."""
    computations = _computations(text)
    sizes, found = {}, []
    for line in computations["ENTRY"]:
        match = re.match(r"(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)", line)
        if not match:
            continue
        name, kind, opcode, operands = match.groups()
        sizes[name] = _bytes(kind)
        if opcode in _FREE:
            continue
        if opcode in _TARGETS:
            found.append(_copy(name, opcode, kind, line))
            continue
        called = re.search(r"calls=%?([\w.\-]+)", line)
        read = 0
        for i, operand in enumerate(o.split()[-1].lstrip("%") for o in operands.split(",") if o.strip()):
            whole = sizes.get(operand, 0)
            if opcode == "slice":
                whole = min(whole, sizes[name])
            read += min(whole, _sliced(computations[called[1]], i, whole)) if called else whole
        found.append(Operation(name, opcode, sizes[name], read, line))
    return found


def _copy(name, opcode, kind, line):
    target = _TARGETS[opcode]
    (to, to_main), (_, from_main) = (_shapes(kind)[i] for i in (target, 1 - target))
    return Operation(name, opcode, to if to_main else 0, to if from_main else 0, line)


def moved_bytes(text):
    """Bytes that ENTRY reads and writes, caches ignored."""
    return sum(operation.moved for operation in operations(text))


def instructions(text):
    """The number of instructions, in ENTRY and in all that it calls."""
    return sum(len(lines) for lines in _computations(text).values())


def kernel_lines(text, name):
    """The lines that call the Mosaic kernel of that name, in ENTRY or in a loop."""
    # The name is in the metadata and in the kernel itself. We search both: jit over a mesh drops the metadata.
    calls = (line.strip() for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line)
    return [line for line in calls if name in line]


def kernel_calls(text, name):
    """How many times the Mosaic kernel of that name is called."""
    return len(kernel_lines(text, name))


def collectives(text):
    """(opcode, bytes of its result) of every operation that communicates between devices."""
    pattern = (
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(-start)?\("
    )
    return [(opcode, _bytes(kind)) for kind, opcode, _ in re.findall(pattern, text)]


def others(text, unit, share=0.05):
    """Names of operations other than Mosaic kernels that move more than that share of x, which has `unit` bytes."""
    return [o.name for o in operations(text) if "mosaic_gpu" not in o.line and o.moved > share * unit]


def _computations(text):
    """{name: lines}."""
    computations, current = {}, None
    for line in text.splitlines():
        start = re.match(r"^(ENTRY )?(%?[\w.\-]+)\s*\(.*\{\s*$", line)
        if start:
            current = computations.setdefault("ENTRY" if start[1] else start[2].lstrip("%"), [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            # Every fifth operand is preceded by a comment, /*index=5*/.
            current.append(re.sub(r"/\*.*?\*/", "", line.strip()))
    return computations


def _sliced(body, index, whole):
    """Bytes that a fusion reads of a parameter: those of the slices if it only slices it, or a bitcast of it."""
    (parameter,) = (line for line in body if re.search(rf" parameter\({index}\)", line))
    names, uses = [_name(parameter)], []
    while names:
        pattern = rf"%{re.escape(names.pop())}[,)]"
        for line in (line for line in body if re.search(pattern, line)):
            if re.search(r" bitcast\(", line):
                names.append(_name(line))
            else:
                uses.append(line)
    if not uses or not all(re.search(r" slice\(", use) for use in uses):
        return whole
    return sum(_bytes(use.split("=", 1)[1].split(" slice(")[0]) for use in uses)


def _name(line):
    return re.match(r"(?:ROOT )?%?([\w.\-]+) =", line)[1]


def _bytes(kind):
    return sum(size for size, is_in_main in _shapes(kind) if is_in_main)


def _shapes(kind):
    """(bytes, whether they are in main memory) of each array. S(1) in a layout is the vector memory of a TPU."""
    found = []
    for dtype, dimensions, layout in re.findall(r"\b([a-z]+\d*)\[([0-9,]*)\](\{[^}]*\})?", kind):
        sizes = map(int, filter(None, dimensions.split(",")))
        found.append((_ITEMSIZE[dtype] * math.prod(sizes), "S(1)" not in layout))
    return found
