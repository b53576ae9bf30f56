"""Compiles for one GPU that is not there and prints what came out, as one JSON object per line.

python tests/aot_report.py H100 calls last 8x64x64x256 float32 bfloat16
python tests/aot_report.py H100 views 2x225x8 float16
python tests/aot_report.py H100 activations
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
from activations import ACTIVATIONS
from aot import Compiler
from hlo import kernel_calls, moved_bytes, others

from jaxnorm import instance_norm, pallas_kernel, tiling
from jaxnorm.xla import Statistics


def report_calls(compiler, shape, channel_axis, dtype, *, residual):
    """instance_norm with ReLU, and all its gradients: one dict each."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    parameter = jax.ShapeDtypeStruct((shape[channel_axis],), jnp.float32)

    def call(x, gamma, beta, residual):
        return instance_norm(x, gamma, beta, channel_axis=channel_axis, residual=residual, activation=jax.nn.relu)

    def gradient(dy, *given):
        return jax.vjp(call, *given)[1](dy)

    given = (x, parameter, parameter, x if residual else None)
    for name, function, arguments in (("forward", call, given), ("gradient", gradient, (x, *given))):
        yield {"of": name, "dtype": dtype, "residual": residual} | _found(compiler, function, arguments, x)


def report_view(compiler, device, view, dtype, *, residual, activation):
    """The kernels alone, on a canonical view: one dict per pass, with the reason where there is no tile."""
    batch, _, lanes = view
    x = jax.ShapeDtypeStruct(view, dtype)
    value = jax.ShapeDtypeStruct((batch, 1, lanes), jnp.float32)
    statistics = Statistics(value, value, value)
    added = x if residual else None

    def forward(tile):
        def function(x, gamma, beta, residual):
            return pallas_kernel.forward(x, gamma, beta, residual, eps=1e-5, activation=activation, tile=tile)

        return function, (x, value, value, added)

    def backward(tile):
        def function(x, statistics, gamma, beta, residual, dy):
            return pallas_kernel.backward(x, statistics, gamma, beta, residual, dy, activation=activation, tile=tile)

        return function, (x, statistics, value, value, added, x)

    for name, arrays, build in (("forward", 1, forward), ("backward", 2, backward)):
        found = {"of": name, "view": view, "dtype": dtype, "residual": residual}
        tile = tiling.find_tile(view, x.dtype.itemsize, arrays + residual, device)
        if isinstance(tile, tiling.NoTile):
            yield found | {"reason": tile.reason}
            continue
        function, arguments = build(tile)
        found |= {"tile": str(tile), "cluster": tile.cluster, "row_bytes": tile.row_bytes}
        found |= {"thread_blocks": tile.thread_blocks, "shared_memory_bound": tile.shared_memory}
        found["shared_memory"] = compiler.shared_memory(function, *arguments)
        yield found | _found(compiler, function, arguments, x)


def _found(compiler, function, arguments, x):
    """What the compiled function holds, moves and spills."""
    unit = math.prod(x.shape) * x.dtype.itemsize
    text, kernels = compiler.compile(function, *arguments)
    return {
        "calls": {name: kernel_calls(text, name) for name in ("jaxnorm_forward", "jaxnorm_backward")},
        "mosaic": text.count('custom_call_target="mosaic'),
        "others": others(text, unit),
        "units": moved_bytes(text) / unit,
        "kernels": kernels,
    }


def main(gpu, what, *options):
    compiler, device = Compiler(gpu), tiling.DEVICES[gpu]
    if what == "activations":
        for name, activation in ACTIVATIONS.items():
            for found in report_view(compiler, device, (8, 1024, 64), "float32", residual=True, activation=activation):
                print(json.dumps({"activation": name} | found))
        return
    *layout, shape = options[:2] if what == "calls" else options[:1]
    shape = tuple(map(int, shape.split("x")))
    for dtype in options[len(layout) + 1 :]:
        for residual in (False, True):
            if what == "calls":
                axis = {"first": 1, "last": -1}[layout[0]]
                reports = report_calls(compiler, shape, axis, dtype, residual=residual)
            else:
                reports = report_view(compiler, device, shape, dtype, residual=residual, activation=jax.nn.relu)
            for found in reports:
                print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
