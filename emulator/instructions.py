"""What instructions mean: one table, with the section of the PTX ISA (9.0) that defines each.

A pattern is an opcode in which [.x] may be missing, <name:a|b> is one of several words, and {int}, {bits}, ... are
types: the type of {int} is called T in the other columns, that of {to} is D, and W is twice as wide as T.

An instruction that touches registers alone has the types of its results and operands, `results = operands`, and its
meaning as a Python expression of the operands a, b, c, d (emulator/arithmetic.py). .ftz and .sat need no mention.
Any other instruction waits, or touches what other threads see; its meaning is a function (emulator/machine.py).

What is not in the table is refused. So are strong accesses and fences of a scope below the GPU, since everything that
they hand on is taken to reach all blocks.
"""

import functools
import re
from typing import NamedTuple


class Registers(NamedTuple):
    """An instruction that touches registers alone."""

    pattern: str
    section: str
    types: str
    expression: str


class Visible(NamedTuple):
    """An instruction that is executed by a function of the machine."""

    pattern: str
    section: str
    function: str


_INTEGER_COMPARISON = {
    **{"eq": "a == b", "ne": "a != b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b"},
    **{"lo": "a < b", "ls": "a <= b", "hi": "a > b", "hs": "a >= b"},
}
# Those that end in u hold for NaN as well.
_FLOAT_COMPARISON = {
    **{"eq": "a == b", "ne": "(a < b) | (a > b)", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b"},
    **{"equ": "~((a < b) | (a > b))", "neu": "a != b"},
    **{"ltu": "~(a >= b)", "leu": "~(a > b)", "gtu": "~(a <= b)", "geu": "~(a < b)"},
    **{"num": "(a == a) & (b == b)", "nan": "(a != a) | (b != b)"},
}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}


def _comparisons(comparison, suffix, kind):
    """setp, alone and combined with another predicate."""
    for name, expression in comparison.items():
        yield Registers(f"setp.{name}{suffix}", "9.7.6 setp", f"pred = {kind} {kind}", expression)
        for word, operator in _LOGIC.items():
            combined = f"({expression}) {operator} c"
            yield Registers(f"setp.{name}.{word}{suffix}", "9.7.6 setp", f"pred = {kind} {kind} pred", combined)


