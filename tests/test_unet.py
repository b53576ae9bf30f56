"""A real network trains with jaxnorm, and step by step as it does with Flax."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerance
from cases import exhaustive
from unet import UNet, dice, ellipses, segmentation_loss

pytestmark = pytest.mark.slow

# Small, so that a processor trains it in seconds; three levels all the same.
FEATURES = (4, 8, 16)
SHAPES = {"2D": (32, 32), "3D": (16, 16, 16)}
STEPS = 40
BATCH = 2
NORMS = 3 * len(FEATURES) - 1
OPTIMIZER = optax.adam(2e-2)


def batches(images):
    """The rows of a batch for every step, again and again through the images."""
    return [np.arange(step * BATCH, (step + 1) * BATCH) % len(images) for step in range(STEPS)]


@functools.partial(jax.jit, static_argnums=0)
def train_step(model, parameters, state, images, masks):
    def loss(parameters):
        return segmentation_loss(model.apply(parameters, images), masks)

    value, gradients = jax.value_and_grad(loss)(parameters)
    updates, state = OPTIMIZER.update(gradients, state)
    return value, optax.apply_updates(parameters, updates), state


def train(model, parameters, images, masks, steps):
    """The losses, and the parameters after so many steps."""
    losses, state = [], OPTIMIZER.init(parameters)
    for rows in batches(images)[:steps]:
        loss, parameters, state = train_step(model, parameters, state, images[rows], masks[rows])
        losses.append(float(loss))
    return np.array(losses), parameters


def initialize(model, images):
    # XLA compiles this generator many times faster than the default one.
    return jax.jit(model.init)(jax.random.key(0, impl="rbg"), images[:1])


class Trained(NamedTuple):
    model: UNet
    images: np.ndarray
    masks: np.ndarray
    before: dict
    losses: np.ndarray
    after: dict


@functools.cache
def trained(dimensions, dtype):
    model = UNet(features=FEATURES, dtype=dtype)
    images, masks = ellipses(8, SHAPES[dimensions], seed=0)
    before = initialize(model, images)
    return Trained(model, images, masks, before, *train(model, before, images, masks, STEPS))


@pytest.mark.parametrize(
    ("dimensions", "dtype"),
    [
        ("2D", "bfloat16"),
        pytest.param("2D", "float32", marks=exhaustive),
        pytest.param("3D", "float32", marks=exhaustive),
    ],
)
def test_training(dimensions, dtype):
    run = trained(dimensions, dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((run.before, run.after))} == {"float32"}
    epoch = len(run.images) // BATCH
    assert run.losses[-epoch:].mean() < run.losses[0] / 4

    images, masks = ellipses(8, SHAPES[dimensions], seed=1)
    prediction = jax.jit(run.model.apply)(run.after, images) > 0
    assert dice(prediction, masks) > 0.8


@exhaustive
@pytest.mark.parametrize("dimensions", ["2D", "3D"])
def test_training_is_the_same_as_with_flax(dimensions):
    ours = trained(dimensions, "float32")
    flax_model = UNet(fused=False, features=FEATURES)
    parameters = jax.eval_shape(functools.partial(initialize, flax_model), ours.images)
    assert jax.tree.structure(parameters) == jax.tree.structure(ours.before)
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, ours.before)

    steps = 5
    losses, _ = train(flax_model, ours.before, ours.images, ours.masks, steps)
    # Each norm rounds, in both networks, and each step starts from what the one before it left.
    rounding = 2 * NORMS * tolerance.arithmetic("float32", int(np.prod(SHAPES[dimensions])))
    assert np.all(abs(ours.losses[:steps] / losses - 1) < rounding * np.arange(1, steps + 1))


@exhaustive
def test_gradients_are_the_same_as_with_flax():
    """In float64, since Adam does not see how long a gradient is."""
    ours = trained("2D", "float32")
    images, masks = ours.images[:BATCH], ours.masks[:BATCH]

    def gradients(fused):
        model = UNet(fused=fused, features=FEATURES, dtype=jnp.float64)
        parameters = jax.tree.map(lambda value: value.astype(jnp.float64), ours.before)
        return jax.jit(jax.grad(lambda p: segmentation_loss(model.apply(p, images), masks)))(parameters)

    with jax.enable_x64(True):
        fused, composed = (jax.tree.leaves(jax.device_get(gradients(fused))) for fused in (True, False))
    # Each norm rounds, in both networks, and the sums over the positions may cancel.
    positions = int(np.prod(SHAPES["2D"]))
    rounding = 2 * NORMS * positions * tolerance.arithmetic("float64", positions)
    for a, b in zip(fused, composed, strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding * abs(b).max())
