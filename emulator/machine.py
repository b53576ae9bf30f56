"""Runs a kernel: blocks, warps and asynchronous copies, in an order that an adversary chooses from a seed."""

import dataclasses
import random
from collections import deque
from collections.abc import Iterable

import numpy as np

from emulator import accesses, barriers, control, copies
from emulator.block import Block, Cluster, Group, Lanes, NotUniformError
from emulator.host import Launch
from emulator.memory import LANES, Global
from emulator.parser import SIZES, UnknownInstructionError
from emulator.report import Finding, KernelError, place
from emulator.translator import Program

PARAMETERS = 1 << 56
_OTHER_LANES = "the other lanes of a warp"
_FUNCTIONS = {**vars(accesses), **vars(barriers), **vars(control), **vars(copies)}


@dataclasses.dataclass
class Policy:
    """What the adversary does.

    Attributes:
      schedule: "uniform": anyone at each turn; "priorities": the first that can, in an order that rarely changes.
      together: the probability that the warps of a block, or some of them, do the next thing at once; 0: never.
      burst: nodes that are run at a turn, at most.
      landing: the probability, at each turn, that a piece of an asynchronous copy is done; 0: only when all wait.
      landing_order: "random", "fifo" or "lifo".
      spurious: the probability that a wait returns for nothing, as the hardware may.
      resident: thread blocks that run at once; None: all.
      dispatch: "order" or "random", in which blocks start.
      poison: what nobody wrote holds: "nan" or "random".
      noise: how much of their bound the hardware's approximations are off.
    """

    schedule: str = "uniform"
    together: float = 1.0
    burst: int = 4
    landing: float = 0.1
    landing_order: str = "random"
    spurious: float = 0.1
    resident: int | None = None
    dispatch: str = "order"
    poison: str = "nan"
    noise: float = 0.0

    @staticmethod
    def draw(seed: int) -> "Policy":
        r = random.Random(seed)
        return Policy(
            schedule=r.choice(["uniform", "priorities"]),
            together=r.choice([0.95, 0.9, 0.7, 0.0]) if seed % 2 else 1.0,
            burst=r.choice([1, 2, 8, 64]),
            landing=r.choice([0.0, 0.0, 0.02, 0.2, 0.9]),
            landing_order=r.choice(["random", "fifo", "lifo"]),
            spurious=r.choice([0.0, 0.1, 0.4]),
            dispatch=r.choice(["order", "random"]),
            poison=r.choice(["nan", "random"]),
            noise=float(seed % 2),
        )