TABLE = [
    # Integer arithmetic
    Registers("add.{int}", "9.7.1 add", "T = T T", "a + b"),
    Registers("sub.{int}", "9.7.1 sub", "T = T T", "a - b"),
    Registers("mul.lo.{int}", "9.7.1 mul", "T = T T", "a * b"),
    Registers("mul.hi.{int32}", "9.7.1 mul", "T = T T", "mul_high(a, b)"),
    Registers("mul.wide.{int32}", "9.7.1 mul", "W = T T", "a.astype(W) * b.astype(W)"),
    Registers("mad.lo.{int}", "9.7.1 mad", "T = T T T", "a * b + c"),
    Registers("mad.wide.{int32}", "9.7.1 mad", "W = T T W", "a.astype(W) * b.astype(W) + c"),
    Registers("div.{int}", "9.7.1 div", "T = T T", "divide(a, b)"),
    Registers("rem.{int}", "9.7.1 rem", "T = T T", "remainder(a, b)"),
    Registers("abs.{int}", "9.7.1 abs", "T = T", "np.abs(a)"),
    Registers("neg.{int}", "9.7.1 neg", "T = T", "-a"),
    Registers("min.{int}", "9.7.1 min", "T = T T", "np.minimum(a, b)"),
    Registers("max.{int}", "9.7.1 max", "T = T T", "np.maximum(a, b)"),
    Registers("popc.{bits}", "9.7.1 popc", "u32 = T", "np.bitwise_count(a).astype(u4)"),
    Registers("clz.b32", "9.7.1 clz", "u32 = b32", "leading_zeros(a)"),
    # Floating point
    Registers("add[.rn]{ftz}{sat}.f32", "9.7.3 add", "f32 = f32 f32", "a + b"),
    Registers("sub[.rn]{ftz}{sat}.f32", "9.7.3 sub", "f32 = f32 f32", "a - b"),
    Registers("mul[.rn]{ftz}{sat}.f32", "9.7.3 mul", "f32 = f32 f32", "a * b"),
    Registers("mul.rz.f32", "9.7.3 mul", "f32 = f32 f32", "fma_to_zero(a, b, f4(0))"),
    Registers("fma.rn{ftz}{sat}.f32", "9.7.3 fma", "f32 = f32 f32 f32", "fma(a, b, c)"),
    Registers("fma.rm.f32", "9.7.3 fma", "f32 = f32 f32 f32", "fma_down(a, b, c)"),
    Registers("fma.rz.f32", "9.7.3 fma", "f32 = f32 f32 f32", "fma_to_zero(a, b, c)"),
    Registers("add[.rn].f32x2", "9.7.3 add", "b64 = b64 b64", "in_pairs(np.add, a, b)"),
    Registers("sub[.rn].f32x2", "9.7.3 sub", "b64 = b64 b64", "in_pairs(np.subtract, a, b)"),
    Registers("mul[.rn].f32x2", "9.7.3 mul", "b64 = b64 b64", "in_pairs(np.multiply, a, b)"),
    Registers("fma.rn.f32x2", "9.7.3 fma", "b64 = b64 b64 b64", "in_pairs(fma, a, b, c)"),
    Registers("neg{ftz}.f32", "9.7.3 neg", "f32 = f32", "-a"),
    Registers("abs{ftz}.f32", "9.7.3 abs", "f32 = f32", "np.abs(a)"),
    Registers("min{ftz}.f32", "9.7.3 min", "f32 = f32 f32", "np.fmin(a, b)"),
    Registers("max{ftz}.f32", "9.7.3 max", "f32 = f32 f32", "np.fmax(a, b)"),
    Registers("min{ftz}.NaN.f32", "9.7.3 min", "f32 = f32 f32", "np.minimum(a, b)"),
    Registers("max{ftz}.NaN.f32", "9.7.3 max", "f32 = f32 f32", "np.maximum(a, b)"),
    Registers("min{ftz}.NaN.f32 3", "9.7.3 min", "f32 = f32 f32 f32", "np.minimum(np.minimum(a, b), c)"),
    Registers("max{ftz}.NaN.f32 3", "9.7.3 max", "f32 = f32 f32 f32", "np.maximum(np.maximum(a, b), c)"),
    Registers("copysign.f32", "9.7.3 copysign", "f32 = f32 f32", "np.copysign(b, a)"),
    Registers("div.rn.f32", "9.7.3 div", "f32 = f32 f32", "(a.astype(f8) / b).astype(f4)"),
    Registers("rcp.rn.f32", "9.7.3 rcp", "f32 = f32", "(1.0 / a.astype(f8)).astype(f4)"),
    Registers("sqrt.rn.f32", "9.7.3 sqrt", "f32 = f32", "np.sqrt(a)"),
    # What the hardware approximates is off by up to the last argument, relatively.
    Registers("div.<how:full|approx>{ftz}.f32", "9.7.3 div", "f32 = f32 f32", "B.near(a.astype(f8) / b, a, 2**-22)"),
    Registers("rcp.approx{ftz}.f32", "9.7.3 rcp", "f32 = f32", "B.near(1.0 / a.astype(f8), a, 2**-23)"),
    Registers("sqrt.approx{ftz}.f32", "9.7.3 sqrt", "f32 = f32", "B.near(np.sqrt(a.astype(f8)), a, 2**-23)"),
    Registers("rsqrt.approx{ftz}.f32", "9.7.3 rsqrt", "f32 = f32", "B.near(1.0 / np.sqrt(a.astype(f8)), a, 2**-22.4)"),
    Registers("ex2.approx{ftz}.f32", "9.7.3 ex2", "f32 = f32", "B.near(np.exp2(a.astype(f8)), a, 2**-22)"),
    Registers("lg2.approx{ftz}.f32", "9.7.3 lg2", "f32 = f32", "B.near(np.log2(a.astype(f8)), a, 2**-22)"),
    Registers("tanh.approx.f32", "9.7.3 tanh", "f32 = f32", "B.near(np.tanh(a.astype(f8)), a, 2**-11)"),
    Registers("sin.approx{ftz}.f32", "9.7.3 sin", "f32 = f32", "B.near(np.sin(a.astype(f8)), a, 2**-20.9)"),
    Registers("cos.approx{ftz}.f32", "9.7.3 cos", "f32 = f32", "B.near(np.cos(a.astype(f8)), a, 2**-20.9)"),
    # float32 and a narrower number
    Registers("add[.rn].f32.<h:f16|bf16>", "9.7.5 add", "f32 = b16 f32", "from_{h}(a) + b"),
    Registers("sub[.rn].f32.<h:f16|bf16>", "9.7.5 sub", "f32 = b16 f32", "from_{h}(a) - b"),
    Registers("fma.rn.f32.<h:f16|bf16>", "9.7.5 fma", "f32 = b16 b16 f32", "fma(from_{h}(a), from_{h}(b), c)"),
    # Comparison and selection
    *_comparisons(_INTEGER_COMPARISON, ".{whole}", "T"),
    *_comparisons(_FLOAT_COMPARISON, "{ftz}.f32", "f32"),
    Registers("selp.{any}", "9.7.6 selp", "T = T T pred", "where(c, a, b)"),
    # Logic and shifts
    *(
        Registers(f"{word}.{{bits}}", f"9.7.8 {word}", "T = T T", f"a {operator} b")
        for word, operator in _LOGIC.items()
    ),
    Registers("not.{bits}", "9.7.8 not", "T = T", "~a"),
    Registers("shl.{bits}", "9.7.8 shl", "T = T u32", "shift_left(a, b)"),
    Registers("shr.{any}", "9.7.8 shr", "T = T u32", "shift_right(a, b)"),
    # Data movement and conversion
    Registers("mov.{any}", "9.7.9 mov", "T = T", "a.copy()"),
    Registers("mov.{bits} parts", "9.7.9 mov", "parts = T", "split_word(a, parts)"),
    Registers("mov.{bits} of parts", "9.7.9 mov", "T = parts", "joined(a, T)"),
    Registers("cvta[.to].<space:global|shared|param>.{int}", "9.7.9 cvta", "T = T", "a.copy()"),
    Registers("prmt.b32", "9.7.9 prmt", "b32 = b32 b32 b32", "permute_bytes(a, b, c)"),
    Registers("cvt.{to}.{from}", "9.7.9 cvt", "D = T", "a.astype(D)"),
    Registers("cvt.rn.f32.{int}", "9.7.9 cvt", "f32 = T", "a.astype(f4)"),
    Registers("cvt.<how:rni|rzi|rmi|rpi>{ftz}.{to}.f32", "9.7.9 cvt", "D = f32", "to_integer(a, '{how}', D)"),
    Registers("cvt.rni{ftz}{sat}.f32.f32", "9.7.9 cvt", "f32 = f32", "np.rint(a)"),
    Registers("cvt.rzi{ftz}{sat}.f32.f32", "9.7.9 cvt", "f32 = f32", "np.trunc(a)"),
    Registers("cvt.rmi{ftz}{sat}.f32.f32", "9.7.9 cvt", "f32 = f32", "np.floor(a)"),
    Registers("cvt.rpi{ftz}{sat}.f32.f32", "9.7.9 cvt", "f32 = f32", "np.ceil(a)"),
    Registers("cvt{ftz}{sat}.f32.f32", "9.7.9 cvt", "f32 = f32", "a.copy()"),
    Registers("cvt.f32.<h:f16|bf16>", "9.7.9 cvt", "f32 = b16", "from_{h}(a)"),
    Registers("cvt.rn.<h:f16|bf16>.f32", "9.7.9 cvt", "b16 = f32", "to_{h}(a)"),
    Registers("cvt.rn.<h:f16|bf16>x2.f32", "9.7.9 cvt", "b32 = f32 f32", "packed(to_{h}(a), to_{h}(b))"),
    Registers("ld.param[::entry].{any}", "9.7.9 ld", "T = parameter", "B.parameter(*a, T)"),
    # Lanes of a warp with each other: all of them come together.
    Registers(
        "shfl.sync.<how:up|down|bfly|idx>.b32",
        "9.7.9 shfl.sync",
        "b32|pred = b32 b32 b32 all",
        "shuffle(a, b, c, '{how}', n)",
    ),
    Registers("elect.sync", "9.7.13 elect.sync", "u32|pred = all", "B.elect(s)"),
    Registers("vote.sync.all.pred", "9.7.13 vote.sync", "pred = pred all", "of_warps(vote(a, False, n).all(1))"),
    Registers("vote.sync.any.pred", "9.7.13 vote.sync", "pred = pred all", "of_warps(vote(a, False, n).any(1))"),
    Registers("vote.sync.ballot.b32", "9.7.13 vote.sync", "b32 = pred all", "of_warps(ballot(vote(a, False, n)))"),
    # Control flow
    Visible("bra[.uni]", "9.7.12 bra", "branch"),
    Visible("brx.idx", "9.7.12 brx.idx", "branch_by_table"),
    Visible("<how:ret|exit>", "9.7.12 ret, exit", "leave"),
    Visible("trap", "9.7.19 trap", "trap"),
    Visible("nanosleep.u32", "9.7.19 nanosleep", "nothing"),
    Visible("griddepcontrol.<how:launch_dependents|wait>", "9.7.13 griddepcontrol", "nothing"),
    Visible("prefetch.tensormap", "9.7.9 prefetch", "prefetch_tensor_map"),
    # Memory
    Visible(
        "ld[.<order:weak|volatile|relaxed|acquire>][.<scope:gpu|sys>][.<space:global|shared|shared::cta>]"
        "[.<nc:nc>][.<v:v2|v4|v8>].{any}",
        "9.7.9 ld",
        "load",
    ),
    Visible(
        "st[.<order:weak|volatile|relaxed|release>][.<scope:gpu|sys>][.<space:global|shared|shared::cta>]"
        "[.<v:v2|v4|v8>].{any}",
        "9.7.9 st",
        "store",
    ),
    Visible(
        "<base:atom|red>[.<order:relaxed|acquire|release|acq_rel>][.<scope:gpu|sys>].global"
        ".<how:add|exch|min|max|inc>.{any}",
        "9.7.13 atom, red",
        "atomic",
    ),
    # Fences and barriers
    Visible("fence.proxy.async[.<space:global|shared::cta|shared::cluster>]", "9.7.13 fence", "fence_proxy"),
    Visible("fence.mbarrier_init.release.cluster", "9.7.13 fence", "fence_mbarrier"),
    Visible("fence.<order:acq_rel|sc|acquire|release>.<scope:gpu|sys>", "9.7.13 fence", "fence"),
    Visible("membar.<scope:gl|sys>", "9.7.13 membar", "fence"),
    Visible("bar[.cta].sync[.aligned]", "9.7.13 bar", "barrier"),
    Visible("bar.warp.sync", "9.7.13 bar.warp.sync", "barrier_of_warp"),
    Visible("barrier.cluster.arrive[.<order:release|relaxed>].aligned", "9.7.13 barrier.cluster", "cluster_arrive"),
    Visible("barrier.cluster.wait[.acquire].aligned", "9.7.13 barrier.cluster", "cluster_wait"),
    Visible("mbarrier.init[.<space:shared|shared::cta>].b64", "9.7.13 mbarrier.init", "mbarrier_init"),
    Visible(
        "mbarrier.arrive[.<tx:expect_tx>][.<order:release|relaxed>][.<scope:cta|cluster>]"
        "[.<space:shared|shared::cta|shared::cluster>].b64",
        "9.7.13 mbarrier.arrive",
        "mbarrier_arrive",
    ),
    Visible(
        "mbarrier.<how:try_wait|test_wait>.parity[.<order:acquire|relaxed>][.<scope:cta|cluster>]"
        "[.<space:shared|shared::cta>].b64",
        "9.7.13 mbarrier.try_wait",
        "mbarrier_wait",
    ),
    Visible("mapa.shared::cluster.u32", "9.7.9 mapa", "map_address"),
    # Asynchronous copies
    Visible("cp.async.<how:ca|cg>.<space:shared|shared::cta>.global", "9.7.9 cp.async", "copy_of_thread"),
    Visible("cp.async.commit_group", "9.7.9 cp.async.commit_group", "commit"),
    Visible("cp.async.<how:wait_group|wait_all>", "9.7.9 cp.async.wait_group", "wait_for_copies_of_thread"),
    Visible(
        "cp.async.bulk.<to:shared::cta|shared::cluster>.global.mbarrier::complete_tx::bytes",
        "9.7.9 cp.async.bulk",
        "bulk_load",
    ),
    Visible("cp.async.bulk.global.shared::cta.bulk_group", "9.7.9 cp.async.bulk", "bulk_store"),
    Visible(
        "cp.async.bulk.tensor.<rank:1|2|3|4|5>d.<to:shared::cta|shared::cluster>.global.mbarrier::complete_tx::bytes",
        "9.7.9 cp.async.bulk.tensor",
        "bulk_load",
    ),
    Visible(
        "cp.async.bulk.tensor.<rank:1|2|3|4|5>d.global.shared::cta.bulk_group",
        "9.7.9 cp.async.bulk.tensor",
        "bulk_store",
    ),
    Visible("cp.async.bulk.commit_group", "9.7.9 cp.async.bulk.commit_group", "bulk_commit"),
    Visible("cp.async.bulk.wait_group[.<read:read>]", "9.7.9 cp.async.bulk.wait_group", "bulk_wait"),
]

