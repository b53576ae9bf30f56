"""Loads, stores and atomic operations of threads: PTX ISA 9.7.9, 9.7.13 and 8 (memory consistency)."""

import numpy as np

from emulator.block import Group, Lanes
from emulator.memory import Buffer, Conflict
from emulator.order import Clock, joined
from emulator.parser import SIZES, UnknownInstructionError, Vector
from emulator.report import KernelError

# The first generic address that is not one of shared memory: see Block.
_SHARED_END = 1 << 24
_COPIED = "an asynchronous copy may not have written yet"


class Access:
    """What a load or a store moves: `parts` registers of `size` bytes for each lane."""

    def __init__(self, node):
        words, instruction = node.words, node.instruction
        kind = words["T"]
        self.size = SIZES[kind]
        self.parts = int(words.get("v", "v1")[1:])
        self.space = words.get("space", "generic").split("::")[0]
        self.order = words.get("order", "weak")
        self.is_strong = self.order not in ("weak", "nc")
        self.is_non_coherent = "nc" in words
        self.kind = f"u{self.size}"
        registers, self.memory = instruction.operands[:: 1 if node.function == "load" else -1]
        self.registers = registers.parts if isinstance(registers, Vector) else (registers,)
        if len(self.registers) != self.parts or kind == "pred":
            raise UnknownInstructionError(
                f"line {instruction.line}: {instruction.opcode} of {len(self.registers)} registers"
            )

    @property
    def bytes(self) -> int:
        return self.size * self.parts


def access(node) -> Access:
    if node.details is None:
        node.details = Access(node)
    return node.details


def smallest_shared_access(nodes) -> int:
    """In bytes, of threads; at most that of an mbarrier."""
    sizes = [
        access(node).bytes for node in nodes if node.function in ("load", "store") and access(node).space != "global"
    ]
    copies = [node.instruction.operands[2].value for node in nodes if node.function == "copy_of_thread"]
    return min([8, *sizes, *copies])


def load(machine, group: Group, node, lanes: Lanes) -> bool:
    what, block = access(node), group.block
    addresses = block.addresses(what.memory, lanes)
    if _is_shared(what, addresses):
        values = _load_shared(machine, block, node, what, addresses, lanes.threads)
    else:
        values = _load_global(machine, group, node, what, addresses, lanes.threads)
        if values is None:
            return False
    for register, value in zip(what.registers, values.T, strict=True):
        block.write(register, value, lanes)
    return True


def _is_shared(what, addresses):
    return what.space == "shared" or (what.space == "generic" and addresses[0] < _SHARED_END)


