"""What the host does before a launch: the LLVM text that Mosaic GPU writes for it, evaluated line by line.

It is straight-line code that loads the addresses of the buffers, encodes tensor maps and describes the launch.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from emulator.parser import UnknownInstructionError, split
from emulator.tensormap import TensorMap

# The element types of mosaic_gpu_init_tma_desc (jaxlib/mosaic/gpu/runtime.cc), in bytes.
_ITEMSIZES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2}
_STACK = 1 << 60


class Launch(NamedTuple):
    """A launch.

    Attributes:
      grid, cluster, block: (x, y, z).
      shared_bytes: of dynamic shared memory.
      parameters: the value of each, or its size in bytes where it holds tensor maps.
      tensor_maps: {(parameter, offset in it): tensor map}.
    """

    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: list[int]
    tensor_maps: dict[tuple[int, int], TensorMap]


def launch(text: str, buffers: list[int]) -> Launch:
    """The launch for buffers at those addresses."""
    body = re.search(
        r"^define void @(?!_mlir_ciface)\w+\(ptr %0, ptr %1\)[^\n]*\{\n(.*?)^\s*ret void", text, re.M | re.S
    )
    if body is None:
        raise UnknownInstructionError("the host's code has no function of two pointers")
    host = _Host(buffers)
    for line in filter(None, map(str.strip, body[1].splitlines())):
        host.execute(line)
    if host.launch is None:
        raise UnknownInstructionError("the host's code has no launch")
    return host.launch


class _Host:
    def __init__(self, buffers):
        self.memory, self.next, self.tensor_maps, self.launch = {}, _STACK, {}, None
        pointers = self.allocate(8 * len(buffers))
        self.memory |= {pointers + 8 * i: address for i, address in enumerate(buffers)}
        self.values = {"%0": self.allocate(8), "%1": pointers}
        self.operations: dict[str, Callable[[str], Any]] = {
            "load": self.load,
            "store": self.store,
            "alloca": self.alloca,
            "getelementptr": self.element_address,
            "insertvalue": self.insert,
            "extractvalue": self.extract,
            "call": self.call,
            "ptrtoint": self.same,
            "inttoptr": self.same,
            "mul": lambda rest: self.binary(rest, lambda a, b: a * b),
            "add": lambda rest: self.binary(rest, lambda a, b: a + b),
            "sub": lambda rest: self.binary(rest, lambda a, b: a - b),
        }

    def execute(self, line):
        result, _, rest = line.rpartition(" = ") if line.startswith("%") else (None, None, line)
        operation, _, rest = rest.partition(" ")
        if operation not in self.operations:
            raise UnknownInstructionError(f"the host's code: {line}")
        value = self.operations[operation](rest)
        if result:
            self.values[result] = value

    def allocate(self, size):
        address, self.next = self.next, self.next + (size + 8191) // 4096 * 4096
        return address

    def value(self, text):
        text = text.split()[-1]
        return self.values[text] if text.startswith("%") else int(text)

    def load(self, rest):
        kind, pointer, *_ = split(rest)
        # A tensor map as a whole: where it is passed on, its address says which.
        return None if kind.startswith("[") else self.memory[self.value(pointer)]

    def store(self, rest):
        value, pointer, *_ = split(rest)
        self.memory[self.value(pointer)] = self.value(value)

    def alloca(self, rest):
        kind, *others = split(rest)
        counts = [int(other.split()[1]) for other in others if other.startswith("i64 ")]
        return self.allocate(_size(kind) * (counts[0] if counts else 1))

    def element_address(self, rest):
        kind, pointer, *indices = split(re.sub(r"^(inbounds |nuw |nusw )+", "", rest))
        first, *others = map(self.value, indices)
        address = self.value(pointer) + first * _size(kind)
        for index in others:
            fields = _fields(kind)
            address += sum(map(_size, fields[:index]))
            kind = fields[index]
        return address

    def insert(self, rest):
        aggregate, value, *path = split(rest)
        old = self.values.get(aggregate.split()[-1], {})
        return old | {tuple(map(int, path)): self.value(value)}

    def extract(self, rest):
        aggregate, *path = split(rest)
        return self.values[aggregate.split()[-1]][tuple(map(int, path))]

    def binary(self, rest, function):
        return function(*map(self.value, re.sub(r"^(nuw |nsw )+", "", rest).split(",")))

    def same(self, rest):
        return self.value(rest.split(" to ")[0])

    def call(self, rest):
        name, arguments = re.fullmatch(r"void @(\w+)\((.*)\)", rest).groups()
        values = [self.value(argument) for argument in arguments.split(", ")]
        if name == "mosaic_gpu_init_tma_desc":
            self.encode(*values)
        elif name == "mosaic_gpu_build_kernel_spec":
            self.describe(*values)
        else:
            raise UnknownInstructionError(f"the host calls {name}")

    def encode(self, where, address, kind, rank, sizes, strides, swizzle, box):
        def read(pointer):
            return tuple(self.memory[pointer + 8 * i] for i in reversed(range(rank)))

        itemsize = _ITEMSIZES[kind]
        in_bytes = tuple(stride * itemsize for stride in read(strides))
        self.tensor_maps[where] = TensorMap(address, itemsize, read(sizes), in_bytes, read(box), swizzle)

    def describe(self, _, *numbers):
        *shape, shared, other, count, pointers, sizes = numbers
        if other:
            raise UnknownInstructionError(f"a launch with {other} where 0 is known")
        parameters, tensor_maps = [], {}
        for i in range(count):
            pointer, size = self.memory[pointers + 8 * i], self.memory[sizes + 4 * i]
            parameters.append(size or self.memory[pointer])
            for where, tensor in self.tensor_maps.items():
                if pointer <= where < pointer + size:
                    tensor_maps[i, where - pointer] = tensor
        grid, cluster, block = (tuple(shape[i : i + 3]) for i in (0, 3, 6))
        self.launch = Launch(grid, cluster if cluster[0] else (1, 1, 1), block, shared, parameters, tensor_maps)


def _size(kind):
    if kind == "ptr":
        return 8
    if found := re.fullmatch(r"i(\d+)", kind):
        return int(found[1]) // 8
    return sum(map(_size, _fields(kind)))


def _fields(kind):
    if found := re.fullmatch(r"\[(\d+) x (.*)\]", kind):
        return [found[2]] * int(found[1])
    if kind.startswith("{"):
        return split(kind[1:-1])
    raise UnknownInstructionError(f"the host's type {kind!r}")
