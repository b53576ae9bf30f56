"""A small U-Net with any norm, and its training step."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.layers import LAYERS, Activation, Layer

IMAGES = (4, 256, 256, 1)


class UNet(nn.Module):
    """Encoder and decoder with skip connections (Ronneberger, Fischer, Brox 2015): (N, *spatial, 1) to (N, *spatial).

    Attributes:
      norm: with the activation, after each convolution.
      dtype: of the computation; parameters are float32.
      features: channels per level, from the finest; each level below has half the side.
      activation: after each norm.
    """

    norm: Layer
    dtype: jax.typing.DTypeLike = jnp.float32
    features: tuple[int, ...] = (16, 32, 64)
    activation: Activation = jax.nn.relu

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
        return nn.Conv(1, (1,) * len(twos), dtype=jnp.float32)(x)[..., 0]

    def convolve(self, x: jax.Array, features: int, stride: int = 1) -> jax.Array:
        threes = (3,) * (x.ndim - 2)
        return self.norm(nn.Conv(features, threes, stride, use_bias=False, dtype=self.dtype)(x), self.activation)


def training_step(layer: str, dtype: jax.typing.DTypeLike) -> Callable[..., tuple[jax.Array, ...]]:
    """(params, x, target) -> (loss, params), by gradient descent; x is (N, H, W, 1) and target (N, H, W)."""
    return gradient_descent(UNet(LAYERS[layer], dtype))


def gradient_descent(network: nn.Module) -> Callable[..., tuple[jax.Array, ...]]:
    """(params, x, target) -> (loss, params): a step on the mean squared error."""

    def loss_of(params: dict, x: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(network.apply(params, x) - target))

    def step(params: dict, x: jax.Array, target: jax.Array) -> tuple[jax.Array, dict]:
        loss, gradients = jax.value_and_grad(loss_of)(params, x, target)
        return loss, jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)

    return step


def arguments(layer: str) -> tuple[dict, jax.Array, jax.Array]:
    """params, x and target of training_step."""
    x = jax.random.normal(jax.random.key(0), IMAGES)
    return jax.jit(UNet(LAYERS[layer], jnp.float32).init)(jax.random.key(1), x), x, (x[..., 0] > 0).astype(x.dtype)
