"""Branches and the end of threads: PTX ISA 9.7.12 and 9.7.19.

Functions of this kind execute an instruction for some lanes of a group. They return whether the group goes on behind
it; if not, it waits, it is gone, or it is somewhere else.
"""

import numpy as np

from emulator.block import Group, Lanes
from emulator.report import KernelError


def branch(machine, group: Group, node, lanes: Lanes) -> bool:
    (label,) = node.instruction.operands
    _go_apart(machine, group, node.index + 1, [(lanes.threads, machine.program.labels[label.index])])
    return False


def branch_by_table(machine, group: Group, node, lanes: Lanes) -> bool:
    index, table = node.instruction.operands
    chosen = group.block.value(index, "u4", lanes)
    if int(chosen.max()) >= len(table.labels):
        raise KernelError("branch", f"entry {chosen.max()} of a table of {len(table.labels)}")
    targets = [machine.program.labels[label.index] for label in table.labels]
    parts = [(lanes.threads[chosen == i], targets[i]) for i in np.unique(chosen)]
    _go_apart(machine, group, node.index + 1, parts)
    return False


def _go_apart(machine, group, otherwise, parts):
    """Threads go where they branch to, all others on."""
    taken = np.concatenate([threads for threads, _ in parts])
    rest = group.threads[~np.isin(group.threads, taken)] if len(taken) < len(group.threads) else taken[:0]
    (own, target), *others = [*parts, *([(rest, otherwise)] if len(rest) else [])]
    if others:
        group.take(own)
    for threads, pc in others:
        other = Group(group.block, threads, pc, machine.random.random())
        machine.add(other)
        machine.go(other, pc)
    machine.go(group, target)


def leave(machine, group: Group, node, lanes: Lanes) -> bool:
    stays = len(lanes.threads) < len(group.threads)
    machine.threads_left(group, lanes.threads)
    return stays


def trap(machine, group: Group, node, lanes: Lanes) -> bool:
    raise KernelError("trap", "the kernel traps")


def nothing(machine, group: Group, node, lanes: Lanes) -> bool:
    """A hint, or a delay."""
    return True