def _load_shared(machine, block, node, what, addresses, threads):
    shared = block.shared
    lines = shared.lines(addresses, what.bytes)
    if (shared.writer[lines.granules] < 0).any():
        machine.find("a load of shared memory that nobody wrote", node.index, error=False)
    if shared.mbarrier[lines.granules].any():
        machine.find("a load of an mbarrier", node.index)
    if conflict := shared.load(lines, threads, node.index, machine.now):
        why = _COPIED if conflict.column >= block.order.threads else "nothing orders after its write"
        report_shared(machine, block, f"a load of shared memory that {why}", node, conflict, threads)
    return shared.data.view(what.kind).reshape(-1, what.parts)[lines.offsets // what.bytes]


def report_shared(machine, block, kind, node, conflict: Conflict, threads) -> None:
    byte = conflict.granule * block.shared.granule
    first = conflict.kind == "write" and conflict.column < block.order.threads
    after = f" after thread {conflict.column}" if first else ""
    detail = f"byte {byte} of shared memory, block {block.index}, thread {_thread_of(conflict, threads)}{after}"
    machine.find(kind, node.index, conflict.node, detail)


def _thread_of(conflict, threads):
    """The first of the threads, a row of the conflict for each, that comes too early."""
    return threads[0] if len(threads) == 1 else threads[int(np.argwhere(conflict.late)[0][0])]


def _load_global(machine, group, node, what, addresses, threads):
    values = np.empty((len(addresses), what.parts), what.kind)
    for buffer, which, offsets in machine.memory.find(addresses, what.bytes):
        own = threads[which]
        if buffer.writable:
            _check_load(machine, group.block, node, what, buffer, offsets, own)
        values[which] = buffer.data.view(what.kind).reshape(-1, what.parts)[offsets // what.bytes]
        if what.is_strong:
            if _waits_for_change(machine, group, node, buffer, values[which]):
                return None
            _observe(group.block, what.order, buffer, offsets, own)
    return values


def _check_load(machine, block, node, what, buffer, offsets, threads):
    lines = buffer.lines(offsets, what.bytes)
    writer = buffer.writer_block[lines.granules]
    if not buffer.initialized and (writer < 0).any():
        machine.find(f"a load of {buffer.name} that nobody wrote", node.index, error=False)
    if what.is_non_coherent and (writer >= 0).any():
        machine.find(f"a non-coherent load of {buffer.name}, which this kernel writes", node.index)
    if not what.is_strong and (conflict := buffer.load(lines, block.order, threads, machine.now)):
        detail = f"element {conflict.granule}, block {block.index}, thread {_thread_of(conflict, threads)}"
        machine.find(f"a load of {buffer.name} that nothing orders after its write", node.index, conflict.node, detail)


def _waits_for_change(machine, group, node, buffer, values):
    """A loop that polls a value may wait until somebody writes: nothing else would come of it."""
    key, seen = (node.index, buffer.name, *group.threads[:1]), values.tobytes()
    if group.block.polled.get(key) == seen:
        del group.block.polled[key]
        buffer.watchers.append(group)
        machine.block(group, f"another value of {buffer.name}")
        return True
    group.block.polled[key] = seen
    return False


def _observe(block, order, buffer, offsets, threads):
    """A strong load comes after the release that it reads from: at once if it acquires, else from the next fence on."""
    for thread, offset in zip(threads.tolist(), offsets.tolist(), strict=True):
        clock = buffer.clocks.get(offset)
        if clock is not None and order in ("acquire", "acq_rel"):
            block.order.acquire(np.array([thread]), clock)
        elif clock is not None:
            block.order.seen[thread] = joined(block.order.seen.get(thread) or Clock(None, {}, None), clock)


def store(machine, group: Group, node, lanes: Lanes) -> bool:
    what, block = access(node), group.block
    addresses = block.addresses(what.memory, lanes)
    values = np.stack([block.value(register, what.kind, lanes) for register in what.registers], 1)
    if _is_shared(what, addresses):
        _store_shared(machine, block, node, what, addresses, lanes.threads, values)
    else:
        _store_global(machine, block, node, what, addresses, lanes.threads, values)
    return True


def _store_shared(machine, block, node, what, addresses, threads, values):
    shared = block.shared
    lines = shared.lines(addresses, what.bytes)
    if shared.mbarrier[lines.granules].any():
        machine.find("a store to an mbarrier", node.index)
    if conflict := shared.store(lines, threads, node.index, machine.now):
        report_write(machine, block, node, conflict, threads)
    data, index = shared.data.view(what.kind).reshape(-1, what.parts), lines.offsets // what.bytes
    data[index] = values
    if differ(data[index], values).any():
        machine.find("lanes of one store write different values to one place", node.index)


def report_write(machine, block, node, conflict: Conflict, threads) -> None:
    """A write to shared memory by threads, or by a copy that they start."""
    copied = conflict.column >= block.order.threads
    kinds = {
        "read": "a write to shared memory that another thread may still read",
        "bulk store": "a write to shared memory that a bulk store may still read",
        "write": "a write to shared memory that an asynchronous copy may still write"
        if copied
        else "two writes to shared memory that nothing orders",
    }
    report_shared(machine, block, kinds[conflict.kind], node, conflict, threads)


def _store_global(machine, block, node, what, addresses, threads, values):
    for buffer, which, offsets in machine.memory.find(addresses, what.bytes):
        check_writable(buffer, "a store")
        own, chosen = threads[which], values[which]
        lines = buffer.lines(offsets, what.bytes)
        data, index = buffer.data.view(what.kind).reshape(-1, what.parts), offsets // what.bytes
        before = data[index]
        if what.is_strong:
            buffer.wrote(lines.granules, block.index, own[:, None], node.index, machine.now)
            for thread, offset in zip(own.tolist(), offsets.tolist(), strict=True):
                _publish(machine, block, buffer, thread, offset, what.order == "release", None)
        elif conflict := buffer.store(lines, block.order, own, node.index, machine.now):
            report_stores(machine, buffer, node, conflict, before, chosen)
        data[index] = chosen
        if differ(data[index], chosen).any():
            machine.find("lanes of one store write different values to one place", node.index, detail=buffer.name)
        machine.value_changed(buffer)


def check_writable(buffer: Buffer, what: str) -> None:
    if not buffer.writable:
        raise KernelError("out of bounds", f"{what} to {buffer.name}, which is an input")


def report_stores(machine, buffer: Buffer, node, conflict: Conflict, before, after) -> None:
    """Two stores, or a load and a store, of one place in global memory; what was there and what comes, row by row."""
    detail = f"element {conflict.granule} of {buffer.name}"
    if conflict.kind == "read":
        machine.find("a store to global memory that another thread may still read", node.index, detail=detail)
        return
    if conflict.late.shape[1] > 1:
        before, after = (np.ascontiguousarray(each).view(f"u{buffer.granule}") for each in (before, after))
    same = not differ(before, after)[conflict.late.any(1) if conflict.late.shape[1] == 1 else conflict.late].any()
    kind = "two stores to global memory that nothing orders" + ", of the same values" * same
    machine.find(kind, node.index, conflict.node, detail, error=not same)


def differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where they do; a NaN of float32 has one pattern on the hardware, but several in NumPy."""
    differs = a != b
    if a.dtype.itemsize == 4 and differs.any():
        differs &= ~(np.isnan(a.view(np.float32)) & np.isnan(b.view(np.float32)))
    return differs


def _publish(machine, block, buffer, thread, offset, releases, before):
    """What a strong write hands on to those who read from it; `before`: what a read-modify-write goes on with."""
    if releases:
        clock = block.order.release(np.array([thread]), machine.now)
    else:
        fenced = block.order.before_fence.get(thread)
        clock = None if fenced is None else joined(Clock(fenced.home, {}, None), fenced)
    if clock is not None:
        # Between blocks nothing is handed on of proxy fences.
        clock.home = None
    buffer.clocks[offset] = joined(clock, before)


_OPERATIONS = {
    "add": lambda old, value: old + value,
    "exch": lambda old, value: value,
    "min": min,
    "max": max,
    "inc": lambda old, value: old * 0 if old >= value else old + 1,
}


def atomic(machine, group: Group, node, lanes: Lanes) -> bool:
    block, words, operands = group.block, node.words, node.instruction.operands
    if words["T"][0] not in "us" or SIZES[words["T"]] < 4:
        raise UnknownInstructionError(f"atomic operations on {words['T']}")
    kind = ("u" if words["T"][0] == "u" else "i") + str(SIZES[words["T"]])
    returns = words["base"] == "atom"
    memory, operand = operands[returns : returns + 2]
    addresses, values = block.addresses(memory, lanes), block.value(operand, kind, lanes)
    order, size = words.get("order", "relaxed"), int(kind[1])
    releases, old = order in ("release", "acq_rel"), np.empty(len(values), kind)
    for buffer, which, offsets in machine.memory.find(addresses, size):
        check_writable(buffer, "an atomic operation")
        if not buffer.initialized and (buffer.writer_block[offsets // buffer.granule] < 0).any():
            machine.find(f"an atomic operation on {buffer.name}, which nobody initialized", node.index)
        data = buffer.data.view(kind)
        if order in ("acquire", "acq_rel"):
            _observe(block, order, buffer, offsets, lanes.threads[which])
        # In an order of the adversary's.
        for k in machine.numbers.permutation(len(which)):
            at, offset = offsets[k] // size, int(offsets[k])
            old[which[k]] = data[at]
            data[at] = _OPERATIONS[words["how"]](data[at], values[which[k]])
            thread = int(lanes.threads[which[k]])
            _publish(machine, block, buffer, thread, offset, releases, buffer.clocks.get(offset))
        machine.value_changed(buffer)
    if returns:
        block.write(operands[0], old.view(f"u{size}"), lanes)
    return True
