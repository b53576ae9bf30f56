"""One launch of a compiled kernel on the emulator: arrays in, arrays out, and what was found."""

import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

from emulator import host
from emulator.machine import Machine, Policy
from emulator.memory import Buffer, Global
from emulator.parser import parse
from emulator.report import Finding
from emulator.translator import Program, translate

_FIRST_ADDRESS = 0x7F0000000000
# Between buffers: so that what runs over an end is out of bounds rather than in the next one.
_GAP = 4096
Array = tuple[tuple[int, ...], str]


class Compiled(NamedTuple):
    """What the compiler made of a kernel.

    Attributes:
      ptx, host: the text of the kernel, and the LLVM text of the host's code for its launch.
      inputs, outputs: (shape, dtype) of each buffer, in the order of the launch.
      aliases: {input: output} that are one buffer.
    """

    ptx: str
    host: str
    inputs: list[Array]
    outputs: list[Array]
    aliases: dict[int, int]

    def program(self) -> Program:
        return translate(parse(self.ptx))

    def uses(self) -> str:
        """How it copies and synchronizes, in words."""
        cluster = re.search(r"\.reqnctapercluster (\d+)", self.ptx)
        words = {
            "tensor copies": "cp.async.bulk.tensor" in self.ptx,
            "bulk copies": re.search(r"cp\.async\.bulk\.(global|shared)", self.ptx),
            "cp.async": re.search(r"cp\.async\.c[ag]", self.ptx),
            f"cluster of {cluster[1] if cluster else 1}": cluster,
            "counter in global memory": "red.release.gpu" in self.ptx,
        }
        return ", ".join(word for word, found in words.items() if found) or "loads and stores"


class Result(NamedTuple):
    """Attributes: outputs; findings that are errors, and remarks; executed: instructions of warps."""

    outputs: list[np.ndarray]
    errors: list[Finding]
    remarks: list[Finding]
    executed: int


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def execute(
    compiled: Compiled,
    inputs: list[np.ndarray],
    seed: int = 0,
    policy: Policy | None = None,
    *,
    program: Program | None = None,
    limit: int = 50_000_000,
) -> Result:
    """Runs the kernel once, with the adversary of a seed. Raises KernelError where it cannot go on.

    Args:
      program: compiled.program(), if it is there already.
    """
    garbage = np.random.default_rng(seed + 1)
    policy = policy or Policy.draw(seed)
    buffers, address = [], _FIRST_ADDRESS
    arrays = [(f"input {i}", given, i in compiled.aliases) for i, given in enumerate(inputs)]
    written = {output: number for number, output in compiled.aliases.items()}
    arrays += [(f"output {i}", None, True) for i in range(len(compiled.outputs))]
    shapes = [*compiled.inputs, *compiled.outputs]
    for number, ((name, given, writable), (shape, dtype)) in enumerate(zip(arrays, shapes, strict=True)):
        output = number - len(inputs)
        if output in written:
            buffers.append(buffers[written[output]])
            continue
        array = np.empty(shape, dtype_of(dtype)) if given is None else np.ascontiguousarray(given)
        if array.shape != tuple(shape) or array.dtype != dtype_of(dtype):
            raise ValueError(f"{name} must be {dtype} of {shape}; it is {array.dtype} of {array.shape}")
        poison = None
        if given is None:
            nan = np.full(array.nbytes, 0xFF, np.uint8)
            poison = nan if policy.poison == "nan" else garbage.integers(0, 256, array.nbytes, np.uint8)
        buffers.append(Buffer(name, address, array, writable=writable, garbage=poison))
        address += -(-(array.nbytes + _GAP) // 256) * 256
    memory = Global(list(dict.fromkeys(buffers)))
    launch = host.launch(compiled.host, [buffer.base for buffer in buffers])
    machine = Machine(program or compiled.program(), launch, memory, seed, policy, limit=limit)
    try:
        machine.run()
    finally:
        machine.forget()
    outputs = [buffer.values.copy() for buffer in buffers[len(inputs) :]]
    return Result(outputs, machine.errors, machine.remarks, machine.executed)
