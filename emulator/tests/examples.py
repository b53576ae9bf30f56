"""Small kernels with known answers, and bugs that are planted into each: what to replace, and what must be reported."""

from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from emulator.host import Launch
from emulator.launch import Result
from emulator.machine import Machine, Policy
from emulator.memory import Buffer, Global
from emulator.parser import parse
from emulator.report import KernelError
from emulator.tensormap import TensorMap
from emulator.translator import translate

# What a bug must bring about, where it is not a text in a report.
WRONG_RESULT, ANY_REPORT = "a wrong result", ""
_IN, _OUT = 0x10000, 0x100000

_HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 in, .param .u64 out, .param .align 64 .b8 maps[256])
{
 .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<60>; .reg .b64 %d<30>; .reg .f32 %f<40>;
 .shared .align 16 .b8 memory;
 ld.param.b64 %d1, [in]; ld.param.b64 %d2, [out];
 mov.b64 %d20, maps; cvta.param.u64 %d20, %d20; add.s64 %d21, %d20, 128;
 mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;
 mov.b64 %d3, memory; cvt.u32.u64 %r3, %d3;
 setp.eq.s32 %p1, %r1, 0;
 mul.wide.u32 %d4, %r1, 4; add.s64 %d5, %d3, %d4; add.s64 %d6, %d1, %d4; add.s64 %d7, %d2, %d4;
"""
_TAIL = "\n ret;\n}\n"


class Bug(NamedTuple):
    """The first `old` becomes `new`, and some report contains `report`."""

    name: str
    old: str
    new: str
    report: str


class Example(NamedTuple):
    """A kernel of 128 threads a block.

    Attributes:
      body: between a head that loads the parameters and addresses, and a return.
      given, want: the input, and the output.
      box: (sizes, box, swizzle) of the two tensor maps, of the input and of the output.
      zeroed: whether the output is zero before; else nobody wrote it.
    """

    name: str
    body: str
    given: np.ndarray
    want: np.ndarray
    bugs: Sequence[Bug] = ()
    grid: int = 1
    cluster: int = 1
    resident: int | None = None
    box: tuple = ((8, 64), (8, 64), 16)
    zeroed: bool = False

    def run(self, body: str, seed: int) -> tuple[list[str], bool]:
        """What is reported, remarks included, and whether the output is right."""
        program = translate(parse(_HEAD + body + _TAIL))
        policy = Policy.draw(seed)
        policy.resident = self.resident
        poison = None if self.zeroed else np.full(self.want.nbytes, 0xFF, np.uint8)
        memory = Global(
            [
                Buffer("in", _IN, self.given, writable=False),
                Buffer("out", _OUT, np.zeros_like(self.want), writable=True, garbage=poison),
            ]
        )
        maps = {(2, 0): self._tensor_map(_IN), (2, 128): self._tensor_map(_OUT)}
        shape = (self.grid, 1, 1), (self.cluster, 1, 1), (128, 1, 1)
        launch = Launch(*shape, shared_bytes=4096, parameters=[_IN, _OUT, 256], tensor_maps=maps)
        machine = None
        try:
            machine = Machine(program, launch, memory, seed, policy, limit=300_000)
            machine.run()
        except KernelError as violation:
            return [str(violation), *(map(str, machine.errors) if machine else [])], False
        result = Result([memory.buffers[1].values], machine.errors, machine.remarks, machine.executed)
        right = np.array_equal(result.outputs[0], self.want, equal_nan=self.want.dtype.kind == "f")
        return [str(finding) for finding in result.errors + result.remarks], right

    def _tensor_map(self, address):
        # Kernels without bulk copies have small buffers.
        sizes, box, swizzle = self.box if ".bulk" in self.body else ((8,), (8,), 16)
        strides = [4]
        for size in sizes[:-1]:
            strides.append(strides[-1] * size)
        return TensorMap(address, 4, sizes, tuple(strides), box, swizzle)


# Pieces: 64 rows of 32 bytes, or 128 of 16, at the start of shared memory, and an mbarrier at byte 2048.
_INITIALIZE = """
 add.s32 %r4, %r3, 2048; mov.b32 %r5, 128; mov.b32 %r6, 16; mov.b32 %r7, 0;
 @%p1 mbarrier.init.shared::cta.b64 [%r4], %r5;
 fence.mbarrier_init.release.cluster;
 bar.sync 0;
"""
_LOAD = """
 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r4], %r6;
 @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%d20, {%r7, %r7}], [%r4];
