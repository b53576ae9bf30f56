"""Running averages of the layers, against NumPy; as torch.nn.InstanceNorm keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from flax import nnx

import jaxnorm

STEPS, MOMENTUM, EPSILON = 3, 0.3, 1e-6


class Linen:
    """The linen layer, used as an object."""

    def __init__(self, channels, **options):
        self.layer = jaxnorm.InstanceNorm(track_running_stats=True, **options)

    def __call__(self, x, training, **inputs):
        if not hasattr(self, "variables"):
            self.variables = self.layer.init(jax.random.key(0), x, use_running_average=not training)
        if not training:
            return self.layer.apply(self.variables, x, use_running_average=True, **inputs)
        y, changed = self.layer.apply(self.variables, x, use_running_average=False, mutable=["batch_stats"], **inputs)
        self.variables |= changed
        return y

    @property
    def running(self):
        return self.variables["batch_stats"]["mean"], self.variables["batch_stats"]["var"]


class NNX:
    def __init__(self, channels, **options):
        self.layer = jaxnorm.nnx.InstanceNorm(channels, track_running_stats=True, rngs=nnx.Rngs(0), **options)

    def __call__(self, x, training, **inputs):
        (self.layer.train if training else self.layer.eval)()
        return nnx.jit(lambda layer, x: layer(x, **inputs))(self.layer, x)

    @property
    def running(self):
        return self.layer.mean[...], self.layer.var[...]


both = pytest.mark.parametrize("kind", [Linen, NNX])


def draw(seed):
    """Batches of one shape, channels-last or channels-first, and a mask or none."""
    rng = np.random.default_rng(seed)
    batch, channels, spatial = rng.integers(1, 4), rng.integers(1, 6), rng.integers(2, 7, rng.integers(1, 4))
    axis = int(rng.choice([1, -1]))
    shape = (batch, channels, *spatial) if axis == 1 else (batch, *spatial, channels)
    batches = (3 + 2 * rng.standard_normal((STEPS, *shape))).astype(np.float32)
    mask = rng.random(shape) < 0.7
    np.moveaxis(mask, axis, 1).reshape(batch, channels, -1)[..., :2] = True
    return batches, axis, mask if rng.random() < 0.5 else None


def by_hand(batches, axis, mask):
    """Means and unbiased variances averaged over the batch, in float64."""
    mean, var = 0.0, 1.0
    for batch in batches:
        counted = np.ones(batch.shape, bool) if mask is None else mask
        x, counted = (np.moveaxis(v, axis, 1).reshape(len(v), v.shape[axis], -1) for v in (np.float64(batch), counted))
        means = np.mean(x, -1, where=counted)
        variances = np.var(x, -1, where=counted, ddof=1)
        mean = (1 - MOMENTUM) * mean + MOMENTUM * means.mean(0)
        var = (1 - MOMENTUM) * var + MOMENTUM * variances.mean(0)
    return mean, var


@both
@pytest.mark.parametrize("seed", range(4))
def test_the_averages_are_torch_s(kind, seed):
    batches, axis, mask = draw(seed)
    layer = kind(batches[0].shape[axis], feature_axes=axis, momentum=MOMENTUM)
    given = {} if mask is None else {"mask": mask}
    for x in batches:
        y = layer(x, True, **given)
        # In training the statistics are those of the input.
        plain = jaxnorm.instance_norm(
            x, eps=EPSILON, channel_axis=axis, where=None if mask is None else jnp.asarray(mask)
        )
        np.testing.assert_allclose(y, plain, rtol=0, atol=1e-5)
    mean, var = by_hand(batches, axis, mask)
    relative = 4 * tolerance.arithmetic("float32", batches[0][0].size)
    for got, want in zip(layer.running, (mean, var), strict=True):
        np.testing.assert_allclose(got, want, rtol=relative, atol=relative * 5)

    # In evaluation they are the averages, which stay, and a mask has no part.
    x = batches[-1]
    shape = [1] * x.ndim
    shape[axis] = -1
    want = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + EPSILON)
    before = [np.asarray(value) for value in layer.running]
    np.testing.assert_allclose(layer(x, False, **given), want, rtol=0, atol=20 * relative)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.running, strict=True))


@both
def test_a_single_position_has_no_unbiased_variance(kind):
    layer = kind(2)
    layer(np.full((3, 1, 2), 5, np.float32), True)
    np.testing.assert_allclose(layer.running, [[0.5, 0.5], [0.9, 0.9]], rtol=1e-6)


def test_initializing_updates_nothing():
    layer = Linen(2)
    layer.layer = jaxnorm.InstanceNorm(track_running_stats=True, use_running_average=False)
    variables = layer.layer.init(jax.random.key(0), np.full((3, 4, 2), 5, np.float32))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0, 0])


def test_without_running_averages_there_are_none():
    x = np.ones((2, 4, 3), np.float32)
    assert set(jaxnorm.InstanceNorm().init(jax.random.key(0), x)) == {"params"}
    layer = jaxnorm.nnx.InstanceNorm(3, rngs=nnx.Rngs(0))
    assert not nnx.state(layer, nnx.BatchStat)
    # eval() of a whole model sets the attribute of every layer.
    layer.eval()
    np.testing.assert_array_equal(layer(x), np.zeros_like(x))


def test_errors():
    x = np.ones((2, 4, 3), np.float32)
    with pytest.raises(ValueError, match="needs running averages: got track_running_stats=False"):
        jaxnorm.InstanceNorm(use_running_average=True).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="needs running averages: got track_running_stats=False"):
        jaxnorm.nnx.InstanceNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\].*got 1\.5\. Flax's momentum of 0\.9 is 0\.1"):
        jaxnorm.InstanceNorm(track_running_stats=True, momentum=1.5, use_running_average=False).init(
            jax.random.key(0), x
        )
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\]"):
        jaxnorm.nnx.InstanceNorm(3, track_running_stats=True, momentum=-1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="use_running_average"):
        # As flax.linen.BatchNorm: somebody must say it.
        jaxnorm.InstanceNorm(track_running_stats=True).init(jax.random.key(0), x)
