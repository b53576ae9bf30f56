"""What instance norm and group norm are, twice: in float64 NumPy, and its JAX twin to be transformed.

Shares no code with jaxnorm.

NumPy compiles nothing, which is most of the time that a test of a small array takes; test_oracle.py has its gradients
against those that JAX forms of the twin.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special


class Activation(NamedTuple):
    """An activation as the user passes it, the same in NumPy, and its derivative."""

    jax: Callable[[Any], Any] | None
    numpy: Callable[[Any], Any]
    slope: Callable[[Any], Any]


def _gelu_slope(z):
    inner = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
    return (1 + inner) / 2 + z / 2 * (1 - inner**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)


ACTIVATIONS = {
    "none": Activation(None, lambda z: z, np.ones_like),
    "relu": Activation(jax.nn.relu, lambda z: np.maximum(z, 0), lambda z: np.float64(z > 0)),
    "leaky_relu": Activation(
        jax.nn.leaky_relu, lambda z: np.where(z >= 0, z, 0.01 * z), lambda z: np.where(z >= 0, 1, 0.01)
    ),
    "silu": Activation(
        jax.nn.silu, lambda z: z * special.expit(z), lambda z: special.expit(z) * (1 + z * special.expit(-z))
    ),
    "gelu": Activation(
        jax.nn.gelu, lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))), _gelu_slope
    ),
    "exact_gelu": Activation(
        lambda z: jax.nn.gelu(z, approximate=False),
        lambda z: z * special.ndtr(z),
        lambda z: special.ndtr(z) + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi),
    ),
    "tanh": Activation(jnp.tanh, np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "own": Activation(lambda z: z / (1 + jnp.abs(z)), lambda z: z / (1 + np.abs(z)), lambda z: (1 + np.abs(z)) ** -2.0),
}


def spatial_axes(rank: int, channel_axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(1, rank) if axis not in {a % rank for a in channel_axes})


def spread(value, shape: tuple[int, ...], channel_axes: tuple[int, ...]):
    """(*C) or (N, *C) to a shape that broadcasts against x."""
    channels = sorted(a % len(shape) for a in channel_axes)
    kept = {0, *channels} if value.ndim == len(channels) + 1 else set(channels)
    sizes = iter(value.shape)
    return value.reshape([next(sizes) if axis in kept else 1 for axis in range(len(shape))])


def grouped(sums, channel_axes: tuple[int, ...], group_size: int):
    """Sums per channel, at the rank of x, added up over the channels of each group, which all have the result."""
    if group_size == 1:
        return sums
    axis = channel_axes[0] % sums.ndim
    shape = sums.shape
    parts = sums.reshape(*shape[:axis], shape[axis] // group_size, group_size, *shape[axis + 1 :])
    return (parts.sum(axis + 1, keepdims=True) + 0 * parts).reshape(shape)


def moments(x, channel_axes=(1,), where=None, group_size=1):
    """Mean and biased variance in float64, kept at the rank of x."""
    x = np.asarray(x, np.float64)
    axes = spatial_axes(x.ndim, channel_axes)
    mask = np.broadcast_to(True if where is None else where, x.shape)

    def total(terms):
        return grouped(terms.sum(axes, keepdims=True), channel_axes, group_size)

    with np.errstate(invalid="ignore"):
        mean = total(np.where(mask, x, 0)) / total(mask.astype(np.int64))
        var = total(np.where(mask, x - mean, 0) ** 2) / total(mask.astype(np.int64))
    return mean, var


def instance_norm(
    x,
    gamma=None,
    beta=None,
    eps=1e-5,
    *,
    channel_axes=(1,),
    group_size=1,
    residual=None,
    activation="none",
    where=None,
):
    """The result in float64, and the largest magnitude that was rounded on the way to it."""
    mean, var = moments(x, channel_axes, where, group_size)
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


def twin(x, gamma=None, beta=None, eps=1e-5, *, channel_axes=(1,), group_size=1, residual=None, activation="none"):
    """The same in JAX, for JAX to differentiate in float64."""

    def average(terms):
        sums = jnp.sum(terms, spatial_axes(x.ndim, channel_axes), keepdims=True)
        return grouped(sums, channel_axes, group_size) / (x.size / sums.size * group_size)

    mean = average(x)
    z = (x - mean) / jnp.sqrt(average((x - mean) ** 2) + eps)
    if gamma is not None:
        z = z * spread(gamma, x.shape, channel_axes)
    if beta is not None:
        z = z + spread(beta, x.shape, channel_axes)
    if residual is not None:
        z = z + residual
    function = ACTIVATIONS[activation].jax
    return z if function is None else function(z)


def gradients(
    dy, x, gamma=None, beta=None, residual=None, eps=1e-5, *, channel_axes=(1,), group_size=1, activation="none"
):
    """float64 gradients of <dy, instance_norm(...)>: a dict with those of the arguments that are there."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    z, _ = instance_norm(x, gamma, beta, eps, channel_axes=channel_axes, group_size=group_size, residual=residual)
    dz = dy * ACTIVATIONS[activation].slope(z)
    mean, var = moments(x, channel_axes, group_size=group_size)
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    dxhat = dz if gamma is None else dz * spread(np.asarray(gamma, np.float64), x.shape, channel_axes)

    def average(terms):
        means = terms.mean(spatial_axes(x.ndim, channel_axes), keepdims=True)
        return grouped(means, channel_axes, group_size) / group_size

    grads = {"x": rstd * (dxhat - average(dxhat) - xhat * average(dxhat * xhat))}
    if gamma is not None:
        grads["gamma"] = _gathered(dz * xhat, gamma, channel_axes)
    if beta is not None:
        grads["beta"] = _gathered(dz, beta, channel_axes)
    return grads if residual is None else grads | {"residual": dz}


def _gathered(terms, parameter, channel_axes):
    """The sum of what reached each value of a parameter."""
    placed = spread(parameter, terms.shape, channel_axes).shape
    return terms.sum(tuple(axis for axis, size in enumerate(placed) if size == 1)).reshape(parameter.shape)
