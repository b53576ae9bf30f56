"""Runs both norms with their gradients on 8 virtual CPU devices; prints one JSON object per placement of x.

python tests/mesh_report.py "STYLE | PLACEMENT"...

STYLE: how the mesh is used, see style(). PLACEMENT: how x is divided, see EVEN and the tables after it.
"""

import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import tolerance
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from benchmarks.hlo import collectives
from jaxnorm import dispatch

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# (N, D, H, W, C) channels-last on a mesh ("data", "space") of 2 x 4.
EVEN = {
    "batch": ((8, 4, 8, 3, 8), P(("data", "space"))),
    "channels": ((2, 4, 8, 3, 8), P(None, None, None, None, "space")),
    "batch and channels": ((4, 4, 8, 3, 8), P("data", None, None, None, "space")),
    "first spatial axis": ((2, 8, 5, 3, 8), P(None, "space")),
    "last spatial axis": ((2, 4, 5, 8, 8), P(None, None, None, "space")),
    "two spatial axes": ((2, 4, 8, 3, 8), P(None, "data", "space")),
    "one spatial axis twice": ((2, 8, 5, 3, 8), P(None, ("data", "space"))),
    "batch and space": ((4, 8, 5, 3, 8), P("data", "space")),
    "channels and space": ((2, 8, 5, 3, 8), P(None, "space", None, None, "data")),
    "nothing": ((2, 4, 5, 3, 8), P()),
}
UNEVEN = {
    "uneven batch": ((3, 4, 8, 3, 8), P("space")),
    "uneven channels": ((2, 4, 8, 3, 6), P(None, None, None, None, "space")),
    "uneven space": ((2, 7, 8, 3, 8), P("data", "space")),
    "a device without positions": ((2, 5, 8, 3, 8), P(None, "space")),
    "uneven space twice": ((2, 5, 7, 3, 8), P(None, "data", "space")),
}
CHANNELS_FIRST = {
    "channels-first, batch and channels": ((4, 8, 4, 6), P("data", "space")),
    "channels-first, batch and space": ((4, 8, 8, 6), P("data", None, "space")),
}
# With a group size: whole groups on every device, and groups that are cut.
_CHANNELS = P(None, None, None, None, "space")
GROUPS = {
    "whole groups": ((2, 4, 8, 3, 8), _CHANNELS, 2),
    "whole groups, batch and space": ((4, 8, 5, 3, 8), P("data", "space"), 4),
}
CUT = {
    "cut groups": ((2, 4, 8, 3, 8), _CHANNELS, 4),
    "a single group, cut": ((2, 4, 8, 3, 8), _CHANNELS, 8),
    "groups cut by both axes": ((2, 4, 8, 3, 8), P(None, None, None, None, ("data", "space")), 2),
    "cut groups and space": ((2, 8, 5, 3, 8), P(None, "space", None, None, "data"), 8),
    "channels-first, cut groups": ((4, 8, 4, 6), P("data", "space"), 4),
}
UNEVEN_GROUPS = {
    "whole groups, uneven batch and space": ((3, 7, 8, 3, 8), P("data", "space"), 4),
    "uneven groups": ((2, 4, 8, 3, 9), _CHANNELS, 3),
    "uneven groups and space": ((2, 7, 8, 3, 6), P(None, "space", None, None, "data"), 2),
}
# Without check_vma JAX adds up the gradient of x over the mesh axes that do not divide it.
BOTH_AXES = {name: EVEN[name] for name in ("batch", "batch and channels", "two spatial axes", "batch and space")}


STYLES = (
    "auto",
    "explicit",
    "explicit data, auto space",
    "shard_map",
    "shard_map, check_vma=False",
    "shard_map over data alone",
)
# XLA asks jaxnorm how to divide, as it does for GPUs.
AS_ON_GPUS = "auto, with the rule for GPUs"


