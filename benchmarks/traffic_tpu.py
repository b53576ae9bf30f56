"""What the norm costs in a network, counted on what XLA compiles for a TPU v5e: a Markdown table.

    python -m benchmarks.traffic_tpu --seeds 0 1

The block of traffic.py, minus the same block without norm and activation, on cases that are drawn. Here XLA fuses a
norm with the matmuls beside it: counted are all bytes that are read from and written to HBM, in sizes of x. Nothing was
run, so it is no time.
"""

import argparse
import functools
import math

# First: it says what libtpu needs when JAX starts.
from benchmarks.aot_tpu import VECTOR_MEMORY, TpuCompiler  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hlo import moved_bytes
from benchmarks.layers import ACTIVATIONS
from benchmarks.report import add_output_options, progress, publish, table
from benchmarks.traffic import Case, block, flax_norm, norm_of

LARGEST = 2**30


def norms(activation: str) -> dict:
    """What is compared."""
    return {
        "flax.linen.InstanceNorm": norm_of("flax.linen.InstanceNorm", -1, activation),
        "the same, use_fast_variance=False": functools.partial(
            flax_norm, -1, activation=ACTIVATIONS[activation], use_fast_variance=False
        ),
        "jaxnorm": norm_of("jaxnorm, xla", -1, activation),
    }


def draw(rng: np.random.Generator) -> Case:
    """Channels-last with 1 to 3 spatial axes, beyond vector memory."""
    while True:
        spatial = tuple(int(2 ** rng.uniform(2, 9)) for _ in range(rng.integers(1, 4)))
        shape = (int(2 ** rng.uniform(0, 5)), *spatial, int(2 ** rng.uniform(3, 9.2)))
        dtype = str(rng.choice(["float32", "bfloat16"]))
        if VECTOR_MEMORY < math.prod(shape) * jnp.dtype(dtype).itemsize <= LARGEST:
            return Case(shape, -1, dtype, str(rng.choice(list(ACTIVATIONS))))


def count(compiler: TpuCompiler, norm, case: Case) -> float:
    """Units that the block moves."""
    channels = case.shape[-1]
    x = jax.ShapeDtypeStruct(case.shape, case.dtype)
    weight = jax.ShapeDtypeStruct((channels, channels), case.dtype)
    value = jax.ShapeDtypeStruct((channels,), jnp.float32)
    loss = jax.value_and_grad(functools.partial(block, norm, -1), argnums=(0, 1, 2, 3, 4))
    return moved_bytes(compiler.compile(loss, x, weight, weight, value, value)) / (x.size * x.dtype.itemsize)


def added(compiler: TpuCompiler, case: Case) -> dict[str, float]:
    """Units of each norm."""
    without = count(compiler, None, case)
    return {name: count(compiler, norm, case) - without for name, norm in norms(case.activation).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cases", type=int, default=8, help="of each seed (default 8)")
    add_output_options(parser, plot=False)
    options = parser.parse_args()
    compiler = TpuCompiler()
    drawn = {seed: np.random.default_rng(seed) for seed in options.seeds}
    cases = [(seed, draw(rng)) for seed, rng in drawn.items() for _ in range(options.cases)]
    results = [
        {"seed": seed, "case": case, "units": added(compiler, case)} for seed, case in progress(cases, "compiling")
    ]
    publish(options, report(results), {"results": results})


def report(results: list[dict]) -> str:
    """A table of all seeds."""
    rows = [
        [
            r["seed"],
            f"{r['case'].shape} {r['case'].dtype}, {r['case'].activation}",
            *(f"{units:.2f}" for units in r["units"].values()),
        ]
        for r in results
    ]
    return "\n\n".join(
        [
            "# Bytes that the norm adds on a TPU",
            "Counted on code compiled for a TPU v5e; nothing was run. HBM traffic of a block of matmul, norm, "
            "activation and matmul with its loss and all gradients, less that of the block without norm and "
            "activation, in sizes of x. Shapes that exceed vector memory, drawn by chance.",
            table(["seed", "", *results[0]["units"]], rows),
        ]
    )


if __name__ == "__main__":
    main()