"""
_WAIT = """
{ .reg .pred done;
TRY: mbarrier.try_wait.parity.shared.b64 done, [%r4], %r7, 1000;
@done bra.uni DONE; bra.uni TRY;
DONE:
}
"""
_READ = """
 shl.b32 %r8, %r1, 4; cvt.u64.u32 %d8, %r8; add.s64 %d9, %d3, %d8;
 ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%d9];
"""
_WRITE = "\n add.s64 %d10, %d2, %d8; st.global.v4.b32 [%d10], {%r10, %r11, %r12, %r13};\n"
_DOUBLE = """
 shl.b32 %r10, %r10, 1; shl.b32 %r11, %r11, 1; shl.b32 %r12, %r12, 1; shl.b32 %r13, %r13, 1;
 st.shared.v4.b32 [%d9], {%r10, %r11, %r12, %r13};
"""
_STORE = """
 fence.proxy.async.shared::cta;
 bar.sync 1, 128;
 @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d21, {%r7, %r7}], [%r3];
 cp.async.bulk.commit_group;
"""
_END = "\n cp.async.bulk.wait_group.read 0;\n bar.sync 1, 128;\n"
_BULK_LOAD = _INITIALIZE + _LOAD + _WAIT + _READ + _WRITE
_BULK_STORE = _INITIALIZE + _LOAD + _WAIT + _READ + _DOUBLE + _STORE + _END

_NUMBERS = np.arange(512, dtype=np.int32)
_UNORDERED_LOAD = "a load of shared memory that nothing orders after its write"
_UNORDERED_GLOBAL = "a load of out that nothing orders after its write"
_TOO_EARLY = "an asynchronous copy may not have written yet"


def _swizzled(values, mode):
    """What lies in shared memory after a load of dense rows with a swizzle, by another formula than the emulator's.

    Pieces of 16 bytes change places in their row, in another way in each 128 bytes (PTX ISA 5.5.6).
    """
    per_row = mode // 16
    rows = values.view(np.uint8).reshape(-1, per_row, 16)
    result = np.empty_like(rows)
    for row in range(len(rows)):
        for piece in range(per_row):
            result[row, piece ^ (row * mode // 128 % per_row)] = rows[row, piece]
    return result.reshape(-1).view(values.dtype)


def _through_shared_memory():
    return Example(
        "through shared memory",
        """
 ld.global.b32 %r10, [%d6]; st.shared.b32 [%d5], %r10;
 bar.sync 0;
 sub.s32 %r11, 127, %r1; mul.wide.u32 %d8, %r11, 4; add.s64 %d8, %d3, %d8;
 ld.shared.b32 %r12, [%d8]; st.global.b32 [%d7], %r12;
