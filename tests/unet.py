"""A U-Net as nnU-Net builds them, and images for it to segment."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm

leaky_relu = functools.partial(jax.nn.leaky_relu, negative_slope=0.01)


class UNet(nn.Module):
    """Encoder and decoder with skip connections (Ronneberger, Fischer, Brox 2015; Isensee et al. 2021).

    (N, *spatial, channels) to one logit per position, for two or three spatial axes, which every level below the
    first halves.

    Attributes:
      fused: whether jaxnorm normalizes, with the activation, or Flax does, and then the activation.
      features: channels per level, from the finest.
      dtype: of the computation; the logits are at least float32.
    """

    fused: bool = True
    features: tuple[int, ...] = (8, 16, 32)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        twos = (2,) * (x.ndim - 2)
        skips = []
        for level, features in enumerate(self.features):
            x = self.convolve(x, features, strides=1 if level == 0 else twos)
            x = self.convolve(x, features)
            skips.append(x)
        for features, skip in zip(self.features[-2::-1], skips[-2::-1], strict=True):
            x = nn.ConvTranspose(features, kernel_size=twos, strides=twos, dtype=self.dtype)(x)
            x = jnp.concatenate([x, skip], axis=-1)
            x = self.convolve(x, features)
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Conv(1, kernel_size=(1,) * len(twos), dtype=dtype)(x)[..., 0]

    def convolve(self, x, features, strides=1):
        # Without a bias: the norm takes it away again, so that its gradient is rounding error, which Adam would
        # blow up to full steps.
        x = nn.Conv(features, (3,) * (x.ndim - 2), strides, use_bias=False, dtype=self.dtype)(x)
        if self.fused:
            return jaxnorm.InstanceNorm(epsilon=1e-5, dtype=self.dtype, activation=leaky_relu)(x)
        return leaky_relu(nn.InstanceNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False)(x))


def ellipses(count, shape, seed):
    """Noisy images (count, *shape, 1) of two to four ellipses each, and where they are: bool (count, *shape).

    Brightness and contrast differ from image to image, as between scanners.
    """
    rng = np.random.default_rng(seed)
    positions = np.stack(np.indices(shape), axis=-1) / np.array(shape)
    images, masks = [], []
    for _ in range(count):
        mask = np.zeros(shape, bool)
        for _ in range(rng.integers(2, 5)):
            center, radii = rng.uniform(0.2, 0.8, len(shape)), rng.uniform(0.15, 0.3, len(shape))
            mask |= np.sum(((positions - center) / radii) ** 2, axis=-1) < 1
        image = mask + rng.normal(0, 0.5, shape)
        images.append(rng.uniform(0.5, 20) * image + rng.uniform(-100, 100))
        masks.append(mask)
    return np.stack(images)[..., None].astype(np.float32), np.stack(masks)


def segmentation_loss(logits, mask):
    """Cross-entropy and soft Dice loss, as in nnU-Net."""
    mask = mask.astype(logits.dtype)
    cross_entropy = jnp.mean(jax.nn.softplus(logits) - logits * mask)
    return cross_entropy + 1 - dice(jax.nn.sigmoid(logits), mask)


def dice(prediction, mask):
    """Twice the intersection over the sum of the sizes: 1 is perfect."""
    return 2 * jnp.sum(prediction * mask) / (jnp.sum(prediction) + jnp.sum(mask))
