"""Fences, barriers of a block and of a cluster, and mbarriers: PTX ISA 9.7.13 and 8."""

import numpy as np

from emulator.block import Block, Group, Lanes
from emulator.memory import LANES
from emulator.order import WRITTEN, Clock, joined
from emulator.parser import Nothing, UnknownInstructionError
from emulator.report import KernelError

_CLUSTER_WINDOW = 1 << 24
_MOST_ARRIVALS = MOST_BYTES = (1 << 20) - 1


# Fences


def fence_proxy(machine, group: Group, node, lanes: Lanes) -> bool:
    block = group.block
    block.order.fence_proxy(lanes.at, machine.now)
    _fence_mbarriers(block, lanes.threads)
    return True


def fence_mbarrier(machine, group: Group, node, lanes: Lanes) -> bool:
    _fence_mbarriers(group.block, lanes.threads)
    return True


def _fence_mbarriers(block, threads):
    """Copies, and other blocks, see mbarriers that these threads have initialized."""
    for barrier in block.mbarriers.values():
        barrier.is_fenced |= barrier.thread in threads


def fence(machine, group: Group, node, lanes: Lanes) -> bool:
    group.block.order.fence(lanes.at, machine.now)
    return True


# Barriers of a block


class Barrier:
    """A named barrier: who has come, of how many."""

    def __init__(self, expected: int):
        self.expected, self.arrived, self.members = expected, 0, []


def barrier(machine, group: Group, node, lanes: Lanes) -> bool:
    block, operands = group.block, node.instruction.operands
    if len(lanes.threads) < len(group.threads):
        raise UnknownInstructionError("a barrier that some lanes of a warp skip")
    number = block.uniform(operands[0], "u4", lanes)
    expected = block.uniform(operands[1], "u4", lanes) if len(operands) > 1 else machine.threads
    if number > 15 or expected % LANES or not 0 < expected <= machine.threads:
        raise KernelError("barrier", f"number {number} for {expected} threads: 0 to 15, for whole warps of the block")
    found = block.barriers.setdefault(number, Barrier(expected))
    if found.expected != expected:
        raise KernelError(
            "barrier", f"number {number} is for {expected} threads here and for {found.expected} elsewhere"
        )
    # A warp counts as a whole, whatever lanes of it have left.
    found.arrived += LANES * int((group.warps > 0).sum())
    found.members.append((group, node.index))
    if found.arrived < expected:
        machine.block(group, f"barrier {number}")
        return False
    if found.arrived > expected:
        raise KernelError("barrier", f"number {number}: {found.arrived} threads come where {expected} are expected")
    del block.barriers[number]
    members = np.sort(np.concatenate([member.threads for member, _ in found.members]))
    block.order.synchronize(Lanes.of(members).at, machine.now)
    machine.changes += 1
    for member, index in found.members:
        if index != node.index:
            machine.find("a barrier is completed from several places", node.index, index, error=False)
        if member is not group:
            machine.wake(member)
            machine.go(member, index + 1)
    return True