""",
        _NUMBERS[:128],
        _NUMBERS[:128][::-1].copy(),
        [
            Bug("no barrier", "bar.sync 0;", "", _UNORDERED_LOAD),
            Bug("a barrier of one warp", "bar.sync 0;", "bar.sync 1, 32;", ANY_REPORT),
            Bug("a barrier within the warp", "bar.sync 0;", "bar.warp.sync -1;", _UNORDERED_LOAD),
            Bug("a fence without a barrier", "bar.sync 0;", "membar.gl;", _UNORDERED_LOAD),
            Bug("barriers of two numbers", "bar.sync 0;", "shr.u32 %r20, %r1, 6; bar.sync %r20, 64;", ANY_REPORT),
            Bug("a barrier number too high", "bar.sync 0;", "bar.sync 16;", "number 16"),
            Bug("a store out of bounds", "st.global.b32 [%d7]", "st.global.b32 [%d7+4]", "out of bounds"),
            Bug("a load out of bounds", "[%d6]", "[%d6+-8]", "out of bounds"),
            Bug("a store to an input", "st.global.b32 [%d7]", "st.global.b32 [%d6]", "which is an input"),
            Bug("shared memory out of bounds", "[%d8];", "[%d8+3600];", "out of bounds"),
            Bug("misaligned", "[%d8];", "[%d8+2];", "misaligned"),
            Bug("never written", "[%d8];", "[%d8+4];", "nobody wrote"),
            Bug("overwritten too early", "st.global.b32", "st.shared.b32 [%d5], %r12; st.global.b32", "may still read"),
            Bug("half a warp skips the barrier", "bar.sync 0;", _half("bar.sync 0;"), _UNORDERED_LOAD),
            Bug(
                "half a warp waits elsewhere",
                "bar.sync 0;",
                _half("bar.sync 0;") + "shfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;",
                "wait for each other",
            ),
            Bug("a warp that does not come", "bar.sync 0;", _half("bar.sync 0;", 32), "deadlock"),
            Bug("all lanes write one place", "[%d5], %r10", "[%d3], %r10", "different values to one place"),
            Bug("a store to one place in global memory", "[%d7], %r12", "[%d2], %r12", "different values to one place"),
            Bug("a trap", "bar.sync 0;", "bar.sync 0; @%p1 trap;", "trap"),
            Bug("a loop without end", "bar.sync 0;", "bar.sync 0; FOREVER: bra FOREVER;", "limit"),
        ],
    )


def _two_halves():
    body = """
 ld.global.b32 %r10, [%d6]; st.shared.b32 [%d5], %r10;
 shr.u32 %r20, %r1, 6; add.s32 %r20, %r20, 1; bar.sync %r20, 64;
 xor.b32 %r11, %r1, 63; mul.wide.u32 %d8, %r11, 4; add.s64 %d8, %d3, %d8;
 ld.shared.b32 %r12, [%d8]; st.global.b32 [%d7], %r12;
