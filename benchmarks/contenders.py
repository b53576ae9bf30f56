"""What is compared: an activation of norm(x), which has a scale and a bias per channel, as users of each library do."""

import functools
import importlib.util
from collections.abc import Callable

import flax.linen as nn
import jax
from jax import lax
from layers import EPSILON, Activation
from shapes import CHANNEL_AXIS, Layout

from jaxnorm import instance_norm

# (x, gamma, beta) -> y, in the shape and dtype of x; gamma and beta are (C,), float32.
Norm = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
BASELINE = "flax"


def contenders(layout: Layout, platform: str, activation: Activation = jax.nn.relu) -> dict[str, Norm]:
    """Those that have the layout and are installed, jaxnorm first."""
    axis = CHANNEL_AXIS[layout]
    norms = {"jaxnorm": _jaxnorm(axis, activation, None)}
    if platform != "cpu":
        # By itself jaxnorm takes the kernel only where that is proven.
        norms["jaxnorm, kernel"] = _jaxnorm(axis, activation, "pallas")
    others = {BASELINE: _flax(axis, use_fast_variance=True), "flax, stable": _flax(axis, use_fast_variance=False)}
    if layout == "channels-last":
        others["flax GroupNorm"] = _flax_group_norm
    if importlib.util.find_spec("haiku"):
        others["haiku"] = _haiku(axis)
    if importlib.util.find_spec("equinox") and layout == "channels-first":
        others["equinox"] = _equinox
    return norms | {name: _followed_by(activation, norm) for name, norm in others.items()}


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


def _jaxnorm(axis: int, activation: Activation, implementation: str | None) -> Norm:
    return functools.partial(
        instance_norm, eps=EPSILON, channel_axis=axis, activation=activation, implementation=implementation
    )


def _followed_by(activation: Activation, norm: Norm) -> Norm:
    return lambda x, gamma, beta: activation(norm(x, gamma, beta))


def _flax(axis: int, *, use_fast_variance: bool) -> Norm:
    def norm(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
        layer = nn.InstanceNorm(epsilon=EPSILON, feature_axes=axis, dtype=x.dtype, use_fast_variance=use_fast_variance)
        return layer.apply({"params": {"scale": gamma, "bias": beta}}, x)

    return norm


def _flax_group_norm(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    layer = nn.GroupNorm(num_groups=None, group_size=1, epsilon=EPSILON, dtype=x.dtype)
    return layer.apply({"params": {"scale": gamma, "bias": beta}}, x)


def _haiku(axis: int) -> Norm:
    import haiku as hk

    def layer(x: jax.Array) -> jax.Array:
        data_format = "channels_last" if axis == -1 else "channels_first"
        return hk.InstanceNorm(True, True, eps=EPSILON, data_format=data_format, name="norm")(x)

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
    return jax.vmap(layer)(x)
