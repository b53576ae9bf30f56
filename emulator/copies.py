"""Asynchronous copies: cp.async of threads, and bulk copies of the async proxy. PTX ISA 9.7.9.

A copy is done in pieces, each when the adversary likes: a bulk store first reads its piece of shared memory, and
writes it later.
"""

from typing import NamedTuple

import numpy as np

from emulator import accesses, barriers
from emulator.block import Block, Group, Lanes
from emulator.memory import NOBODY
from emulator.order import READ, WRITTEN
from emulator.report import KernelError
from emulator.tensormap import Box, TensorMap, box_at, contiguous


class BulkCopy:
    """A bulk copy that a thread started.

    Attributes:
      column: by which its block's threads know of it.
      address: in shared memory.
      mbarrier: that a load tells of its bytes.
      group: of stores, which the thread waits for, once it has one.
      to_read, to_write: pieces that are to come.
    """

    def __init__(self, block: Block, thread: int, node, box: Box, address: int, mbarrier=None):
        self.block, self.thread, self.node, self.box, self.address = block, thread, node, box, address
        self.mbarrier, self.column, self.group = mbarrier, block.order.new_copy(), None
        self.to_read, self.to_write, self.waiting = 0, 0, []

    @property
    def is_done(self) -> bool:
        return self.to_write == 0


class ThreadCopies:
    """cp.async of some lanes: `size` bytes each, from `sources` in global memory to `lines` of shared memory.

    `groups` are the numbers of those that each lane waits for, -1 before; `landed` says whose bytes have come.
    """

    def __init__(self, block: Block, threads, node, sources, lines, size: int):
        self.block, self.threads, self.node, self.sources, self.lines, self.size = (
            block,
            threads,
            node,
            sources,
            lines,
            size,
        )
        self.column = block.order.new_copy()
        self.groups, self.landed = np.full(len(threads), -1), np.zeros(len(threads), bool)
        self.taken = np.zeros(len(threads), bool)
        self.waiting = []


class Piece(NamedTuple):
    """Rows of a bulk copy, or lanes of copies of threads, that are to be moved; `data`: what a store has read."""

    kind: str
    copy: BulkCopy | ThreadCopies
    rows: np.ndarray
    data: np.ndarray | None = None


# Copies of threads


def copy_of_thread(machine, group: Group, node, lanes: Lanes) -> bool:
    block, (target, source, size) = group.block, node.instruction.operands
    if size.value not in ((16,) if node.words["how"] == "cg" else (4, 8, 16)):
        raise KernelError("copy", f"cp.async.{node.words['how']} of {size.value} bytes")
    lines = block.shared.lines(block.addresses(target, lanes), size.value)
    sources = block.addresses(source, lanes)
    machine.memory.find(sources, size.value)
    copy = ThreadCopies(block, lanes.threads, node, sources, lines, size.value)
    if conflict := block.shared.copy_in(lines.granules, lanes.threads, copy.column, node.index):
        accesses.report_write(machine, block, node, conflict, lanes.threads)
    block.copies.append(copy)
    _add_pieces(machine, "lanes", copy, machine.numbers.permutation(len(lanes.threads)), [1, 1, 1, 2])
    return True


def _add_pieces(machine, kind, copy, rows, numbers):
    parts = np.array_split(rows, min(len(rows), machine.random.choice(numbers)))
    machine.pending += [Piece(kind, copy, part) for part in parts]
    return len(parts)


def commit(machine, group: Group, node, lanes: Lanes) -> bool:
    block = group.block
    for copy in block.copies:
        mine = np.isin(copy.threads, lanes.threads) & (copy.groups < 0)
        copy.groups[mine] = block.copy_group[copy.threads[mine]]
    block.copy_group[lanes.threads] += 1
    return True


def wait_for_copies_of_thread(machine, group: Group, node, lanes: Lanes) -> bool:
    block = group.block
    waits_for_all = node.words["how"] == "wait_all"
    if waits_for_all:
        commit(machine, group, node, lanes)
    allowed = 0 if waits_for_all else node.instruction.operands[0].value
    due = []
    for copy in block.copies:
        mine = np.isin(copy.threads, lanes.threads) & ~copy.taken
        due.append(mine & (copy.groups >= 0) & (copy.groups < block.copy_group[copy.threads] - allowed))
        if not copy.landed[due[-1]].all():
            copy.waiting.append(group)
            machine.block(group, "cp.async")
            return False
    for copy, which in zip(block.copies, due, strict=True):
        if which.any():
            block.shared.take(copy.lines.granules[which], copy.column, copy.threads[which], machine.now)
            copy.taken |= which
    block.copies = [copy for copy in block.copies if not copy.taken.all()]
    return True


# Bulk copies


def prefetch_tensor_map(machine, group: Group, node, lanes: Lanes) -> bool:
    _tensor_map(machine, group.block.address(node.instruction.operands[0], lanes))
    return True


