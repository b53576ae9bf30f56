"""The emulator itself: known answers, planted bugs, and what it refuses."""

import pathlib
import re

import numpy as np
import pytest

from emulator import host, mutations
from emulator.instructions import TABLE, Visible
from emulator.launch import Compiled, execute
from emulator.machine import _FUNCTIONS
from emulator.parser import UnknownInstructionError, parse
from emulator.report import KernelError
from emulator.tensormap import TensorMap
from emulator.tests.examples import _HEAD, _TAIL, EXAMPLES, WRONG_RESULT
from emulator.translator import translate

DATA = pathlib.Path(__file__).parent / "data"
SEEDS = range(8)
BUGS = [(example, bug) for example in EXAMPLES for bug in example.bugs]
RIGHT = [example for example in EXAMPLES if example.resident is None]


@pytest.mark.parametrize("example", RIGHT, ids=lambda example: example.name)
def test_known_answers(example):
    """Right, and nothing is reported, whatever the adversary does."""
    for seed in SEEDS:
        assert example.run(example.body, seed) == ([], True)


@pytest.mark.parametrize(("example", "bug"), BUGS, ids=[f"{example.name}: {bug.name}" for example, bug in BUGS])
def test_planted_bugs(example, bug):
    """Some adversary of a few makes each of them seen."""
    assert bug.old in example.body
    body = example.body.replace(bug.old, bug.new, 1)
    seen = []
    for seed in SEEDS:
        reports, right = example.run(body, seed)
        if not right if bug.report == WRONG_RESULT else bug.report in "\n".join(reports):
            return
        seen += reports
    pytest.fail(f"nobody reports {bug.report!r}, but {seen}")


def test_there_are_many_bugs():
    """So that a filter that takes some away is noticed."""
    assert len(BUGS) >= 80


def test_every_instruction_has_its_section_and_its_function():
    for row in TABLE:
        assert re.match(r"9\.7\.\d+ [a-z]", row.section), row
        if isinstance(row, Visible):
            assert row.function in _FUNCTIONS, row


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("wgmma.fence.sync.aligned;", "line 15: wgmma.fence.sync.aligned is not in the table"),
        ("add.f16x2 %r1, %r2, %r3;", "not in the table"),
        ("add.s32 %r1, %r2, %nothing;", "special register %nothing"),
        ("add.s32 %r1, %r2;", "1 operands for 2"),
        ("add.s64 %r1, %d1, %d2;", "a register of 4 bytes|i8 for a register"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, 0xFF;", "a mask that does not name all lanes"),
        ("bra NOWHERE;", "what is NOWHERE?"),
        ("call f;", "what is f?"),
        (".local .align 4 .b8 stack[16];", r"line 15: \.local"),
    ],
)
def test_what_it_does_not_know_it_refuses(line, message):
    """With the line and the reason, rather than by guessing; nothing is executed."""
    with pytest.raises(UnknownInstructionError, match=message):
        EXAMPLES[0].run(f"{line}\n", 0)


def test_a_module_must_have_one_kernel():
    with pytest.raises(UnknownInstructionError, match="this one has 0"):
        parse(".version 8.7\n.target sm_90a\n")
    kernel = _HEAD + _TAIL
    with pytest.raises(UnknownInstructionError, match="this one has 2"):
        parse(kernel + kernel)


_MAP = TensorMap(4096, 4, (64, 64), (4, 256), (8, 64), 32)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"address": 4100}, "multiple of 16"),
        ({"strides": (4, 250)}, "strides are multiples of 16"),
        ({"strides": (8, 256)}, "innermost stride is one element"),
        ({"box": (8, 257)}, "1 to 256 elements"),
        ({"box": (6, 64)}, "multiples of 16 bytes, not 24"),
        ({"box": (16, 64)}, "fit the swizzle of 32"),
        ({"sizes": (0, 64)}, "sizes are 1 to"),
        ({"swizzle": 48}, "swizzle is one of"),
    ],
)
def test_a_tensor_map_that_the_driver_would_refuse(change, rule):
    _MAP.check()
    with pytest.raises(KernelError, match=rule):
        _MAP._replace(**change).check()


