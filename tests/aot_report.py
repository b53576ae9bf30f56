"""Compiles for one GPU that is not there, and answers questions about what came out.

Each line of the input is a question, as a JSON list of words; each line of the output is the answer, as a JSON list of
dicts, or as a text where something was raised. One process answers many questions, because it takes seconds to start.

python tests/aot_report.py H100 <<END
["calls", "pallas", "last:8x64x64x256:float32:relu", "first:8x256x64x64:bfloat16:gelu:residual"]
["calls", "pallas", "last:8x64x64x256:float32:silu:8:residual"]
["views", "2x225x8,3x1008x1", "float16", "float32:residual"]
["activations", "relu", "gelu"]
["transformations", "vmap", "scan"]
["mesh", "Auto", "batch", "float32"]
["blocks", "0", "4"]
["ptx", "2x250x4:float32:relu"]
["races"]
END
"""

import dataclasses
import functools
import gc
import itertools
import json
import math
import random
import re
import sys
import traceback

import jax
import jax.numpy as jnp
from activations import ACTIVATIONS
from jax.sharding import AxisType
from ptx_report import report_ptx

from benchmarks import traffic
from benchmarks.aot import Compiler, shared_memory
from benchmarks.contenders import PLAIN
from benchmarks.hlo import collectives, kernel_calls, kernel_lines, moved_bytes, others
from benchmarks.shapes import CHANNEL_AXIS, Shape, random_blocks
from jaxnorm import group_norm, instance_norm, pallas_kernel
from jaxnorm.gpu.devices import DEVICES
from jaxnorm.gpu.tile import NoTile, find_tile
from jaxnorm.selfcheck import numbers, races
from jaxnorm.selfcheck.cases import Case

KERNELS = ("jaxnorm_forward", "jaxnorm_backward")


def report_call(compiler, case, implementation):
    """instance_norm or group_norm and all its gradients, in one program.

    Args:
      case: such as "last:8x64x64x256:float32:relu" or "first:8x256x64x64:bfloat16:gelu:residual"; with a number before
        the residual, "last:8x64x64x256:float32:silu:8:residual", it is group_norm with that many channels per group.
      implementation: as in instance_norm.
    """
    layout, shape, dtype, activation, *options = case.split(":")
    groups = {"group_size": int(options.pop(0))} if options and options[0].isdigit() else {}
    channel_axis = {"first": 1, "last": -1}[layout]
    x = jax.ShapeDtypeStruct(tuple(map(int, shape.split("x"))), dtype)
    parameter = jax.ShapeDtypeStruct((x.shape[channel_axis],), jnp.float32)
    norm = functools.partial(
        group_norm if groups else instance_norm,
        **groups,
        channel_axis=channel_axis,
        activation=ACTIVATIONS[activation],
        implementation=implementation,
    )

    def gradients(dy, *given):
        y, pullback = jax.vjp(lambda x, gamma, beta, residual: norm(x, gamma, beta, residual=residual), *given)
        return y, pullback(dy)

    given = (x, x, parameter, parameter, x if options else None)
    return {"case": case} | _found(compiler, gradients, given, x)


def report_view(compiler, device, view, dtype, *, residual, activation):
    """The kernels alone, on a canonical view: one dict per pass, with the reason where there is no tile."""
    batch, _, lanes = view
    x = jax.ShapeDtypeStruct(view, dtype)
    value = jax.ShapeDtypeStruct((batch, 1, lanes), jnp.float32)
    statistics = pallas_kernel.Moments(value, value, value, value)
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
        tile = find_tile(view, x.dtype.itemsize, arrays + residual, device)
        if isinstance(tile, NoTile):
            yield found | {"reason": tile.reason}
            continue
        function, arguments = build(tile)
        found |= {"tile": str(tile), "blocks": tile.blocks_per_instance, "row_bytes": tile.row_bytes}
        found |= {"thread_blocks": tile.thread_blocks, "shared_memory_bound": tile.shared_memory}
        with shared_memory() as asked:
            found |= _found(compiler, function, arguments, x)
        (found["shared_memory"],) = asked
        yield found


def transformations():
    """{name: (a transformed call, its arguments)}"""
    x = jax.ShapeDtypeStruct((3, 2, 32, 32, 64), "float32")
    parameter = jax.ShapeDtypeStruct((3, 64), "float32")
    one = tuple(jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for value in (x, parameter, parameter))
    norm = functools.partial(instance_norm, channel_axis=-1, activation=jax.nn.silu, implementation="pallas")

    def loss(*given):
        return jnp.sum(jnp.sin(norm(*given)))

    def layers(x, gamma, beta):
        return jnp.sum(jax.lax.scan(lambda x, _: (norm(x, gamma, beta), None), x, None, length=3)[0])

    return {
        "vmap": (jax.vmap(norm), (x, parameter, parameter)),
        "vmap of x alone": (jax.vmap(norm, (0, None, None)), (x, *one[1:])),
        "vmap of gamma alone": (jax.vmap(norm, (None, 0, None)), (one[0], parameter, one[2])),
        "vmap with a name": (jax.vmap(norm, axis_name="styles"), (x, parameter, parameter)),
        "vmap of vmap": (jax.vmap(jax.vmap(norm, (None, 0, None)), (0, None, None)), (x, parameter, one[2])),
        "vmap of grad": (jax.vmap(jax.grad(loss)), (x, parameter, parameter)),
        "grad": (jax.grad(loss), one),
        "grad of grad": (jax.grad(lambda *given: jnp.sum(jax.grad(loss)(*given) ** 2)), one),
        "checkpoint": (jax.grad(jax.checkpoint(loss)), one),
        "scan": (jax.grad(layers), one),
        "scan of checkpoint": (jax.grad(jax.checkpoint(layers)), one),
    }


