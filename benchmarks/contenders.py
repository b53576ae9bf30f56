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

import jaxnorm
from benchmarks.shapes import CHANNEL_AXIS, EPSILON, Case

# (x, gamma, beta, *residual) -> y, in the shape and dtype of x; gamma and beta are (C,), float32.
Norm = Callable[..., jax.Array]
BASELINE, STABLE = "Flax", "Flax, stable"
JAXNORM, PLAIN, KERNEL = "jaxnorm", "jaxnorm, plain XLA", "jaxnorm, kernel"
OTHERS = (KERNEL, BASELINE, STABLE, "Flax GroupNorm", "Haiku", "Equinox")


def contenders(case: Case, platform: str) -> list[str]:
    """Names of those that have the layout and are installed, jaxnorm first."""
    # By itself jaxnorm takes the kernel only on GPUs where it is proven.
    names = [JAXNORM, *[KERNEL] * (platform != "cpu"), BASELINE, STABLE]
    if case.group_size is not None:
        return names
    if case.layout == "channels-last":
        names.append("Flax GroupNorm")
    if importlib.util.find_spec("haiku"):
        names.append("Haiku")
    if importlib.util.find_spec("equinox") and case.layout == "channels-first":
        names.append("Equinox")
    return names


def norm_of(name: str, case: Case) -> Norm:
    """activation(norm(x) + residual), as the users of that library write it."""
    axis, activation = CHANNEL_AXIS[case.layout], getattr(jax.nn, case.activation)
    implementations = {JAXNORM: None, PLAIN: "xla", KERNEL: "pallas"}
    if name in implementations:
        groups = {} if case.group_size is None else {"group_size": case.group_size}
        fused = functools.partial(
            jaxnorm.group_norm if groups else jaxnorm.instance_norm,
            **groups,
            eps=EPSILON,
            channel_axis=axis,
            activation=activation,
            implementation=implementations[name],
        )
        return lambda x, gamma, beta, residual=None: fused(x, gamma, beta, residual=residual)
    if case.group_size is None:
        flax = functools.partial(_flax, functools.partial(nn.InstanceNorm, feature_axes=axis))
    else:
        flax = functools.partial(_flax, functools.partial(nn.GroupNorm, None, case.group_size))
    norm = {
        BASELINE: functools.partial(flax, True),
        STABLE: functools.partial(flax, False),
        "Flax GroupNorm": functools.partial(_flax, functools.partial(nn.GroupNorm, None, 1), True),
        "Haiku": functools.partial(_haiku, axis),
        "Equinox": _equinox,
    }[name]
    return lambda x, gamma, beta, *residual: activation(sum(residual, norm(x, gamma, beta)))


def forward(norm: Norm) -> Callable[..., jax.Array]:
    """(x, gamma, beta, dy, *residual) -> y. It has no use for dy, which jit drops."""
    return lambda x, gamma, beta, dy, *residual: norm(x, gamma, beta, *residual)


def step(norm: Norm) -> Callable[..., tuple[jax.Array, ...]]:
    """(x, gamma, beta, dy, *residual) -> (y, dx, dgamma, dbeta, *dresidual)."""

    def run(x: jax.Array, gamma: jax.Array, beta: jax.Array, dy: jax.Array, *residual: jax.Array) -> Any:
        y, pullback = jax.vjp(norm, x, gamma, beta, *residual)
        # The rest of a network lies between the two passes, so dy must not be available before y.
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


def call(name: str, case: Case, given: tuple[jax.Array, ...]) -> Callable[[], Any]:
    """A function that makes one call of that contender under jit and waits for the result; given are its arguments."""
    return waiting(jax.jit(WRAP[case.pass_name](norm_of(name, case))), *given)


def waiting(function: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    """A function that makes one call and waits for the result."""
    return lambda: jax.block_until_ready(function(*given))


def _flax(
    layer: Callable[..., nn.Module], use_fast_variance: bool, x: jax.Array, gamma: jax.Array, beta: jax.Array
) -> jax.Array:
    norm = layer(epsilon=EPSILON, dtype=x.dtype, use_fast_variance=use_fast_variance)
    return norm.apply({"params": {"scale": gamma, "bias": beta}}, x)


def _haiku(axis: int, x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    import haiku as hk

    def layer(x: jax.Array) -> jax.Array:
        data_format = "channels_last" if axis == -1 else "channels_first"
        return hk.InstanceNorm(True, True, eps=EPSILON, data_format=data_format, name="norm")(x)

    # Haiku computes in the dtype that its parameters and x have in common, so its users give both the same one.
    shape = [1] * x.ndim
    shape[axis] = len(gamma)
    parameters = {"norm": {"scale": gamma.astype(x.dtype), "offset": beta.astype(x.dtype)}}
    parameters = jax.tree.map(lambda value: value.reshape(shape if axis == 1 else -1), parameters)
    return hk.without_apply_rng(hk.transform(layer)).apply(parameters, x)


def _equinox(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    import equinox as eqx

    layer = eqx.nn.GroupNorm(groups=len(gamma), channels=len(gamma), eps=EPSILON)
    layer = eqx.tree_at(lambda module: (module.weight, module.bias), layer, (gamma, beta))
    return jax.vmap(layer)(x)
