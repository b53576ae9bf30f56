"""What the generator is trained for: the style's texture and the content's structure, both seen through random filters.

No pretrained network is needed: the Gram matrices of one layer of random filters, at several scales, describe a texture
(Ustyuzhaninov et al. 2017, https://arxiv.org/abs/1606.00021). The filters are drawn once and stay as they are, and
nothing here is normalized by the picture that is judged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Filters(NamedTuple):
    """A convolution and a relu: relu(x * kernel + bias)."""

    kernel: jax.Array
    bias: jax.Array


class Texture(NamedTuple):
    """What remains of a style: the mean of the responses and the Gram matrix of their deviations from it."""

    mean: jax.Array
    gram: jax.Array


class Bank(NamedTuple):
    """Per scale, finest first: the filters of edges, the filters of colors, and the style's texture in both."""

    filters: tuple[tuple[Filters, Filters], ...]
    textures: tuple[tuple[Texture, Texture], ...]


def make_bank(
    key: jax.Array, style: jax.Array, *, scales: int = 3, size: int = 7, edges: int = 48, colors: int = 16
) -> Bank:
    """Random filters for a pyramid of scales, and the texture of the style (1, H, W, 3) in them.

    Natural pictures have far more energy in some filters than in others. All are scaled to a standard deviation of one
    over the style, once and for all, so that the Gram matrices weigh them alike.
    """
    filters, textures = [], []
    for scale_key in jax.random.split(key, scales):
        edge_key, color_key = jax.random.split(scale_key)
        edge = jax.random.normal(edge_key, (size, size, 3, edges))
        edge -= edge.mean((0, 1), keepdims=True)  # blind to plain areas, which are for the filters of colors
        color = jax.random.normal(color_key, (1, 1, 3, colors))
        pair = (_standardized(edge, style), _standardized(color, style))
        filters.append(pair)
        textures.append(tuple(_texture(respond(one, style)) for one in pair))
        style = halve(style)
    return Bank(tuple(filters), tuple(textures))


def style_loss(bank: Bank, y: jax.Array) -> jax.Array:
    """Squared differences of the Gram matrices relative to the style's, averaged over scales and kinds of filters."""
    distances = []
    for pair, textures in zip(bank.filters, bank.textures, strict=True):
        for filters, texture in zip(pair, textures, strict=True):
            gram = _gram(respond(filters, y), texture.mean)
            distances.append(jnp.mean(jnp.sum((gram - texture.gram) ** 2, (1, 2))) / jnp.sum(texture.gram**2))
        y = halve(y)
    return jnp.mean(jnp.stack(distances))


def content_loss(bank: Bank, y: jax.Array, content: jax.Array) -> jax.Array:
    """Squared differences of what the coarser scales see of the brightness; colors are left to the style."""
    y, content = halve(grayscale(y)), halve(grayscale(content))
    distances = []
    for _, colors in bank.filters[1:]:
        distances.append(jnp.mean((respond(colors, y) - respond(colors, content)) ** 2))
        y, content = halve(y), halve(content)
    return jnp.mean(jnp.stack(distances))


def respond(filters: Filters, x: jax.Array) -> jax.Array:
    """(N, H, W, 3) to (N, H', W', filters)."""
    return jax.nn.relu(_convolve(x, filters.kernel) + filters.bias)


def grayscale(x: jax.Array) -> jax.Array:
    """The brightness of a picture (ITU-R BT.601), in all three channels."""
    return jnp.broadcast_to((x @ jnp.array([0.299, 0.587, 0.114]))[..., None], x.shape)


def halve(x: jax.Array) -> jax.Array:
    n, h, w, c = x.shape
    return jax.image.resize(x, (n, h // 2, w // 2, c), "linear")


def _standardized(kernel: jax.Array, style: jax.Array) -> Filters:
    response = _convolve(style, kernel)
    scale = 1 / response.std((0, 1, 2))
    return Filters(kernel * scale, -response.mean((0, 1, 2)) * scale)


def _texture(response: jax.Array) -> Texture:
    mean = response.mean((0, 1, 2))
    return Texture(mean, _gram(response, mean)[0])


def _gram(response: jax.Array, mean: jax.Array) -> jax.Array:
    response = (response - mean).reshape(response.shape[0], -1, response.shape[-1])
    return jnp.einsum("npc,npd->ncd", response, response) / response.shape[1]


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