_MACROS = {
    "int": "(?P<T>[us](?:16|32|64))",
    "int32": "(?P<T>[us](?:16|32))",
    "from": "(?P<T>[us](?:8|16|32|64))",
    "to": "(?P<D>[us](?:8|16|32|64))",
    "whole": "(?P<T>[bus](?:16|32|64))",
    "bits": "(?P<T>b(?:16|32|64)|pred)",
    "any": "(?P<T>[bus](?:8|16|32|64)|f32|f64|pred)",
    "ftz": r"(?P<ftz>\.ftz)?",
    "sat": r"(?P<sat>\.sat)?",
}


def _compiled(pattern):
    text = re.escape(pattern).replace(r"\[", "(?:").replace(r"\]", ")?").replace(r"\|", "|")
    text = re.sub(r"\\\{(\w+)\\\}", lambda macro: _MACROS[macro[1]], text)
    return re.compile(re.sub(r"<(\w+):([^>]*)>", r"(?P<\1>\2)", text))


_COMPILED = [(_compiled(row.pattern), row) for row in TABLE]


@functools.cache
def find(opcode: str) -> tuple[Registers | Visible, dict[str, str]] | None:
    """The row of an opcode, and the words that its pattern left open."""
    for pattern, row in _COMPILED:
        if found := pattern.fullmatch(opcode):
            return row, {name: word for name, word in found.groupdict().items() if word is not None}
    return None
