"""Numbers whose squares overflow: right as far as float32 carries, and never NaN from finite input."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import each_value, some

import jaxnorm

pytestmark = pytest.mark.slow
plain = pytest.mark.parametrize("implementation", ["xla", "reference"])


def draw(rng):
    """Random numbers of all magnitudes up to a fifth of the largest, about two decades from instance to instance."""
    shape = (3, 6, int(rng.integers(3, 40)), int(rng.integers(1, 5)))
    magnitude = 10 ** np.minimum(np.linspace(0, 36.5, 18) + rng.uniform(-1, 1, 18), 36.5).reshape(3, 6, 1, 1)
    offset = rng.choice([0, 1, 8], (*shape[:2], 1, 1))
    return (magnitude * (rng.standard_normal(shape) + offset)).astype(np.float32)


@plain
@pytest.mark.parametrize("case", some(range(8), 0))
def test_right_at_any_magnitude(case, implementation, seed):
    x = draw(np.random.default_rng((seed, case)))
    y, pullback = jax.vjp(lambda x: jaxnorm.instance_norm(x, implementation=implementation), x)
    want, magnitude = oracle.instance_norm(x)
    # At an offset of 8 deviations the center stands in for 8 more.
    np.testing.assert_allclose(y, want, rtol=0, atol=9 * tolerance.forward("float32", x[0, 0].size, magnitude))
    assert np.isfinite(pullback(y)[0]).all()


@plain
def test_overflow_gives_beta(implementation):
    """Single numbers far beyond the rest: their instances are beta, the others are right."""
    x = np.random.default_rng(0).standard_normal((2, 3, 20, 20)).astype(np.float32)
    x[0, 1, 15:, 3] = 3e38
    x[1, 0] = np.where(np.arange(400).reshape(20, 20) % 2, 3e38, -3e38)
    beta = jnp.arange(3.0)

    def norm(x):
        return jaxnorm.instance_norm(x, beta=beta, implementation=implementation)

    y, pullback = jax.vjp(norm, x)
    assert np.isfinite(y).all()
    assert np.isfinite(pullback(jnp.ones_like(x))[0]).all()
    others = np.ones((2, 3), bool)
    others[0, 1] = others[1, 0] = False
    want, magnitude = oracle.instance_norm(x[others][None], beta=np.array([0.0, 2.0, 1.0, 2.0]))
    np.testing.assert_allclose(y[others], want[0], rtol=0, atol=tolerance.forward("float32", 400, magnitude))


@pytest.mark.parametrize(("value", "implementation"), each_value([1e19, 1e30, 1e38], ["xla", "reference"]))
def test_constant(value, implementation):
    x = jnp.full((2, 3, 5, 5), value, jnp.float32)
    y, pullback = jax.vjp(lambda x: jaxnorm.instance_norm(x, beta=jnp.ones(3), implementation=implementation), x)
    np.testing.assert_array_equal(y, jnp.ones_like(x))
    assert np.isfinite(pullback(x * 0 + 1)[0]).all()


def test_moments():
    x = draw(np.random.default_rng(3))
    mean, var = jaxnorm.instance_moments(x)
    exact_mean, exact_var = (np.squeeze(v, (2, 3)) for v in oracle.moments(x))
    np.testing.assert_allclose(mean, exact_mean, rtol=1e-5, atol=1e-6 * np.abs(x).max((2, 3)).max())
    fits = exact_var < np.finfo(np.float32).max
    np.testing.assert_allclose(var[fits], exact_var[fits], rtol=1e-4)
    assert np.isinf(var[~fits]).all()