class Machine:
    """A kernel that is run once.

    Attributes:
      executed: instructions of warps.
      findings: {(kind, places): [Finding, how often]}.
    """

    def __init__(
        self,
        program: Program,
        launch: Launch,
        memory: Global,
        seed: int = 0,
        policy: Policy | None = None,
        *,
        limit: int = 50_000_000,
        granule: int | None = None,
    ):
        self.program, self.launch, self.memory, self.limit = program, launch, memory, limit
        self.policy = policy or Policy.draw(seed)
        self.random, self.numbers = random.Random(seed * 7919 + 13), np.random.default_rng(seed)
        self.nodes = program.nodes
        self.functions = [_FUNCTIONS[node.function] if node.function else None for node in self.nodes]
        self.threads = launch.block[0] * launch.block[1] * launch.block[2]
        if self.threads % LANES:
            raise UnknownInstructionError(f"blocks are made of whole warps; this one has {self.threads} threads")
        if any(n != 1 for n in (*launch.grid[1:], *launch.cluster[1:])):
            raise UnknownInstructionError("grids and clusters have one dimension")
        if program.kernel.cluster not in (None, launch.cluster):
            raise KernelError(
                "launch", f"the kernel requires clusters of {program.kernel.cluster}, not {launch.cluster}"
            )
        self.granule = granule or accesses.smallest_shared_access(self.nodes)
        self.shared_base = 1024 * self.random.choice([1, 1, 2, 5])
        self.leader = self.random.choice([0, 0, self.random.randrange(LANES)])
        self.parameters, self.tensor_maps = self._parameters()
        self.garbage_registers = [self._garbage_register(SIZES[kind], kind) for kind in program.kernel.registers]
        self.findings: dict = {}
        # pending: pieces of asynchronous copies. changes: so that what waits for a value can tell whether any came.
        self.now, self.turns, self.executed, self.changes = 0, 0, 0, 0
        self.ready: list[Group] = []
        self.pending: list[copies.Piece] = []
        self.blocks: list[Block] = []
        self.waiting: deque[int] = deque()
        self.resident, self.woken = 0, (0, 0)

    def garbage(self, size: int) -> np.ndarray:
        return np.full(size, 0xFF, np.uint8) if self.policy.poison == "nan" else self.random_bytes(size)

    def random_bytes(self, shape) -> np.ndarray:
        return self.numbers.integers(0, 256, shape, np.uint8)

    def _garbage_register(self, size, kind):
        garbage = self.random_bytes(self.threads * size)
        return garbage & 1 if kind == "pred" else garbage

    def _parameters(self):
        kernel, launch = self.program.kernel, self.launch
        if len(kernel.parameters) != len(launch.parameters):
            raise KernelError("launch", f"{len(launch.parameters)} parameters for {len(kernel.parameters)}")
        memory, tensor_maps = np.zeros(kernel.parameter_bytes, np.uint8), {}
        for i, ((offset, size), value) in enumerate(zip(kernel.parameters.values(), launch.parameters, strict=True)):
            mine = {at: tensor for (parameter, at), tensor in launch.tensor_maps.items() if parameter == i}
            for at, tensor in mine.items():
                tensor.check()
                self.memory.rows(np.array([tensor.address]), tensor.last - tensor.address)
                tensor_maps[PARAMETERS + offset + at] = tensor
            if size != (value if mine else 8):
                raise KernelError("launch", f"parameter {i} has {size} bytes, and is given {value if mine else 8}")
            if not mine:
                memory[offset : offset + size] = np.array([value], np.uint64).view(np.uint8)
        return memory, tensor_maps

    def address_of(self, name: str) -> int:
        kernel = self.program.kernel
        if name in kernel.parameters:
            return PARAMETERS + kernel.parameters[name][0]
        if kernel.shared != [name]:
            raise UnknownInstructionError(f"a kernel has one variable in shared memory, not {kernel.shared}")
        return self.shared_base

    # Running.

    def run(self, only: Iterable[int] | None = None) -> None:
        """Until all blocks, or those of some clusters, have left. Raises KernelError."""
        total, size = self.launch.grid[0], self.launch.cluster[0]
        if total % size:
            raise KernelError("launch", f"{total} blocks in clusters of {size}")
        self.waiting = deque(range(total // size) if only is None else only)
        if self.policy.dispatch == "random":
            self.random.shuffle(self.waiting)
        self.room = max((self.policy.resident or total) // size, 1)
        self.dispatch()
        with np.errstate(all="ignore"):
            while self.ready or self.pending or self.resident:
                self._turn()

    def forget(self) -> None:
        """Lets go of the blocks, which refer to each other and would wait for the garbage collector."""
        for block in self.blocks:
            block.cluster = None
            block.groups.clear()
        self.blocks, self.ready, self.pending = [], [], []

    def dispatch(self) -> None:
        """Starts clusters where there is room."""
        while self.waiting and self.resident < self.room:
            first = self.waiting.popleft() * self.launch.cluster[0]
            blocks = [Block(self, first + rank, rank) for rank in range(self.launch.cluster[0])]
            cluster = Cluster(blocks)
            for block in blocks:
                block.cluster = cluster
                everybody = np.arange(self.threads)
                parts = [everybody] if self.policy.together else np.split(everybody, self.threads // LANES)
                for threads in parts:
                    self.add(Group(block, threads, 0, self.random.random()))
            self.blocks += blocks
            self.resident += 1

    def _turn(self):
        self.turns += 1
        if self.pending and (not self.ready or self.random.random() < self.policy.landing):
            copies.land(self)
        elif not self.ready and not self._wake_watchers():
            raise KernelError("deadlock", self._who_waits())
        if not self.ready:
            return
        group = self._choose()
        for _ in range(self.random.randrange(self.policy.burst) + 1):
            self._step(group)
            if group.blocked is not None:
                break
        if self.executed > self.limit:
            raise KernelError("limit", f"more than {self.limit} instructions")

    def _choose(self):
        ready = self.ready
        if self.policy.schedule == "uniform":
            group = ready[self.random.randrange(len(ready))]
        else:
            if self.random.random() < 0.003:
                self.random.choice(ready).priority = -self.turns
            group = max(ready, key=lambda each: each.priority)
        if group.is_partial and self.random.random() < 0.8:
            # As the hardware mostly does, so that lanes come together again.
            group = min(
                (each for each in ready if each.block is group.block and each.is_partial), key=lambda each: each.pc
            )
        return group

    def _step(self, group):
        """Runs one node, or what can be run of it."""
        node, block = self.nodes[group.pc], group.block
        if len(group.threads) > LANES and self.random.random() >= self.policy.together:
            self._split(group, self._some_warps(group))
        if node.whole_warps and not group.ran and not self._whole(group):
            return
        if node.run is not None and not group.ran:
            node.run(block.views, block, group.lanes.at, len(group.threads))
        group.ran = True
        self.now += 1
        self.executed += node.count * int((group.warps > 0).sum())
        lanes = group.lanes
        if node.function is not None and node.instruction.predicate is not None:
            slot, negated = node.instruction.predicate
            chosen = lanes.threads[block.predicate(slot, lanes.at) ^ negated]
            lanes = Lanes.of(chosen) if len(chosen) else None
        try:
            if node.function is None or lanes is None or self.functions[node.index](self, group, node, lanes):
                self.go(group, node.index + 1)
        except (KernelError, UnknownInstructionError) as problem:
            if isinstance(problem, NotUniformError) and (group.warps > 0).sum() > 1:
                self._split(group, [np.flatnonzero(group.warps)[0]])
                return
            problem.args = (
                f"{problem}\n    {self.place(node.index)}\n    block {block.index}, {_named(group.threads)}",
            )
            raise

    def go(self, group: Group, pc: int) -> None:
        """The group goes on at a node, together with others that are there."""
        group.pc, group.ran = pc, False
        if len(group.block.groups) > 1:
            self._merge(group)

    def _some_warps(self, group):
        warps = np.flatnonzero(group.warps).tolist()
        return self.random.sample(warps, self.random.randrange(1, len(warps))) if len(warps) > 1 else warps

    def _split(self, group, warps):
        """Those go first."""
        first = np.isin(group.threads // LANES, warps)
        if not first.all():
            rest = Group(group.block, group.threads[~first], group.pc, self.random.random())
            rest.ran = group.ran
            group.take(group.threads[first])
            self.add(rest)

    def _merge(self, group):
        for other in [*group.block.groups]:
            here = other is not group and other.pc == group.pc and not other.ran
            if here and other.blocked in (None, _OTHER_LANES):
                shares_warp = (other.warps * group.warps).any()
                if shares_warp or self.random.random() < self.policy.together:
                    group.take(np.sort(np.concatenate([group.threads, other.threads])))
                    self.remove(other)

    def _whole(self, group):
        """Whether all live lanes of its warps are here; those of other warps wait."""
        if not group.is_partial:
            return True
        complete = (group.warps == group.block.live)[group.threads // LANES]
        if complete.any():
            rest = Group(group.block, group.threads[~complete], group.pc, group.priority)
            group.take(group.threads[complete])
            self.add(rest)
            self.block(rest, _OTHER_LANES)
            return True
        self.block(group, _OTHER_LANES)
        for warp in np.flatnonzero(group.warps):
            those = [each for each in group.block.groups if each.warps[warp]]
            if all(each.blocked == _OTHER_LANES for each in those):
                where = "\n".join(f"    {_named(each.threads)}: {self.place(each.pc)}" for each in those)
                raise KernelError("divergence", f"lanes of a warp wait for each other at different places\n{where}")
        return False

    # Groups that come, wait, and go.

    def add(self, group: Group) -> None:
        group.block.groups.append(group)
        self.ready.append(group)

    def remove(self, group: Group) -> None:
        group.block.groups.remove(group)
        if group.blocked is None:
            self.ready.remove(group)
        group.blocked = "nothing: it is gone"

    def block(self, group: Group, reason: str) -> None:
        group.blocked = reason
        self.ready.remove(group)

    def wake(self, group: Group) -> None:
        if group.blocked is not None and group in group.block.groups:
            group.blocked = None
            self.ready.append(group)

    def threads_left(self, group: Group, threads: np.ndarray) -> None:
        """Threads of a group are done."""
        block = group.block
        block.live -= np.bincount(threads // LANES, minlength=len(block.live))
        rest = group.threads[~np.isin(group.threads, threads)]
        if len(rest):
            group.take(rest)
        else:
            self.remove(group)
        for each in [*block.groups]:
            each.take(each.threads)
            if each.blocked == _OTHER_LANES:
                self.wake(each)
        if not block.live.any():
            block.left = True
            copies.check_left_behind(self, block)
            if all(each.left for each in block.cluster.blocks):
                self.resident -= 1
                self.dispatch()

    def _wake_watchers(self):
        """Lets those who wait for another value look again, a few times while nothing changes; whether any do."""
        times = self.woken[1] + 1 if self.woken[0] == self.changes else 1
        self.woken = self.changes, times
        watched = [buffer for buffer in self.memory.buffers if buffer.watchers]
        for buffer in watched:
            self.value_changed(buffer, really=False)
        return bool(watched) and times <= 3

    def value_changed(self, buffer, *, really: bool = True) -> None:
        self.changes += really
        watchers, buffer.watchers = buffer.watchers, []
        for group in watchers:
            self.wake(group)

    def _who_waits(self):
        groups = [group for block in self.blocks if not block.left for group in block.groups]
        lines = [
            f"    block {g.block.index}, {_named(g.threads)}, for {g.blocked}: {self.place(g.pc)}" for g in groups[:6]
        ]
        return "\n".join([f"{len(groups)} groups of threads wait", *lines])

    # Reports.

    def place(self, index: int):
        if index >= len(self.nodes):
            return "the end"
        node = self.nodes[index]
        return place(self.program.kernel, node.instruction or node.first)

    def find(self, kind: str, node: int, other: int | None = None, detail: str = "", *, error: bool = True) -> None:
        key = (kind, node, other)
        if key in self.findings:
            self.findings[key][1] += 1
            return
        second = None if other is None else self.place(other)
        self.findings[key] = [Finding(kind, self.place(node), second, detail, error), 1]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding, _ in self.findings.values() if finding.error]

    @property
    def remarks(self) -> list[Finding]:
        return [finding for finding, _ in self.findings.values() if not finding.error]


def _named(threads):
    if len(threads) == threads[-1] - threads[0] + 1:
        return f"threads {threads[0]} to {threads[-1]}" if len(threads) > 1 else f"thread {threads[0]}"
    return f"{len(threads)} threads from {threads[0]} to {threads[-1]}"