def report_transformation(compiler, name):
    """How often a transformed call launches each kernel."""
    function, arguments = transformations()[name]
    text, _ = compiler.compile(function, *arguments)
    return {"transformation": name, "launches": [kernel_calls(text, kernel) for kernel in KERNELS]}


# Shape and partition of x on 8 GPUs. Where the positions of an instance are divided there is no kernel.
PLACEMENTS = {
    "batch": ((16, 64, 64, 256), (("data", "space"),), "pallas"),
    "batch and channels": ((8, 64, 64, 256), ("data", None, None, "space"), "pallas"),
    "batch of large maps": ((8, 512, 512, 64), (("data", "space"),), "pallas"),
    "batch and space": ((2, 128, 64, 64, 32), ("data", "space"), None),
}


def report_mesh(gpu, axes, placement, dtype):
    """A training step's norm on 8 GPUs, in units of the part of one."""
    compiler = Compiler(gpu, {"data": 2, "space": 4}, AxisType[axes])
    shape, spec, implementation = PLACEMENTS[placement]

    def gradients(dy, *given):
        norm = functools.partial(instance_norm, channel_axis=-1, activation=jax.nn.relu, implementation=implementation)
        y, pullback = jax.vjp(norm, *given)
        return y, pullback(dy)

    x, parameter = compiler.array(shape, dtype, *spec), compiler.array(shape[-1:], "float32")
    text, _ = compiler.compile(gradients, x, x, parameter, parameter)
    return {
        "views": [kernel_view(text, kernel) for kernel in KERNELS],
        "sent": collectives(text),
        "units": moved_bytes(text) / (math.prod(shape) * x.dtype.itemsize / 8),
    }


def report_races(compiler, device):
    """Selfcheck's repeated training step beside work on another stream."""
    case = Case((2, 32, 32, 64), -1, "float32", implementation="pallas", device=device)
    given = jax.tree.map(lambda value: jax.ShapeDtypeStruct((2, *value.shape), value.dtype), numbers.draw(case))

    def run(stacked, repeats):
        return races.repeat(numbers.training_step(case), stacked, repeats, busy=True)

    text, _ = compiler.compile(run, given, jax.ShapeDtypeStruct((), "int32"))
    between = text.partition(" call-start(")[2].partition(" call-done(")[0]
    mosaic = between.count('custom_call_target="mosaic_gpu')
    return {"other_streams": text.count(" call-start("), "kernels_meanwhile": mosaic}


def report_blocks(compiler, seed, count):
    """What plain XLA's norm adds to the block of traffic.py, in random cases: one dict each.

    Half of them are those of traffic.py, in any half precision; the others are larger and have few channels where they
    may: half precision pads odd numbers of them for the tensor cores, with or without a norm.
    """
    rng = random.Random(seed)
    for i, case in enumerate(random_blocks(seed, count, traffic.ELEMENTS)):
        dtype = rng.choice(["bfloat16", "float16"]) if case.dtype == "bfloat16" else case.dtype
        shape, layout = case.shape, case.layout
        if i % 2:
            channels = rng.randint(2, 14) if dtype == "float32" else 8 * int(2 ** rng.uniform(0, 6))
            spatial = tuple(rng.randint(45, 300) for _ in range(2))
            batch = max(1, int(2 ** rng.uniform(21, 26)) // (math.prod(spatial) * channels))
            shape, layout = Shape(batch, spatial, channels), "channels-last"
        changed = dataclasses.replace(case, dtype=dtype, shape=shape, layout=layout)
        ((units, temporary),) = traffic.added(compiler, [PLAIN], changed).values()
        found = {"shape": changed.array, "channel_axis": CHANNEL_AXIS[layout], "dtype": dtype}
        yield found | {"activation": case.activation, "units": units, "temporary": temporary}


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


def answer(gpu, compiler, what, *words):
    """The dicts that answer a question."""
    device = DEVICES[gpu]
    match what:
        case "calls":
            implementation, *cases = words
            found = [
                report_call(compiler, case, None if implementation == "None" else implementation) for case in cases
            ]
        case "views":
            found = views(compiler, device, *words)
        case "activations":
            found = itertools.chain.from_iterable(report_activation(compiler, device, name) for name in words)
        case "transformations":
            found = [report_transformation(compiler, name) for name in words]
        case "mesh":
            found = [report_mesh(gpu, *words)]
        case "blocks":
            found = report_blocks(compiler, *map(int, words))
        case "ptx":
            found = itertools.chain.from_iterable(report_ptx(compiler, device, case) for case in words)
        case "races":
            found = [report_races(compiler, device)]
    return list(found)


def views(compiler, device, shapes, *dtypes):
    for view, described in itertools.product(shapes.split(","), dtypes):
        dtype, *residual = described.split(":")
        shape = tuple(map(int, view.split("x")))
        yield from report_view(compiler, device, shape, dtype, residual=bool(residual), activation=jax.nn.relu)


def report_activation(compiler, device, name):
    """The kernels with an activation; "all" is the sum of all of them, so that one kernel has every primitive."""
    activation = (lambda z: sum(each(z) for each in ACTIVATIONS.values())) if name == "all" else ACTIVATIONS[name]
    for found in report_view(compiler, device, (8, 1024, 64), "float32", residual=True, activation=activation):
        yield {"activation": name} | found


def main(gpu):
    # Mosaic makes millions of objects, among which the garbage collector would look for garbage again and again.
    gc.disable()
    compiler = Compiler(gpu)
    for line in sys.stdin:
        try:
            found = answer(gpu, compiler, *json.loads(line))
        except Exception:
            found = traceback.format_exc()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
