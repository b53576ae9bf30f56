"""All thread blocks of a kernel on a GPU over time: they wait for an SM, load, compute, meet, compute and store.

What they share is modelled, in steps of a few hundredths of a microsecond: the bandwidth of the memory is divided
evenly among the blocks that load or store, with at most so much for one SM; the cycles of an SM among its blocks that
compute. A cluster starts where all of its blocks fit at once, in one GPC, and its blocks wait for each other. So do
those of a group, which start one by one, wherever there is room.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxnorm.gpu.devices import DEVICES


class Chip(NamedTuple):
    """What the timeline needs to know of a GPU.

    Attributes:
      gpcs: SMs of each graphics processing cluster.
      clock: cycles per microsecond.
      bandwidth: bytes per microsecond that a large copy moves, nine tenths of the data sheet.
      per_sm: bytes per microsecond that one SM can move, 64 per cycle.
    """

    gpcs: tuple[int, ...]
    clock: float
    bandwidth: float
    per_sm: float

    @property
    def sms(self) -> int:
        return sum(self.gpcs)


CHIPS = {
    "H100": Chip(DEVICES["H100"].gpcs, 1.7e3, 3.0e6, 1.1e5),
    "B200": Chip(DEVICES["B200"].gpcs, 1.85e3, 7.2e6, 1.2e5),
}

# Microseconds: until a kernel's first block starts and after its last one ends, which a copy takes as well; from the
# start of a block until the first bytes are there; from its end until the next one starts.
_KERNEL, _START, _NEXT = 2.0, 1.3, 0.3
STEP = 0.02
# Of a plain copy: smaller blocks and others per SM make it slower here, or as fast.
_COPIED_BY_A_BLOCK, _COPYING_PER_SM = 64 * 1024, 3


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Cycles of one sweep of a thread block: alone, and as its part of those of a full SM."""

    alone: float = 0.0
    shared: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel does.

    Attributes:
      thread_blocks: in all.
      cluster: thread blocks that wait for each other.
      together: whether these start at once, in one GPC.
      per_sm: thread blocks that an SM holds at once.
      loaded, stored: bytes per thread block.
      boxes: that it loads and stores one after another.
      first, middle, last: sweeps; the first goes on while boxes come, the last while they leave.
      meeting: cycles between them, for sums and for the other blocks.
      ending: cycles after the last.
      ticket: cycles before a block knows what it loads.
    """

    thread_blocks: int
    cluster: int
    per_sm: int
    loaded: float
    stored: float
    boxes: int
    first: Sweep
    middle: Sweep
    last: Sweep
    meeting: float
    ending: float
    together: bool = True
    ticket: float = 0.0


def resident_clusters(chip: Chip, cluster: int, per_sm: int) -> int:
    """Clusters that run at once."""
    return sum(sms * per_sm // cluster for sms in chip.gpcs)


def microseconds(work: Work, chip: Chip) -> float:
    """Modelled, from start to end."""
    return _KERNEL + Timeline(work, chip).run()


def copy_microseconds(work: Work, chip: Chip) -> float:
    """A copy that moves as many bytes."""
    return _KERNEL + work.thread_blocks * (work.loaded + work.stored) / chip.bandwidth


@functools.cache
def attainable(loaded: float, stored: float, chip: Chip) -> float:
    """The share of a copy's speed that this model grants to a kernel that loads and stores so much and does no more.

    In a small array nothing hides that a block starts and ends, which the speed of a copy leaves out.
    """
    blocks = max(1, round(loaded / _COPIED_BY_A_BLOCK))
    nothing = dict.fromkeys(("first", "middle", "last"), Sweep())
    work = Work(
        blocks, 1, _COPYING_PER_SM, loaded / blocks, stored / blocks, boxes=1, **nothing, meeting=0.0, ending=0.0
    )
    return copy_microseconds(work, chip) / microseconds(work, chip)


WAITING, STARTING, LOADING, COMPUTING, MEETING, STORING, ENDING, DONE = range(8)


class Timeline:
    """The state of all thread blocks."""

    def __init__(self, work: Work, chip: Chip) -> None:
        blocks = work.thread_blocks
        self.work, self.chip = work, chip
        self.free = np.full(chip.sms, work.per_sm)
        self.gpc = np.repeat(np.arange(len(chip.gpcs)), chip.gpcs)
        self.next = 0
        self.phase, self.sm = np.full(blocks, WAITING), np.zeros(blocks, int)
        # What is left of the delay, the bytes to load and to store, and the sweeps, as shares of them.
        self.delay = np.full(blocks, _START + work.ticket / chip.clock)
        self.load, self.store = np.full(blocks, float(work.loaded)), np.zeros(blocks)
        self.first, self.middle, self.last = np.zeros(blocks), np.zeros(blocks), np.zeros(blocks)

    def run(self) -> float:
        """Microseconds until all are done."""
        return sum(STEP for _ in self.steps())

    def steps(self) -> Iterator[tuple[float, float]]:
        """Goes on step by step: the time, and the bytes that were moved meanwhile."""
        time = 0.0
        while True:
            self._place()
            active = np.flatnonzero((self.phase > WAITING) & (self.phase < DONE))
            if active.size == 0:
                return
            moved = self._move(active)
            self._compute(active)
            self._advance(active)
            time += STEP
            yield time, moved

    def _place(self) -> None:
        """Starts clusters in the GPC with the most room, on its SMs with the most room."""
        cluster = self.work.cluster if self.work.together else 1
        while self.next < self.work.thread_blocks:
            room = np.bincount(self.gpc, self.free)
            best = int(np.argmax(np.where(room >= cluster, room / np.asarray(self.chip.gpcs), -1.0)))
            if room[best] < cluster:
                return
            sms = np.flatnonzero(self.gpc == best)
            for block in range(self.next, self.next + cluster):
                sm = sms[np.argmax(self.free[sms])]
                self.free[sm] -= 1
                self.sm[block], self.phase[block] = sm, STARTING
            self.next += cluster

    def _move(self, active: np.ndarray) -> float:
        """Bytes, for those that load and those that store."""
        loading = (self.phase[active] == LOADING) & (self.load[active] > 0)
        storing = (self.phase[active] == STORING) & (self.store[active] > 0)
        moving = active[loading | storing]
        if moving.size == 0:
            return 0.0
        here = np.bincount(self.sm[moving], minlength=self.chip.sms)[self.sm[moving]]
        moved = STEP * np.minimum(self.chip.bandwidth / moving.size, self.chip.per_sm / here)
        is_load = self.phase[moving] == LOADING
        for left, chosen, amount in (
            (self.load, moving[is_load], moved[is_load]),
            (self.store, moving[~is_load], moved[~is_load]),
        ):
            left[chosen] = np.maximum(left[chosen] - amount, 0.0)
        return float(moved.sum())

    def _compute(self, active: np.ndarray) -> None:
        """Cycles, for those that have something to compute."""
        work, boxes = self.work, self.work.boxes
        phase = self.phase[active]
        # Whole boxes that are there.
        there = np.floor((1 - self.load[active] / work.loaded) * boxes + 1e-9) / boxes
        first = active[(phase == LOADING) & (self.first[active] < there)]
        limit = dict(zip(first.tolist(), there[(phase == LOADING) & (self.first[active] < there)], strict=True))
        middle, last = active[phase == COMPUTING], active[(phase == STORING) & (self.last[active] < 1)]
        here = np.bincount(self.sm[np.concatenate([first, middle, last])], minlength=self.chip.sms)
        cycles = STEP * self.chip.clock

        def done(sweep: Sweep, blocks: np.ndarray) -> np.ndarray:
            taken = np.maximum(sweep.alone, sweep.shared * here[self.sm[blocks]])
            return cycles / np.maximum(taken, 1e-9)

        self.first[first] = np.minimum(self.first[first] + done(work.first, first), [limit[b] for b in first.tolist()])
        self.middle[middle] += done(work.middle, middle)
        before = self.last[last]
        self.last[last] = np.minimum(before + done(work.last, last), 1.0)
        boxes_done = np.floor(self.last[last] * boxes + 1e-9) - np.floor(before * boxes + 1e-9)
        self.store[last] += boxes_done * work.stored / boxes

    def _advance(self, active: np.ndarray) -> None:
        """To the next phase, where one is over."""
        phase, work = self.phase[active], self.work
        self.delay[active] -= np.where(np.isin(phase, (STARTING, ENDING)), STEP, 0.0)
        meeting = active[phase == MEETING]
        # The delay of a meeting runs once all of the cluster are there.
        clusters = meeting // work.cluster
        all_there = np.bincount(clusters, minlength=work.thread_blocks // work.cluster) == work.cluster
        self.delay[meeting] -= np.where(all_there[clusters], STEP, 0.0)
        over = {
            STARTING: self.delay[active] <= 0,
            LOADING: (self.load[active] <= 0) & (self.first[active] >= 1 - 1e-9),
            COMPUTING: self.middle[active] >= 1,
            MEETING: self.delay[active] <= 0,
            STORING: (self.last[active] >= 1) & (self.store[active] <= 0),
            ENDING: self.delay[active] <= 0,
        }
        for number, condition in over.items():
            blocks = active[(phase == number) & condition]
            self.phase[blocks] = number + 1
            if number == COMPUTING:
                self.delay[blocks] = work.meeting / self.chip.clock
            elif number == STORING:
                self.delay[blocks] = _NEXT + work.ending / self.chip.clock
            elif number == ENDING:
                np.add.at(self.free, self.sm[blocks], 1)


def waves(work: Work, chip: Chip) -> float:
    """How many times the chip is filled, the last time perhaps in part."""
    cluster = work.cluster if work.together else 1
    return work.thread_blocks / cluster / resident_clusters(chip, cluster, work.per_sm)


def bounds(work: Work, chip: Chip) -> dict[str, float]:
    """Microseconds that the kernel takes at least, by what limits it: one limit at a time, nothing else in the way."""
    moved = work.thread_blocks * (work.loaded + work.stored)
    issue = work.thread_blocks * sum(s.shared for s in (work.first, work.middle, work.last)) / chip.sms / chip.clock
    memory = moved / chip.bandwidth
    return {
        "memory": _KERNEL + memory,
        "issue": _KERNEL + issue,
        "waves": _KERNEL + max(memory, issue) * _unevenness(work, chip),
    }


def _unevenness(work: Work, chip: Chip) -> float:
    """How much longer it takes because the last wave fills the chip in part, or the only one its SMs unevenly."""
    filled, each = waves(work, chip), work.thread_blocks / chip.sms
    return math.ceil(filled) / filled if filled > 1 else math.ceil(each) / each
