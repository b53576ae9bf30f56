"""What the norm costs in a network, counted on what XLA compiles for GPUs that need not be there: Markdown tables.

    python benchmarks/traffic.py
    python benchmarks/traffic.py --gpus B200 L40S

A block of matmul, norm, ReLU and matmul with its loss and all gradients, minus the same block without norm and ReLU.
Counted are the bytes that all but the matmuls read and write, in sizes of the activation; caches are ignored, so it is
no time. The floor is 5: x in and y out forward, x and dy in and dx out backward. The kernel is taken by name. What it
reads twice, of instances that shared memory holds in part, a compiled module does not show: that is added here, as
jaxnorm.explain says it.
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys

# Nothing is run: without autotuning the compiler needs no GPU. Both are read when JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import flax.linen as nn
import jax
import jax.numpy as jnp
from aot import GPUS, Compiler
from hlo import Operation, operations
from report import add_output_options, progress, publish, table

from jaxnorm import explain, instance_norm

BOTH, HALF = ("float32", "bfloat16"), ("bfloat16",)
# Channels-last unless it says otherwise.
CASES = [
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
NORMS = ("flax.linen.InstanceNorm", "jaxnorm, xla", "jaxnorm, kernel")


def norm_of(name, channel_axis):
    """relu(norm(x, gamma, beta))."""
    if name == NORMS[0]:
        return functools.partial(flax_norm, channel_axis)
    return functools.partial(
        instance_norm,
        eps=1e-6,
        channel_axis=channel_axis,
        activation=jax.nn.relu,
        implementation={"jaxnorm, xla": "xla", "jaxnorm, kernel": "pallas"}[name],
    )


def flax_norm(channel_axis, x, gamma, beta, **options):
    layer = nn.InstanceNorm(dtype=x.dtype, feature_axes=channel_axis, **options)
    return jax.nn.relu(layer.apply({"params": {"scale": gamma, "bias": beta}}, x))


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


def count(compiler: Compiler, norm, shape, channel_axis, dtype) -> tuple[float, float]:
    """Units that all but the matmuls move, and units of temporary memory."""
    channels = shape[channel_axis]
    x = jax.ShapeDtypeStruct(shape, dtype)
    weight = jax.ShapeDtypeStruct((channels, channels), dtype)
    value = jax.ShapeDtypeStruct((channels,), jnp.float32)
    loss = functools.partial(block, norm, channel_axis)
    compiled = compiler.lower(
        jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)), x, weight, weight, value, value
    ).compile()
    unit = math.prod(shape) * jnp.dtype(dtype).itemsize
    moved = sum(operation.moved for operation in operations(compiled.as_text()) if not is_matmul(operation))
    return moved / unit, compiled.memory_analysis().temp_size_in_bytes / unit


def is_matmul(operation: Operation) -> bool:
    """A gemm fusion of XLA's own, a dot, or a call of cuBLAS."""
    return operation.name.startswith("gemm_fusion") or operation.opcode == "dot" or "__cublas" in operation.line


def count_case(compiler: Compiler, gpu: str, shape, channel_axis, dtype) -> dict:
    """The figures of one row: units and temporary units for each norm; None where the kernel cannot run."""
    case = (shape, channel_axis, dtype)
    without = count(compiler, None, *case)
    kernel = explain(
        jax.ShapeDtypeStruct(shape, dtype),
        channel_axis=channel_axis,
        activation=jax.nn.relu,
        implementation="pallas",
        device=gpu,
    )
    passes = (kernel.forward, kernel.backward)
    figures = {}
    for name in NORMS:
        if name == "jaxnorm, kernel" and any(one.bytes_moved is None for one in passes):
            figures[name] = None
            continue
        moved, temporary = (
            a - b for a, b in zip(count(compiler, norm_of(name, channel_axis), *case), without, strict=True)
        )
        if name == "jaxnorm, kernel":
            moved += sum(one.bytes_moved for one in passes) / (math.prod(shape) * jnp.dtype(dtype).itemsize) - 5
        figures[name] = (moved, temporary)
    tiles = [one.tile for one in passes]
    how = [] if figures["jaxnorm, kernel"] is None else [(tile.copies, tile.meeting, tile.share) for tile in tiles]
    return {"gpu": gpu, "shape": shape, "dtype": dtype, "figures": figures, "how": how}


def compile_all(gpu: str) -> None:
    """Prints the rows of a GPU as JSON lines: a process compiles for one architecture."""
    compiler = Compiler(gpu)
    for shape, channel_axis, dtypes in CASES:
        for dtype in dtypes:
            print(json.dumps(count_case(compiler, gpu, shape, channel_axis, dtype)), flush=True)


def rows_of(gpu: str) -> list[dict]:
    command = [sys.executable, __file__, "--compile", gpu]
    number = sum(len(dtypes) for *_, dtypes in CASES)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        rows = [
            json.loads(process.stdout.readline() or "null") for _ in progress(range(number), f"compiling for {gpu}")
        ]
    if process.returncode or None in rows:
        raise RuntimeError(f"compiling for {gpu} failed: see above")
    return rows


def report(rows: list[dict]) -> str:
    header = ["units moved / temporary memory", *NORMS, "the kernel, forward; backward"]
    lines = []
    for row in rows:
        cells = [
            f"{row['figures'][n][0]:.2f} / {row['figures'][n][1]:+.2f}" if row["figures"][n] else "-" for n in NORMS
        ]
        how = "; ".join(dict.fromkeys(_how(*one) for one in row["how"])) or "does not fit: plain XLA"
        lines.append([f"({', '.join(map(str, row['shape']))}) {row['dtype']}", *cells, how])
    return table(header, lines)


def _how(copies: str, meeting: str, share: float) -> str:
    return f"{copies} copies, {meeting}" + ("" if share == 1 else f", {share:.0%} held")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus", nargs="+", choices=GPUS, default=["H100", "A100"], metavar="NAME", help=", ".join(GPUS)
    )
    parser.add_argument("--compile", choices=GPUS, help=argparse.SUPPRESS)
    add_output_options(parser, plot=False)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_all(arguments.compile)
        return
    rows = {gpu: rows_of(gpu) for gpu in arguments.gpus}
    text = "\n\n".join(
        [
            "# What norm and ReLU add to a training block",
            (__doc__ or "").strip().split("\n\n")[-1],
            *(f"## {GPUS[gpu].name}\n\n{report(found)}" for gpu, found in rows.items()),
        ]
    )
    publish(arguments, text, {"rows": [row for found in rows.values() for row in found]})


if __name__ == "__main__":
    main()