def barrier_of_warp(machine, group: Group, node, lanes: Lanes) -> bool:
    for warp in np.unique(lanes.threads // LANES):
        group.block.order.synchronize(lanes.threads[lanes.threads // LANES == warp], machine.now)
    return True


# Barriers of a cluster


def cluster_arrive(machine, group: Group, node, lanes: Lanes) -> bool:
    block, cluster, threads = group.block, group.block.cluster, lanes.threads
    steps = cluster.steps[block.index]
    if (steps[threads] % 2).any():
        raise KernelError("cluster barrier", "a second arrival before the wait")
    steps[threads] += 1
    if node.words.get("order") != "relaxed":
        clock = block.order.release(lanes.at, machine.now)
        clock.home = None
        cluster.clock = joined(cluster.clock, clock)
    cluster.arrived += len(threads)
    if cluster.arrived == machine.threads * len(cluster.blocks):
        cluster.done, cluster.clock, cluster.arrived = cluster.clock, None, 0
        cluster.phase += 1
        for each in cluster.blocks:
            for found in each.mbarriers.values():
                found.is_visible |= found.is_fenced
        for waiting in cluster.waiting:
            machine.wake(waiting)
        cluster.waiting = []
    return True


def cluster_wait(machine, group: Group, node, lanes: Lanes) -> bool:
    block, cluster, threads = group.block, group.block.cluster, lanes.threads
    steps = cluster.steps[block.index]
    if (steps[threads] % 2 == 0).any():
        raise KernelError("cluster barrier", "a wait without an arrival")
    if (2 * cluster.phase <= steps[threads]).any():
        cluster.waiting.append(group)
        machine.block(group, "the cluster")
        return False
    steps[threads] += 1
    block.order.acquire(lanes.at, cluster.done)
    return True


# mbarriers


class MBarrier:
    """A barrier in shared memory that counts arrivals, and bytes of asynchronous copies.

    Attributes:
      count, pending: arrivals of a phase, and those to come.
      bytes: of copies, to come.
      phase: how many are complete.
      thread, time: that initialized it; is_fenced, is_visible: whether copies, and other blocks, see that.
      copies: started; finished: columns of those that were complete with the last phase.
      own, foreign: clocks of arrivals from the block and from others in this phase, and in `done_` until the last one.
    """

    def __init__(self, count: int, thread: int, time: int):
        self.count = self.pending = count
        self.bytes, self.phase, self.thread, self.time = 0, 0, thread, time
        self.is_fenced = self.is_visible = False
        self.copies, self.finished, self.waiting = [], [], []
        self.own: Clock | None = None
        self.foreign: Clock | None = None
        self.done_own: Clock | None = None
        self.done_foreign: Clock | None = None


def mbarrier_init(machine, group: Group, node, lanes: Lanes) -> bool:
    block, (where, count) = group.block, node.instruction.operands
    if len(lanes.threads) != 1:
        raise KernelError("mbarrier", f"{len(lanes.threads)} threads initialize it at once")
    offset = _offset(machine, block, block.address(where, lanes))
    arrivals, thread = block.uniform(count, "u4", lanes), int(lanes.threads[0])
    if not 1 <= arrivals <= _MOST_ARRIVALS:
        raise KernelError("mbarrier", f"a count of {arrivals}; it is 1 to {_MOST_ARRIVALS}")
    if offset in block.mbarriers:
        raise KernelError("mbarrier", f"the one at byte {offset} is initialized twice")
    block.mbarriers[offset] = MBarrier(arrivals, thread, machine.now)
    block.shared.mbarrier[block.shared.granules_of(offset, 8)] = True
    return True


def _offset(machine, block, address):
    offset = address - machine.shared_base
    if offset % 8 or not 0 <= offset <= block.shared.size - 8:
        raise KernelError("out of bounds", f"an mbarrier at byte {offset} of {block.shared.size} in shared memory")
    return offset


def find_mbarrier(machine, block: Block, address: int, *, remote: bool = False) -> tuple[Block, MBarrier]:
    """The mbarrier at an address, and the block that it belongs to."""
    if address >= _CLUSTER_WINDOW:
        if not remote:
            raise KernelError(
                "out of bounds", "an address of another block's shared memory where one of this is needed"
            )
        block, address = block.cluster.blocks[address // _CLUSTER_WINDOW - 1], address % _CLUSTER_WINDOW
        if block.left:
            raise KernelError("mbarrier", f"block {block.index}, to which it belongs, has left")
    offset = _offset(machine, block, address)
    if offset not in block.mbarriers:
        raise KernelError("mbarrier", f"the one at byte {offset} of block {block.index} is not initialized")
    return block, block.mbarriers[offset]


def check_known(machine, user: Block, owner: Block, found: MBarrier, threads, node, *, by_copy: bool = False) -> None:
    """Whether those who use an mbarrier can know that it is initialized."""
    if owner is not user:
        if not found.is_visible:
            machine.find("an mbarrier of another block is used that may not be initialized yet", node.index)
        return
    known = user.order.own[threads, found.thread] >= found.time
    if not known.all() and not found.is_visible:
        machine.find("an mbarrier is used that may not be initialized yet", node.index)
    if by_copy and not found.is_fenced:
        machine.find("a copy uses an mbarrier whose initialization no fence made visible to it", node.index)


def mbarrier_arrive(machine, group: Group, node, lanes: Lanes) -> bool:
    block, (state, where, *rest) = group.block, node.instruction.operands
    if not isinstance(state, Nothing):
        raise UnknownInstructionError("an arrival whose state is kept")
    addresses = block.addresses(where, lanes)
    for address in {*addresses.tolist()}:
        here = lanes.threads[addresses == address]
        owner, found = find_mbarrier(machine, block, address, remote="cluster" in node.words.get("space", ""))
        check_known(machine, block, owner, found, here, node)
        arrivals = len(here)
        if "tx" in node.words:
            found.bytes += int(block.value(rest[0], "u4", Lanes.of(here)).sum())
        elif rest:
            arrivals *= block.uniform(rest[0], "u4", lanes)
        if abs(found.bytes) > MOST_BYTES:
            raise KernelError("mbarrier", f"{found.bytes} bytes are expected; at most {MOST_BYTES} can be")
        found.pending -= arrivals
        if found.pending < 0:
            raise KernelError("mbarrier", f"{-found.pending} arrivals more than the {found.count} of a phase")
        if node.words.get("order") != "relaxed":
            _arrived(block, owner, found, block.order.release(Lanes.of(here).at, machine.now), node.words.get("scope"))
        complete_phase(machine, found)
    return True


def _arrived(block, owner, found, clock, scope):
    """What an arrival hands on: to other blocks only where its scope is the cluster."""
    if owner is block:
        found.own = joined(found.own, clock)
    elif scope == "cluster":
        clock.home = None
        found.foreign = joined(found.foreign, clock)


def complete_phase(machine, found: MBarrier) -> None:
    """If everything has come that the phase waits for."""
    if found.pending or found.bytes:
        return
    machine.changes += 1
    found.phase += 1
    found.pending = found.count
    found.done_own, found.own = joined(found.done_own, found.own), None
    found.done_foreign, found.foreign = joined(found.done_foreign, found.foreign), None
    found.finished = [copy.column for copy in found.copies if copy.is_done]
    for waiting in found.waiting:
        machine.wake(waiting)
    found.waiting = []


def mbarrier_wait(machine, group: Group, node, lanes: Lanes) -> bool:
    block, (result, where, parity, *_) = group.block, node.instruction.operands
    if node.instruction.predicate is not None:
        raise UnknownInstructionError("a wait that some lanes skip")
    _, found = find_mbarrier(machine, block, block.address(where, lanes))
    check_known(machine, block, block, found, lanes.threads, node)
    wanted = block.uniform(parity, "u4", lanes)
    if wanted not in (0, 1):
        raise KernelError("mbarrier", f"a parity of {wanted}")
    done, tries = found.phase & 1 != wanted, node.words["how"] == "try_wait"
    spurious = machine.random.random() < machine.policy.spurious
    if tries and not done and not spurious:
        found.waiting.append(group)
        machine.block(group, "an mbarrier")
        return False
    succeeds = done and not (tries and spurious)
    if succeeds and node.words.get("order") != "relaxed":
        block.order.acquire(lanes.at, found.done_own)
        if node.words.get("scope") == "cluster":
            block.order.acquire(lanes.at, found.done_foreign)
        block.order.own[np.ix_(lanes.threads, found.finished)] = WRITTEN
    block.write(result, np.bool_(succeeds), lanes)
    return True


def map_address(machine, group: Group, node, lanes: Lanes) -> bool:
    block, (result, address, rank) = group.block, node.instruction.operands
    ranks = block.value(rank, "u4", lanes).astype(np.int64)
    if int(ranks.max()) >= len(block.cluster.blocks):
        raise KernelError("cluster", f"rank {ranks.max()} of {len(block.cluster.blocks)}")
    addresses = block.value(address, "u4", lanes) + (ranks + 1) * _CLUSTER_WINDOW
    block.write(result, addresses.astype(np.uint32), lanes)
    return True
