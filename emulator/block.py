"""A thread block: its threads, their registers and shared memory, and what they wait for."""

import functools
from typing import NamedTuple

import numpy as np

from emulator.memory import LANES, Shared
from emulator.order import Clock, Order
from emulator.parser import SIZES, Immediate, Memory, Nothing, Register, Special, Symbol, UnknownInstructionError


class NotUniformError(UnknownInstructionError):
    """An operand that differs between lanes; if it does between warps only, each goes on its own."""


class Lanes(NamedTuple):
    """Threads of a block that execute an instruction; `at` selects them in an array of all, as a slice if possible."""

    threads: np.ndarray
    at: slice | np.ndarray

    @staticmethod
    def of(threads: np.ndarray) -> "Lanes":
        first, last = int(threads[0]), int(threads[-1])
        return Lanes(threads, slice(first, last + 1) if last - first + 1 == len(threads) else threads)


class Group:
    """Threads of a block that are at the same node.

    Attributes:
      ran: whether they have run the part of the node that only touches registers.
      blocked: what they wait for, or None.
      priority: of the schedule.
    """

    def __init__(self, block: "Block", threads: np.ndarray, pc: int, priority: float):
        self.block, self.pc, self.priority = block, pc, priority
        self.ran, self.blocked = False, None
        self.take(threads)

    def take(self, threads: np.ndarray) -> None:
        self.lanes = Lanes.of(threads)
        self.warps = np.bincount(threads // LANES, minlength=len(self.block.live))
        self.is_partial = bool((self.warps[self.warps > 0] != self.block.live[self.warps > 0]).any())

    @property
    def threads(self) -> np.ndarray:
        return self.lanes.threads


class Block:
    """A thread block: registers, shared memory, barriers, and what its threads know of each other."""

    def __init__(self, machine, index: int, rank: int):
        self.machine, self.index, self.rank, self.cluster = machine, index, rank, None
        threads = machine.threads
        self.order = Order(index, threads)
        shared = machine.launch.shared_bytes
        self.shared = Shared(
            machine.shared_base, shared, machine.granule, self.order, machine.garbage(-(-shared // 16) * 16)
        )
        self.lane = np.arange(threads) % LANES
        # The lanes of each warp that have not left.
        self.live = np.full(threads // LANES, LANES)
        self.views = self._registers()
        self.groups: list[Group] = []
        self.barriers, self.mbarriers = {}, {}
        self.left = False
        # For each thread the number of the group that its next copies belong to; copies without and with one.
        self.bulk_group, self.copy_group = np.zeros(threads, int), np.zeros(threads, int)
        self.bulk_open, self.bulk_closed, self.copies = [], [], []
        # What loops that poll a value saw last.
        self.polled: dict[tuple, bytes] = {}
        self._specials: dict[str, np.ndarray] = {}

    def _registers(self):
        """The views of registers that the functions of the nodes take; what nobody wrote is random."""
        rows = [row.copy() for row in self.machine.garbage_registers]
        return [rows[slot].view(name) for slot, name in self.machine.program.views]

    # What functions of registers ask for.

    def special(self, name: str) -> np.ndarray:
        """A register of the hardware, of all threads."""
        if name in ("globaltimer", "clock64", "clock"):
            return np.full(self.machine.threads, self.machine.turns * 1000)
        if name not in self._specials:
            self._specials[name] = np.broadcast_to(self._special(name), self.machine.threads)
        return self._specials[name]

    def _special(self, name):
        launch, threads = self.machine.launch, np.arange(self.machine.threads)
        name, _, axis = name.partition(".")
        a = "xyz".index(axis) if axis else 0
        first = a == 0
        x, y, _ = launch.block
        values = {
            "tid": lambda: (threads % x, threads // x % y, threads // (x * y))[a],
            "laneid": lambda: threads % LANES,
            "warpid": lambda: threads // LANES,
            "ntid": lambda: launch.block[a],
            "ctaid": lambda: self.index * first,
            "nctaid": lambda: launch.grid[a],
            "cluster_ctaid": lambda: self.rank * first,
            "cluster_nctaid": lambda: launch.cluster[a],
            "clusterid": lambda: self.index // launch.cluster[0] * first,
            "nclusterid": lambda: launch.grid[a] // launch.cluster[a],
            "cluster_ctarank": lambda: self.rank,
            "cluster_nctarank": lambda: launch.cluster[0],
            "smid": lambda: self.index % 132,
            "dynamic_smem_size": lambda: launch.shared_bytes,
        }
        if name not in values:
            raise UnknownInstructionError(f"the special register %{name} is not known")
        return values[name]()

    def address_of(self, name: str) -> int:
        return self.machine.address_of(name)

    def parameter(self, name: str, offset: int, kind: type) -> np.generic:
        at = self.machine.program.kernel.parameters[name][0] + offset
        return self.machine.parameters[at : at + np.dtype(kind).itemsize].view(kind)[0]

    def near(self, exact: np.ndarray, argument: np.ndarray, bound: float) -> np.ndarray:
        """What the hardware approximates: off by a part of the bound, always the same for an argument."""
        if self.machine.policy.noise:
            bits = (argument.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(8)
            share = (bits & np.uint32(0xFFFF)).astype(np.float64) / 32768 - 1
            exact = exact * (1 + self.machine.policy.noise * bound * share)
        return exact.astype(np.float32)

    def elect(self, at: slice | np.ndarray) -> tuple[np.uint32, np.ndarray]:
        leader = self.machine.leader
        return np.uint32(leader), self.lane[at] == leader

    # What visible instructions ask for.

    def value(self, operand, kind: str, lanes: Lanes) -> np.ndarray:
        """An operand for each lane, as a NumPy type; wider registers are cut, narrower ones extended by zeros."""
        match operand:
            case Register(slot):
                size = SIZES[self.machine.program.kernel.registers[slot]]
                value = self.views[self.machine.program.view_of[slot, f"u{size}"]][lanes.at]
                return value.view(kind) if size == int(kind[1]) else value.astype(f"u{kind[1]}").view(kind)
            case Immediate(value, _):
                return _constant(value, kind, len(lanes.threads))
            case Special(name):
                return self.special(name)[lanes.at].astype(kind)
        raise UnknownInstructionError(f"operand {operand}")

    def uniform(self, operand, kind: str, lanes: Lanes) -> int:
        return _same(self.value(operand, kind, lanes))

    def predicate(self, slot: int, at: slice | np.ndarray) -> np.ndarray:
        return self.views[self.machine.program.view_of[slot, "b1"]][at]

    def addresses(self, operand: Memory, lanes: Lanes) -> np.ndarray:
        match operand.base:
            case Symbol(name):
                return np.full(len(lanes.threads), self.address_of(name) + operand.offset)
            case Register(slot):
                size = SIZES[self.machine.program.kernel.registers[slot]]
                return self.value(operand.base, f"u{size}", lanes).astype(np.int64) + operand.offset
        raise UnknownInstructionError(f"address {operand}")

    def address(self, operand: Memory, lanes: Lanes) -> int:
        return _same(self.addresses(operand, lanes))

    def write(self, operand, values: np.ndarray, lanes: Lanes) -> None:
        """Unsigned numbers, or predicates, into a register, which may be wider."""
        if isinstance(operand, Nothing):
            return
        kind = self.machine.program.kernel.registers[operand.slot]
        name = "b1" if kind == "pred" else f"u{SIZES[kind]}"
        self.views[self.machine.program.view_of[operand.slot, name]][lanes.at] = values


@functools.cache
def _constant(value, kind, count):
    return np.full(count, value & ((1 << 8 * int(kind[1])) - 1), f"u{kind[1]}").view(kind)


def _same(values):
    if len(values) > 1 and (values != values[0]).any():
        raise NotUniformError("an operand differs between lanes of a warp where one for all is expected")
    return int(values[0])


class Cluster:
    """Blocks that start together, and their barrier."""

    def __init__(self, blocks: list[Block]):
        self.blocks, self.arrived, self.phase, self.waiting = blocks, 0, 0, []
        self.clock: Clock | None = None
        self.done: Clock | None = None
        # Twice the phases that a thread has completed, and one more where it has arrived.
        self.steps = {block.index: np.zeros(block.order.threads, int) for block in blocks}