def _tensor_map(machine, address) -> TensorMap:
    if address % 64 or address not in machine.tensor_maps:
        raise KernelError("copy", f"there is no tensor map at {address:#x}")
    return machine.tensor_maps[address]


def _box(machine, block, node, far, near, size, lanes) -> tuple[Box, int]:
    """What one thread's instruction moves, and its place in shared memory."""
    address, shared = block.address(near, lanes), block.shared
    if "rank" in node.words:
        tensor = _tensor_map(machine, block.address(far, lanes))
        coordinates = [block.uniform(each, "i4", lanes) for each in far.coordinates.parts]
        if len(coordinates) != int(node.words["rank"]):
            raise KernelError("copy", f"{len(coordinates)} coordinates in {node.words['rank']} dimensions")
        box, alignment = box_at(tensor, coordinates), 128
    else:
        box, alignment = contiguous(block.address(far, lanes), block.uniform(size, "u4", lanes)), 16
    if address % alignment:
        raise KernelError(
            "misaligned", f"a bulk copy at address {address} of shared memory: no multiple of {alignment}"
        )
    if box.is_empty:
        machine.find("a bulk copy of nothing", node.index, error=False)
    low = address - shared.base
    if low < 0 or low + box.rows * box.inner > shared.size:
        raise KernelError(
            "out of bounds", f"a copy of bytes {low} to {low + box.rows * box.inner} of {shared.size} in shared memory"
        )
    return box, address


def bulk_load(machine, group: Group, node, lanes: Lanes) -> bool:
    near, far, *size, where = node.instruction.operands
    for thread in lanes.threads:
        one = Lanes.of(np.array([thread]))
        block, shared = group.block, group.block.shared
        box, address = _box(machine, block, node, far, near, *(size or [None]), one)
        _, mbarrier = barriers.find_mbarrier(machine, block, block.address(where, one))
        barriers.check_known(machine, block, block, mbarrier, one.threads, node, by_copy=True)
        copy = BulkCopy(block, int(thread), node, box, address, mbarrier)
        granules = _granules(machine, shared, copy, node)
        if conflict := shared.unfenced(granules, int(thread)):
            kind = "a bulk load overwrites what threads wrote, without a proxy fence"
            accesses.report_shared(machine, block, kind, node, conflict, one.threads)
        if conflict := shared.copy_in(granules[None], one.threads, copy.column, node.index):
            accesses.report_write(machine, block, node, conflict, one.threads)
        mbarrier.copies.append(copy)
        copy.to_write = _add_pieces(machine, "load", copy, np.arange(box.rows), [1, 1, 2, 3, 8])
    return True


def _granules(machine, shared, copy, node):
    granules = shared.granules_of(copy.box.places(copy.address).reshape(-1) - shared.base, 16)
    if shared.mbarrier[granules].any():
        machine.find("a bulk copy meets an mbarrier", node.index)
    return granules


def bulk_store(machine, group: Group, node, lanes: Lanes) -> bool:
    far, near, *size = node.instruction.operands
    for thread in lanes.threads:
        one = Lanes.of(np.array([thread]))
        block, shared = group.block, group.block.shared
        box, address = _box(machine, block, node, far, near, *(size or [None]), one)
        if box.rows == 0:
            continue
        copy = BulkCopy(block, int(thread), node, box, address)
        granules = _granules(machine, shared, copy, node)
        if (shared.writer[granules] == NOBODY).any():
            machine.find("a bulk store reads shared memory that nobody wrote", node.index, error=False)
        late, unfenced = shared.copy_out(granules, int(thread), copy.column, node.index)
        if late:
            copied = late.column >= block.order.threads
            why = (
                "an asynchronous copy may not have written yet"
                if copied
                else "is written by a thread that nothing orders before it"
            )
            accesses.report_shared(machine, block, f"a bulk store reads what {why}", node, late, one.threads)
        if unfenced:
            kind = "a bulk store reads what a thread wrote without fence.proxy.async"
            accesses.report_shared(machine, block, kind, node, unfenced, one.threads)
        block.bulk_open.append(copy)
        copy.to_read = copy.to_write = _add_pieces(machine, "read", copy, np.arange(box.rows), [1, 1, 2, 3, 8])
    return True


def bulk_commit(machine, group: Group, node, lanes: Lanes) -> bool:
    block = group.block
    committed = [copy for copy in block.bulk_open if copy.thread in lanes.threads]
    for copy in committed:
        copy.group = int(block.bulk_group[copy.thread])
    block.bulk_open = [copy for copy in block.bulk_open if copy.group is None]
    block.bulk_closed += committed
    block.bulk_group[lanes.threads] += 1
    return True


