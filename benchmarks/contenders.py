"""What is compared: relu(norm(x)) with a scale and a bias per channel, as each library's users write it."""

import functools
import importlib.util
from collections.abc import Callable

import flax.linen as nn
import jax
from jax import lax
from shapes import CHANNEL_AXIS, Layout

from jaxnorm import instance_norm

# (x, gamma, beta) -> y, in the shape and dtype of x; gamma and beta are (C,), float32.
Norm = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
EPSILON = 1e-5
BASELINE = "flax"


def contenders(layout: Layout, platform: str) -> dict[str, Norm]:
    """Those that have the layout and are installed, jaxnorm first."""
    axis = CHANNEL_AXIS[layout]
    norms = {"jaxnorm": _jaxnorm(axis, None)}
    if platform != "cpu":
        # By itself jaxnorm takes the kernel only where that is proven.
        norms["jaxnorm, kernel"] = _jaxnorm(axis, "pallas")
    norms[BASELINE] = _flax(axis, use_fast_variance=True)
    norms["flax, stable"] = _flax(axis, use_fast_variance=False)
    if layout == "channels-last":
        norms["flax GroupNorm"] = _flax_group_norm
    if importlib.util.find_spec("haiku"):
        norms["haiku"] = _haiku(axis)
    if importlib.util.find_spec("equinox") and layout == "channels-first":
        norms["equinox"] = _equinox
    return norms


def forward(norm: Norm) -> Callable[..., jax.Array]:
    """(x, gamma, beta, dy) -> y. It has no use for dy, which jit drops."""
    return lambda x, gamma, beta, dy: norm(x, gamma, beta)


def step(norm: Norm) -> Callable[..., tuple[jax.Array, ...]]:
    """(x, gamma, beta, dy) -> (y, dx, dgamma, dbeta)."""

    def run(x: jax.Array, gamma: jax.Array, beta: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(norm, x, gamma, beta)
        # The rest of a network lies between the two passes: dy is not there before y is.
        y, dy = lax.optimization_barrier((y, dy))
        return y, *pullback(dy)

    return run


def _jaxnorm(axis: int, implementation: str | None) -> Norm:
    return functools.partial(
        instance_norm, eps=EPSILON, channel_axis=axis, activation=jax.nn.relu, implementation=implementation
    )


def _flax(axis: int, *, use_fast_variance: bool) -> Norm:
    def norm(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
        layer = nn.InstanceNorm(epsilon=EPSILON, feature_axes=axis, dtype=x.dtype, use_fast_variance=use_fast_variance)
        return jax.nn.relu(layer.apply({"params": {"scale": gamma, "bias": beta}}, x))

    return norm


def _flax_group_norm(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    layer = nn.GroupNorm(num_groups=None, group_size=1, epsilon=EPSILON, dtype=x.dtype)
    return jax.nn.relu(layer.apply({"params": {"scale": gamma, "bias": beta}}, x))


def _haiku(axis: int) -> Norm:
    import haiku as hk

    def layer(x: jax.Array) -> jax.Array:
        data_format = "channels_last" if axis == -1 else "channels_first"
        return jax.nn.relu(hk.InstanceNorm(True, True, eps=EPSILON, data_format=data_format, name="norm")(x))

    def norm(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
        # Haiku computes in the dtype of its parameters and of x, which its users make the same one.
        shape = [1] * x.ndim
        shape[axis] = len(gamma)
        parameters = {"norm": {"scale": gamma.astype(x.dtype), "offset": beta.astype(x.dtype)}}
        parameters = jax.tree.map(lambda value: value.reshape(shape if axis == 1 else -1), parameters)
        return hk.without_apply_rng(hk.transform(layer)).apply(parameters, x)

    return norm


def _equinox(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    import equinox as eqx

    layer = eqx.nn.GroupNorm(groups=len(gamma), channels=len(gamma), eps=EPSILON)
    layer = eqx.tree_at(lambda module: (module.weight, module.bias), layer, (gamma, beta))
    return jax.nn.relu(jax.vmap(layer)(x))
