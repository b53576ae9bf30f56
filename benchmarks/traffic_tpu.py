"""What the norm costs in a network, counted on what XLA compiles for a TPU v5e: a Markdown table.

    python benchmarks/traffic_tpu.py [--seed 0] [--shapes 8]

The block of traffic.py, minus the same block without norm and ReLU, on shapes that are drawn. Here XLA fuses a norm
with the matmuls beside it: counted are all bytes that are read from and written to HBM, in sizes of the activation.
Nothing was run, so it is no time.
"""

import argparse
import functools
import math

# First: it says what libtpu needs when JAX starts.
from aot_tpu import VECTOR_MEMORY, TpuCompiler  # isort: skip

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hlo import moved_bytes
from report import table
from rich.progress import track
from traffic import block, flax_norm, ours

LARGEST = 2**30


def flax_stable_norm(x, gamma, beta):
    layer = nn.InstanceNorm(dtype=x.dtype, use_fast_variance=False)
    return jax.nn.relu(layer.apply({"params": {"scale": gamma, "bias": beta}}, x))


NORMS = {
    "flax.linen.InstanceNorm": flax_norm,
    "the same, use_fast_variance=False": flax_stable_norm,
    "jaxnorm": ours(None),
}


def draw(rng: np.random.Generator) -> tuple[tuple[int, ...], str]:
    """A channels-last shape of 1 to 3 spatial axes, and a dtype, beyond vector memory."""
    while True:
        spatial = tuple(int(2 ** rng.uniform(2, 9)) for _ in range(rng.integers(1, 4)))
        shape = (int(2 ** rng.uniform(0, 5)), *spatial, int(2 ** rng.uniform(3, 9.2)))
        dtype = str(rng.choice(["float32", "bfloat16"]))
        if VECTOR_MEMORY < math.prod(shape) * jnp.dtype(dtype).itemsize <= LARGEST:
            return shape, dtype


def count(compiler: TpuCompiler, norm, shape, dtype) -> float:
    """Units that the block moves."""
    x, weight = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((shape[-1],) * 2, dtype)
    value = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    loss = jax.value_and_grad(functools.partial(block, norm), argnums=(0, 1, 2, 3, 4))
    return moved_bytes(compiler.compile(loss, x, weight, weight, value, value)) / (math.prod(shape) * x.dtype.itemsize)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", type=int, default=8)
    options = parser.parse_args()
    compiler, rng = TpuCompiler(), np.random.default_rng(options.seed)
    print(f"Seed {options.seed}.\n")
    rows = []
    for shape, dtype in track([draw(rng) for _ in range(options.shapes)], description="compiling"):
        without = count(compiler, None, shape, dtype)
        cells = (f"{count(compiler, norm, shape, dtype) - without:.2f}" for norm in NORMS.values())
        rows.append([f"{shape} {dtype}", *cells])
    print(table(["HBM units that the norm adds", *NORMS], rows))


if __name__ == "__main__":
    main()