def bulk_wait(machine, group: Group, node, lanes: Lanes) -> bool:
    block, reads_only = group.block, "read" in node.words
    last = block.bulk_group - node.instruction.operands[0].value
    due = [copy for copy in block.bulk_closed if copy.thread in lanes.threads and copy.group < last[copy.thread]]
    for copy in due:
        if copy.to_read or (copy.to_write and not reads_only):
            copy.waiting.append(group)
            machine.block(group, "bulk stores")
            return False
    for copy in due:
        known = block.order.own[copy.thread]
        known[copy.column] = max(known[copy.column], READ if reads_only else WRITTEN)
    block.bulk_closed = [copy for copy in block.bulk_closed if copy.to_write or copy not in due]
    return True


# What the adversary does to them


def land(machine) -> None:
    """One piece goes on."""
    order, pending = machine.policy.landing_order, machine.pending
    index = {"fifo": 0, "lifo": len(pending) - 1}.get(order)
    piece = pending.pop(machine.random.randrange(len(pending)) if index is None else index)
    _LANDINGS[piece.kind](machine, piece.copy, piece)
    waiting, piece.copy.waiting = piece.copy.waiting, []
    for group in waiting:
        machine.wake(group)


def _land_lanes(machine, copy, piece):
    data, size = copy.block.shared.data.reshape(-1, copy.size), copy.size
    for buffer, which, offsets in machine.memory.find(copy.sources[piece.rows], size):
        _check_source(machine, copy, buffer)
        targets = copy.lines.offsets[piece.rows[which]] // size
        data[targets] = buffer.data.reshape(-1, size)[offsets // size]
    copy.landed[piece.rows] = True


def _check_source(machine, copy, buffer):
    if buffer.writable and (buffer.writer_block != NOBODY).any():
        machine.find(f"an asynchronous copy reads {buffer.name}, which this kernel writes", copy.node.index)


def _land_load(machine, copy, piece):
    box, shared = copy.box, copy.block.shared
    rows = np.zeros((len(piece.rows), box.inner), np.uint8)
    inside = box.inside[piece.rows]
    if inside.any() and not box.is_empty:
        width = box.last - box.first
        buffer, offsets = machine.memory.rows(box.starts[piece.rows][inside] + box.first, width)
        _check_source(machine, copy, buffer)
        rows[inside, box.first : box.last] = buffer.data[offsets[:, None] + np.arange(width)]
    places = (box.places(copy.address, piece.rows) - shared.base) // 16
    shared.data.reshape(-1, 16)[places] = rows.reshape(*places.shape, 16)
    copy.to_write -= 1
    copy.mbarrier.bytes -= rows.size
    if abs(copy.mbarrier.bytes) > barriers.MOST_BYTES:
        raise KernelError("mbarrier", f"{-copy.mbarrier.bytes} bytes more than expected")
    barriers.complete_phase(machine, copy.mbarrier)


def _land_read(machine, copy, piece):
    shared = copy.block.shared
    places = (copy.box.places(copy.address, piece.rows) - shared.base) // 16
    data = shared.data.reshape(-1, 16)[places].reshape(len(piece.rows), -1)
    copy.to_read -= 1
    machine.pending.append(Piece("write", copy, piece.rows, data))


def _land_write(machine, copy, piece):
    box, inside = copy.box, copy.box.inside[piece.rows]
    copy.to_write -= 1
    if not inside.any() or box.is_empty:
        return
    width = box.last - box.first
    buffer, offsets = machine.memory.rows(box.starts[piece.rows][inside] + box.first, width)
    accesses.check_writable(buffer, "a bulk store")
    values = np.ascontiguousarray(piece.data[inside, box.first : box.last])
    granules = buffer.lines(offsets, width).granules
    index = offsets[:, None] + np.arange(width)
    again = buffer.writer_block[granules] != NOBODY
    if again.any():
        kind = f"u{buffer.granule}"
        same = not accesses.differ(buffer.data[index].view(kind)[again], values.view(kind)[again]).any()
        first = int(granules[again][0])
        text = "two stores to one place in global memory" + ", of the same values" * same
        detail = f"element {first} of {buffer.name}, block {copy.block.index}"
        machine.find(text, copy.node.index, int(buffer.node[first]), detail, error=not same)
    buffer.data[index] = values
    buffer.wrote(granules, copy.block.index, copy.column, copy.node.index, WRITTEN)


_LANDINGS = {"lanes": _land_lanes, "load": _land_load, "read": _land_read, "write": _land_write}


def check_left_behind(machine, block: Block) -> None:
    """What a block that leaves should have waited for; its shared memory is somebody else's from now on."""
    for piece in machine.pending:
        if piece.copy.block is block and piece.kind == "read":
            machine.find("a block leaves while a bulk store still reads its shared memory", piece.copy.node.index)
        elif piece.copy.block is block and piece.kind in ("load", "lanes"):
            machine.find("a block leaves while a copy still writes its shared memory", piece.copy.node.index)
    block.shared.data[:] = machine.random_bytes(len(block.shared.data))