"""
    bugs = [
        Bug("the other half", "xor.b32 %r11, %r1, 63", "xor.b32 %r11, %r1, 127", _UNORDERED_LOAD),
        Bug("counts that differ", "bar.sync %r20, 64", "shl.b32 %r21, %r20, 6; bar.sync 1, %r21", ANY_REPORT),
    ]
    return Example("two halves with barriers of their own", body, _NUMBERS[:128], _NUMBERS[:128] ^ 63, bugs)


def _half(instruction, first=16):
    return f"setp.lt.u32 %p5, %r1, {first}; @%p5 bra OTHERS; {instruction}\nOTHERS: "


def _bulk_loads():
    yield Example(
        "a bulk load",
        _BULK_LOAD,
        _NUMBERS,
        _NUMBERS,
        [
            Bug("no wait", _WAIT, "", _TOO_EARLY),
            Bug("fewer bytes expected", "mov.b32 %r6, 16", "mov.b32 %r6, 8", ANY_REPORT),
            Bug("more bytes expected", "mov.b32 %r6, 16", "mov.b32 %r6, 32", "deadlock"),
            Bug("too many arrivals", "mov.b32 %r5, 128", "mov.b32 %r5, 64", ANY_REPORT),
            Bug("too few arrivals", "mov.b32 %r5, 128", "mov.b32 %r5, 129", "deadlock"),
            Bug("the other parity", "[%r4], %r7, 1000", "[%r4], 1, 1000", _TOO_EARLY),
            Bug("no initialization", "@%p1 mbarrier.init.shared::cta.b64 [%r4], %r5;", "", "is not initialized"),
            Bug(
                "initialized twice",
                "fence.mbarrier",
                "@%p1 mbarrier.init.shared::cta.b64 [%r4], %r5; fence.mbarrier",
                "twice",
            ),
            Bug("initialized by all", "@%p1 mbarrier.init", "mbarrier.init", "threads initialize"),
            Bug("no barrier after the initialization", "bar.sync 0;", "", "initialized"),
            Bug(
                "no fence after the initialization", "fence.mbarrier_init.release.cluster;", "", "no fence made visible"
            ),
            Bug("coordinates of another row", "{%r7, %r7}", "{%r7, 1}", WRONG_RESULT),
            Bug("all threads copy", "@%p1 cp.async.bulk", "cp.async.bulk", ANY_REPORT),
            Bug("an address between", "[%r3], [%d20", "[%r9], [%d20", ANY_REPORT),
            Bug("over the mbarrier", "[%r3], [%d20", "[%r4], [%d20", ANY_REPORT),
            Bug("no tensor map", "[%d20, ", "[%d1, ", "no tensor map"),
            Bug("a store into what is loaded", _WAIT, " st.shared.b32 [%d5], %r1;" + _WAIT, "may still write"),
            Bug(
                "written before, no proxy fence", _LOAD, " st.shared.b32 [%d5], %r1; bar.sync 0;" + _LOAD, "proxy fence"
            ),
            Bug("not waited for before the end", _WAIT + _READ + _WRITE, "", "a copy still writes"),
        ],
    )
    for mode, width in ((32, 8), (64, 16), (128, 32)):
        box = (width, 512 // width)
        yield Example(f"swizzle {mode}", _BULK_LOAD, _NUMBERS, _swizzled(_NUMBERS, mode), box=(box, box, mode))
    yield Example(
        "a bulk load without a tensor map",
        _BULK_LOAD.replace(".tensor.2d", "").replace("[%d20, {%r7, %r7}], [%r4]", "[%d1], 2048, [%r4]"),
        _NUMBERS,
        _NUMBERS,
        [
            Bug("too much", "[%d1], 2048", "[%d1], 2064", ANY_REPORT),
            Bug("no multiple of 16", "[%d1], 2048", "[%d1], 2040", "multiples of 16"),
        ],
    )
    # Rows 60 to 123 of 64, columns -4 to 3 of 8: all but 4 rows of half the width are zero.
    clipped = np.zeros((64, 8), np.int32)
    clipped[:4, 4:] = _NUMBERS.reshape(64, 8)[60:, :4]
    beyond = _BULK_LOAD.replace("{%r7, %r7}", "{-4, 60}")
    yield Example("a bulk load beyond the end", beyond, _NUMBERS, clipped.reshape(-1))


def _bulk_stores():
    fence, unfenced = "fence.proxy.async.shared::cta;", "without fence.proxy.async"
    still_reads = "still reads its shared memory"
    yield Example(
        "a bulk store",
        _BULK_STORE,
        _NUMBERS,
        2 * _NUMBERS,
        [
            Bug("no fence", fence, "", unfenced),
            Bug("a fence of one thread", fence, "@%p1 " + fence, unfenced),
            Bug("the fence after the barrier", fence + "\n bar.sync 1, 128;", "bar.sync 1, 128; " + fence, unfenced),
            Bug("no barrier", "bar.sync 1, 128;\n @%p1", "@%p1", "nothing orders before it"),
            Bug("no wait at the end", _END, "", still_reads),
            Bug("the wait leaves one", "wait_group.read 0", "wait_group.read 1", still_reads),
            Bug("no commit", " cp.async.bulk.commit_group;", "", still_reads),
            Bug("twice", _END, _STORE + _END, ANY_REPORT),
            Bug("to an input", "[%d21, {", "[%d20, {", "which is an input"),
            Bug("what was never loaded", "[%r3];\n cp.async.bulk.commit", "[%r30];\n cp.async.bulk.commit", ANY_REPORT),
        ],
    )
    again = _BULK_STORE + " mov.b32 %r20, 7; st.shared.b32 [%d9], %r20;\n"
    yield Example(
        "shared memory after a bulk store",
        again,
        _NUMBERS,
        2 * _NUMBERS,
        [
            Bug("no wait", "cp.async.bulk.wait_group.read 0;", "", "a bulk store may still read"),
            Bug("others do not wait", _END, "\n cp.async.bulk.wait_group.read 0;\n", "a bulk store may still read"),
        ],
    )
    want = np.concatenate([np.full(480, -1, np.int32), 2 * _NUMBERS[:32]])
    beyond = _BULK_STORE.replace("[%d21, {%r7, %r7}]", "[%d21, {%r7, 60}]")
    yield Example("a bulk store beyond the end is clipped", beyond, _NUMBERS, want)
    plain = _BULK_STORE.replace(
        ".tensor.2d.global.shared::cta.bulk_group [%d21, {%r7, %r7}], [%r3]",
        ".global.shared::cta.bulk_group [%d2], [%r3], 2048",
    )
    yield Example(
        "a bulk store without a tensor map",
        plain,
        _NUMBERS,
        2 * _NUMBERS,
        [Bug("nothing clips it", "[%d2], [%r3], 2048", "[%d2+16], [%r3], 2048", "out of bounds")],
    )
    # Each block stores 2048 bytes, the first one 16 more: over the first of the second block.
    rows = "mul.lo.s32 %r20, %r2, 2048; cvt.u64.u32 %d22, %r20; add.s64 %d22, %d2, %d22; mov.b32 %r21, 2048;"
    own = plain.replace(" @%p1 cp.async.bulk.global", f" {rows} @%p1 cp.async.bulk.global").replace(
        "[%d2], [%r3], 2048", "[%d22], [%r3], %r21"
    )
    both = np.concatenate([2 * _NUMBERS, 2 * _NUMBERS])
    more = "setp.eq.u32 %p6, %r2, 0; selp.b32 %r21, 2064, 2048, %p6;"
    bug = Bug(
        "rows of one sample over the next", "mov.b32 %r21, 2048;", more, "two stores to one place in global memory"
    )
    yield Example("bulk stores of two blocks", own, _NUMBERS, both, [bug], grid=2)


def _between_blocks():
    meet = """
 setp.ne.s32 %p2, %r2, 0; @%p2 bra READ;
 ld.global.b32 %r10, [%d6]; st.global.b32 [%d7], %r10;
 bar.sync 0;
 @%p1 red.release.gpu.global.add.u32 [%d2+1024], 1;
 bra END;
