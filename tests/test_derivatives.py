"""First, second and third derivatives against float64 autodiff of the oracle's twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import each_value, exhaustive, some
from jax.test_util import check_grads

import jaxnorm

pytestmark = pytest.mark.usefixtures("strict_dtypes")

IMPLEMENTATIONS = ["xla", "reference"]
SHAPE = (2, 3, 4, 5)


def arguments(dtype, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    return draw(*SHAPE), 1 + draw(3) / 4, draw(3), draw(*SHAPE)


def norm(implementation, activation):
    """(x, gamma, beta, residual) -> y, by jaxnorm or, for "twin", by the oracle's twin."""
    if implementation == "twin":
        return twin(activation)
    return lambda x, gamma, beta, residual: jaxnorm.instance_norm(
        x,
        gamma,
        beta,
        residual=residual,
        activation=oracle.ACTIVATIONS[activation].jax,
        implementation=implementation,
    )


@functools.cache
def twin(activation):
    """One object per activation, for what is compiled once."""
    return lambda x, gamma, beta, residual: oracle.twin(x, gamma, beta, residual=residual, activation=activation)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(function, normalize, *given):
    """Of function(normalize, *given), by all of them."""
    return jax.grad(functools.partial(function, normalize), tuple(range(len(given))))(*given)


def penalty(normalize, x, gamma, beta, residual):
    """A gradient penalty (WGAN-GP, R1): the squared gradient of a critic with respect to its input."""

    def critic(x, residual):
        return jnp.sum(jnp.sin(normalize(x, gamma, beta, residual)))

    return sum(jnp.sum(g**2) for g in jax.grad(critic, (0, 1))(x, residual))


@exhaustive
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", ["none", "silu", "tanh"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_check_grads_to_second_order(implementation, activation):
    check_grads(jax.jit(norm(implementation, activation)), arguments("float64"), order=2, modes=("rev",))


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "activation"), each_value(IMPLEMENTATIONS, ["silu", "leaky_relu", "none"]))
def test_second_derivative_in_every_argument(implementation, activation):
    got = gradients(penalty, norm(implementation, activation), *arguments("float64"))
    want = gradients(penalty, norm("twin", activation), *arguments("float64"))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)


@exhaustive
@pytest.mark.usefixtures("x64")
def test_third_derivative():
    def third(normalize, x, *rest):
        return jnp.sum(jax.grad(functools.partial(penalty, normalize))(x, *rest) ** 2)

    got, *_ = gradients(third, norm("xla", "silu"), *arguments("float64"))
    want, *_ = gradients(third, norm("twin", "silu"), *arguments("float64"))
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8 * float(jnp.abs(want).max()))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", some(IMPLEMENTATIONS, "xla"))
@pytest.mark.parametrize("offset", some([0.0, 1e4], 1e4))
def test_gradient_penalty_of_a_critic_in_float32(implementation, offset):
    """Convolution, norm, activation, twice: the gradient penalty's gradient in the weights, against float64."""

    def critic(normalize, weights, x):
        for weight in weights:
            x = jax.lax.conv(x, weight, (1, 1), "SAME")
            x = normalize(x + jnp.asarray(offset, x.dtype))
        return jnp.sum(jnp.mean(x, (1, 2, 3)))

    def loss(normalize, weights, x):
        norms = jnp.sqrt(jnp.sum(jax.grad(critic, 2)(normalize, weights, x) ** 2, (1, 2, 3)))
        return jnp.mean((norms - 1) ** 2)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    weights = [
        rng.standard_normal((6, 3, 3, 3)).astype(np.float32),
        rng.standard_normal((4, 6, 3, 3)).astype(np.float32),
    ]
    normalize = functools.partial(jaxnorm.instance_norm, activation=jax.nn.silu, implementation=implementation)
    got = jax.jit(jax.grad(functools.partial(loss, normalize)))(weights, x)
    with jax.enable_x64(True):
        want = jax.jit(jax.grad(functools.partial(loss, functools.partial(oracle.twin, activation="silu"))))(
            [jnp.asarray(w, jnp.float64) for w in weights], jnp.asarray(x, jnp.float64)
        )
    # Each of three derivatives takes the difference of two sums in each of two norms, so the error of a call may double
    # at each. Adding the offset rounds x by up to u times the offset before jaxnorm sees it, which all of them see.
    rounding = tolerance.arithmetic("float32", 64) + tolerance.unit("float32") * offset
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=2 ** (3 * 2) * rounding * float(np.abs(w).max()))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_forward_mode_through_the_reference():
    x, gamma, beta, residual = arguments("float64")
    reference, exact = norm("reference", "silu"), norm("twin", "silu")
    given = (x, gamma, beta, residual)
    tangents = arguments("float64", seed=1)
    moved = (jax.jit(functools.partial(jax.jvp, function))(given, tangents) for function in (reference, exact))
    for got, want in zip(*moved, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)

    def energy(normalize, x):
        return jnp.sum(jnp.sin(normalize(x, gamma, beta, residual)))

    got = jax.jit(jax.hessian(functools.partial(energy, reference)))(x)
    want = jax.jit(jax.hessian(functools.partial(energy, exact)))(x)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_where_the_moments_are_given(implementation):
    x, gamma, beta, residual = arguments("float64")
    mean, variance = beta / 2, jnp.square(gamma)

    def energy(normalize):
        return lambda *given: jnp.sum(jnp.sin(normalize(*given)))

    def ours(x, gamma, beta, mean, variance, residual):
        options = {"residual": residual, "activation": jax.nn.silu, "implementation": implementation}
        return jaxnorm.instance_norm(x, gamma, beta, moments=(mean, variance), **options)

    def exact(x, gamma, beta, mean, variance, residual):
        gamma, beta, mean, variance = (v.reshape(1, 3, 1, 1) for v in (gamma, beta, mean, variance))
        return jax.nn.silu((x - mean) / jnp.sqrt(variance + 1e-5) * gamma + beta + residual)

    given = x, gamma, beta, mean, variance, residual
    got, want = (jax.jit(jax.grad(energy(function), range(6)))(*given) for function in (ours, exact))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_of_the_moments():
    x = arguments("float64")[0]

    def from_twin(x):
        mean = jnp.mean(x, (2, 3))
        return mean, jnp.mean((x - mean[:, :, None, None]) ** 2, (2, 3))

    for order in (jax.jacrev, jax.jacfwd, jax.hessian):
        differentiated = (jax.jit(order(function))(x) for function in (jaxnorm.instance_moments, from_twin))
        for got, want in zip(*differentiated, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
