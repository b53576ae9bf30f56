"""The norm layers of the networks: a norm and then an activation, as each library's users write it."""

from collections.abc import Callable

import flax.linen as nn
import jax

import jaxnorm
from benchmarks.shapes import ACTIVATIONS as NAMES
from benchmarks.shapes import EPSILON

Activation = Callable[[jax.Array], jax.Array]
ACTIVATIONS: dict[str, Activation] = {name: getattr(jax.nn, name) for name in NAMES}
# Called inside a network, where it makes its layer: (x, activation) -> activation(norm(x)), in the dtype of x.
Layer = Callable[[jax.Array, Activation], jax.Array]


def _fused(x: jax.Array, activation: Activation) -> jax.Array:
    return jaxnorm.InstanceNorm(epsilon=EPSILON, dtype=x.dtype, activation=activation)(x)


def _separate(x: jax.Array, activation: Activation) -> jax.Array:
    return activation(jaxnorm.InstanceNorm(epsilon=EPSILON, dtype=x.dtype)(x))


def _flax(x: jax.Array, activation: Activation) -> jax.Array:
    return activation(nn.InstanceNorm(epsilon=EPSILON, dtype=x.dtype)(x))


def _flax_stable(x: jax.Array, activation: Activation) -> jax.Array:
    return activation(nn.InstanceNorm(epsilon=EPSILON, dtype=x.dtype, use_fast_variance=False)(x))


def _flax_group_norm(x: jax.Array, activation: Activation) -> jax.Array:
    return activation(nn.GroupNorm(num_groups=None, group_size=1, epsilon=EPSILON, dtype=x.dtype)(x))


LAYERS: dict[str, Layer] = {
    "no norm": lambda x, activation: activation(x),
    "jaxnorm": _fused,
    "jaxnorm, activation apart": _separate,
    "Flax": _flax,
    "Flax, stable": _flax_stable,
    "Flax GroupNorm": _flax_group_norm,
}