READ:
 @!%p1 bra ON;
{ .reg .pred less; .reg .u32 seen;
AGAIN: ld.acquire.gpu.global.u32 seen, [%d2+1024];
 setp.lt.u32 less, seen, 1; @less bra AGAIN; }
ON:
 bar.sync 2;
 ld.global.b32 %r11, [%d7]; st.global.b32 [%d7+512], %r11;
END:
"""
    want = np.concatenate([_NUMBERS[:128], _NUMBERS[:128], np.array([1], np.int32)])
    bugs = [
        Bug("no release", "red.release.gpu", "red.relaxed.gpu", _UNORDERED_GLOBAL),
        Bug("no acquire", "ld.acquire.gpu", "ld.relaxed.gpu", _UNORDERED_GLOBAL),
        Bug("no barrier before", "bar.sync 0;", "", _UNORDERED_GLOBAL),
        Bug("no barrier after", "bar.sync 2;", "", _UNORDERED_GLOBAL),
        Bug("no wait", "@less bra AGAIN;", "", _UNORDERED_GLOBAL),
        Bug("one more to wait for", "seen, 1;", "seen, 2;", "deadlock"),
        Bug("a non-coherent load", "ld.global.b32 %r11", "ld.global.nc.b32 %r11", "non-coherent"),
    ]
    yield Example("two blocks and a counter", meet, _NUMBERS[:128], want, bugs, grid=2, zeroed=True)
    fences = meet.replace("@%p1 red.release.gpu", "@%p1 fence.acq_rel.gpu; @%p1 red.relaxed.gpu").replace(
        "ld.acquire.gpu", "ld.relaxed.gpu"
    )
    fences = fences.replace("ON:\n", " fence.acq_rel.gpu;\nON:\n")
    bugs = [
        Bug("no fence before", "@%p1 fence.acq_rel.gpu;", "", _UNORDERED_GLOBAL),
        Bug("no fence after", " fence.acq_rel.gpu;\nON", "ON", _UNORDERED_GLOBAL),
    ]
    yield Example("two blocks and fences", fences, _NUMBERS[:128], want, bugs, grid=2, zeroed=True)
    backwards = meet.replace("setp.ne.s32 %p2, %r2, 0", "setp.eq.s32 %p2, %r2, 0")
    bug = Bug("only one block at a time", "END:", "END:", "deadlock")
    yield Example(
        "a block waits for a later one", backwards, _NUMBERS[:128], want, [bug], grid=2, zeroed=True, resident=1
    )


def _clusters():
    exchange = """
 shl.b32 %r8, %r2, 9; cvt.u64.u32 %d8, %r8; add.s64 %d9, %d7, %d8;
 ld.global.b32 %r10, [%d6]; add.s32 %r10, %r10, %r2; st.global.b32 [%d9], %r10;
 barrier.cluster.arrive.release.aligned;
 barrier.cluster.wait.acquire.aligned;
 xor.b32 %r9, %r8, 512; cvt.u64.u32 %d10, %r9; add.s64 %d11, %d7, %d10;
 ld.global.b32 %r11, [%d11]; st.global.b32 [%d9+1024], %r11;
