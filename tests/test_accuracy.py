"""Every implementation against float64: layouts, ranks, dtypes, parameter forms, residual, activations."""

import jax
import numpy as np
import oracle
import pytest
import tolerance
from cases import each_value, exhaustive, pairwise
from checked_call import check, draw

import jaxnorm

pytestmark = pytest.mark.usefixtures("strict_dtypes")

IMPLEMENTATIONS = ["xla", "reference"]
DTYPES = ["float16", "bfloat16", "float32", "float64"]
# channels-first shapes; R is ragged and, in rank 3, beyond one chunk and one provisional center
SHAPES = {3: (2, 5, 1001), 4: (3, 4, 9, 13), 5: (2, 3, 4, 5, 6)}


@pytest.mark.parametrize(
    ("implementation", "channels", "rank", "dtype"), pairwise(IMPLEMENTATIONS, ["first", "last"], list(SHAPES), DTYPES)
)
def test_layout_rank_dtype(implementation, channels, rank, dtype):
    batch, channel, *spatial = SHAPES[rank]
    shape, axes = ((batch, channel, *spatial), (1,)) if channels == "first" else ((batch, *spatial, channel), (-1,))
    check(implementation, dtype, shape, axes, residual=True, activation="silu")


FORMS = ["none", "shared", "each"]


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "gamma", "beta"), each_value(IMPLEMENTATIONS, FORMS, FORMS[::-1]))
def test_parameter_forms(implementation, gamma, beta):
    check(implementation, "float32", (3, 7, 9, 4), (-1,), gamma=gamma, beta=beta)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "activation", "residual"), each_value(IMPLEMENTATIONS, list(oracle.ACTIVATIONS), [False, True])
)
def test_activation_and_residual(implementation, activation, residual):
    check(implementation, "float32", (2, 3, 8, 9), (1,), residual=residual, activation=activation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "gamma", "axes"),
    each_value(IMPLEMENTATIONS, ["shared", "each"], [(2,), (1, 2), (-2, -1), (1, -1), (2, 1)]),
)
def test_any_channel_axes(implementation, gamma, axes):
    check(implementation, "float32", (2, 3, 4, 5), axes, gamma=gamma, residual=True, activation="tanh")


@pytest.mark.slow
@pytest.mark.parametrize("positions", [255, 256, 257, 4096, 70001])
@pytest.mark.parametrize("implementation", ["xla", pytest.param("reference", marks=exhaustive)])
def test_sizes_around_the_provisional_center(implementation, positions):
    check(implementation, "float32", (1, positions, 3), (-1,), activation="leaky_relu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = draw((2, 5, 9, 7), dtype)
        mean, var = jaxnorm.instance_moments(x)
    mean64, var64 = oracle.moments(x)
    assert mean.shape == var.shape == (2, 5)
    assert mean.dtype == var.dtype == ("float64" if dtype == "float64" else "float32")
    rtol = tolerance.arithmetic(dtype, 63)
    np.testing.assert_allclose(mean, mean64.reshape(2, 5), rtol=0, atol=rtol * float(np.abs(np.float64(x)).max()))
    np.testing.assert_allclose(var, var64.reshape(2, 5), rtol=rtol)


@pytest.mark.slow
def test_moments_over_several_channel_axes():
    x = draw((2, 3, 4, 5), "float32")
    mean, _ = jaxnorm.instance_moments(x, channel_axis=(1, 3))
    mean64, _ = oracle.moments(x, (1, 3))
    np.testing.assert_allclose(mean, mean64[:, :, 0], atol=tolerance.arithmetic("float32", 4) * 5)
