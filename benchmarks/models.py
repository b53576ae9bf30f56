"""Networks with any norm, and their training step."""

from collections.abc import Callable
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnorm
from benchmarks.contenders import BASELINE, JAXNORM, STABLE
from benchmarks.shapes import EPSILON

Activation = Callable[[jax.Array], jax.Array]
NO_NORM, SEPARATE = "no norm", "jaxnorm, separate activation and residual"


class Layer(Protocol):
    """Called inside a network, where it makes its layer: activation(norm(x) + residual), in the dtype of x."""

    def __call__(
        self, x: jax.Array, activation: Activation | None = None, residual: jax.Array | None = None
    ) -> jax.Array: ...


def _fused(make: Callable[..., nn.Module], **options: int) -> Layer:
    """A layer of jaxnorm that is given the activation and the residual."""

    def layer(x: jax.Array, activation: Activation | None = None, residual: jax.Array | None = None) -> jax.Array:
        return make(epsilon=EPSILON, dtype=x.dtype, activation=activation, **options)(x, residual=residual)

    return layer


def _unfused(make: Callable[..., nn.Module | Callable[[jax.Array], jax.Array]], **options: int) -> Layer:
    """A layer that is only the norm, followed by the addition and the activation."""

    def layer(x: jax.Array, activation: Activation | None = None, residual: jax.Array | None = None) -> jax.Array:
        z = make(epsilon=EPSILON, dtype=x.dtype, **options)(x)
        z = z if residual is None else z + residual
        return z if activation is None else activation(z)

    return layer


def _layers(flax: Callable[..., nn.Module], own: Callable[..., nn.Module], **options: int) -> dict[str, Layer]:
    """What is compared in a network: Flax's layer and the layer of jaxnorm that takes its place."""
    return {
        NO_NORM: _unfused(lambda **_: lambda x: x),
        BASELINE: _unfused(flax, **options),
        STABLE: _unfused(flax, use_fast_variance=False, **options),
        SEPARATE: _unfused(own, **options),
        JAXNORM: _fused(own, **options),
    }


LAYERS = _layers(nn.InstanceNorm, jaxnorm.InstanceNorm)
# Those of the decoder.
GROUP_LAYERS = _layers(nn.GroupNorm, jaxnorm.GroupNorm, num_groups=32)


class UNet(nn.Module):
    """Encoder and decoder with skip connections (Ronneberger, Fischer, Brox 2015): (N, *spatial, 1) to the same.

    Attributes:
      norm: after each convolution, with the activation.
      features: channels per level, from the finest; each level below has half the side.
      activation: after each norm.
      dtype: of the computation; parameters are float32.
    """

    norm: Layer
    features: tuple[int, ...]
    activation: Activation = jax.nn.relu
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        twos = (2,) * (x.ndim - 2)
        skips = []
        for level, features in enumerate(self.features):
            x = self.convolve(x, features, stride=1 if level == 0 else 2)
            x = self.convolve(x, features)
            skips.append(x)
        for features, skip in zip(self.features[-2::-1], skips[-2::-1], strict=True):
            x = nn.ConvTranspose(features, twos, twos, dtype=self.dtype)(x)
            x = self.convolve(jnp.concatenate([x, skip], axis=-1), features)
        return nn.Conv(1, (1,) * len(twos), dtype=jnp.float32)(x)

    def convolve(self, x: jax.Array, features: int, stride: int = 1) -> jax.Array:
        threes = (3,) * (x.ndim - 2)
        return self.norm(nn.Conv(features, threes, stride, use_bias=False, dtype=self.dtype)(x), self.activation)


class Generator(nn.Module):
    """Down, residual blocks, up (Johnson et al. 2016; Zhu et al. 2017): (N, H, W, 3) to the same.

    Attributes:
      norm: after each convolution but the last, with the activation or, at the end of a block, with the residual.
      features: channels at full size; each of two levels below has twice as many and half the side.
      blocks: of two convolutions each, at the lowest level.
      dtype: of the computation; parameters are float32.
    """

    norm: Layer
    features: int = 64
    blocks: int = 9
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.convolution(self.features, 7)(x), jax.nn.relu)
        for level in (1, 2):
            x = self.norm(self.convolution(self.features * 2**level, 3, 2)(x), jax.nn.relu)
        for _ in range(self.blocks):
            y = self.norm(self.convolution(x.shape[-1], 3)(x), jax.nn.relu)
            x = self.norm(self.convolution(x.shape[-1], 3)(y), residual=x)
        for level in (1, 0):
            up = nn.ConvTranspose(self.features * 2**level, (3, 3), (2, 2), use_bias=False, dtype=self.dtype)
            x = self.norm(up(x), jax.nn.relu)
        return jnp.tanh(nn.Conv(3, (7, 7), dtype=jnp.float32)(x))

    def convolution(self, features: int, side: int, stride: int = 1) -> nn.Conv:
        return nn.Conv(features, (side, side), stride, use_bias=False, dtype=self.dtype)


class Decoder(nn.Module):
    """The decoder of latent diffusion (Rombach et al. 2022) without attention: (N, H, W, 4) to (N, 4 H, 4 W, 3).

    Attributes:
      norm: before each convolution, with the activation; of GROUP_LAYERS.
      features: channels per level, from the coarsest; each level below has twice the side.
      blocks: per level.
      dtype: of the computation; parameters are float32.
    """

    norm: Layer
    features: tuple[int, ...] = (512, 256, 128)
    blocks: int = 2
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.convolve(x, self.features[0])
        for level, features in enumerate(self.features):
            if level > 0:
                x = self.convolve(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), x.shape[-1])
            for _ in range(self.blocks):
                y = self.convolve(self.norm(x, jax.nn.silu), features)
                y = self.convolve(self.norm(y, jax.nn.silu), features)
                x = y + (x if x.shape[-1] == features else self.convolve(x, features, side=1))
        return nn.Conv(3, (3, 3), dtype=jnp.float32)(self.norm(x, jax.nn.silu))

    def convolve(self, x: jax.Array, features: int, side: int = 3) -> jax.Array:
        return nn.Conv(features, (side, side), dtype=self.dtype)(x)


def gradient_descent(network: nn.Module) -> Callable[..., tuple[jax.Array, dict]]:
    """(params, x, target) -> (loss, params): a training step on the mean squared error."""

    def loss_of(params: dict, x: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(network.apply(params, x) - target))

    def step(params: dict, x: jax.Array, target: jax.Array) -> tuple[jax.Array, dict]:
        loss, gradients = jax.value_and_grad(loss_of)(params, x, target)
        return loss, jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)

    return step