"""
    n = _NUMBERS[:128]
    both = "barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;"
    bugs = [
        Bug("a relaxed arrival", "arrive.release", "arrive.relaxed", _UNORDERED_GLOBAL),
        Bug("no wait", "barrier.cluster.wait.acquire.aligned;", "", _UNORDERED_GLOBAL),
        Bug("no arrival", "barrier.cluster.arrive.release.aligned;", "", "without an arrival"),
        Bug("a barrier of the block", both, "bar.sync 0;", _UNORDERED_GLOBAL),
        Bug(
            "two arrivals",
            "barrier.cluster.wait",
            "barrier.cluster.arrive.release.aligned; barrier.cluster.wait",
            "second arrival",
        ),
    ]
    want = np.concatenate([n, n + 1, n + 1, n])
    yield Example("a cluster", exchange, n, want, bugs, grid=2, cluster=2)
    remote = """
 add.s32 %r4, %r3, 2048; mov.b32 %r5, 2; mov.b32 %r7, 0;
 @%p1 mbarrier.init.shared::cta.b64 [%r4], %r5;
 fence.mbarrier_init.release.cluster;
 barrier.cluster.arrive.relaxed.aligned;
 barrier.cluster.wait.aligned;
 setp.lt.u32 %p3, %r1, 2;
 { .reg .b32 there; @%p3 mapa.shared::cluster.u32 there, %r4, %r1;
 @%p3 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }
"""
    remote += (
        _WAIT
        + """
 mul.wide.u32 %d8, %r2, 512; add.s64 %d9, %d7, %d8; st.global.b32 [%d9], %r1;
 barrier.cluster.arrive.relaxed.aligned;
 barrier.cluster.wait.aligned;
"""
    )
    first = " barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.aligned;\n setp"
    bugs = [
        Bug("no cluster barrier before", first, " bar.sync 0;\n setp", "initialized"),
        Bug("no fence", "fence.mbarrier_init.release.cluster;", "", "initialized"),
        Bug("an arrival less", "%p3, %r1, 2", "%p3, %r1, 1", "deadlock"),
        Bug("a block that is not there", "there, %r4, %r1", "there, %r4, 2", "rank 2 of 2"),
    ]
    yield Example("mbarriers of a cluster", remote, n, np.concatenate([n, n]), bugs, grid=2, cluster=2)


def _copies_of_threads():
    body = """
 shl.b32 %r8, %r1, 4; cvt.u64.u32 %d8, %r8; add.s64 %d9, %d3, %d8; add.s64 %d11, %d1, %d8;
 cp.async.cg.shared.global [%d9], [%d11], 16;
 cp.async.commit_group;
 cp.async.wait_group 0;
 bar.sync 0;
 sub.s32 %r9, 2032, %r8; cvt.u64.u32 %d12, %r9; add.s64 %d13, %d3, %d12;
 ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%d13];
