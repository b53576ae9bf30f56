"""What norm and activation add to a training block, in memory traffic, counted on code compiled for GPUs and a TPU v5e.

    python -m benchmarks.traffic
    python -m benchmarks.traffic --devices TPU --seeds 2 3 --count 4

The block is matmul, norm, activation and matmul with its loss and all gradients, minus the same block without norm and
activation, on listed shapes and on random ones; with group norm where there is room for several channels in each of 32
groups (8 on a TPU). We count the bytes that are read and written, in sizes of x; caches are ignored, so it is no time.
On a GPU the matmuls themselves are not counted. On a TPU, where XLA fuses a norm with the matmuls beside it, all
traffic with HBM is. The floor is 5: x in and y out forward, x and dy in and dx out backward. The kernel is taken
explicitly.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Nothing is run: without autotuning the compiler needs no GPU. Both are read when JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.aot import GPUS, Compiler
from benchmarks.aot_tpu import VECTOR_MEMORY, TpuCompiler
from benchmarks.contenders import BASELINE, KERNEL, PLAIN, STABLE, Norm, norm_of
from benchmarks.hlo import Operation, operations
from benchmarks.shapes import CHANNEL_AXIS, Case, Layout, listed_on_a_gpu, random_blocks, with_groups
from benchmarks.turns import mean_and_range
from jaxnorm import explain

TPU = "TPU"
NORMS = (BASELINE, PLAIN, KERNEL)
TPU_NORMS = (BASELINE, STABLE, PLAIN)

# Of random shapes on a GPU.
ELEMENTS = (2**17, 2**26)

# Units that a norm adds to the block: moved, and of temporary memory.
Units = tuple[float, float]


def matmul(x: jax.Array, weight: jax.Array, layout: Layout) -> jax.Array:
    """Over the channels, which stay where they are."""
    if layout == "channels-last":
        return x @ weight
    batch, channels, *spatial = x.shape
    weights = jnp.broadcast_to(weight, (batch, channels, channels))
    return (weights @ x.reshape(batch, channels, -1)).reshape(batch, channels, *spatial)


def block_of(norm: Norm | None, layout: Layout) -> Callable[..., Any]:
    """(x, first, second, gamma, beta) -> the loss and all gradients."""

    def loss(x: jax.Array, first: jax.Array, second: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
        hidden = matmul(x, first, layout)
        if norm is not None:
            hidden = norm(hidden, gamma, beta)
        return jnp.sum(jnp.square(matmul(hidden, second, layout)).astype(jnp.float32))

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))


def count(compiler: Compiler | TpuCompiler, name: str | None, case: Case) -> Units:
    """Units of the block with that norm, or without one."""
    channels = case.shape.channels
    x = jax.ShapeDtypeStruct(case.array, case.dtype)
    weight = jax.ShapeDtypeStruct((channels, channels), case.dtype)
    value = jax.ShapeDtypeStruct((channels,), jnp.float32)
    block = block_of(None if name is None else norm_of(name, case), case.layout)
    compiled = compiler.lower(block, x, weight, weight, value, value).compile()
    found = operations(compiled.as_text())
    if isinstance(compiler, Compiler):
        found = [operation for operation in found if not is_matmul(operation)]
    unit = case.shape.size * x.dtype.itemsize
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return sum(operation.moved for operation in found) / unit, temporary / unit


def added(compiler: Compiler | TpuCompiler, names: Sequence[str], case: Case) -> dict[str, Units]:
    """For each norm, count with it minus count without."""
    moved, temporary = count(compiler, None, case)
    with_norm = {name: count(compiler, name, case) for name in names}
    return {name: (units[0] - moved, units[1] - temporary) for name, units in with_norm.items()}


def is_matmul(operation: Operation) -> bool:
    """A gemm fusion of XLA's own, a dot, or a call of cuBLAS."""
    return operation.name.startswith("gemm_fusion") or operation.opcode == "dot" or "__cublas" in operation.line


def fits(gpu: str, case: Case) -> bool:
    """Whether the kernel can run."""
    found = explain(
        jax.ShapeDtypeStruct(case.array, case.dtype),
        group_size=case.group_size,
        channel_axis=CHANNEL_AXIS[case.layout],
        activation=getattr(jax.nn, case.activation),
        implementation="pallas",
        device=gpu,
    )
    return all(one.bytes_moved is not None for one in (found.forward, found.backward))