def test_the_host_does_nothing_unknown():
    with pytest.raises(UnknownInstructionError, match="the host's code: br label"):
        host.launch("define void @f(ptr %0, ptr %1) {\n  br label %2\n  ret void\n}", [])


def _stored(name, shape):
    """The forward kernel of jaxnorm 0.2, compiled for H100, of float32 arrays of a shape; and inputs of it."""
    files = [(DATA / f"{name}.{kind}").read_text() for kind in ("ptx", "ll")]
    view, values = (shape, "float32"), ((shape[0], 1), "float32")
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    ones = np.ones((shape[0], 1), np.float32)
    return Compiled(*files, [view, values, values], [view, values, values, values], {}), [x, ones, ones]


@pytest.mark.parametrize("seed", range(2))
def test_stores_that_run_over_the_end_of_a_sample_are_found(seed):
    """The kernel for x of (1, 3, 30, 30): its last store of each instance is not clipped.

    The interpreter of Pallas clips it, and no compiler objects: rows of one instance overwrite the first of the next.
    """
    result = execute(*_stored("clipped_stores", (3, 225, 4)), seed)
    assert {error.kind for error in result.errors} == {"two stores to one place in global memory"}
    assert {error.at.text.split()[1] for error in result.errors} == {"cp.async.bulk.global.shared::cta.bulk_group"}


# A kernel that is right, for x of (1, 2, 24, 24). What nobody misses in it, and why.
NOT_NEEDED = {
    ("delete bar.sync", 319): "it lets the memory of the last reduction be written again, which nobody does",
    ("delete bar.sync", 437): "nothing follows it; the thread that waits for the stores does so before",
    ("delete commit_group", 407): "the store then belongs to the next group, and all groups are waited for",
    ("all threads copy", 404): "they store the same bytes",
    ("all threads copy", 430): "they store the same bytes",
}


@pytest.mark.slow
def test_synchronization_of_a_real_kernel():
    """Each line of it is taken out or changed, and missed, but for those that are not needed."""
    compiled, inputs = _stored("bulk_copies", (2, 18, 32))
    mutants, left = mutations.survivors(compiled, inputs, seeds=2)
    assert len(mutants) > 50
    # To weaken a barrier to one of a warp is missed where to delete it is.
    same = {"bar.sync becomes bar.warp.sync": "delete bar.sync"}
    assert {(same.get(mutant.change, mutant.change), mutant.line) for mutant in left} == set(NOT_NEEDED)


def test_the_page_shows_a_report_as_it_is():
    """docs/emulator.md has what is reported without the barrier before the first bulk store."""
    compiled, inputs = _stored("bulk_copies", (2, 18, 32))
    lines = compiled.ptx.split("\n")
    assert lines[398].strip() == "bar.sync %r10, 128;"
    result = execute(compiled._replace(ptx="\n".join([*lines[:398], "", *lines[399:]])), inputs, 0)
    page = DATA.parent.parent.parent / "docs" / "emulator.md"
    assert str(result.errors[0]) in page.read_text()


def test_reports_name_both_instructions():
    """The kind, what was touched, and both instructions with their lines."""
    store, load = "st.shared.b32 [%d5], %r10", "ld.shared.b32 %r12, [%d8]"
    body = EXAMPLES[0].body.replace("bar.sync 0;", "").replace(f" {store}", f"\n{store}")
    body = body.replace(f" {load};", f"\n{load};\n")
    reports, _ = EXAMPLES[0].run(body, 0)
    kind, at, other = next(each for each in reports if each.startswith("a load of shared memory that nothing")).split(
        "\n"
    )
    assert re.search(r"\(byte \d+ of shared memory, block 0, thread \d+ after thread \d+\)", kind), kind
    assert re.fullmatch(rf"    {re.escape(load)} +PTX line \d+", at), at
    assert re.fullmatch(rf"    {re.escape(store)} +PTX line \d+", other), other


def test_unknown_instructions_are_found_before_anything_runs():
    with pytest.raises(UnknownInstructionError):
        translate(parse(_HEAD + "tcgen05.fence::before_thread_sync;" + _TAIL))