"""
    bugs = [
        Bug("the wait leaves one", "wait_group 0", "wait_group 1", _TOO_EARLY),
        Bug("no wait", "cp.async.wait_group 0;", "", _TOO_EARLY),
        Bug("no commit", "cp.async.commit_group;", "", _TOO_EARLY),
        Bug("no barrier", "bar.sync 0;", "", ANY_REPORT),
        Bug(
            "the barrier before the wait",
            "cp.async.wait_group 0;\n bar.sync 0;",
            "bar.sync 0; cp.async.wait_group 0;",
            ANY_REPORT,
        ),
        Bug("beyond the buffer", "[%d11], 16", "[%d11+16], 16", "out of bounds"),
        Bug(
            "a store meanwhile",
            " cp.async.wait_group",
            " st.shared.b32 [%d9], %r1; cp.async.wait_group",
            "may still write",
        ),
        Bug("8 bytes past the first level", "[%d11], 16", "[%d11], 8", "8 bytes"),
    ]
    want = _NUMBERS.reshape(128, 4)[::-1].reshape(-1).copy()
    yield Example("cp.async", body + _WRITE, _NUMBERS, want, bugs)


def _divergence():
    body = """
 TABLE: .branchtargets A, B, C, A;
 and.b32 %r10, %r1, 3; mov.b32 %r11, 0; mov.b32 %r12, 100;
LOOP: add.s32 %r11, %r11, 1; setp.le.u32 %p4, %r11, %r10; @%p4 bra LOOP;
 brx.idx %r10, TABLE;
A: add.s32 %r12, %r12, 1; bra.uni J;
B: add.s32 %r12, %r12, 2; bra.uni J;
C: add.s32 %r12, %r12, 4;
J: shfl.sync.bfly.b32 %r13, %r12, 1, 31, -1;
 mul.lo.s32 %r14, %r13, 1000; add.s32 %r14, %r14, %r11; st.global.b32 [%d7], %r14;
