"""PTX text as instructions whose registers and labels are resolved."""

import re
from collections import ChainMap
from typing import NamedTuple

SIZES = {"pred": 1} | {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}


class UnknownInstructionError(Exception):
    """The emulator does not know this, and says so rather than guess."""


class Register(NamedTuple):
    """`slot` is its index in Kernel.registers."""

    slot: int


class Not(NamedTuple):
    """The negation of a predicate register."""

    slot: int


class Immediate(NamedTuple):
    """An integer; for floats the pattern of bits and its size in bytes."""

    value: int
    float_size: int = 0


class Vector(NamedTuple):
    parts: tuple


class Pair(NamedTuple):
    """`a|b`: two results."""

    first: object
    second: object


class Memory(NamedTuple):
    """`[base + offset]`; a tensor copy has the coordinates of its box as well."""

    base: object
    offset: int
    coordinates: Vector | None = None


class Label(NamedTuple):
    """The index of the instruction that it stands before."""

    index: int


class Table(NamedTuple):
    """The branch targets of a brx.idx."""

    labels: tuple


class Symbol(NamedTuple):
    """The address of a parameter or of shared memory."""

    name: str


class Special(NamedTuple):
    """A register that the hardware provides, such as tid.x."""

    name: str


class Nothing(NamedTuple):
    """`_`: the result is dropped."""


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      predicate: (slot, whether it is negated), or None.
      line: of the PTX text, from 1.
      source: (file, line) of the program that was compiled, or None.
    """

    opcode: str
    operands: tuple
    predicate: tuple[int, bool] | None
    line: int
    source: tuple[str, int] | None


class Kernel(NamedTuple):
    """A parsed kernel.

    Attributes:
      registers: the type of each slot.
      parameters: {name: (offset, size)} in the block of parameters, which has `parameter_bytes` bytes.
      shared: names of variables in shared memory.
      cluster: the cluster size that the kernel requires, or None.
      lines: the PTX text.
    """

    name: str
    target: str
    registers: list[str]
    parameters: dict[str, tuple[int, int]]
    parameter_bytes: int
    shared: list[str]
    cluster: tuple[int, int, int] | None
    instructions: list[Instruction]
    lines: list[str]


class _Statement(NamedTuple):
    text: str
    line: int
    source: tuple[str, int] | None
    scope: ChainMap


def parse(text: str) -> Kernel:
    """The one kernel of a PTX module."""
    clean = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    clean = re.sub(r"//[^\n]*", "", clean)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(", clean))
    if len(entries) != 1:
        raise UnknownInstructionError(f"a PTX module must have one kernel; this one has {len(entries)}")
    if found := re.search(r"\.func\b", clean):
        raise UnknownInstructionError(
            f"line {_line(clean, found.start())}: device functions are not known; inline them"
        )
    if found := re.search(r"\.(?:global|const|shared)\b[^;]*;", clean[: entries[0].start()]):
        raise UnknownInstructionError(f"a variable of the module is not known: {found[0]!r}")
    close = clean.index(")", entries[0].end())
    body = clean.index("{", close)
    parameters, size = _parameters(clean[entries[0].end() : close])
    cluster = re.search(r"\.reqnctapercluster\s+([\d, ]+)", clean[close:body])
    scope = ChainMap({name: Symbol(name) for name in parameters})
    registers, shared = [], []
    statements, after = _statements(clean, body, scope, registers, shared)
    if ".entry" in after:
        raise UnknownInstructionError("there is something behind the kernel")
    return Kernel(
        name=entries[0][1],
        target=re.search(r"\.target\s+(\w+)", clean)[1],
        registers=registers,
        parameters=parameters,
        parameter_bytes=size,
        shared=shared,
        cluster=tuple(int(n) for n in cluster[1].split(",")) if cluster else None,
        instructions=[_instruction(statement) for statement in statements],
        lines=text.splitlines(),
    )


def _line(text, position):
    return text.count("\n", 0, position) + 1


def _parameters(text):
    """{name: (offset, size)} and the size of all."""
    found, offset = {}, 0
    for declaration in filter(str.strip, text.split(",")):
        match = re.fullmatch(
            r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.(?:global|shared))?(?:\s+\.align\s+\d+)?)?"
            r"\s+([\w$]+)(?:\[(\d+)\])?\s*",
            declaration,
        )
        if not match:
            raise UnknownInstructionError(f"parameter {declaration.strip()!r}")
        align, kind, name, count = match.groups()
        size, align = SIZES[kind] * int(count or 1), int(align or SIZES[kind])
        offset = -(-offset // align) * align
        found[name] = (offset, size)
        offset += size
    return found, offset


def _statements(text, position, scope, registers, shared):
    """The instructions of a body as text; declarations and labels go into the scope where they stand."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    statements, source, label = [], None, None
    token = re.compile(
        r"\s+|(?P<open>\{)|(?P<close>\})|;|\.loc\s+(?P<file>\d+)\s+(?P<row>\d+)[^\n]*|(?P<label>[$A-Za-z_][\w$]*)\s*:(?!:)"
        r"|(?P<text>[^;]+);"
    )
    depth, line = 0, _line(text, position)
    while True:
        found = token.match(text, position)
        # A statement starts where its text does: blank lines before it are tokens of their own.
        position, start = found.end(), line
        line += found[0].count("\n")
        if found["open"]:
            scope, depth = scope.new_child(), depth + 1
        elif found["close"]:
            scope, depth = scope.parents, depth - 1
            if depth == 0:
                return statements, text[position:]
        elif found["file"]:
            source = (files.get(found["file"], "?").rsplit("/", 1)[-1], int(found["row"]))
        elif found["label"]:
            label = found["label"]
            scope[label] = Label(len(statements))
        elif found["text"]:
            statement = found["text"].strip()
            if statement.startswith(".branchtargets"):
                scope[label] = Table(tuple(name.strip() for name in statement.split(None, 1)[1].split(",")))
            elif statement.startswith("."):
                _declaration(statement, start, scope, registers, shared)
            else:
                statements.append(_Statement(statement, start, source, scope))


