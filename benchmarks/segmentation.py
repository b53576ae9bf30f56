"""A small U-Net with any norm, and its training step."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from contenders import EPSILON

import jaxnorm

IMAGES = (4, 256, 256, 1)

# Each is called inside the network, where it makes its layer: x -> relu(norm(x)).
LAYERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "no norm": jax.nn.relu,
    "jaxnorm": lambda x: jaxnorm.InstanceNorm(epsilon=EPSILON, dtype=x.dtype, activation=jax.nn.relu)(x),
    "flax": lambda x: jax.nn.relu(nn.InstanceNorm(epsilon=EPSILON, dtype=x.dtype)(x)),
    "flax, stable": lambda x: jax.nn.relu(nn.InstanceNorm(epsilon=EPSILON, dtype=x.dtype, use_fast_variance=False)(x)),
    "flax GroupNorm": lambda x: jax.nn.relu(
        nn.GroupNorm(num_groups=None, group_size=1, epsilon=EPSILON, dtype=x.dtype)(x)
    ),
}


class UNet(nn.Module):
    """Encoder and decoder with skip connections (Ronneberger, Fischer, Brox 2015): (N, H, W, 1) to (N, H, W).

    Attributes:
      norm: of LAYERS, after each convolution.
      dtype: of the computation; parameters are float32.
      features: channels per level, from the finest; each level below has half the side.
    """

    norm: Callable[[jax.Array], jax.Array]
    dtype: jax.typing.DTypeLike
    features: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        skips = []
        for level, features in enumerate(self.features):
            x = self.convolve(x, features, stride=1 if level == 0 else 2)
            x = self.convolve(x, features)
            skips.append(x)
        for features, skip in zip(self.features[-2::-1], skips[-2::-1], strict=True):
            x = nn.ConvTranspose(features, (2, 2), (2, 2), dtype=self.dtype)(x)
            x = self.convolve(jnp.concatenate([x, skip], axis=-1), features)
        return nn.Conv(1, (1, 1), dtype=jnp.float32)(x)[..., 0]

    def convolve(self, x: jax.Array, features: int, stride: int = 1) -> jax.Array:
        return self.norm(nn.Conv(features, (3, 3), stride, use_bias=False, dtype=self.dtype)(x))


def training_step(layer: str, dtype: jax.typing.DTypeLike) -> Callable[..., tuple[jax.Array, ...]]:
    """(params, x, target) -> (loss, params), by gradient descent; x is (N, H, W, 1) and target (N, H, W)."""
    network = UNet(LAYERS[layer], dtype)

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
