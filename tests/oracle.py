"""What instance norm is, twice: in float64 NumPy, and its JAX twin for derivatives. Shares no code with jaxnorm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special


class Activation(NamedTuple):
    """An activation as the user passes it, and the same in NumPy."""

    jax: Callable[[Any], Any] | None
    numpy: Callable[[Any], Any]


ACTIVATIONS = {
    "none": Activation(None, lambda z: z),
    "relu": Activation(jax.nn.relu, lambda z: np.maximum(z, 0)),
    "leaky_relu": Activation(jax.nn.leaky_relu, lambda z: np.where(z >= 0, z, 0.01 * z)),
    "silu": Activation(jax.nn.silu, lambda z: z / (1 + np.exp(-z))),
    "gelu": Activation(jax.nn.gelu, lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))),
    "exact_gelu": Activation(
        lambda z: jax.nn.gelu(z, approximate=False), lambda z: z / 2 * special.erfc(-z / np.sqrt(2))
    ),
    "tanh": Activation(jnp.tanh, np.tanh),
    "own": Activation(lambda z: z / (1 + jnp.abs(z)), lambda z: z / (1 + np.abs(z))),
}


def spatial_axes(rank: int, channel_axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(1, rank) if axis not in {a % rank for a in channel_axes})


def spread(value, shape: tuple[int, ...], channel_axes: tuple[int, ...]):
    """(*C) or (N, *C) to a shape that broadcasts against x."""
    channels = sorted(a % len(shape) for a in channel_axes)
    kept = {0, *channels} if value.ndim == len(channels) + 1 else set(channels)
    sizes = iter(value.shape)
    return value.reshape([next(sizes) if axis in kept else 1 for axis in range(len(shape))])


def moments(x, channel_axes=(1,), where=None):
    """Mean and biased variance in float64, kept at the rank of x."""
    x = np.asarray(x, np.float64)
    axes = spatial_axes(x.ndim, channel_axes)
    mask = np.broadcast_to(True if where is None else where, x.shape)
    count = mask.sum(axes, keepdims=True)
    with np.errstate(invalid="ignore"):
        mean = np.where(mask, x, 0).sum(axes, keepdims=True) / count
        var = (np.where(mask, x - mean, 0) ** 2).sum(axes, keepdims=True) / count
    return mean, var


def instance_norm(
    x, gamma=None, beta=None, eps=1e-5, *, channel_axes=(1,), residual=None, activation="none", where=None
):
    """The result in float64, and the largest magnitude that was rounded on the way to it."""
    mean, var = moments(x, channel_axes, where)
    z = (np.asarray(x, np.float64) - mean) / np.sqrt(var + eps)
    magnitude = np.abs(z)
    if gamma is not None:
        gamma = spread(np.asarray(gamma, np.float64), x.shape, channel_axes)
        z, magnitude = z * gamma, magnitude * np.abs(gamma)
    if beta is not None:
        beta = spread(np.asarray(beta, np.float64), x.shape, channel_axes)
        z, magnitude = z + beta, magnitude + np.abs(beta)
    if residual is not None:
        residual = np.asarray(residual, np.float64)
        z, magnitude = z + residual, magnitude + np.abs(residual)
    return ACTIVATIONS[activation].numpy(z), float(magnitude.max(initial=0.0))


def twin(x, gamma=None, beta=None, eps=1e-5, *, channel_axes=(1,), residual=None, activation="none"):
    """The same in JAX, for JAX to differentiate in float64."""
    axes = spatial_axes(x.ndim, channel_axes)
    mean = jnp.mean(x, axes, keepdims=True)
    z = (x - mean) / jnp.sqrt(jnp.mean((x - mean) ** 2, axes, keepdims=True) + eps)
    if gamma is not None:
        z = z * spread(gamma, x.shape, channel_axes)
    if beta is not None:
        z = z + spread(beta, x.shape, channel_axes)
    if residual is not None:
        z = z + residual
    function = ACTIVATIONS[activation].jax
    return z if function is None else function(z)


def gradients(dy, x, gamma=None, beta=None, residual=None, **options):
    """float64 gradients of <dy, twin(...)> by JAX: a dict with those of the arguments that are there."""
    given = {"x": x, "gamma": gamma, "beta": beta, "residual": residual}
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        given = {name: jnp.asarray(np.asarray(v, np.float64)) for name, v in given.items() if v is not None}
        weight = jnp.asarray(np.asarray(dy, np.float64))
        grads = jax.grad(lambda given: jnp.sum(weight * twin(**given, **options)))(given)
        return {name: np.asarray(g) for name, g in grads.items()}
