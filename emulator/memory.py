"""Memory with bounds that remembers who wrote and read it, and finds accesses that nothing orders.

It is tracked in granules: the smallest pieces that the kernel accesses.
"""

from typing import NamedTuple

import numpy as np

from emulator.order import READ, WRITTEN, Order
from emulator.report import KernelError

NOBODY = -1
_MANY = np.iinfo(np.int16).max
LANES = 32


class Conflict(NamedTuple):
    """Two accesses that nothing orders: where, and of the first one its kind, its node and the column that wrote.

    `late` says for which granules of the second one, a row for each access.
    """

    kind: str
    granule: int
    node: int
    column: int
    late: np.ndarray


class Lines:
    """Where accesses of `size` bytes lie: offsets in bytes, and their granules, a row for each access."""

    def __init__(self, offsets: np.ndarray, size: int, granule: int):
        self.offsets, self.size = offsets, size
        first = (offsets // granule)[:, None]
        self.granules = first if size <= granule else first + np.arange(size // granule)


class Shared:
    """The shared memory of one block; its addresses start at `base`.

    Attributes:
      writer, written: the column that wrote a granule last, and when.
      reader, read: for each warp the lane that read a granule last, or _MANY, and when.
      copy: the column of the bulk store that reads a granule.
      nodes: for each kind of access the node of the last one.
      mbarrier: whether a granule is part of one.
    """

    def __init__(self, base: int, size: int, granule: int, order: Order, garbage: np.ndarray):
        self.base, self.size, self.granule, self.order, self.data = base, size, granule, order, garbage
        count, warps = len(garbage) // granule, order.threads // LANES
        self.writer, self.written = np.full(count, NOBODY, np.int32), np.zeros(count, np.int32)
        self.reader, self.read = np.zeros((count, warps), np.int16), np.zeros((count, warps), np.int32)
        self.lanes = np.arange(order.threads)[:, None] % LANES
        self.copy = np.full(count, NOBODY, np.int32)
        self.nodes = {kind: np.zeros(count, np.int32) for kind in ("write", "read", "bulk store")}
        self.mbarrier = np.zeros(count, bool)

    def lines(self, addresses: np.ndarray, size: int) -> Lines:
        """Bounds and alignment are checked."""
        offsets = addresses - self.base
        bits, high = int(np.bitwise_or.reduce(offsets)), int(offsets.max()) + size
        if bits < 0 or high > self.size:
            raise KernelError("out of bounds", f"bytes {offsets.min()} to {high} of {self.size} in shared memory")
        if bits % size:
            bad = int(offsets[offsets % size != 0][0])
            raise KernelError("misaligned", f"{size} bytes at byte {bad} of shared memory")
        return Lines(offsets, size, self.granule)

    def granules_of(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Of pieces of `size` bytes, as one row."""
        return Lines(np.atleast_1d(offsets), size, self.granule).granules.reshape(-1)

    def take(self, granules: np.ndarray, column: int, threads: np.ndarray, now: int) -> None:
        """What copies of threads have brought counts as written by the threads that have waited, now."""
        mine = self.writer[granules] == column
        self.writer[granules] = np.where(mine, threads[:, None], self.writer[granules])
        self.written[granules] = np.where(mine, now, self.written[granules])

    def load(self, lines: Lines, threads: np.ndarray, node: int, now: int) -> Conflict | None:
        """Notes a load; the conflict that it has with a write."""
        granules, column = lines.granules, threads[:, None]
        late = self._late(column, granules)
        index, lane = granules * self.read.shape[1] + column // LANES, self.lanes[threads].astype(np.int16)
        readers, reads = self.reader.reshape(-1), self.read.reshape(-1)
        read = reads[index]
        if read.max() > self.order.all_until:
            # A read that is over for the one that reads now may be forgotten: who comes after this comes after that.
            lane = np.where(self._known(threads, column // LANES, readers[index]) >= read, lane, _MANY)
        readers[index], reads[index], self.nodes["read"][granules] = lane, now, node
        mixed = readers[index] != lane
        if mixed.any():
            readers[index[mixed]] = _MANY
        return self._conflict("write", late, granules)

    def store(self, lines: Lines, threads: np.ndarray, node: int, now: int) -> Conflict | None:
        """Notes a store by threads; the conflict that it has with anything before."""
        conflict = self.before_write(lines.granules, threads)
        self._wrote(lines.granules, threads[:, None], node, now)
        return conflict

    def copy_in(self, granules: np.ndarray, threads: np.ndarray, column: int, node: int) -> Conflict | None:
        """Notes that an asynchronous copy, which the threads start, will write."""
        conflict = self.before_write(granules, threads)
        self._wrote(granules, column, node, WRITTEN)
        return conflict

    def _wrote(self, granules, column, node, time):
        self.writer[granules], self.written[granules], self.nodes["write"][granules] = column, time, node
        self.copy[granules] = NOBODY
        self.read[granules] = 0

    def copy_out(
        self, granules: np.ndarray, thread: int, column: int, node: int
    ) -> tuple[Conflict | None, Conflict | None]:
        """Notes a bulk store; its conflicts: with a write, and with one that no proxy fence follows."""
        writer, written = self.writer[granules], self.written[granules]
        late = self._late(thread, granules)
        by_thread = (writer >= 0) & (writer < self.order.threads)
        fenced = self.order.fenced[thread, np.where(by_thread, writer, 0)]
        self.copy[granules], self.nodes["bulk store"][granules] = column, node
        return (
            self._conflict("write", late, granules),
            self._conflict("write", by_thread & ~late & (fenced < written), granules),
        )

    def unfenced(self, granules: np.ndarray, thread: int) -> Conflict | None:
        """A write by threads that a copy would overwrite, and that no proxy fence follows."""
        writer = self.writer[granules]
        by_thread = (writer >= 0) & (writer < self.order.threads)
        fenced = self.order.fenced[thread, np.where(by_thread, writer, 0)]
        return self._conflict("write", by_thread & (fenced < self.written[granules]), granules)

    def before_write(self, granules: np.ndarray, threads: np.ndarray) -> Conflict | None:
        """What is not over for threads that write granules, a row for each thread."""
        column = threads[:, None]
        if (late := self._late(column, granules)).any():
            return self._conflict("write", late, granules)
        copy = self.copy[granules]
        if (copy >= 0).any() and (late := (copy >= 0) & (self.order.own[column, copy] < READ)).any():
            return self._conflict("bulk store", late, granules)
        reads = self.read[granules]
        if reads.max() > self.order.all_until:
            for warp in range(reads.shape[-1]):
                late = self._known(threads, warp, self.reader[granules, warp]) < reads[..., warp]
                if late.any():
                    return self._conflict("read", late, granules)
        return None

    def _known(self, threads, warp, reader):
        """The time up to which the reader, or each of many, in a warp is known to the threads."""
        own, many = self.order.own, reader == _MANY
        known = own[threads[:, None], warp * LANES + np.where(many, 0, reader)]
        if many.any():
            of_warps = own[threads, : self.order.threads].reshape(len(threads), -1, LANES).min(2)
            known = np.where(many, of_warps[np.arange(len(threads))[:, None], warp], known)
        return known

    def _late(self, column, granules):
        writer = self.writer[granules]
        return (writer >= 0) & (self.order.own[column, writer] < self.written[granules])

    def _conflict(self, kind, late, granules):
        if not late.any():
            return None
        granule = int(granules[late][0])
        return Conflict(kind, granule, int(self.nodes[kind][granule]), int(self.writer[granule]), late)


class Buffer:
    """An allocation in global memory.

    Attributes:
      writable: whether the kernel may write it; only then accesses are tracked.
      writer_block, writer, written, node: the last write of each granule.
      reader_block, reader, read: the last read.
      clocks: {offset: what a release at that address handed on}.
      watchers: those that wait for another value.
    """

    def __init__(self, name: str, base: int, array: np.ndarray, *, writable: bool, garbage: np.ndarray | None = None):
        self.name, self.base, self.dtype, self.shape = name, base, array.dtype, array.shape
        self.granule, self.writable, self.initialized = array.dtype.itemsize, writable, garbage is None
        self.size, count = array.nbytes, array.size
        # Wide accesses see the memory as rows of up to 32 bytes; that they stay inside is checked before.
        self.data = np.zeros(-(-self.size // 32) * 32, np.uint8)
        self.data[: self.size] = np.frombuffer(array.tobytes(), np.uint8) if garbage is None else garbage[: self.size]
        self.clocks, self.watchers = {}, []
        if writable:
            self.writer_block, self.writer = np.full(count, NOBODY, np.int32), np.zeros(count, np.int32)
            self.written, self.node = np.zeros(count, np.int32), np.zeros(count, np.int32)
            self.reader_block, self.reader = np.full(count, NOBODY, np.int32), np.zeros(count, np.int32)
            self.read = np.zeros(count, np.int32)

    @property
    def values(self) -> np.ndarray:
        return self.data[: self.size].view(self.dtype).reshape(self.shape)

    def lines(self, offsets: np.ndarray, size: int) -> Lines:
        return Lines(offsets, size, self.granule)

    def load(self, lines: Lines, order: Order, threads: np.ndarray, now: int) -> Conflict | None:
        """Notes a load; the conflict that it has with a write."""
        granules = lines.granules
        late = _late(order, self.writer_block[granules], self.writer[granules], self.written[granules], threads)
        self.reader_block[granules], self.reader[granules], self.read[granules] = order.block, threads[:, None], now
        return self._conflict("write", late, granules)

    def store(self, lines: Lines, order: Order, threads: np.ndarray, node: int, now: int) -> Conflict | None:
        """Notes a store by threads; the conflict that it has with what came before."""
        granules = lines.granules
        late = _late(order, self.writer_block[granules], self.writer[granules], self.written[granules], threads)
        conflict = self._conflict("write", late, granules)
        if conflict is None:
            late = _late(order, self.reader_block[granules], self.reader[granules], self.read[granules], threads)
            conflict = self._conflict("read", late, granules)
        self.wrote(granules, order.block, threads[:, None], node, now)
        return conflict

    def wrote(self, granules, block, column, node, time) -> None:
        self.writer_block[granules], self.writer[granules] = block, column
        self.written[granules], self.node[granules] = time, node

    def _conflict(self, kind, late, granules):
        if not late.any():
            return None
        granule = int(granules[late][0])
        return Conflict(kind, granule, int(self.node[granule]), int(self.writer[granule]), late)


def _late(order, blocks, columns, times, threads):
    """Which accesses by columns of blocks are not over for the threads, a row for each thread."""
    late = np.zeros(blocks.shape, bool)
    rows = np.broadcast_to(threads[:, None], blocks.shape)
    for block in np.unique(blocks):
        if block != NOBODY:
            here = blocks == block
            late[here] = order.late(int(block), rows[here], columns[here], times[here])
    return late


class Global:
    """All buffers."""

    def __init__(self, buffers: list[Buffer]):
        self.buffers = sorted(buffers, key=lambda buffer: buffer.base)
        self.bases = np.array([buffer.base for buffer in self.buffers])

    def find(self, addresses: np.ndarray, size: int) -> list[tuple[Buffer, np.ndarray, np.ndarray]]:
        """(buffer, which of the addresses lie there, their offsets); bounds and alignment are checked."""
        if (addresses % size).any():
            bad = int(addresses[addresses % size != 0][0])
            raise KernelError("misaligned", f"{size} bytes at {bad:#x} of global memory")
        index = np.searchsorted(self.bases, addresses, "right") - 1
        found = []
        for i in np.unique(index):
            buffer, which = self.buffers[max(int(i), 0)], np.flatnonzero(index == i)
            offsets = addresses[which] - buffer.base
            outside = (offsets < 0) | (offsets + size > buffer.size)
            if outside.any():
                at = int(offsets[outside][0])
                raise KernelError(
                    "out of bounds", f"{size} bytes at byte {at} of {buffer.name}, which has {buffer.size}"
                )
            found.append((buffer, which, offsets))
        return found

    def rows(self, starts: np.ndarray, size: int) -> tuple[Buffer, np.ndarray]:
        """The buffer in which rows of any size lie, and their offsets."""
        index = int(np.searchsorted(self.bases, starts.min(), "right")) - 1
        buffer = self.buffers[max(index, 0)]
        offsets = starts - buffer.base
        if offsets.min() < 0 or offsets.max() + size > buffer.size:
            raise KernelError(
                "out of bounds", f"a bulk copy of bytes {offsets.min()} to {offsets.max() + size} of {buffer.name}"
            )
        return buffer, offsets
