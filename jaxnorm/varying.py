"""Inside shard_map the type of an array says over which mesh axes its values may differ between devices."""

from typing import Any

import jax
from jax import lax


def vary_together(*values: Any) -> Any:
    """The values, each an array, a tree of arrays or None: all vary over the axes that any varies over.

    The transpose sums a gradient over the axes that its array did not vary over before.
    """
    axes: frozenset[Any] = frozenset().union(*map(_axes, jax.tree.leaves(values)))

    def vary(array: jax.Array) -> jax.Array:
        missing = axes - _axes(array)
        return lax.pcast(array, tuple(missing), to="varying") if missing else array

    return jax.tree.map(vary, values)


def _axes(array: jax.Array) -> frozenset[Any]:
    axes: frozenset[Any] = jax.typeof(array).manual_axis_type.varying
    return axes