def style(name):
    """Axis types, the placements, and how the norm is called."""
    all_of_them = EVEN | UNEVEN | CHANNELS_FIRST | GROUPS | CUT | UNEVEN_GROUPS
    return {
        "auto": ((AUTO, AUTO), all_of_them, call_on_the_whole),
        AS_ON_GPUS: ((AUTO, AUTO), all_of_them, call_on_the_whole),
        "explicit": ((EXPLICIT, EXPLICIT), EVEN | CHANNELS_FIRST | GROUPS | CUT, call_on_the_whole),
        "explicit data, auto space": ((EXPLICIT, AUTO), EVEN | GROUPS | CUT, call_on_the_whole),
        "shard_map": (
            (AUTO, AUTO),
            EVEN | CHANNELS_FIRST | GROUPS,
            functools.partial(call_in_shard_map, check_vma=True),
        ),
        "shard_map, check_vma=False": ((AUTO, AUTO), BOTH_AXES, functools.partial(call_in_shard_map, check_vma=False)),
        "shard_map over data alone": ((AUTO, AUTO), EVEN, functools.partial(call_in_shard_map, manual={"data"})),
    }[name]


def of_today(styles, seed):
    """Each placement in one of the styles, another one each day, and each style at least once."""
    chosen = []
    for i, placement in enumerate(style("auto")[1]):
        having = [name for name in styles if placement in style(name)[1]]
        chosen.append((having[(i + seed) % len(having)], placement))
    missing = [name for name in styles if name not in dict(chosen)]
    return chosen + [(name, next(iter(style(name)[1]))) for name in missing]


def call_on_the_whole(norm, mesh, spec, axes):
    return norm


def call_in_shard_map(norm, mesh, spec, axes, *, check_vma=True, manual=None):
    """norm on the part of one device, over some of the mesh axes."""
    manual = manual or set(mesh.axis_names)

    def names(axis):
        entry = spec[axis] if axis < len(spec) else None
        return tuple(n for n in ((entry,) if isinstance(entry, str) else entry or ()) if n in manual)

    rank, channel = axes
    x = P(*(names(axis) for axis in range(rank)))
    spread = tuple(name for axis in range(1, rank) if axis != channel for name in names(axis))
    return jax.shard_map(
        functools.partial(norm, axis_name=spread or None),
        mesh=mesh,
        in_specs=(x, P(names(channel)), P(names(channel)), x),
        out_specs=x,
        axis_names=manual,
        check_vma=check_vma,
    )


def report(shape, spec, group_size, channel, types, caller):
    """Errors in units of their tolerance, the shards of the results, and what travels between devices."""
    mesh = jax.make_mesh((2, 4), ("data", "space"), axis_types=types)
    sharding = NamedSharding(mesh, spec)
    x, gamma, beta, residual, dy = draw(shape, channel)
    is_even = all(size % parts == 0 for size, parts in zip(shape, parts_of(mesh, spec), strict=False))

    def norm(x, gamma, beta, residual, **options):
        options |= {"channel_axis": channel, "activation": jax.nn.silu}
        if group_size > 1:
            return jaxnorm.group_norm(x, gamma, beta, residual=residual, group_size=group_size, **options)
        return jaxnorm.instance_norm(x, gamma, beta, residual=residual, **options)

    def affine(x, gamma, beta, residual):
        return jax.nn.silu(x * spread(gamma, x.ndim, channel) + spread(beta, x.ndim, channel) + residual)

    def step(function, x, gamma, beta, residual, dy):
        if not is_even:
            # jit takes even arrays only: uneven ones are made inside.
            x, residual, dy = (jax.lax.with_sharding_constraint(a + 0.0, sharding) for a in (x, residual, dy))
        y, pullback = jax.vjp(function, x, gamma, beta, residual)
        return dict(zip(("y", "x", "gamma", "beta", "residual"), (y, *pullback(dy)), strict=True))

    def summed(function, *arguments):
        """jit returns even arrays only, too: an uneven one would be gathered."""
        return {name: jnp.sum(value**2) for name, value in step(function, *arguments).items()}

    def compiled(run, function):
        return jax.jit(functools.partial(run, function)).lower(*arguments).compile()

    def place(value):
        return jax.device_put(value, sharding) if is_even else value

    function = caller(norm, mesh, spec, (len(shape), channel))
    arguments = (place(x), gamma, beta, place(residual), place(dy))
    program = compiled(step, function)
    sending = program if is_even else compiled(summed, function)
    got = program(*arguments)
    names = ("y", "x", "residual") if is_even else ()
    return {
        "per_instance_bytes": 4 * shape[0] * shape[channel],
        "errors": errors(got, shape, channel, group_size, x, gamma, beta, residual, dy),
        "stays": all(got[name].sharding.is_equivalent_to(sharding, len(shape)) for name in names),
        "sent": collectives(sending.as_text()),
        # XLA sends parts of an unevenly divided array without a norm too.
        "sent_without_a_norm": [] if is_even else collectives(compiled(summed, affine).as_text()),
    }


