"""Mutations of a kernel: some of its synchronization is taken out or changed, and the emulator should object.

What it does not object to is either not needed, or not seen; somebody has to look at it. A run counts as objecting if
it reports an error, ends with a violation, or has other outputs, bit by bit.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from emulator.launch import Compiled, Result, execute
from emulator.machine import Policy
from emulator.parser import UnknownInstructionError
from emulator.report import KernelError


class Mutant(NamedTuple):
    """A changed kernel: what was done, to which line of the PTX, and the new text."""

    change: str
    line: int
    ptx: str


def _replace(pattern, replacement):
    return lambda line: re.sub(pattern, replacement, line)


def _add(pattern, by):
    return lambda line: re.sub(pattern, lambda found: f"{found[1]}{int(found[2]) + by}{found[3]}", line)


def _delete(line):
    return ""


# What is done, to which lines, and how.
_CHANGES = [
    ("delete bar.sync", r"^\s*bar\.sync", _delete),
    ("bar.sync becomes bar.warp.sync", r"^\s*bar\.sync", _replace(r"bar\.sync.*?;", "bar.warp.sync -1;")),
    ("delete a fence", r"^\s*fence\.", _delete),
    ("delete mbarrier.init", r"mbarrier\.init", _delete),
    ("expect one arrival less", r"^\s*mov\.b32\s+%r\d+, (128|256|384);", _add(r"(, )(\d+)(;)", -1)),
    ("delete mbarrier.arrive", r"mbarrier\.arrive", _delete),
    ("do not wait for an mbarrier", r"bra\.uni\s+LAB_WAIT", _delete),
    ("wait for the other phase", r"mbarrier\.try_wait", _replace(r"\], %r\d+,", "], 1,")),
    ("delete the cluster's arrival", r"barrier\.cluster\.arrive", _delete),
    ("delete the cluster's wait", r"barrier\.cluster\.wait", _delete),
    (
        "relaxed arrival at the cluster",
        r"barrier\.cluster\.arrive\.release",
        _replace(r"arrive\.release", "arrive.relaxed"),
    ),
    ("delete commit_group", r"commit_group", _delete),
    ("delete wait_group", r"wait_group", _delete),
    ("wait_group leaves one more", r"wait_group", _add(r"(wait_group\S*\s+)(\d+)(;)", 1)),
    ("relaxed red", r"red\.release", _replace(r"red\.release", "red.relaxed")),
    ("relaxed load", r"ld\.acquire", _replace(r"ld\.acquire", "ld.relaxed")),
    ("wait for one less", r"setp\.lt\.u32 waiting, seen", _add(r"(seen, )(\d+)(;)", -1)),
    ("wait for one more", r"setp\.lt\.u32 waiting, seen", _add(r"(seen, )(\d+)(;)", 1)),
    ("no ticket", r"atom\.relaxed\.gpu\.global\.add\.u32", _replace(r", 1;", ", 0;")),
    ("arrive twice", r"red\.release", lambda line: f"{line} {line.strip()}"),
    ("all threads copy", r"@%p\d+ cp\.async\.bulk", _replace(r"@%p\d+ ", "")),
    ("delete a bulk copy", r"cp\.async\.bulk\.(tensor|global|shared)", _delete),
    ("delete cp.async", r"cp\.async\.c[ag]", _delete),
]


def mutants(ptx: str) -> Iterator[Mutant]:
    """Each line that a change is for, one at a time; and two neighboring bar.sync, of which one would not be missed."""
    lines = ptx.split("\n")
    for change, pattern, alter in _CHANGES:
        for i, line in enumerate(lines):
            if re.search(pattern, line) and alter(line) != line:
                yield Mutant(change, i + 1, "\n".join([*lines[:i], alter(line), *lines[i + 1 :]]))
    barriers = [i for i, line in enumerate(lines) if re.match(r"\s*bar\.sync", line)]
    for pair in itertools.pairwise(barriers):
        kept = ["" if i in pair else line for i, line in enumerate(lines)]
        yield Mutant("delete two bar.sync", pair[0] + 1, "\n".join(kept))


def objection(
    mutant: Mutant, compiled: Compiled, inputs: list[np.ndarray], right: list[Result], policies: list[Policy]
) -> str | None:
    """What the emulator says of a mutant, or None; `right` has what the kernel itself gave with each policy."""
    try:
        changed = compiled._replace(ptx=mutant.ptx)
        program = changed.program()
        for seed, (policy, result) in enumerate(zip(policies, right, strict=True)):
            found = execute(changed, inputs, seed, policy, program=program, limit=3 * result.executed + 10_000)
            if found.errors:
                return found.errors[0].kind
            if not all(map(_same, found.outputs, result.outputs)):
                return "other outputs"
    except (KernelError, UnknownInstructionError) as problem:
        return getattr(problem, "kind", "refused")
    return None


def _same(a, b):
    return a.tobytes() == b.tobytes()


def survivors(compiled: Compiled, inputs: list[np.ndarray], seeds: int, resident: int | None = None):
    """(all mutants, those that nobody objects to); `resident`: blocks that some adversaries run at once."""
    policies = [Policy.draw(seed) for seed in range(seeds)]
    for seed, policy in enumerate(policies):
        policy.noise, policy.poison = 0.0, "nan"
        policy.resident = resident if seed % 2 else None
    program = compiled.program()
    right = [execute(compiled, inputs, seed, policy, program=program) for seed, policy in enumerate(policies)]
    if any(result.errors for result in right):
        raise ValueError("the kernel itself is reported; mutations would prove nothing")
    everything = [*mutants(compiled.ptx)]
    return everything, [each for each in everything if objection(each, compiled, inputs, right, policies) is None]