def _declaration(statement, line, scope, registers, shared):
    if found := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL):
        for name in found[2].split(","):
            counted = re.fullmatch(r"\s*(%?\w+)<(\d+)>\s*", name)
            names = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name.strip()]
            for each in names:
                scope[each] = Register(len(registers))
                registers.append(found[1])
    elif found := re.fullmatch(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)(?:\[\])?", statement):
        scope[found[1]] = Symbol(found[1])
        shared.append(found[1])
    elif not statement.startswith(".pragma"):
        raise UnknownInstructionError(f"line {line}: {statement}")


def _instruction(statement):
    text, line, source, scope = statement
    predicate = None
    if found := re.match(r"@(!?)([%\w$]+)\s+", text):
        predicate, text = (_lookup(found[2], scope, line).slot, bool(found[1])), text[found.end() :]
    opcode, *rest = text.split(None, 1)
    operands = tuple(_operand(each, scope, line) for each in split(rest[0])) if rest else ()
    return Instruction(opcode, operands, predicate, line, source)


def _operand(text, scope, line):
    if text.startswith("{"):
        return Vector(tuple(_operand(each, scope, line) for each in split(text[1:-1])))
    if text.startswith("["):
        address, *coordinates = split(text[1:-1])
        found = re.fullmatch(r"([%\w$]+)\s*(?:\+\s*(-?\w+))?", address)
        if not found or len(coordinates) > 1:
            raise UnknownInstructionError(f"line {line}: address {text}")
        base, offset = _operand(found[1], scope, line), int(found[2] or "0", 0)
        return Memory(base, offset, _operand(coordinates[0], scope, line) if coordinates else None)
    if "|" in text:
        return Pair(*(_operand(each.strip(), scope, line) for each in text.split("|")))
    return _word(text, scope, line)


def _word(text, scope, line):
    if text == "_":
        return Nothing()
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(found[1] or found[2], 16), 4 if found[1] else 8)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if text.startswith("!"):
        return Not(_lookup(text[1:], scope, line).slot)
    return _lookup(text, scope, line)


def _lookup(name, scope, line):
    found = scope.get(name)
    if isinstance(found, Table):
        return Table(tuple(_lookup(each, scope, line) for each in found.labels))
    if found is not None:
        return found
    if name.startswith("%"):
        return Special(name[1:])
    raise UnknownInstructionError(f"line {line}: what is {name}?")


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]
