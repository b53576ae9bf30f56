"""What happens before what, by vector clocks.

Every visible instruction has a time of its own. A column stands for one thread of a block, or for one of its
asynchronous copies: `own[t, c]` is the last time of c that thread t comes after. An access of c at a time is over for t
where own[t, c] has reached that time. Barriers, mbarriers, cluster barriers, and releases with their acquires hand this
on; nothing else does. Copies have two times of their own, READ and WRITTEN.
"""

import numpy as np

READ, WRITTEN = 1, 2
_Vector = np.ndarray
# As indices, or as a slice: then nothing is copied.
Threads = np.ndarray | slice


class Clock:
    """What a release hands on.

    Attributes:
      known: {block: a time for each column of it}.
      home, fenced: of the block `home`, which writes of its threads a proxy fence has made visible to copies.
    """

    def __init__(self, home: int | None, known: dict[int, _Vector], fenced: _Vector | None):
        self.home, self.known, self.fenced = home, known, fenced

    def join(self, other: "Clock") -> None:
        for block, vector in other.known.items():
            mine = self.known.get(block)
            self.known[block] = vector.copy() if mine is None else _maximum(mine, vector)
        if self.home == other.home and other.fenced is not None:
            self.fenced = other.fenced if self.fenced is None else np.maximum(self.fenced, other.fenced)


def joined(clock: Clock | None, other: Clock | None) -> Clock | None:
    if clock is None or other is None:
        return clock or other
    clock.join(other)
    return clock


def _maximum(a, b):
    """Of vectors that may differ in length, as copies were started between them."""
    if len(a) < len(b):
        a, b = b, a
    result = a.copy()
    np.maximum(result[: len(b)], b, out=result[: len(b)])
    return result


def _raise(matrix, threads, vector):
    """To at least the vector, in the rows of the threads."""
    if isinstance(threads, slice):
        np.maximum(matrix[threads], vector, out=matrix[threads])
    else:
        matrix[threads] = np.maximum(matrix[threads], vector)


class Order:
    """What the threads of one block know.

    Attributes:
      known: {block: what each thread knows of its columns}; `own` is that of the block itself.
      fenced: [t, s], the time up to which writes of s were followed by a proxy fence of s, as far as t knows.
    """

    def __init__(self, block: int, threads: int):
        self.block, self.threads, self.columns = block, threads, threads
        self.own = np.zeros((threads, threads + 32), np.int32)
        # What a thread did itself is always over for it.
        np.fill_diagonal(self.own, np.iinfo(np.int32).max)
        self.known = {block: self.own}
        self.fenced = np.zeros((threads, threads), np.int32)
        self.everybody = np.arange(threads)
        # Whatever threads did until then is over for all of them.
        self.all_until = 0
        # Of each thread: what it knew when it last fenced memory, and what its relaxed loads have seen since.
        self.before_fence: dict[int, Clock] = {}
        self.seen: dict[int, Clock] = {}

    def new_copy(self) -> int:
        """A column for an asynchronous copy."""
        if self.columns == self.own.shape[1]:
            self.own = np.concatenate([self.own, np.zeros_like(self.own)], 1)
            self.known[self.block] = self.own
        self.columns += 1
        return self.columns - 1

    def release(self, threads: Threads, now: int) -> Clock:
        known = {block: matrix[threads].max(0) for block, matrix in self.known.items()}
        known[self.block][: self.threads][threads] = now
        return Clock(self.block, known, self.fenced[threads].max(0))

    def acquire(self, threads: Threads, clock: Clock | None) -> None:
        if clock is None:
            return
        for block, vector in clock.known.items():
            matrix = self.known.get(block)
            if matrix is None or matrix.shape[1] < len(vector):
                matrix = self._widened(block, matrix, len(vector))
            _raise(matrix[:, : len(vector)], threads, vector)
        if clock.home == self.block and clock.fenced is not None:
            _raise(self.fenced, threads, clock.fenced)

    def _widened(self, block, matrix, width):
        wider = np.zeros((self.threads, width), np.int32)
        if matrix is not None:
            wider[:, : matrix.shape[1]] = matrix
        self.known[block] = wider
        if block == self.block:
            self.own = wider
        return wider

    def synchronize(self, threads: Threads, now: int) -> None:
        """Each of the threads comes after what all of them did."""
        self.acquire(threads, self.release(threads, now))
        if isinstance(threads, slice) and threads == slice(0, self.threads):
            self.all_until = now

    def fence(self, threads: Threads, now: int) -> None:
        """A fence of memory, of each thread for itself."""
        for thread in self.everybody[threads].tolist():
            one = slice(thread, thread + 1)
            self.acquire(one, self.seen.pop(thread, None))
            self.before_fence[thread] = self.release(one, now)

    def fence_proxy(self, threads: Threads, now: int) -> None:
        """A thread's own writes become visible to copies that come after it."""
        which = self.everybody[threads]
        self.fenced[which, which] = now

    def late(self, block: int, threads: _Vector, columns: _Vector, times: _Vector) -> _Vector:
        """Which accesses by columns of a block are not over for the threads; all have one shape."""
        matrix = self.known.get(block)
        if matrix is None:
            return np.ones(columns.shape, bool)
        safe = np.minimum(columns, matrix.shape[1] - 1)
        return (matrix[threads, safe] < times) | (columns >= matrix.shape[1])
