"""What the compiler made of the kernel: registers, shared memory and the instructions of its loops.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --gpus H100 --activations relu gelu --dtypes float32

Compiled for GPUs that are not there. A loop here is an innermost one that loads from shared memory; its instructions
are given per 32 elements, which is one element of each thread of a warp. What the compiler unrolls completely is in no
loop. An SM of an H100 can issue 77 instructions in the time in which its share of the bandwidth brings 32 numbers of
float32 and takes 32 back. These are counts, and no time.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Iterator

# Nothing is run: without autotuning the compiler needs no GPU. Both are read when JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.aot import GPUS, Compiler, shared_memory
from benchmarks.contenders import KERNEL, norm_of, step
from benchmarks.machine_code import loops_of
from benchmarks.shapes import ACTIVATIONS, DTYPES, ON_A_GPU, Case, listed_on_a_gpu

# Arrays of the size of x that a pass loads.
LOADED = {"forward": 1, "backward": 2}


@dataclasses.dataclass(frozen=True)
class Row:
    """One pass of a call.

    Attributes:
      registers: per thread.
      spilled: bytes per thread that did not fit into registers.
      shared_memory: bytes per thread block.
      loops: instructions of each loop per 32 elements, in order.
      stores_elsewhere: stores in a loop to addresses that it does not load from. There must be none, because no barrier
        protects them.
    """

    gpu: str
    case: Case
    pass_name: str
    registers: int
    spilled: int
    shared_memory: int
    loops: list[float]
    stores_elsewhere: int


def count(gpu: str, case: Case) -> list[Row]:
    """Compiles a call with its gradients; a pass that has no kernel has no row."""
    x = jax.ShapeDtypeStruct(case.array, case.dtype)
    parameter = jax.ShapeDtypeStruct((case.shape.channels,), jnp.float32)
    with shared_memory() as asked:
        assembled, listing = _compiler(gpu).listing(step(norm_of(KERNEL, case)), x, parameter, parameter, x)
    found = loops_of(listing)
    rows = []
    for (name, facts), size in zip(assembled.items(), asked, strict=True):
        pass_name = name.removeprefix("jaxnorm_")
        itemsize = x.dtype.itemsize * LOADED[pass_name]
        per_32 = [len(loop.instructions) * itemsize / loop.bytes_loaded for loop in found[name]]
        elsewhere = sum(loop.stores_elsewhere for loop in found[name])
        rows.append(Row(gpu, case, pass_name, **facts, shared_memory=size, loops=per_32, stores_elsewhere=elsewhere))
    return rows


@functools.cache
def _compiler(gpu: str) -> Compiler:
    return Compiler(gpu)


def main(argv: list[str] | None = None) -> None:
    """Compiles, counts, prints, writes."""
    parser = report.parser(__doc__)
    gpus = ["H100", "B200"]
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=gpus, help=f"default: {' '.join(gpus)}")
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=ACTIVATIONS, help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    parser.add_argument("--shapes", type=int, default=len(ON_A_GPU), metavar="N", help="the first N (default: all)")
    chosen = parser.parse_args(argv)
    cases = [
        dataclasses.replace(case, activation=activation)
        for case in listed_on_a_gpu(chosen.shapes)
        for activation in chosen.activations
        if case.dtype in chosen.dtypes
    ]
    if chosen.quick:
        chosen.gpus, cases = chosen.gpus[:1], cases[:1]
    rows = list(_rows(chosen.gpus, cases))
    report.publish(chosen, "What the compiler made of the kernel", tables(rows), report.machine(), rows)


def _rows(gpus: list[str], cases: list[Case]) -> Iterator[Row]:
    """In one process per GPU: the compiler refuses a second, newer architecture."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {gpu: stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, spawn)) for gpu in gpus}
        pending = [pools[gpu].submit(count, gpu, case) for gpu in gpus for case in cases]
        for future in report.progress(pending, "compiling"):
            yield from future.result()


def tables(rows: list[Row]) -> list[str]:
    """One per GPU."""
    header = ["", "pass", "registers", "spilled", "shared memory", "instructions of the loops per 32 elements"]
    parts = [(__doc__ or "").strip().split("\n\n")[-1]]
    for gpu in dict.fromkeys(row.gpu for row in rows):
        lines = [
            [
                str(row.case),
                row.pass_name,
                str(row.registers),
                str(row.spilled),
                str(row.shared_memory),
                ", ".join(f"{value:.1f}" for value in row.loops),
            ]
            for row in rows
            if row.gpu == gpu
        ]
        parts += [f"## {gpu}", report.table(header, lines)]
    return parts


if __name__ == "__main__":
    main()
