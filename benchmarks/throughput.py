"""What limits the speed of the kernel, counted on its machine code and modelled: a Markdown table.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --gpus H100 --activations relu gelu --shapes 8x64x64x256

Compiled for GPUs that are not there. Counted are warp instructions per 32 elements in the sweeps over shared memory;
thread blocks per SM and waves follow from registers, shared memory and the size of the chip. The share of a copy comes
from a model (replay.py, timeline.py) that ranks designs. It is not a time, and nothing here is measured.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

# Both are read when JAX starts: nothing is run, and without autotuning the compiler needs no GPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

try:
    import jax
    import jax.numpy as jnp
    import kernel_cost
    import machine_code
    from aot import Compiler
    from kernel_cases import CASES
    from report import add_output_options, describe, machine, progress, publish
    from tabulate import tabulate
    from timeline import CHIPS
except ModuleNotFoundError as error:
    sys.exit(f"throughput: {error.name} is not installed. Install what it needs: pip install 'jaxnorm[bench,aot]'")

from jaxnorm import choice, instance_norm
from jaxnorm.gpu.devices import DEVICES
from jaxnorm.gpu.tile import NoTile, Tile
from jaxnorm.layout import Layout

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "exact gelu": functools.partial(jax.nn.gelu, approximate=False),
}
PASSES = ("forward", "backward")


class Case(NamedTuple):
    """A call, and what it is compiled for."""

    gpu: str
    shape: str
    layout: str
    dtype: str
    activation: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One pass of a call."""

    case: Case
    name: str
    tile: Tile
    cost: kernel_cost.Cost


def main(argv: list[str] | None = None) -> None:
    """Compiles, counts, models, prints, writes."""
    parser = argparse.ArgumentParser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    parser.add_argument("--shapes", nargs="+", choices=[shape for shape, *_ in CASES], help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    add_output_options(parser, plot=False)
    arguments = parser.parse_args(argv)
    cases = [
        Case(gpu, shape, layout, dtype, activation)
        for gpu in arguments.gpus
        for shape, layout, dtypes in CASES
        for dtype in dtypes
        for activation in arguments.activations
        if (arguments.shapes is None or shape in arguments.shapes) and dtype in arguments.dtypes
    ]
    rows = list(compute(cases))
    publish(arguments, report(rows), {"machine": machine(), "rows": rows})


def compute(cases: list[Case]) -> Iterator[Row]:
    """The rows of all cases, in one process per GPU: the compiler refuses a second, newer architecture."""
    spawn = multiprocessing.get_context("spawn")
    pools = {gpu: concurrent.futures.ProcessPoolExecutor(1, spawn) for gpu in dict.fromkeys(c.gpu for c in cases)}
    try:
        pending = [pools[case.gpu].submit(passes, case) for case in cases]
        for future in progress(pending, "compiling"):
            yield from future.result()
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


def compiled(case: Case) -> tuple[dict[str, dict[str, int]], dict[str, machine_code.Code]]:
    """What the assembler says of the kernels of a call with its gradients, and their machine code."""
    shape, axis = _shape_and_axis(case)
    activation = ACTIVATIONS[case.activation]
    x = jax.ShapeDtypeStruct(shape, case.dtype)
    parameter = jax.ShapeDtypeStruct((shape[axis],), jnp.float32)
    # By name: where plain XLA is taken for faster, too.
    norm = functools.partial(instance_norm, channel_axis=axis, activation=activation, implementation="pallas")

    def gradients(dy, *given):
        y, pullback = jax.vjp(norm, *given)
        return y, pullback(dy)

    assembled, listing = _compiler(case.gpu).listing(gradients, x, x, parameter, parameter)
    return assembled, machine_code.parse(listing)


def passes(case: Case) -> list[Row]:
    """Compiles a call with its gradients. A pass that has no tile has no row."""
    shape, axis = _shape_and_axis(case)
    assembled, codes = compiled(case)
    view = Layout(shape, (axis % len(shape),)).view_shape
    dtype = jnp.dtype(case.dtype)
    tiles = choice.find_tiles(
        view,
        dtype,
        residual=False,
        activation=ACTIVATIONS[case.activation],
        device=DEVICES[case.gpu],
        implementation="pallas",
    )
    size = math.prod(shape) * dtype.itemsize
    return [
        Row(
            case,
            name,
            tile,
            kernel_cost.cost(
                codes[f"jaxnorm_{name}"],
                tile,
                **assembled[f"jaxnorm_{name}"],
                moved=(arrays * size, size),
                chip=CHIPS[case.gpu],
            ),
        )
        for name, arrays, tile in zip(PASSES, (1, 2), tiles, strict=True)
        if not isinstance(tile, NoTile)
    ]


def _shape_and_axis(case: Case) -> tuple[tuple[int, ...], int]:
    return tuple(map(int, case.shape.split("x"))), {"first": 1, "last": -1}[case.layout]


@functools.cache
def _compiler(gpu: str) -> Compiler:
    return Compiler(gpu)


HEADER = (
    "x, layout", "dtype", "activation", "pass", "instructions per 32", "sweeps", "registers", "meeting", "parts",
    "blocks", "blocks per SM", "waves", "share of a copy", "attainable", "limit",
)  # fmt: skip


def report(rows: list[Row]) -> str:
    """All tables."""
    parts = [
        "# What limits the kernel",
        f"Compiled, {describe(machine())}.",
        "Counted: warp instructions per 32 elements in the sweeps over shared memory. Modelled: "
        "the share of the speed of a copy that moves as many "
        "bytes, what a kernel would reach that does nothing but move them, and what limits it. The model ranks "
        "designs; it is not a time.",
    ]
    for gpu in dict.fromkeys(row.case.gpu for row in rows):
        chosen = [row for row in rows if row.case.gpu == gpu]
        parts += [f"## {gpu}", tabulate(map(_line, chosen), HEADER, "github", disable_numparse=True)]
    return "\n\n".join(parts)


def _line(row: Row) -> tuple[str, ...]:
    case, cost = row.case, row.cost
    return (
        f"{case.shape}, {case.layout}",
        case.dtype,
        case.activation,
        row.name,
        f"{cost.instructions:.1f}",
        f"{cost.sweeps:.2g}",
        f"{cost.registers}",
        row.tile.synchronization,
        f"{row.tile.blocks_per_instance}",
        f"{row.tile.thread_blocks}",
        f"{cost.per_sm}",
        f"{cost.waves:.2f}",
        f"{cost.share:.0%}",
        f"{cost.attainable:.0%}",
        cost.limit,
    )


if __name__ == "__main__":
    main()