"""
    lane = np.arange(128) & 3
    want = ((100 + np.array([1, 2, 4, 1])[lane ^ 1]) * 1000 + lane + 1).astype(np.int32)
    shuffle = "shfl.sync.bfly.b32 %r13, %r12, 1, 31, -1;"
    bugs = [
        Bug("a shuffle in a branch", "C: add", f"C: {shuffle} add", "wait for each other"),
        Bug("an entry too many", "and.b32 %r10, %r1, 3", "and.b32 %r10, %r1, 7", "entry"),
    ]
    yield Example("divergence", body, _NUMBERS, want, bugs)


def _arithmetic():
    x = np.array([1.0, -2.5, np.nan, 3.0e38, -0.0, 1e-40, 0.3333, 65504.0] * 16, np.float32)
    third = np.array([0x3EAAAAAB], np.uint32).view(np.float32)[0]
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) * third + x
        near = exact.astype(np.float32)
        half = (x * 2).astype(ml_dtypes.bfloat16)
        flushed = np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)
        rows = [
            ("mul.f32 {}, %f1, 0f40000000;", x * 2),
            ("fma.rn.f32 {}, %f1, %f1, 0f3F800000;", x.astype(np.float64) ** 2 + 1),
            (
                "fma.rm.f32 {}, %f1, 0f3EAAAAAB, %f1;",
                np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near),
            ),
            ("max.NaN.f32 {}, %f1, 0f00000000;", np.maximum(x, 0)),
            ("min.f32 {}, %f1, 0f00000000;", np.fmin(x, 0)),
            ("setp.gt.f32 %p5, %f1, 0f00000000; selp.f32 {}, %f1, 0f00000000, %p5;", np.where(x > 0, x, 0)),
            ("setp.leu.f32 %p6, %f1, 0f00000000; selp.f32 {}, 0f3F800000, 0f00000000, %p6;", ~(x > 0)),
            ("cvt.rn.bf16x2.f32 %r10, %f1, %f2; mov.b32 {{%h1, %h2}}, %r10; cvt.f32.bf16 {}, %h1;", half),
            ("cvt.f32.bf16 {}, %h2;", x.astype(ml_dtypes.bfloat16)),
            ("cvt.rn.f16.f32 %h3, %f1; cvt.f32.f16 {}, %h3;", x.astype(np.float16)),
            ("copysign.f32 {}, %f1, 0f40400000;", np.copysign(3, x)),
            ("neg.f32 {}, %f1;", -x),
            ("abs.f32 {}, %f1;", np.abs(x)),
            ("cvt.sat.f32.f32 {}, %f1;", np.where(np.isnan(x), 0, np.clip(x, 0, 1))),
            ("add.ftz.f32 {}, %f1, 0f00000000;", flushed),
            (
                "cvt.rzi.s32.f32 %r11, %f1; cvt.rn.f32.s32 {}, %r11;",
                np.clip(np.trunc(np.nan_to_num(x)), -(2**31), 2**31 - 1),
            ),
            ("shl.b32 %r12, %r1, 31; shr.s32 %r12, %r12, 31; cvt.rn.f32.s32 {}, %r12;", -(np.arange(128) % 2)),
            ("mul.hi.s32 %r13, %r1, -2147483648; cvt.rn.f32.s32 {}, %r13;", (np.arange(128) * -(2**31)) >> 32),
            (
                "div.u32 %r14, %r1, 7; rem.u32 %r15, %r1, 7; mad.lo.s32 %r16, %r14, 7, %r15; cvt.rn.f32.u32 {}, %r16;",
                np.arange(128),
            ),
            ("mov.b64 %d8, {{%r1, %r14}}; mov.b64 {{%r17, %r18}}, %d8; cvt.rn.f32.u32 {}, %r18;", np.arange(128) // 7),
            (
                "vote.sync.ballot.b32 %r19, %p1, -1; clz.b32 %r20, %r19; cvt.rn.f32.u32 {}, %r20;",
                np.repeat([31, 32, 32, 32], 32),
            ),
            ("shfl.sync.idx.b32 %r21, %r1, 5, 31, -1; cvt.rn.f32.u32 {}, %r21;", np.arange(128) // 32 * 32 + 5),
            (
                "shfl.sync.up.b32 %r22|%p7, %r1, 1, 0, -1; selp.f32 {}, 0f3F800000, 0f00000000, %p7;",
                np.arange(128) % 32 > 0,
            ),
            (
                "mov.b64 %d9, {{%f1, %f1}}; mov.b64 %d10, 0x4000000040400000; mul.rn.f32x2 %d11, %d9, %d10; "
                "mov.b64 {{%r24, %r25}}, %d11; mov.b32 {}, %r25;",
                x * 2,
            ),
            ("add.rn.f32x2 %d12, %d10, %d10; mov.b64 {{%r26, %r27}}, %d12; mov.b32 {}, %r26;", np.full(128, 6.0)),
            ("prmt.b32 %r23, %r1, 0, 0x4440; cvt.rn.f32.u32 {}, %r23;", np.arange(128)),
            (
                "mul.lo.s32 %r27, %r1, 5; cvt.s32.s8 %r28, %r27; cvt.rn.f32.s32 {}, %r28;",
                (5 * np.arange(128)).astype(np.int8),
            ),
            (
                "cvt.u16.u32 %h4, %r27; cvt.s16.s8 %h5, %h4; cvt.rn.f32.s16 {}, %h5;",
                (5 * np.arange(128)).astype(np.int8),
            ),
        ]
        body, want = " ld.global.f32 %f1, [%d6];\n", []
        for i, (code, value) in enumerate(rows):
            body += f" {code.format(f'%f{i + 2}')} st.global.f32 [%d7+{512 * i}], %f{i + 2};\n"
            want.append(np.asarray(value).astype(np.float32))
    yield Example("arithmetic", body, x, np.concatenate(want))


EXAMPLES = [
    _through_shared_memory(),
    _two_halves(),
    *_bulk_loads(),
    *_bulk_stores(),
    *_between_blocks(),
    *_clusters(),
    *_copies_of_threads(),
    *_divergence(),
    *_arithmetic(),
]
