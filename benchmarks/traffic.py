"""What the norm costs in a network, counted on what XLA compiles for GPUs that need not be there: Markdown tables.

    python benchmarks/traffic.py
    python benchmarks/traffic.py --gpus B200 L40S --seed 7

A block of matmul, norm, activation and matmul with its loss and all gradients, minus the same block without norm and
activation, on shapes that are listed and on others that are drawn.
Counted are the bytes that all but the matmuls read and write, in sizes of the activation; caches are ignored, so it is
no time. The floor is 5: x in and y out forward, x and dy in and dx out backward. The kernel is taken by name.
"""

import argparse
import functools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

# Nothing is run: without autotuning the compiler needs no GPU. Both are read when JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import flax.linen as nn
import jax
import jax.numpy as jnp
from aot import GPUS, Compiler
from hlo import Operation, operations
from layers import ACTIVATIONS
from report import add_output_options, progress, publish, table
from turns import geometric_mean

from jaxnorm import explain, instance_norm


class Case(NamedTuple):
    """What the block works on: activation is the name of one in ACTIVATIONS."""

    shape: tuple[int, ...]
    channel_axis: int
    dtype: str
    activation: str = "relu"


BOTH, HALF = ("float32", "bfloat16"), ("bfloat16",)
CASES = [
    Case(shape, channel_axis, dtype)
    for shape, channel_axis, dtypes in [
        ((8, 64, 64, 256), -1, BOTH),
        ((2, 128, 128, 128), -1, BOTH),
        ((4, 32, 32, 512), -1, BOTH),
        ((1, 256, 256, 64), -1, BOTH),
        ((1, 512, 512, 64), -1, BOTH),
        ((2, 64, 64, 64, 32), -1, BOTH),
        ((2, 640, 480, 32), -1, HALF),
        ((1, 96, 96, 96, 32), -1, HALF),
        ((2, 128, 128, 128, 32), -1, HALF),
        ((16, 64, 15, 15), 1, BOTH),
        ((8, 32, 7, 7, 7), 1, BOTH),
    ]
    for dtype in dtypes
]
# Elements of what is drawn.
_SMALLEST, _LARGEST = 2**17, 2**26
NORMS = ("flax.linen.InstanceNorm", "jaxnorm, xla", "jaxnorm, kernel")


def draw(seed: int, count: int) -> list[Case]:
    """Half of the sizes are 2^k or 3 * 2^k, as networks have them: XLA compiles those differently.

    Channels are multiples of 8, since others are padded for the tensor cores in half precision, with or without a norm;
    and fewer than a quarter of the rows, so that the weights are small beside x.
    """
    rng = random.Random(seed)

    def size(low: float, high: float, *, is_round: bool) -> int:
        drawn = 2 ** rng.uniform(low, high)
        return rng.choice((1, 3)) * 2 ** round(math.log2(drawn)) if is_round else round(drawn)

    cases: list[Case] = []
    while len(cases) < count:
        is_round = rng.random() < 0.5
        spatial = tuple(size(2, 8, is_round=is_round) for _ in range(rng.randint(1, 3)))
        channels = 8 * size(0, 6, is_round=is_round)
        channel_axis = rng.choice((-1, -1, 1))
        batch = size(0, 5, is_round=False)
        shape = (batch, *spatial, channels) if channel_axis == -1 else (batch, channels, *spatial)
        if _SMALLEST <= math.prod(shape) <= _LARGEST and 4 * channels <= batch * math.prod(spatial):
            cases.append(Case(shape, channel_axis, rng.choice(BOTH), rng.choice(list(ACTIVATIONS))))
    return cases


def norm_of(name, channel_axis, activation="relu"):
    """activation(norm(x, gamma, beta))."""
    if name == NORMS[0]:
        return functools.partial(flax_norm, channel_axis, activation=ACTIVATIONS[activation])
    return functools.partial(
        instance_norm,
        eps=1e-6,
        channel_axis=channel_axis,
        activation=ACTIVATIONS[activation],
        implementation={"jaxnorm, xla": "xla", "jaxnorm, kernel": "pallas"}[name],
    )


def flax_norm(channel_axis, x, gamma, beta, activation=jax.nn.relu, **options):
    layer = nn.InstanceNorm(dtype=x.dtype, feature_axes=channel_axis, **options)
    return activation(layer.apply({"params": {"scale": gamma, "bias": beta}}, x))


def matmul(x, weight, channel_axis):
    """Over the channels, which stay where they are."""
    if channel_axis == -1:
        return x @ weight
    batch, channels, *space = x.shape
    weights = jnp.broadcast_to(weight, (batch, channels, channels))
    return (weights @ x.reshape(batch, channels, -1)).reshape(batch, channels, *space)


def block(norm, channel_axis, x, first, second, gamma, beta):
    """The loss."""
    hidden = matmul(x, first, channel_axis)
    if norm is not None:
        hidden = norm(hidden, gamma, beta)
    return jnp.sum(jnp.square(matmul(hidden, second, channel_axis)).astype(jnp.float32))


def count(compiler: Compiler, name: str | None, case: Case) -> tuple[float, float]:
    """Units that all but the matmuls move, and units of temporary memory; without a name those of the block alone."""
    channels = case.shape[case.channel_axis]
    x = jax.ShapeDtypeStruct(case.shape, case.dtype)
    weight = jax.ShapeDtypeStruct((channels, channels), case.dtype)
    value = jax.ShapeDtypeStruct((channels,), jnp.float32)
    norm = None if name is None else norm_of(name, case.channel_axis, case.activation)
    loss = functools.partial(block, norm, case.channel_axis)
    compiled = compiler.lower(
        jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)), x, weight, weight, value, value
    ).compile()
    unit = math.prod(case.shape) * x.dtype.itemsize
    moved = sum(operation.moved for operation in operations(compiled.as_text()) if not is_matmul(operation))
    return moved / unit, compiled.memory_analysis().temp_size_in_bytes / unit


