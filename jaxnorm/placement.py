"""Where an array lies: what its type says of meshes, of shard_map, and of the devices that hold its parts."""

from typing import Any

import jax
from jax import lax

from jaxnorm.arguments import AxisName, as_names


def is_split_by_jit(x: jax.Array) -> bool:
    """Whether jit may split x over several devices.

    Inside shard_map x is the part of one device. While plain jit traces, shardings cannot be seen: then several
    devices count as a yes.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.empty:
        return mesh.size > 1 and not mesh.are_all_axes_manual
    return jax.device_count() > 1 if isinstance(x, jax.core.Tracer) else len(x.devices()) > 1


def is_explicit(x: jax.Array) -> bool:
    """Whether the type of x says how it is split over the devices of a mesh, or over some of its axes."""
    sharding = jax.typeof(x).sharding
    is_split = sharding.mesh.size > 1 or any(part is not None for part in sharding.spec)
    return bool(sharding.mesh.explicit_axes) and is_split


def is_partly_manual(x: jax.Array) -> bool:
    """Whether x is inside shard_map over some axes of a mesh, and jit may split it over the others."""
    mesh = jax.typeof(x).sharding.mesh
    return bool(mesh.manual_axes) and not mesh.are_all_axes_manual


def is_manual(x: jax.Array, axis_name: AxisName | None) -> bool:
    """Whether x is inside shard_map over the named axes, all of them."""
    return set(as_names(axis_name)) <= set(jax.typeof(x).sharding.mesh.manual_axes)


def vary_together(*values: Any) -> Any:
    """The values, each an array, a tree of arrays or None: all vary over the axes that any varies over.

    Inside shard_map the type of an array says over which mesh axes its values may differ between devices.

    The transpose sums a gradient over the axes that its array did not vary over before.
    """
    axes: frozenset[Any] = frozenset().union(*map(varying_axes, jax.tree.leaves(values)))

    def vary(array: jax.Array) -> jax.Array:
        missing = axes - varying_axes(array)
        return lax.pcast(array, tuple(missing), to="varying") if missing else array

    return jax.tree.map(vary, values)


def varying_axes(array: jax.Array) -> frozenset[Any]:
    """The axes of shard_map over which the values of an array may differ between devices."""
    axes: frozenset[Any] = jax.typeof(array).manual_axis_type.varying
    return axes
