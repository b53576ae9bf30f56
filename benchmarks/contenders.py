"""What is compared: activation(norm(x) + residual), with a scale and a bias per channel, as each library's users do."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.shapes import CHANNEL_AXIS, EPSILON, Case
from jaxnorm import instance_norm

# (x, gamma, beta, *residual) -> y, in the shape and dtype of x; gamma and beta are (C,), float32.
Norm = Callable[..., jax.Array]
BASELINE, STABLE = "Flax", "Flax, stable"


def contenders(case: Case, platform: str) -> dict[str, Norm]:
    """The libraries that have the layout and are installed, jaxnorm first."""
    axis, activation = CHANNEL_AXIS[case.layout], getattr(jax.nn, case.activation)
    norms = {"jaxnorm": _jaxnorm(axis, activation, None)}
    if platform != "cpu":
        # By itself jaxnorm takes the kernel only where that is proven.
        norms["jaxnorm, kernel"] = _jaxnorm(axis, activation, "pallas")
    others = {BASELINE: _flax(axis, use_fast_variance=True), STABLE: _flax(axis, use_fast_variance=False)}
    if axis == -1:
        others["Flax GroupNorm"] = _flax_group_norm
    if importlib.util.find_spec("haiku"):
        others["Haiku"] = _haiku(axis)
    if importlib.util.find_spec("equinox") and axis == 1:
        others["Equinox"] = _equinox
    return norms | {name: _then(norm, activation) for name, norm in others.items()}


def forward(norm: Norm) -> Callable[..., jax.Array]:
    """(x, gamma, beta, dy, *residual) -> y. It has no use for dy, which jit drops."""
    return lambda x, gamma, beta, dy, *residual: norm(x, gamma, beta, *residual)


def step(norm: Norm) -> Callable[..., tuple[jax.Array, ...]]:
    """(x, gamma, beta, dy, *residual) -> (y, dx, dgamma, dbeta, *dresidual)."""

    def run(x: jax.Array, gamma: jax.Array, beta: jax.Array, dy: jax.Array, *residual: jax.Array) -> Any:
        y, pullback = jax.vjp(norm, x, gamma, beta, *residual)
        # The rest of a network lies between the two passes: dy is not there before y is.
        y, dy = lax.optimization_barrier((y, dy))
        return y, *pullback(dy)

    return run


WRAP = {"forward": forward, "step": step}


def arguments(case: Case) -> tuple[jax.Array, ...]:
    """x, gamma, beta, dy and, where the case has one, the residual."""
    # NumPy draws them, because JAX would compile its generator again for every shape.
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...] | int, dtype: str) -> jax.Array:
        return jnp.array(rng.standard_normal(shape, "float32").astype(dtype))

    gamma, beta = (draw(case.shape.channels, "float32") for _ in range(2))
    x, dy, *residual = (draw(case.array, case.dtype) for _ in range(2 + case.residual))
    return x, 1 + 0.1 * gamma, 0.1 * beta, dy, *residual


def call(case: Case, norm: Norm) -> Callable[[], Any]:
    """A function that makes one call under jit and waits for the result."""
    function, given = jax.jit(WRAP[case.pass_name](norm)), arguments(case)
    return lambda: jax.block_until_ready(function(*given))


def _jaxnorm(axis: int, activation: Callable[..., jax.Array], implementation: str | None) -> Norm:
    norm = functools.partial(
        instance_norm, eps=EPSILON, channel_axis=axis, activation=activation, implementation=implementation
    )
    return lambda x, gamma, beta, residual=None: norm(x, gamma, beta, residual=residual)


def _then(norm: Norm, activation: Callable[..., jax.Array]) -> Norm:
    return lambda x, gamma, beta, *residual: activation(sum(residual, norm(x, gamma, beta)))


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