def added(compiler: Compiler, names: Sequence[str], case: Case) -> dict[str, tuple[float, float]]:
    """By each norm: count with it minus count without."""
    without = count(compiler, None, case)
    return {name: tuple(a - b for a, b in zip(count(compiler, name, case), without, strict=True)) for name in names}


def is_matmul(operation: Operation) -> bool:
    """A gemm fusion of XLA's own, a dot, or a call of cuBLAS."""
    return operation.name.startswith("gemm_fusion") or operation.opcode == "dot" or "__cublas" in operation.line


def count_case(compiler: Compiler, gpu: str, case: Case) -> dict:
    """The figures of one row: units and temporary units for each norm; None where the kernel cannot run."""
    x = jax.ShapeDtypeStruct(case.shape, case.dtype)
    kernel = explain(
        x,
        channel_axis=case.channel_axis,
        activation=ACTIVATIONS[case.activation],
        implementation="pallas",
        device=gpu,
    )
    passes = (kernel.forward, kernel.backward)
    fits = all(one.bytes_moved is not None for one in passes)
    figures = dict.fromkeys(NORMS) | added(compiler, NORMS if fits else NORMS[:2], case)
    tiles = [one.tile for one in passes]
    how = [(tile.copies, tile.synchronization) for tile in tiles] if fits else []
    return {"gpu": gpu, "case": case, "figures": figures, "how": how}


def compile_all(gpu: str, cases: list[Case]) -> None:
    """Prints the rows of a GPU as JSON lines: a process compiles for one architecture."""
    compiler = Compiler(gpu)
    for case in cases:
        print(json.dumps(count_case(compiler, gpu, case)), flush=True)


def rows_of(gpu: str, seed: int, number: int) -> list[dict]:
    """Of the listed cases, then of the drawn ones."""
    command = [sys.executable, __file__, "--compile", gpu, "--seed", str(seed), "--drawn", str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        rows = [
            json.loads(process.stdout.readline() or "null")
            for _ in progress(range(len(CASES) + number), f"compiling for {gpu}")
        ]
    if process.returncode or None in rows:
        raise RuntimeError(f"compiling for {gpu} failed: see above")
    return rows


def report(gpu: str, rows: list[dict], seed: int) -> str:
    listed, drawn = rows[: len(CASES)], rows[len(CASES) :]
    parts = [f"## {GPUS[gpu].name}", _rows(listed), _means(listed)]
    if drawn:
        parts += [f"### Drawn with seed {seed}", _rows(drawn), _means(drawn)]
    return "\n\n".join(parts)


def _rows(rows: list[dict]) -> str:
    header = ["units moved / temporary memory", *NORMS, "the kernel, forward; backward"]
    lines = []
    for row in rows:
        cells = [
            f"{row['figures'][n][0]:.2f} / {row['figures'][n][1]:+.2f}" if row["figures"][n] else "-" for n in NORMS
        ]
        how = "; ".join(dict.fromkeys(_how(*one) for one in row["how"])) or "does not fit: plain XLA"
        case = Case(*row["case"])
        layout = {1: "first", -1: "last"}[case.channel_axis]
        lines.append([f"({', '.join(map(str, case.shape))}) {layout}, {case.dtype}, {case.activation}", *cells, how])
    return table(header, lines)


def _means(rows: list[dict]) -> str:
    """In words, with the worst of each."""
    found = {name: [row["figures"][name][0] for row in rows if row["figures"][name]] for name in NORMS}
    means = (
        f"{name} {geometric_mean(units):.2f} ({min(units):.2f} to {max(units):.2f})"
        for name, units in found.items()
        if units
    )
    less = [row["figures"][NORMS[0]][0] / row["figures"][NORMS[1]][0] for row in rows]
    return (
        f"Geometric means (lowest to highest): {'; '.join(means)}. jaxnorm in plain XLA moves "
        f"{geometric_mean(less):.2f} times less than Flax, at least {min(less):.2f} times."
    )


def _how(copies: str, meeting: str) -> str:
    return f"{copies} copies, {meeting}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus", nargs="+", choices=GPUS, default=["H100", "A100"], metavar="NAME", help=", ".join(GPUS)
    )
    parser.add_argument("--seed", type=int, help="of the draws (default: another one in every run; it is printed)")
    parser.add_argument("--drawn", type=int, default=24, help="cases that are drawn (default 24)")
    parser.add_argument("--compile", choices=GPUS, help=argparse.SUPPRESS)
    add_output_options(parser, plot=False)
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    if arguments.compile:
        compile_all(arguments.compile, [*CASES, *draw(seed, arguments.drawn)])
        return
    rows = {gpu: rows_of(gpu, seed, arguments.drawn) for gpu in arguments.gpus}
    text = "\n\n".join(
        [
            "# What norm and activation add to a training block",
            (__doc__ or "").strip().split("\n\n")[-1],
            *(report(gpu, found, seed) for gpu, found in rows.items()),
        ]
    )
    publish(arguments, text, {"rows": [row for found in rows.values() for row in found]})


if __name__ == "__main__":
    main()
