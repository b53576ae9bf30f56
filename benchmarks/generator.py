"""A small generator of images with any norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.layers import Layer


class Generator(nn.Module):
    """Down, residual blocks, up (Johnson et al. 2016; Zhu et al. 2017): (N, H, W, 3) to (N, H, W, 3).

    Attributes:
      norm: with the activation, after each convolution but the last.
      features: channels at full size; each of two levels below has twice as many and half the side.
      blocks: residual ones, at the lowest level.
    """

    norm: Layer
    features: int = 16
    blocks: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.convolve(x, self.features, side=7)
        for level in (1, 2):
            x = self.convolve(x, self.features * 2**level, stride=2)
        for _ in range(self.blocks):
            features = x.shape[-1]
            y = self.convolve(x, features)
            x = x + self.norm(nn.Conv(features, (3, 3), use_bias=False)(y), _identity)
        for level in (1, 0):
            features = self.features * 2**level
            x = self.norm(nn.ConvTranspose(features, (3, 3), (2, 2), use_bias=False)(x), jax.nn.relu)
        return jnp.tanh(nn.Conv(3, (7, 7))(x))

    def convolve(self, x: jax.Array, features: int, side: int = 3, stride: int = 1) -> jax.Array:
        return self.norm(nn.Conv(features, (side, side), stride, use_bias=False)(x), jax.nn.relu)


def _identity(z: jax.Array) -> jax.Array:
    return z
