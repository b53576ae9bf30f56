"""What a user writes with types, which mypy reads in `make lint`: it must accept this, and refuse what is ignored."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm
from jaxnorm import nnx
from jaxnorm.explanation import Explanation, Pass
from jaxnorm.gpu.tile import NoTile, Tile


def calls() -> list[jax.Array]:
    """Calls with arrays of NumPy and of JAX."""
    x = np.zeros((2, 3, 8, 8), np.float32)
    values = np.ones(3, np.float32)
    mask = np.ones((2, 1, 8, 8), np.bool_)
    moments: tuple[jax.Array, jax.Array] = jaxnorm.instance_moments(x, where=mask)
    y: jax.Array = jaxnorm.instance_norm(x, values, values, residual=x, activation=jax.nn.relu, where=mask)
    y = jaxnorm.instance_norm(jnp.asarray(x), moments[0], residual=y, moments=moments)
    given = jaxnorm.instance_norm(x, moments=(values, values))
    groups = jaxnorm.group_norm(x, values, values, num_groups=3, residual=x, activation=jax.nn.silu, where=mask)
    return [y, given, groups]


def layers() -> list[jaxnorm.InstanceNorm | jaxnorm.GroupNorm | type[nnx.GroupNorm] | type[nnx.InstanceNorm]]:
    """Layers of both kinds, as modules and as classes."""
    return [
        jaxnorm.GroupNorm(num_groups=3),
        jaxnorm.nnx.GroupNorm,
        jaxnorm.InstanceNorm(activation=jax.nn.relu),
        nnx.InstanceNorm,
    ]


def explanations() -> list[Tile | NoTile]:
    """What explain returns."""
    x = jax.ShapeDtypeStruct((2, 3, 8), jnp.bfloat16)
    explanation: Explanation = jaxnorm.explain(np.zeros((2, 3, 8)), activation=jnp.tanh, implementation="xla")
    explanation = jaxnorm.explain(x, residual=True, device="H100")
    passes: list[Pass] = [explanation.forward, explanation.backward]
    return [each.tile for each in passes]


def wrong_call() -> jax.Array:
    """A list is no array. mypy would call the comment unused if it did not see that."""
    return jaxnorm.instance_norm([[[1.0, 2.0]]])  # type: ignore[arg-type]
