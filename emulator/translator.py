"""From instructions to nodes: what only touches registers becomes Python functions of NumPy vectors over lanes.

A node is a run of such instructions, and the one visible instruction that ends it. Registers lie in arrays with one
element per thread of a block; a function is given the threads that execute it, as a slice or as indices.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from emulator import arithmetic
from emulator.instructions import Registers, Visible, find
from emulator.parser import (
    SIZES,
    Immediate,
    Instruction,
    Kernel,
    Label,
    Memory,
    Not,
    Nothing,
    Pair,
    Register,
    Special,
    Symbol,
    UnknownInstructionError,
    Vector,
)

_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
_BITS_OF_ALL_LANES = 0xFFFFFFFF


class Node:
    """A run of instructions that only touch registers, and what ends it.

    Attributes:
      run: run(views, block, threads, count), or None.
      instruction: the visible instruction, or None where a label follows.
      function: the name of the machine's function for it.
      words: what the pattern of the instruction left open.
      whole_warps: whether all lanes of a warp must come together.
      count: of instructions.
    """

    def __init__(self, index: int, instructions: list[Instruction], last: Instruction | None):
        self.index, self.instruction = index, last
        self.first = instructions[0] if instructions else last
        self.count = len(instructions) + (last is not None)
        self.run: Callable[..., None] | None = None
        self.function, self.words = None, {}
        self.whole_warps = bool(instructions) and _is_convergent(instructions[0])
        self.details: Any = None
        if last is not None:
            row, self.words = _row(last)
            self.function = row.function
            self.whole_warps |= last.opcode.startswith(("bar.", "barrier.")) and "bar.warp" not in last.opcode


class Program(NamedTuple):
    """A kernel as nodes; `views` has the (slot, NumPy type) of each view of a register that the functions take."""

    kernel: Kernel
    nodes: list[Node]
    views: list[tuple[int, str]]
    view_of: dict[tuple[int, str], int]
    labels: dict[int, int]


def numpy_type(kind: str) -> str:
    """The NumPy name of a PTX type."""
    return "b1" if kind == "pred" else f"{_KINDS[kind[0]]}{SIZES[kind]}"


def translate(kernel: Kernel) -> Program:
    """Raises UnknownInstructionError for what is not in the table."""
    starts = {o.index for i in kernel.instructions for o in _flat(i.operands) if isinstance(o, Label)}
    runs, labels, run = [], {}, []
    for index, instruction in enumerate(kernel.instructions):
        row, _ = _row(instruction)
        if run and (index in starts or (_is_convergent(instruction) and not _is_convergent(run[0]))):
            runs.append((run, None))
            run = []
        if index in starts:
            labels[index] = len(runs)
        if isinstance(row, Visible):
            runs.append((run, instruction))
            run = []
        else:
            run.append(instruction)
    if run:
        runs.append((run, None))
    labels[len(kernel.instructions)] = len(runs)
    nodes = [Node(index, *each) for index, each in enumerate(runs)]
    return _with_functions(kernel, nodes, runs, labels)


def _with_functions(kernel, nodes, runs, labels):
    views = {}
    namespace = dict(vars(arithmetic)) | {"b1": np.bool_}
    users = defaultdict(set)
    for node, (run, last) in zip(nodes, runs, strict=True):
        for instruction in run:
            for slot in slots(instruction):
                users[slot].add(node.index)
        for slot in slots(last) if last else ():
            users[slot].add(-1 - node.index)
    text = []
    for node, (run, _) in zip(nodes, runs, strict=True):
        if run:
            text += _Writer(kernel, node.index, users, views, namespace).function(run)
    exec(compile("\n".join(text), f"<{kernel.name}>", "exec"), namespace)
    for node in nodes:
        node.run = namespace.get(f"n{node.index}")
    # The machine reads every register as unsigned numbers, and some as other types.
    for slot, kind in enumerate(kernel.registers):
        size = SIZES[kind]
        for name in ("b1",) if kind == "pred" else (f"u{size}", f"i{size}"):
            views.setdefault((slot, name), len(views))
    return Program(kernel, nodes, list(views), views, labels)


def _row(instruction):
    key = instruction.opcode
    if key.startswith("mov."):
        result, source = instruction.operands
        key += " parts" * isinstance(result, Vector) + " of parts" * isinstance(source, Vector)
    elif key.endswith("NaN.f32") and len(instruction.operands) == 4:
        key += " 3"
    found = find(key)
    if found is None:
        raise UnknownInstructionError(
            f"line {instruction.line}: {instruction.opcode} is not in the table of emulator/instructions.py; add what "
            "it means there, with a test"
        )
    return found


def _is_convergent(instruction):
    return instruction.opcode.startswith(("shfl.sync", "elect.sync", "vote.sync"))


def _flat(operands):
    for operand in operands:
        if isinstance(operand, Vector | Pair | Memory):
            yield from _flat(operand.parts if isinstance(operand, Vector) else operand)
        elif isinstance(operand, tuple) and hasattr(operand, "labels"):
            yield from operand.labels
        else:
            yield operand


def slots(instruction: Instruction):
    """The registers of an instruction."""
    yield from (o.slot for o in _flat(instruction.operands) if isinstance(o, Register | Not))
    if instruction.predicate:
        yield instruction.predicate[0]


class _Writer:
    """Writes the function of one node."""

    def __init__(self, kernel, index, users, views, namespace):
        self.kernel, self.index, self.users, self.views, self.namespace = kernel, index, users, views, namespace
        # current: {slot: (name, type)} of what was written; loaded: {slot} whose old value was taken.
        self.lines, self.current, self.loaded, self.names = [], {}, {}, 0

    def function(self, run):
        for instruction in run:
            self.instruction = instruction
            try:
                self.write(instruction)
            except (KeyError, ValueError, TypeError) as error:
                raise UnknownInstructionError(f"line {instruction.line}: {instruction.opcode}: {error!r}") from error
        stores = []
        for slot, (name, kind) in self.current.items():
            # What no other node uses, and what this one does not use again, need not be kept.
            if self.users[slot] - {self.index} or any(key[0] == slot for key in self.loaded):
                stores.append(f"R[{self.view(slot, kind)}][s] = {name}")
        body = self.lines + stores or ["pass"]
        return [f"def n{self.index}(R, B, s, n):", *(f"    {line}" for line in body)]

    def view(self, slot, kind):
        return self.views.setdefault((slot, kind), len(self.views))

    def assign(self, expression):
        self.names += 1
        self.lines.append(f"t{self.names} = {expression}")
        return f"t{self.names}"

    def write(self, instruction):
        row, words = _row(instruction)
        if not isinstance(row, Registers):
            raise ValueError("it is not one of registers alone")
        results, operands = ([*side.split()] for side in row.types.split("="))
        kinds = {"T": words.get("T"), "D": words.get("D")}
        numpy = {key: numpy_type(kind) for key, kind in kinds.items() if kind}
        if "W" in row.types:
            numpy["W"] = f"{numpy['T'][0]}{2 * int(numpy['T'][1])}"
        result, *sources = instruction.operands
        if len(sources) != len(operands):
            raise ValueError(f"{len(sources)} operands for {len(operands)}")
        names = {}
        for letter, source, kind in zip("abcd", sources, operands, strict=False):
            names[letter] = self.operand(source, kind, numpy, words)
        (kind,) = results
        if kind == "parts":
            numpy["parts"] = self.part_type(result)
        elif isinstance(sources[0], Vector):
            numpy["parts"] = self.part_type(sources[0])
        expression = row.expression.format_map(words)
        expression = re.sub(r"\b([a-dTDW]|parts)\b(?!')", lambda m: (names | numpy).get(m[1], m[1]), expression)
        if "ftz" in words:
            expression = f"flush({expression})"
        if "sat" in words:
            expression = f"saturate({expression})"
        self.results(instruction, result, kind, numpy, self.assign(expression))

    def operand(self, source, kind, numpy, words):
        match kind:
            case "all":
                if not isinstance(source, Immediate) or source.value & _BITS_OF_ALL_LANES != _BITS_OF_ALL_LANES:
                    raise ValueError("a mask that does not name all lanes")
                return ""
            case "parameter":
                return repr((source.base.name, source.offset))
            case "parts":
                return f"[{', '.join(self.get(part, self.part_type(source)) for part in source.parts)}]"
        value = self.get(source, numpy.get(kind) or numpy_type(kind))
        return self.assign(f"flush({value})") if "ftz" in words and kind == "f32" else value

    def part_type(self, vector):
        sizes = {SIZES[self.kernel.registers[p.slot]] for p in vector.parts if isinstance(p, Register)}
        return f"u{sizes.pop()}"

    def get(self, operand, kind):
        """The name of an operand's value as that NumPy type."""
        match operand:
            case Immediate(value, float_size):
                return self.constant(value, float_size, kind)
            case Special(name):
                return self.assign(f"B.special({name!r}).astype({kind})[s]")
            case Symbol(name):
                return self.assign(f"{kind}(B.address_of({name!r}))")
            case Not(slot):
                return self.assign(f"~{self.get(Register(slot), 'b1')}")
            case Register(slot):
                return self.register(slot, kind)
        raise ValueError(f"operand {operand}")

    def constant(self, value, float_size, kind):
        size = int(kind[1])
        if float_size not in (0, size) or (kind[0] == "f" and not float_size):
            raise ValueError(f"a constant of another type than {kind}")
        bits = np.array(value & ((1 << 8 * size) - 1), f"u{size}")
        name = f"C{kind}_{int(bits):x}"
        self.namespace[name] = np.bool_(value & 1) if kind == "b1" else bits.view(kind)[()]
        return name

    def register(self, slot, kind):
        size = SIZES[self.kernel.registers[slot]]
        if int(kind[1]) > size:
            raise ValueError(f"a register of {size} bytes as {kind}")
        if slot in self.current:
            name, has = self.current[slot]
        elif int(kind[1]) == size:
            if (slot, kind) not in self.loaded:
                self.loaded[slot, kind] = self.assign(f"R[{self.view(slot, kind)}][s]")
            return self.loaded[slot, kind]
        else:
            name, has = self.register(slot, f"u{size}"), f"u{size}"
        if int(kind[1]) < size:
            unsigned = name if has[0] == "u" else f"{name}.view(u{size})"
            return self.assign(f"{unsigned}.astype(u{kind[1]}).view({kind})")
        return name if has == kind else self.assign(f"{name}.view({kind})")

    def results(self, instruction, result, kind, numpy, name):
        if kind == "parts":
            pieces = [(part, numpy["parts"], f"{name}[{i}]") for i, part in enumerate(result.parts)]
        elif "|" in kind:
            both = result if isinstance(result, Pair) else Pair(result, Nothing())
            pieces = [
                (each, numpy_type(k), f"{name}[{i}]")
                for i, (each, k) in enumerate(zip(both, kind.split("|"), strict=True))
            ]
        else:
            pieces = [(result, numpy.get(kind) or numpy_type(kind), name)]
        condition = None
        if instruction.predicate:
            slot, negated = instruction.predicate
            condition = self.get(Not(slot) if negated else Register(slot), "b1")
        for target, has, value in pieces:
            if not isinstance(target, Nothing):
                self.set(target.slot, has, value, condition)

    def set(self, slot, kind, value, condition):
        size = 1 if kind == "b1" else SIZES[self.kernel.registers[slot]]
        if int(kind[1]) > size:
            raise ValueError(f"{kind} for a register of {size} bytes")
        if int(kind[1]) < size:
            kind = f"{kind[0]}{size}"
            value = f"{value}.astype({kind})"
        if condition:
            value = f"where({condition}, {value}, {self.register(slot, kind)})"
        self.current[slot] = (self.assign(value), kind)
