"""Trains a generator to redraw crops of a content picture in a style."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from networks import Generator, Norm, make_noise
from perception import Bank, content_loss, grayscale, style_loss

BATCH = 2
LEARNING_RATE = 3e-3
# As strong as the style: below it buildings dissolve, above it the colors stay timid.
CONTENT_WEIGHT = 1.0
# Contrast and brightness of the crops vary, and the target does not: the result should not depend on the
# contrast of the content, which is what the paper introduced instance norm for.
CONTRAST, BRIGHTNESS = 2.0, 0.15


class Trained(NamedTuple):
    """A generator after training.

    Attributes:
      variables: parameters, and batch statistics where there are some.
      losses: of every step.
      steps_per_second: without the first step, which compiles.
    """

    variables: Any
    losses: list[float]
    steps_per_second: float


def train(
    norm: Norm,
    content: jax.Array,
    target: jax.Array,
    bank: Bank,
    *,
    steps: int,
    size: int,
    seed: int,
    on_step: Callable[[float], None],
) -> Trained:
    """Trains with Adam on random crops, mirrored at random, of varying contrast and brightness.

    Args:
      norm: of the generator.
      content: the picture (1, H, W, 3) in [0, 1] that crops are taken from.
      target: the picture whose structure is wanted, like content.
      bank: the style.
      steps, size, seed: steps, side of a crop, seed of everything random.
      on_step: called with every loss.
    """
    generator = Generator(norm)
    crop = jnp.zeros((1, size, size, 3))
    variables = generator.init(jax.random.key(seed), crop, make_noise(jax.random.key(0), crop), train=True)
    state = {key: value for key, value in variables.items() if key != "params"}
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    carry = (variables["params"], state, optimizer.init(variables["params"]))
    step = jax.jit(functools.partial(_step, generator, optimizer, size))
    pictures = jnp.concatenate([content, target], axis=-1)[0]

    losses: list[float] = []
    started = time.perf_counter()
    for i in range(steps):
        carry, loss = step(carry, jax.random.fold_in(jax.random.key(seed + 1), i), pictures, bank)
        losses.append(float(loss))
        on_step(losses[-1])
        if i == 0:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    params, state, _ = carry
    return Trained({"params": params, **state}, losses, (steps - 1) / seconds if steps > 1 else float("nan"))


def stylize(norm: Norm, variables: Any, picture: jax.Array) -> jax.Array:
    """The picture (1, H, W, 3) as the trained generator redraws it, with the same noise every time."""
    noise = make_noise(jax.random.key(0), picture)
    y: jax.Array = jax.jit(functools.partial(Generator(norm).apply, train=False))(variables, picture, noise)
    return y


def content_target(content: jax.Array, style: jax.Array) -> jax.Array:
    """The brightness of the content with the mean and the contrast of the style's, which its texture asks for."""
    ours, theirs = grayscale(content), grayscale(style)
    return jnp.clip((ours - ours.mean()) / ours.std() * theirs.std() + theirs.mean(), 0, 1)


def _step(
    generator: Generator, optimizer: Any, size: int, carry: Any, key: jax.Array, pictures: jax.Array, bank: Bank
) -> tuple[Any, jax.Array]:
    params, state, momentum = carry
    crop_key, contrast_key, noise_key = jax.random.split(key, 3)
    crops = jax.vmap(lambda key: _crop(key, pictures, size))(jax.random.split(crop_key, BATCH))
    content, target = crops[..., :3], crops[..., 3:]
    content = jax.vmap(_vary_contrast)(jax.random.split(contrast_key, BATCH), content)
    noise = make_noise(noise_key, content)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        y, updated = generator.apply({"params": params, **state}, content, noise, train=True, mutable=list(state))
        return style_loss(bank, y) + CONTENT_WEIGHT * content_loss(bank, y, target), updated

    (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, momentum = optimizer.update(gradients, momentum)
    return (optax.apply_updates(params, updates), state, momentum), value


def _vary_contrast(key: jax.Array, picture: jax.Array) -> jax.Array:
    contrast_key, brightness_key = jax.random.split(key)
    contrast = CONTRAST ** jax.random.uniform(contrast_key, minval=-1)
    brightness = BRIGHTNESS * jax.random.uniform(brightness_key, minval=-1)
    return jnp.clip((picture - 0.5) * contrast + 0.5 + brightness, 0, 1)


def _crop(key: jax.Array, pictures: jax.Array, size: int) -> jax.Array:
    row_key, column_key, mirror_key = jax.random.split(key, 3)
    height, width, channels = pictures.shape
    row = jax.random.randint(row_key, (), 0, height - size + 1)
    column = jax.random.randint(column_key, (), 0, width - size + 1)
    crop = jax.lax.dynamic_slice(pictures, (row, column, 0), (size, size, channels))
    return jnp.where(jax.random.bernoulli(mirror_key), crop[:, ::-1], crop)
