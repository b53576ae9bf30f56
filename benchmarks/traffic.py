"""What the norm costs in a network, counted on what XLA compiles for an H100: a Markdown table.

    python benchmarks/traffic.py

A block of matmul, norm, ReLU and matmul with its loss and all gradients, channels-last, minus the same block without
norm and ReLU. Counted are the bytes that all but the matmuls read and write, in sizes of the activation; caches are
ignored, so it is no time. The floor is 5: x in and y out forward, x and dy in and dx out backward.
"""

import functools
import math
import os

# Nothing is run: without autotuning the compiler needs no GPU. Both are read when JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import flax.linen as nn
import jax
import jax.numpy as jnp
from aot import Compiler
from hlo import Operation, operations
from report import table
from rich.progress import track

from jaxnorm import instance_norm

SHAPES = [(8, 64, 64, 256), (2, 128, 128, 128), (1, 256, 256, 64), (4, 32, 32, 512)]
DTYPES = ["float32", "bfloat16"]


def flax_norm(x, gamma, beta):
    layer = nn.InstanceNorm(dtype=x.dtype)
    return jax.nn.relu(layer.apply({"params": {"scale": gamma, "bias": beta}}, x))


def ours(implementation):
    return functools.partial(
        instance_norm, eps=1e-6, channel_axis=-1, activation=jax.nn.relu, implementation=implementation
    )


NORMS = {
    "flax.linen.InstanceNorm": flax_norm,
    "jaxnorm, xla": ours("xla"),
    "jaxnorm, kernel": ours(None),
}


def block(norm, x, first, second, gamma, beta):
    """The loss."""
    hidden = x @ first
    if norm is not None:
        hidden = norm(hidden, gamma, beta)
    return jnp.sum(jnp.square(hidden @ second).astype(jnp.float32))


def count(compiler: Compiler, norm, shape, dtype) -> tuple[float, float]:
    """Units that all but the matmuls move, and units of temporary memory."""
    channels = shape[-1]
    x = jax.ShapeDtypeStruct(shape, dtype)
    weight = jax.ShapeDtypeStruct((channels, channels), dtype)
    value = jax.ShapeDtypeStruct((channels,), jnp.float32)
    compiled = compiler.lower(
        jax.value_and_grad(functools.partial(block, norm), argnums=(0, 1, 2, 3, 4)), x, weight, weight, value, value
    ).compile()
    unit = math.prod(shape) * jnp.dtype(dtype).itemsize
    moved = sum(operation.moved for operation in operations(compiled.as_text()) if not is_matmul(operation))
    return moved / unit, compiled.memory_analysis().temp_size_in_bytes / unit


def is_matmul(operation: Operation) -> bool:
    """A gemm fusion of XLA's own, a dot, or a call of cuBLAS."""
    return operation.name.startswith("gemm_fusion") or operation.opcode == "dot" or "__cublas" in operation.line


def main() -> None:
    compiler = Compiler("H100")
    rows = []
    for shape, dtype in track([(shape, dtype) for shape in SHAPES for dtype in DTYPES], description="compiling"):
        without = count(compiler, None, shape, dtype)
        cells = []
        for norm in NORMS.values():
            moved, temporary = count(compiler, norm, shape, dtype)
            cells.append(f"{moved - without[0]:.1f} / {temporary - without[1]:+.1f}")
        rows.append([f"{shape} {dtype}", *cells])
    print(table(["units moved / temporary memory", *NORMS], rows))


if __name__ == "__main__":
    main()