def spread(value, rank, channel):
    return jnp.expand_dims(value, tuple(axis for axis in range(rank) if axis != channel))


def errors(got, shape, channel, group_size, x, gamma, beta, residual, dy):
    """Largest error of each result, divided by its tolerance."""
    given = {"gamma": gamma, "beta": beta, "residual": residual}
    options = {"channel_axes": (channel,), "group_size": group_size, "activation": "silu"}
    y, magnitude = oracle.instance_norm(x, **given, **options)
    want = oracle.gradients(dy, x, **given, **options)
    positions = int(np.prod(shape)) // (shape[0] * shape[channel]) * group_size
    mean, var = oracle.moments(x, (channel,), group_size=group_size)
    rstd = 1 / np.sqrt(var + 1e-5)
    xhat = np.abs(x - mean) * rstd
    # |silu'| < 1.1, |silu''| < 0.5 and gamma < 2
    dz = 1.1 * np.abs(dy)
    relative = tolerance.arithmetic("float32", positions)
    axes = tuple(axis for axis in range(x.ndim) if axis != channel)
    sums = {"gamma": (dz * xhat).sum(axes).max(), "beta": dz.sum(axes).max()}
    allowed = {
        "y": tolerance.forward("float32", positions, magnitude),
        "x": tolerance.input_gradient(
            "float32", positions, want["x"], scale=2 * rstd.max(), dz=dz.max(), xhat=float(xhat.max())
        ),
        "residual": dz.max() * 2 * relative * magnitude,
    } | {name: tolerance.parameter_gradient("float32", "float32", positions, total) for name, total in sums.items()}
    return {
        name: float(np.abs(np.float64(value) - (y if name == "y" else want[name])).max() / allowed[name])
        for name, value in got.items()
    }


def draw(shape, channel):
    """Instances whose shards are unlike: mean and spread grow along every axis."""
    rng = np.random.default_rng(0)
    ramp = sum(np.arange(size).reshape(-1, *(1,) * (len(shape) - 1 - a)) for a, size in enumerate(shape))
    x = (ramp + (1 + ramp) * rng.standard_normal(shape)).astype(np.float32)
    gamma, beta = rng.uniform(0.5, 2, (2, shape[channel])).astype(np.float32)
    residual, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    return x, gamma, beta, residual, dy


def parts_of(mesh, spec):
    """How many parts each axis has."""
    return [math.prod(mesh.shape[name] for name in ((e,) if isinstance(e, str) else e or ())) for e in spec]


def divide_as_on_gpus():
    """XLA asks jaxnorm how to divide a pass, as it does for GPUs. In a process of its own: it stays."""
    for one_pass in (dispatch.FORWARD, dispatch.BACKWARD):
        mlir.register_lowering(one_pass.primitive, dispatch._lowering(one_pass, "cuda"), platform="cpu")


def main(*cases):
    # Not when imported: pytest imports this file to look for doctests, and the number of devices is one per process.
    jax.config.update("jax_num_cpu_devices", 8)
    pairs = [case.split(" | ") for case in cases]
    if any(name == AS_ON_GPUS for name, _ in pairs):
        divide_as_on_gpus()
    for name, placement in pairs:
        types, placements, caller = style(name)
        shape, spec, *group_size = placements[placement]
        channel = 1 if "channels-first" in placement else len(shape) - 1
        found = report(shape, spec, *(group_size or [1]), channel, types, caller)
        print(json.dumps({"placement": f"{name}: {placement}"} | found))


if __name__ == "__main__":
    main(*sys.argv[1:])