def cases_for(device: str, seeds: list[int], number: int, quick: bool) -> list[Case]:
    """The listed ones, the same with group norm, then the random ones."""
    if quick:
        return random_blocks(seeds[0], 1, (2**17, 2**18)) if device != TPU else tpu_cases(seeds[0], 1)
    if device == TPU:
        cases = [case for seed in seeds for case in tpu_cases(seed, number)]
        return [*cases, *with_groups(cases, 8)]
    cases = listed_on_a_gpu()
    return [*cases, *with_groups(cases, 32), *(c for seed in seeds for c in random_blocks(seed, number, ELEMENTS))]


def tpu_cases(seed: int, number: int) -> list[Case]:
    """Channels-last, and in bfloat16 still larger than vector memory, since what fits may never reach HBM."""
    cases = random_blocks(seed, 5 * number, (VECTOR_MEMORY // 2, 2**28))
    return [case for case in cases if case.layout == "channels-last"][:number]


def compile_here(device: str, cases: list[Case]) -> None:
    """Prints a row per line as JSON."""
    compiler = TpuCompiler() if device == TPU else Compiler(device)
    for case in cases:
        names = TPU_NORMS if device == TPU else NORMS if fits(device, case) else NORMS[:2]
        kind = ("listed" if case.seed is None else "random") + (", group norm" if case.group_size else "")
        row = {"device": device, "case": str(case), "kind": kind, "units": added(compiler, names, case)}
        print(json.dumps(row), flush=True)


def rows_of(device: str, cases: int, options: list[str]) -> list[dict[str, Any]]:
    """A process compiles for one device: the compiler refuses a second, newer architecture."""
    command = [sys.executable, "-m", "benchmarks.traffic", *options, "--devices", device, "--compile"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in report.progress(range(cases), f"compiling for {device}")]
    if process.returncode or not all(lines):
        raise RuntimeError(f"compiling for {device} failed: see above")
    return [json.loads(line) for line in lines]


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """The kinds of cases of a device."""
    names = TPU_NORMS if rows[0]["device"] == TPU else NORMS
    parts = [f"## {rows[0]['device']}"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found = [row for row in rows if row["kind"] == kind]
        parts += [_cases(found, names), _means(found, names)]
    return parts


def _cases(rows: list[dict[str, Any]], names: Sequence[str]) -> str:
    def cell(units: Units | None) -> str:
        return "does not fit" if units is None else f"{units[0]:.2f} / {units[1]:+.2f}"

    lines = [[row["case"], *(cell(row["units"].get(name)) for name in names)] for row in rows]
    return report.table(["sizes of x moved / temporary memory", *names], lines)


def _means(rows: list[dict[str, Any]], names: Sequence[str]) -> str:
    """In words, with the worst of each."""
    found = {name: [row["units"][name][0] for row in rows if name in row["units"]] for name in names}
    means = "; ".join(f"{name} {mean_and_range(units)}" for name, units in found.items() if units)
    shares = [ours / flax for ours, flax in zip(found[PLAIN], found[BASELINE], strict=True)]
    return (
        f"Geometric means of what is moved (lowest to highest): {means}. {PLAIN} moves "
        f"{statistics.geometric_mean(shares):.2f} of what {BASELINE} does, at most {max(shares):.2f}."
    )


def main(argv: list[str] | None = None) -> None:
    """Compiles, counts, prints, writes."""
    parser = report.parser(__doc__)
    devices = [*GPUS, TPU]
    parser.add_argument(
        "--devices", nargs="+", choices=devices, default=["H100", "A100"], metavar="NAME", help=", ".join(devices)
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="of random shapes (default: a new one, which is printed)")
    parser.add_argument("--count", type=int, default=24, help="random shapes of each seed (default 24)")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    seeds = chosen.seeds or [random.SystemRandom().randrange(10**6)]
    cases = {device: cases_for(device, seeds, chosen.count, chosen.quick) for device in chosen.devices}
    if chosen.compile:
        compile_here(chosen.devices[0], cases[chosen.devices[0]])
        return
    options = ["--seeds", *map(str, seeds), "--count", str(chosen.count), *["--quick"] * chosen.quick]
    rows = {device: rows_of(device, len(found), options) for device, found in cases.items()}
    how = (__doc__ or "").strip().split("\n\n")[-1]
    parts = [how, *(part for found in rows.values() for part in tables(found))]
    everything = [row for found in rows.values() for row in found]
    report.publish(chosen, "What norm and activation add to a training block", parts, report.machine(), everything)


if __name__ == "__main__":
    main()
