"""Compiles for one GPU that is not there and prints what came out, as one JSON object per line.

python tests/aot_report.py H100 calls last 8x64x64x256 float32 bfloat16
python tests/aot_report.py H100 views 2x225x8 float16
python tests/aot_report.py H100 activations
python tests/aot_report.py H100 transformations
python tests/aot_report.py H100 mesh Auto
"""

import functools
import json
import math
import re
import sys

import as_if_proven
import jax
import jax.numpy as jnp
from activations import ACTIVATIONS
from aot import Compiler
from hlo import collectives, kernel_calls, kernel_lines, moved_bytes, others
from jax.sharding import AxisType

from jaxnorm import instance_norm, pallas_kernel
from jaxnorm.gpu import tiling
from jaxnorm.gpu.devices import DEVICES
from jaxnorm.gpu.tile import NoTile
from jaxnorm.xla import Statistics

KERNELS = ("jaxnorm_forward", "jaxnorm_backward")


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
            return pallas_kernel.forward(x, gamma, beta, (), residual, eps=1e-5, activation=activation, tile=tile)

        return function, (x, value, value, added)

    def backward(tile):
        def function(x, statistics, gamma, beta, residual, dy):
            return pallas_kernel.backward(
                x, statistics, gamma, beta, (), residual, dy, activation=activation, tile=tile
            )

        return function, (x, statistics, value, value, added, x)

    for name, arrays, build in (("forward", 1, forward), ("backward", 2, backward)):
        found = {"of": name, "view": view, "dtype": dtype, "residual": residual}
        tile = tiling.find_tile(view, x.dtype.itemsize, arrays + residual, device)
        if isinstance(tile, NoTile):
            yield found | {"reason": tile.reason}
            continue
        function, arguments = build(tile)
        found |= {"tile": str(tile), "parts": tile.parts, "row_bytes": tile.row_bytes}
        found |= {"thread_blocks": tile.thread_blocks, "shared_memory_bound": tile.shared_memory}
        found["shared_memory"] = compiler.shared_memory(function, *arguments)
        yield found | _found(compiler, function, arguments, x)


def report_transformations(compiler):
    """How often a transformed call launches each kernel."""
    x = jax.ShapeDtypeStruct((3, 2, 32, 32, 64), "float32")
    parameter = jax.ShapeDtypeStruct((3, 64), "float32")
    one = tuple(jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for value in (x, parameter, parameter))
    norm = functools.partial(instance_norm, channel_axis=-1, activation=jax.nn.silu)

    def loss(*given):
        return jnp.sum(jnp.sin(norm(*given)))

    def layers(x, gamma, beta):
        return jnp.sum(jax.lax.scan(lambda x, _: (norm(x, gamma, beta), None), x, None, length=3)[0])

    for name, function, arguments in (
        ("vmap", jax.vmap(norm), (x, parameter, parameter)),
        ("vmap of x alone", jax.vmap(norm, (0, None, None)), (x, *one[1:])),
        ("vmap of gamma alone", jax.vmap(norm, (None, 0, None)), (one[0], parameter, one[2])),
        ("vmap with a name", jax.vmap(norm, axis_name="styles"), (x, parameter, parameter)),
        ("vmap of vmap", jax.vmap(jax.vmap(norm, (None, 0, None)), (0, None, None)), (x, parameter, one[2])),
        ("vmap of grad", jax.vmap(jax.grad(loss)), (x, parameter, parameter)),
        ("grad", jax.grad(loss), one),
        ("grad of grad", jax.grad(lambda *given: jnp.sum(jax.grad(loss)(*given) ** 2)), one),
        ("checkpoint", jax.grad(jax.checkpoint(loss)), one),
        ("scan", jax.grad(layers), one),
        ("scan of checkpoint", jax.grad(jax.checkpoint(layers)), one),
    ):
        text, _ = compiler.compile(function, *arguments)
        yield {"transformation": name, "launches": [kernel_calls(text, kernel) for kernel in KERNELS]}


def report_mesh(axis_type):
    """A training step's norm on 8 GPUs, in units of the part of one: one dict for each placement of x."""
    compiler = Compiler("H100", {"data": 2, "space": 4}, axis_type)
    norm = functools.partial(instance_norm, channel_axis=-1, activation=jax.nn.relu)

    def gradients(dy, *given):
        y, pullback = jax.vjp(norm, *given)
        return y, pullback(dy)

    for name, shape, spec in (
        ("batch", (16, 64, 64, 256), (("data", "space"),)),
        ("batch and channels", (8, 64, 64, 256), ("data", None, None, "space")),
        ("batch and space", (2, 128, 64, 64, 32), ("data", "space")),
    ):
        for dtype in ("float32", "bfloat16"):
            x, parameter = compiler.array(shape, dtype, *spec), compiler.array(shape[-1:], "float32")
            text, _ = compiler.compile(gradients, x, x, parameter, parameter)
            yield {
                "placement": name,
                "views": [kernel_view(text, kernel) for kernel in KERNELS],
                "sent": collectives(text),
                "units": moved_bytes(text) / (math.prod(shape) * x.dtype.itemsize / 8),
            }


def kernel_view(text, name):
    """The shape of the first result of each call of the kernel."""
    shapes = (re.search(r"= \(?\w+\[([\d,]+)\]", line)[1] for line in kernel_lines(text, name))
    return [list(map(int, shape.split(","))) for shape in shapes]


def _found(compiler, function, arguments, x):
    """What the compiled function holds, moves and spills."""
    unit = math.prod(x.shape) * x.dtype.itemsize
    text, kernels = compiler.compile(function, *arguments)
    return {
        "calls": {name: kernel_calls(text, name) for name in KERNELS},
        "mosaic": text.count('custom_call_target="mosaic'),
        "others": others(text, unit),
        "units": moved_bytes(text) / unit,
        "kernels": kernels,
    }


def main(gpu, what, *options):
    # What is chosen is part of what is looked at.
    as_if_proven.assume()
    if what == "mesh":
        for found in report_mesh(AxisType[options[0]]):
            print(json.dumps(found))
        return
    compiler, device = Compiler(gpu), DEVICES[gpu]
    if what == "transformations":
        for found in report_transformations(compiler):
            print(json.dumps(found))
        return
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
