"""Activations evaluated equation by equation agree with JAX; the compiler's opinion is in test_kernel_compiled.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activations import ACTIVATIONS
from scipy import special

from jaxnorm.gpu import elementwise

Z = np.concatenate([np.linspace(-12, 12, 4001), np.linspace(-1e-3, 1e-3, 101), [0.0, -0.0]]).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_pullback(name):
    activation = ACTIVATIONS[name]
    assert elementwise.first_uncovered(activation) is None
    dy = np.cos(Z)
    y, pullback = jax.vjp(activation, jnp.asarray(Z))
    got = elementwise.evaluate(elementwise.trace(activation), jnp.asarray(Z))
    np.testing.assert_allclose(got, y, rtol=1e-6, atol=1e-6)
    dz = elementwise.evaluate(elementwise.trace_pullback(activation), jnp.asarray(Z), jnp.asarray(dy))
    np.testing.assert_allclose(dz, pullback(jnp.asarray(dy))[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (jax.lax.erf, special.erf),
        (jax.lax.erfc, special.erfc),
        (jnp.expm1, np.expm1),
        (jnp.log1p, np.log1p),
        (lambda x: jax.lax.integer_pow(x, 5), lambda x: x**5),
        (lambda x: jax.lax.integer_pow(x, -2), lambda x: x**-2.0),
    ],
)
def test_substitutes_against_float64(function, exact):
    # Relative accuracy, near 0 too: that is what expm1, log1p and erf are there for.
    x = np.concatenate([np.linspace(-0.99, 5, 3001), np.geomspace(1e-30, 1e-3, 200)]).astype(np.float32)
    x = x[np.abs(x) > 1e-32]
    want = exact(x.astype(np.float64))
    x, want = x[np.abs(want) < 1e30], want[np.abs(want) < 1e30]
    got = elementwise.evaluate(elementwise.trace(function), jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-37)


@pytest.mark.slow
@pytest.mark.parametrize("function", [jax.lax.erf, jax.lax.erfc, jnp.expm1, jnp.log1p])
def test_substitutes_at_the_ends(function):
    x = jnp.asarray([np.inf, -np.inf, np.nan, 1e30, -1e30, -1.0], jnp.float32)
    np.testing.assert_allclose(elementwise.evaluate(elementwise.trace(function), x), function(x), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("sign", [1, -1, Z / np.abs(Z + 1e-30), np.sign(np.sin(1e5 * Z))])
def test_in_bfloat16_the_hardware_is_good_enough(name, sign):
    """Its tanh is off by 2^-11 of itself and its exp by 2^-22, whichever way: half a unit in the last place is 2^-8."""
    activation, dy = ACTIVATIONS[name], np.cos(Z)
    y, pullback = jax.vjp(activation, jnp.asarray(Z))

    def tanh(x):
        return jnp.tanh(x) * (1 + 2.0**-11 * sign)

    def tanh_of_exp(x):
        return 1 - 2 / (1 + jnp.exp(2 * x) * (1 + 2.0**-22 * sign))

    approximate = elementwise.APPROXIMATE | {"tanh": tanh}
    got = elementwise.evaluate(elementwise.trace(activation), jnp.asarray(Z), substitutes=approximate)
    assert np.all(np.abs(got - y) <= (2.0**-8 / 8 + 1e-6) * np.maximum(np.abs(Z), 1))
    traced = elementwise.trace_pullback(activation)
    approximate = elementwise.APPROXIMATE_IN_DERIVATIVES | {"tanh": tanh_of_exp}
    dz = elementwise.evaluate(traced, jnp.asarray(Z), jnp.asarray(dy), substitutes=approximate)
    assert np.all(np.abs(dz - pullback(jnp.asarray(dy))[0]) <= 2.0**-8 / 8)


@pytest.mark.slow
def test_a_constant_and_a_captured_number():
    slope = np.float32(0.3)
    activation = lambda z: jnp.where(z > 0, z, slope * z) + jnp.asarray(2.0)  # noqa: E731
    got = elementwise.evaluate(elementwise.trace(activation), jnp.asarray(Z))
    np.testing.assert_array_equal(got, activation(jnp.asarray(Z)))
    constant = elementwise.trace_pullback(jnp.ones_like)
    zeros = elementwise.evaluate(constant, jnp.asarray(Z), jnp.asarray(Z))
    np.testing.assert_array_equal(zeros, np.zeros_like(Z))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (jax.lax.lgamma, "lgamma"),
        (lambda z: jax.lax.fori_loop(0, 3, lambda _, z: z * z, z), "scan"),
        (lambda z: jax.lax.cond(z > 0, jnp.sin, jnp.cos, z), "cond"),
        (functools.partial(jnp.atan2, 2.0), "atan2"),
    ],
)
def test_the_first_primitive_that_is_not_covered(activation, name):
    assert elementwise.first_uncovered(activation) == name


@pytest.mark.usefixtures("x64")
def test_under_x64_what_computes_in_64_bits_is_not_covered():
    # An integer times a Python number is float64 there.
    wide = {name: elementwise.first_uncovered(activation) for name, activation in ACTIVATIONS.items()}
    assert {name: reason for name, reason in wide.items() if reason} == {"steps": "convert_element_type to float64"}
