"""Where arrays are: what their types say of meshes and of shard_map, and how a pass is run on the part of each device.

    jit, one device          nothing to do
    jit, Auto axes           XLA divides plain sums itself; on several GPUs it asks the rule here (divided)
    jit, Explicit axes       shard_map, since the type of x says how it is divided (over_explicit_axes)
    inside shard_map         nothing to do: the pass is the part of one device

Batch and channels are divided without any exchange. Where the positions of an instance are, their sums are added up
across the devices, (N, C) numbers each. No array as large as x is moved between devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnorm.arguments import AxisName, as_names
from jaxnorm.call import Arguments, Call, Gradients, Operands, Statistics
from jaxnorm.layout import Layout

# The axes of x that the axes of a value are; None for an axis along which the value is repeated.
Axes = tuple[int | None, ...]
# The mesh axes that divide each axis of an array.
Spec = tuple[tuple[str, ...], ...]
Pass = Callable[..., Any]


def is_explicit(x: jax.Array) -> bool:
    """Whether the type of x says how it is divided over the devices of a mesh, or over some of its axes."""
    sharding = jax.typeof(x).sharding
    is_divided = sharding.mesh.size > 1 or any(part is not None for part in sharding.spec)
    return bool(sharding.mesh.explicit_axes) and is_divided


def is_manual(x: jax.Array, axis_name: AxisName | None) -> bool:
    """Whether x is inside shard_map over the named axes, all of them."""
    return set(as_names(axis_name)) <= set(jax.typeof(x).sharding.mesh.manual_axes)


def vary_together[Values](values: Values) -> Values:
    """A tree of arrays that all vary over the axes that any of them varies over.

    Inside shard_map the type of an array says over which mesh axes its values may differ between devices. The transpose
    sums a gradient over the axes that its array did not vary over before.
    """
    axes: frozenset[Any] = frozenset().union(*map(_varying_axes, jax.tree.leaves(values)))

    def vary(array: jax.Array) -> jax.Array:
        missing = axes - _varying_axes(array)
        return lax.pcast(array, tuple(missing), to="varying") if missing else array

    varying: Values = jax.tree.map(vary, values)
    return varying


def _varying_axes(array: jax.Array) -> frozenset[Any]:
    axes: frozenset[Any] = jax.typeof(array).manual_axis_type.varying
    return axes


def over_explicit_axes(norm: Pass, call: Call, arguments: Arguments) -> tuple[jax.Array, Statistics]:
    """y and statistics of norm(call, arguments) on the part of every device, as the type of x says."""
    sharding = jax.typeof(arguments.x).sharding
    mesh, layout = sharding.mesh, call.layout(arguments.x.shape)
    spec = _spec(sharding, arguments.x.ndim)
    parts = jax.tree.map(lambda _, axes: _part(spec, axes), arguments, _axes(layout, arguments))
    arguments = jax.tree.map(lambda v, part: jax.sharding.reshard(v, NamedSharding(mesh, part)), arguments, parts)
    names = (*as_names(call.axis_name), *(name for axis in layout.spatial_axes for name in spec[axis]))
    cut = _cut_groups(layout, spec, dict(mesh.shape))
    y, statistics = jax.shard_map(
        functools.partial(norm, dataclasses.replace(call, axis_name=names or None, channel_axis_name=cut or None)),
        mesh=mesh,
        in_specs=(parts,),
        out_specs=(parts.x, _part(spec, layout.instance_axes)),
        axis_names=set(mesh.explicit_axes),
    )(arguments)
    return y, statistics


def with_whole_groups(norm: Callable[..., jax.Array], call: Call, operands: Operands) -> jax.Array:
    """The part of this device of norm(call, operands), computed where all channels are, since groups are cut."""
    axis, names = call.channel_axes[0], call.channel_axis_name
    own = operands.x.shape[axis]

    def gathered(value: jax.Array, axes: Axes) -> jax.Array:
        return lax.all_gather(value, names, axis=axes.index(axis), tiled=True) if axis in axes else value

    whole = jax.tree.map(gathered, operands, _axes(call.layout(operands.x.shape), operands))
    y = norm(dataclasses.replace(call, channel_axis_name=None), whole)
    return lax.dynamic_slice_in_dim(y, lax.axis_index(names) * own, own, axis)


def divided(one_pass: Pass, call: Call, results: Any, *arguments: Any) -> Any:
    """A pass with a rule by which XLA divides it along every axis of x.

    XLA has rules of its own for plain JAX. But a kernel has none, and what XLA makes of sums that are tuned for GPUs,
    when it divides them over several, moves 17 to 27 units of memory instead of 5 to 7.

    Args:
      one_pass: one_pass(call, *arguments).
      call: the static half.
      results: what has the structure and the shapes of the results.
      arguments: Operands, and for the backward pass Statistics and dy.
    """
    layout = call.layout(arguments[0].x.shape)
    axes, axes_of_results = _axes(layout, arguments), _axes(layout, results)

    def rule(*_: Any) -> SdyShardingRule:
        def mapping(axes: Axes) -> ArrayMapping:
            return ArrayMapping(*("one" if axis is None else f"axis{axis}" for axis in axes))

        def mappings(values: Any, axes: Any) -> tuple[ArrayMapping, ...]:
            each = jax.tree.map(lambda _, own: [mapping(own)], values, axes)
            return tuple(jax.tree.leaves(each))

        return SdyShardingRule(mappings(arguments, axes), mappings(results, axes_of_results))

    def partition(mesh: Mesh, values: Any, _: Any) -> Any:
        spec = _spec(values[0].x.sharding, len(layout.shape))

        def shardings(values: Any, axes: Any) -> Any:
            return jax.tree.map(lambda _, own: NamedSharding(mesh, _part(spec, own)), values, axes)

        on_part = functools.partial(_on_part, one_pass, call, layout, spec, dict(mesh.shape))
        return mesh, on_part, shardings(results, axes_of_results), shardings(arguments, axes)

    run = custom_partitioning(functools.partial(one_pass, call))
    run.def_partition(partition, sharding_rule=rule)
    return run(*arguments)


def _on_part(one_pass: Pass, call: Call, layout: Layout, spec: Spec, sizes: dict[str, int], *arguments: Any) -> Any:
    """The pass on the part of one device.

    Args:
      layout: of the whole x.
      spec: of x.
      sizes: of the mesh axes.
      arguments: the part of this device.
    """
    shares = {axis: math.prod(sizes[name] for name in spec[axis]) for axis in layout.spatial_axes}
    names = tuple(name for axis, share in shares.items() if share > 1 for name in spec[axis])
    cut = _cut_groups(layout, spec, sizes)
    if cut:
        call = dataclasses.replace(call, channel_axis_name=cut)
    if not names:
        return one_pass(call, *arguments)
    padded = {axis: spec[axis] for axis, share in shares.items() if layout.shape[axis] % share}
    if padded:
        arguments = _without_padding(layout, padded, *arguments)
    results = one_pass(dataclasses.replace(call, axis_name=names), *arguments)
    if isinstance(results, Gradients):
        # The gradients of per-instance values are the terms of this device, which are to be added up.
        gamma, beta = lax.psum((results.gamma, results.beta), names)
        results = results._replace(gamma=gamma, beta=beta)
    return results


def _without_padding(
    layout: Layout, padded: dict[int, tuple[str, ...]], operands: Operands, *others: Any
) -> tuple[Any, ...]:
    """The arguments where an axis is no multiple of its devices: XLA pads it with anything, which must not count.

    x, the residual and dy are 0 there, so that nothing is added to a gradient.
    """
    shape = operands.x.shape
    inside = jnp.ones((), bool)
    for axis, names in padded.items():
        position = lax.axis_index(names) * shape[axis] + lax.broadcasted_iota(jnp.int32, shape, axis)
        inside = inside & (position < layout.shape[axis])

    def zeroed(value: jax.Array) -> jax.Array:
        return jnp.where(inside, value, 0)

    operands = operands._replace(
        x=zeroed(operands.x),
        residual=None if operands.residual is None else zeroed(operands.residual),
        where=inside if operands.where is None else inside & operands.where,
    )
    if not others:
        return (operands,)
    statistics, dy = others
    return operands, statistics, zeroed(dy)


def _axes(layout: Layout, values: Any) -> Any:
    """For each array, of arguments or results, the axes of x that its axes are: by its name."""
    whole = tuple(range(len(layout.shape)))

    def of(name: str, value: Any) -> Axes | None:
        if value is None:
            return None
        if name in ("x", "residual"):
            return whole
        if name == "where":
            return tuple(axis if value.shape[axis] == layout.shape[axis] else None for axis in whole)
        # (N, *channels), or (*channels)
        return layout.instance_axes[len(layout.instance_axes) - value.ndim :]

    if isinstance(values, (Arguments, Operands, Statistics, Gradients)):
        roles: Any = type(values)
        return roles(*map(of, values._fields, values))
    # y and dy have no name.
    return tuple(_axes(layout, value) for value in values) if isinstance(values, tuple) else whole


def _cut_groups(layout: Layout, spec: Spec, sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes that divide the channels, where they leave parts of a group on different devices."""
    if layout.group_size == 1:
        return ()
    (axis,) = layout.channel_axes
    share = math.prod(sizes[name] for name in spec[axis])
    return spec[axis] if share > 1 and layout.shape[axis] % (share * layout.group_size) else ()


def _part(spec: Spec, axes: Axes) -> PartitionSpec:
    """How a value is divided where x is divided by spec."""
    return PartitionSpec(*(None if axis is None else spec[axis] for axis in axes))


def _spec(sharding: NamedSharding, rank: int) -> Spec:
    entries = (*sharding.spec, *(None,) * (rank - len(sharding.spec)))
    return tuple(map(as_names, entries))
