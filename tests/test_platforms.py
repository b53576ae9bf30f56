"""What plain XLA computes on a GPU and on a TPU, computed on the CPU: their forms of the sums against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checked_call import check

import jaxnorm
from jaxnorm import lowering

pytestmark = [pytest.mark.usefixtures("strict_dtypes"), pytest.mark.slow]

SEED = 20261124


@pytest.fixture(params=["gpu", "tpu"])
def platform(request, monkeypatch):
    """Every pass has the form of that platform, wherever it is lowered."""

    def in_its_form(plain, *arguments):
        return plain(request.param, *arguments)

    # What was traced before for another platform must not be taken, here or after.
    jax.clear_caches()
    monkeypatch.setattr(lowering, "for_its_platform", in_its_form)
    monkeypatch.setattr(lowering, "for_every_platform", in_its_form)
    yield request.param
    jax.clear_caches()


def drawn(count):
    """Shapes of up to four spatial axes, with one or two channel axes anywhere."""
    rng = np.random.default_rng(SEED)
    cases = []
    while len(cases) < count:
        rank = int(rng.integers(3, 7))
        shape = (int(rng.integers(1, 4)), *(int(2 ** rng.uniform(0, 7)) for _ in range(rank - 1)))
        axes = rng.choice(np.arange(1, rank), int(rng.integers(1, min(3, rank - 1))), replace=False)
        if 100 <= math.prod(shape) <= 200_000:
            cases.append((shape, tuple(map(int, axes)), str(rng.choice(["float16", "bfloat16", "float32"]))))
    return cases


@pytest.mark.parametrize(("shape", "axes", "dtype"), drawn(6), ids=str)
def test_against_float64(platform, shape, axes, dtype):
    check("xla", dtype, shape, axes, residual=True, activation="silu")


@pytest.mark.parametrize("channels", [1, 3, 15])
@pytest.mark.parametrize("positions", [7, 2053])
def test_few_and_many_channels(platform, positions, channels):
    check("xla", "float32", (2, positions, channels), (-1,), activation="leaky_relu")


def test_vmap(platform):
    """Each mapped call is what it is alone."""
    x = jax.random.normal(jax.random.key(SEED), (3, 2, 4, 40, 5)) + 1e3

    def norm(x):
        return jaxnorm.instance_norm(x, channel_axis=2, activation=jnp.tanh, implementation="xla")

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(norm(x) * jnp.cos(x)))(x)

    for function in (norm, gradient):
        alone = jnp.stack([function(one) for one in x])
        np.testing.assert_allclose(jax.vmap(function)(x), alone, rtol=0, atol=1e-4)
