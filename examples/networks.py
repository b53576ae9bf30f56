"""The generator: a feed-forward network that redraws a picture, with a choice of normalization."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm import InstanceNorm
from jaxnorm.arguments import Activation

Norm = Literal["instance", "batch", "none"]


# Channels of noise.
NOISE = 4


class Generator(nn.Module):
    """Pictures (N, H, W, 3) in [0, 1] to pictures of the same size; H and W are multiples of 4.

    The network of Johnson et al. 2016 (https://arxiv.org/abs/1603.08155) and Ulyanov et al. 2016
    (https://arxiv.org/abs/1607.08022), but smaller: an encoder, residual blocks at a quarter of the resolution, and a
    decoder that resizes and convolves, because transposed convolutions draw checkerboards. Noise (N, H/4, W/4, NOISE)
    enters after the encoder: a clear sky has nothing else to make a pattern of.
    """

    norm: Norm = "instance"
    channels: int = 16
    blocks: int = 4
    # With instance norm: record the moments of the picture when train, and normalize with them when not.
    tracked: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array, *, train: bool) -> jax.Array:
        x = self._layer(x - 0.5, self.channels, train, kernel=7)
        x = self._layer(x, 2 * self.channels, train, stride=2)
        x = self._layer(x, 4 * self.channels, train, stride=2)
        for block in range(self.blocks):
            y = jnp.concatenate([x, noise], -1) if block == 0 else x
            y = self._layer(y, 4 * self.channels, train)
            x = self._layer(y, 4 * self.channels, train, residual=x)
        x = self._layer(double(x), 2 * self.channels, train)
        x = self._layer(double(x), self.channels, train)
        return nn.sigmoid(ReflectConv(3, kernel=5)(x))

    def _layer(
        self,
        x: jax.Array,
        channels: int,
        train: bool,
        *,
        kernel: int = 3,
        stride: int = 1,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        # A norm brings its own bias, so that the convolution needs one only where there is no norm.
        x = ReflectConv(channels, kernel, stride, use_bias=self.norm == "none")(x)
        return Normalize(self.norm, nn.relu, self.tracked)(x, residual, train=train)


class Normalize(nn.Module):
    """activation(norm(x) + residual). Only jaxnorm's layer does the three in one pass."""

    norm: Norm
    activation: Activation
    tracked: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None, *, train: bool) -> jax.Array:
        if self.norm == "instance":
            layer = InstanceNorm(activation=self.activation, track_running_stats=self.tracked, momentum=1.0)
            return layer(x, residual=residual, use_running_average=self.tracked and not train)
        if self.norm == "batch":
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return self.activation(x if residual is None else x + residual)


class ReflectConv(nn.Module):
    """A convolution whose borders are mirrored: zeros would draw a frame around the picture."""

    channels: int
    kernel: int = 3
    stride: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        margin = (self.kernel // 2, self.kernel // 2)
        x = jnp.pad(x, ((0, 0), margin, margin, (0, 0)), mode="reflect")
        kernel = (self.kernel, self.kernel)
        return nn.Conv(self.channels, kernel, self.stride, padding="VALID", use_bias=self.use_bias)(x)


def make_noise(key: jax.Array, pictures: jax.Array) -> jax.Array:
    """Noise for pictures (N, H, W, 3), smooth over about 8 pixels."""
    n, h, w, _ = pictures.shape
    coarse = jax.random.normal(key, (n, h // 8, w // 8, NOISE))
    return jax.image.resize(coarse, (n, h // 4, w // 4, NOISE), "linear")


def double(x: jax.Array) -> jax.Array:
    """(N, H, W, C) to (N, 2H, 2W, C): every pixel becomes four."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
