"""A pass under vmap and on a mesh, where JAX and XLA cannot know how a kernel may be divided.

    vmap                  the mapped axis becomes a batch axis in front of the others: one launch
    jit, Auto axes        every device runs the pass on its part of x; XLA asks here when it divides the program
    jit, Explicit axes    the same by shard_map, since the type of x says how it is divided
    inside shard_map      nothing to do

Batch and channels are divided without any exchange. Where the positions of an instance are, their sums are added up
across the devices, (N, C) numbers each: no array as large as x travels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnorm import xla
from jaxnorm.arguments import as_names
from jaxnorm.layout import Layout
from jaxnorm.passes import Call, Operands

Pass = Callable[..., Any]


def run(one_pass: Pass, call: Call, operands: Operands, *arguments: Any) -> Any:
    """passes.forward or passes.backward, with a rule for vmap and one for meshes where they are needed.

    Plain JAX has its own rules. But the kernel has none, and what XLA makes of the plain sums when it divides them over
    several GPUs moves 17 to 27 units of memory instead of 5 to 7.

    Args:
      one_pass: the function.
      call, operands, arguments: what it takes.
    """
    if call.device is None or not (call.split_by_jit or call.may_run_kernel(operands)):
        return one_pass(call, operands, *arguments)

    @jax.custom_batching.custom_vmap
    def batched(*arguments: Any) -> Any:
        return _divided_by_jit(one_pass, call, *arguments) if call.split_by_jit else one_pass(call, *arguments)

    @batched.def_vmap
    def _(size: int, is_mapped: Any, *arguments: Any) -> Any:
        def with_axis(value: jax.Array, is_mapped: bool) -> jax.Array:
            return value if is_mapped else jnp.broadcast_to(value, (size, *value.shape))

        results = run(one_pass, call.with_mapped_axis(), *jax.tree.map(with_axis, arguments, tuple(is_mapped)))
        return results, jax.tree.map(lambda _: True, results)

    return batched(operands, *arguments)


def _divided_by_jit(one_pass: Pass, call: Call, *arguments: Any) -> Any:
    """The pass, with a rule by which XLA divides it along every axis of x."""
    call = dataclasses.replace(call, split_by_jit=False)
    layout = call.layout(arguments[0].x.shape)

    def rule(mesh: Mesh, values: Any, results: Any) -> SdyShardingRule:
        def mappings(types: Any) -> tuple[ArrayMapping, ...]:
            return tuple(
                ArrayMapping(*("one" if axis is None else f"axis{axis}" for axis in _axes(layout, t.shape)))
                for t in types
            )

        return SdyShardingRule(mappings(values), mappings(results))

    def partition(mesh: Mesh, values: Any, results: Any) -> Any:
        spec = _names_of_axes(values[0].x.sharding, len(layout.shape))

        def sharding(info: jax.ShapeDtypeStruct) -> NamedSharding:
            return NamedSharding(mesh, _part(layout, spec, info.shape))

        on_one_device = functools.partial(_on_one_device, one_pass, call, layout, spec, dict(mesh.shape))
        return mesh, on_one_device, jax.tree.map(sharding, results), jax.tree.map(sharding, values)

    divided = custom_partitioning(functools.partial(one_pass, call))
    divided.def_partition(partition, sharding_rule=rule)
    return divided(*arguments)


def _axes(layout: Layout, shape: Sequence[int]) -> list[int | None]:
    """The axes of x that the axes of a value are; None for one along which a value as large as x is repeated."""
    if len(shape) < len(layout.shape):
        return list(layout.instance_axes[len(layout.instance_axes) - len(shape) :])
    return [axis if size == layout.shape[axis] else None for axis, size in enumerate(shape)]


def _part(layout: Layout, spec: tuple[tuple[str, ...], ...], shape: Sequence[int]) -> PartitionSpec:
    """How a value of that shape is divided where x is divided by spec."""
    return PartitionSpec(*(None if axis is None else spec[axis] for axis in _axes(layout, shape)))


def _on_one_device(
    one_pass: Pass,
    call: Call,
    layout: Layout,
    spec: tuple[tuple[str, ...], ...],
    sizes: dict[str, int],
    operands: Operands,
    *arguments: Any,
) -> Any:
    """The pass on the part of one device.

    Args:
      layout: of the whole x.
      spec: the mesh axes that divide each axis of x.
      sizes: of the mesh axes.
    """
    divided = [axis for axis in layout.spatial_axes if math.prod(sizes[name] for name in spec[axis]) > 1]
    if not divided:
        return one_pass(call, operands, *arguments)
    if call.implementation == "pallas":
        raise ValueError(
            "implementation='pallas' computes instances that lie on one device whole: got x of shape "
            f"{layout.shape} whose spatial axes {tuple(divided)} are divided over the mesh axes "
            f"{tuple(name for axis in divided for name in spec[axis])}. Pass implementation=None, which adds up the "
            "sums of the devices, or divide the batch or the channels."
        )
    names = tuple(name for axis in divided for name in spec[axis])
    call = dataclasses.replace(call, device=None, axis_name=names)
    padded = [a for a in divided if layout.shape[a] % math.prod(sizes[name] for name in spec[a])]
    if padded:
        names_of_padded = {axis: spec[axis] for axis in padded}
        return _on_padded(one_pass, call, layout, names_of_padded, operands, *arguments)
    return _added_up(one_pass(call, operands, *arguments), names)


def _added_up(results: Any, names: tuple[str, ...]) -> Any:
    """The gradients of per-instance values, which are those of this device."""
    if isinstance(results, xla.Gradients):
        gamma, beta, captures = lax.psum((results.gamma, results.beta, results.captures), names)
        results = results._replace(gamma=gamma, beta=beta, captures=captures)
    return results


def _on_padded(
    one_pass: Pass,
    call: Call,
    layout: Layout,
    padded: dict[int, tuple[str, ...]],
    operands: Operands,
    *arguments: Any,
) -> Any:
    """The pass where an axis is no multiple of its devices: what fills it up does not count.

    Outside nobody knows of that mask: of the statistics the number of positions that count is not handed on, and comes
    back as the number of all.
    """
    is_masked = operands.where is not None
    operands, arguments = _without_padding(layout, padded, operands, arguments)
    if arguments and not is_masked:
        statistics, dy = arguments
        number = math.prod(layout.shape[axis] for axis in layout.spatial_axes)
        arguments = (statistics._replace(counted=jnp.full_like(statistics.center, number)), dy)
    results = _added_up(one_pass(call, operands, *arguments), as_names(call.axis_name))
    if not arguments and not is_masked:
        y, statistics = results
        return y, statistics._replace(counted=None)
    return results


def _without_padding(
    layout: Layout, padded: dict[int, tuple[str, ...]], operands: Operands, arguments: tuple[Any, ...]
) -> tuple[Operands, tuple[Any, ...]]:
    """The arguments where an axis is no multiple of its devices: XLA fills it up, with anything, which must not count.

    dy is 0 there too, so that nothing is added to a gradient.
    """
    shape = operands.x.shape
    inside = jnp.ones((), bool)
    for axis, names in padded.items():
        position = lax.axis_index(names) * shape[axis] + lax.broadcasted_iota(jnp.int32, shape, axis)
        inside = inside & (position < layout.shape[axis])

    def inside_only(value: jax.Array) -> jax.Array:
        return jnp.where(inside, value, 0) if value.shape == shape and value.dtype != bool else value

    operands, arguments = jax.tree.map(inside_only, (operands, arguments))
    where = inside if operands.where is None else inside & operands.where
    return operands._replace(where=where), arguments


@functools.partial(jax.jit, static_argnums=(0, 1))
def over_explicit_axes(norm: Callable[..., Any], call: Call, x: jax.Array, *others: Any) -> Any:
    """y and statistics of norm(call, x, *others) on the part of every device, as the type of x says."""
    sharding = jax.typeof(x).sharding
    mesh, layout = sharding.mesh, call.layout(x.shape)
    spec = _names_of_axes(sharding, x.ndim)
    arguments = (x, *others)
    parts = jax.tree.map(lambda value: _part(layout, spec, value.shape), arguments)
    arguments = jax.tree.map(lambda v, p: jax.sharding.reshard(v, NamedSharding(mesh, p)), arguments, parts)
    spatial = tuple(name for axis in layout.spatial_axes for name in spec[axis])
    inner = dataclasses.replace(call, axis_name=(*as_names(call.axis_name), *spatial) or None)
    of_instance = _part(layout, spec, layout.instances)
    return jax.shard_map(
        functools.partial(norm, inner),
        mesh=mesh,
        in_specs=parts,
        out_specs=(parts[0], of_instance),
        axis_names=set(mesh.explicit_axes),
    )(*arguments)


def _names_of_axes(sharding: NamedSharding, rank: int) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that divide each axis of an array."""
    entries = (*sharding.spec, *(None,) * (rank - len(sharding.spec)))
    return tuple(map(as_names, entries))
