"""Right at any offset, and on data made to break a provisional center."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import each_value

import jaxnorm

IMPLEMENTATIONS = ["xla", "reference"]


def layouts(x):
    """The same instances channels-last (N, R, C) and channels-first (N, C, R)."""
    return [(x, -1), (np.ascontiguousarray(np.swapaxes(x, 1, 2)), 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("positions", "implementation", "layout"), each_value([4096, 65536, 200], IMPLEMENTATIONS, [0, 1])
)
def test_normal_data_at_an_offset(implementation, positions, layout):
    rng = np.random.default_rng(0)
    normal, weight = rng.standard_normal((2, 2, positions, 4))
    relative = tolerance.sums_around(1, positions)

    @jax.jit
    def norm_and_gradient(x, dy):
        y, pullback = jax.vjp(
            functools.partial(jaxnorm.instance_norm, channel_axis=axis, implementation=implementation), x
        )
        return y, pullback(dy)[0]

    dy, axis = layouts(weight.astype(np.float32))[layout]
    for offset in (0, 1e2, 1e4, 1e6):
        x, _ = layouts((normal + offset).astype(np.float32))[layout]
        y, dx = norm_and_gradient(x, dy)
        y64, magnitude = oracle.instance_norm(x, channel_axes=(axis,))
        np.testing.assert_allclose(y, y64, rtol=0, atol=relative * magnitude)
        dx64 = oracle.gradients(dy, x, channel_axes=(axis,))["x"]
        # dx = rstd (dy - mean(dy) - xhat mean(dy xhat)), where both means are near 0, and rstd is near 1.
        terms = np.abs(dy).max() * (2 + magnitude) / np.sqrt(x.var(3 - axis % 3, dtype=np.float64).min())
        np.testing.assert_allclose(dx, dx64, rtol=0, atol=2 * relative * terms)


def constant_border(x):
    """A frame of zeros, as zero padding makes it, around data far from zero."""
    image = x.reshape(2, 64, 64, 4) + 100
    framed = np.zeros_like(image)
    framed[:, 8:-8, 8:-8] = image[:, 8:-8, 8:-8]
    return framed.reshape(x.shape)


def first_rows_unlike_the_rest(x):
    x = x * 1e-3
    x[:, : x.shape[1] // 16] += 1000
    return x


def middle_rows_unlike_the_rest(x):
    """The very rows from which the center is taken are elsewhere: the worst case of its bound."""
    x, rows = x * 1e-3, x.shape[1]
    x[:, rows // 2 - rows // 32 : rows // 2 + rows // 32] += 1000
    return x


def first_row_unlike_the_rest(x):
    x[:, 0] += 1e4
    return x


def checkerboard(x):
    return x * 1e-3 + 1000 * (np.arange(x.shape[1])[:, None] % 2)


def one_outlier(x):
    x[:, 2000] = 1e6
    return x


def outlier_first(x):
    x[:, 0] = 1e6
    return x


HOSTILE = [
    constant_border,
    first_rows_unlike_the_rest,
    middle_rows_unlike_the_rest,
    first_row_unlike_the_rest,
    checkerboard,
    one_outlier,
    outlier_first,
]


@pytest.mark.parametrize("implementation", ["xla", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_data(implementation, hostile):
    data = hostile(np.random.default_rng(0).standard_normal((2, 4096, 4))).astype(np.float32)
    for x, axis in layouts(data):
        y64, magnitude = oracle.instance_norm(x, channel_axes=(axis,))
        y = jaxnorm.instance_norm(x, channel_axis=axis, implementation=implementation)
        bound = tolerance.forward("float32", 4096, magnitude)
        if hostile is middle_rows_unlike_the_rest and implementation == "xla":
            # The mean square is 16 variances, and so is the error of the sum of the squares.
            bound = tolerance.sums_around(16, 4096) * magnitude
        np.testing.assert_allclose(y, y64, rtol=0, atol=bound)


def test_the_worst_case_of_the_center_is_in_the_data():
    """middle_rows_unlike_the_rest reaches the bound of numerics.provisional_center: 15 variances."""
    x = middle_rows_unlike_the_rest(np.random.default_rng(0).standard_normal((2, 4096, 4)))
    center = x[:, 2048 - 128 : 2048 + 128].mean(1)
    np.testing.assert_allclose((center - x.mean(1)) ** 2 / x.var(1), 15, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("offset", "dtype"), each_value([1000, 100, 0], ["float16", "bfloat16"]))
def test_half_precision_at_an_offset(dtype, offset):
    """The statistics are those of the rounded numbers; only the result is rounded again."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4096, 4)) * 8 + offset, dtype)
    y64, magnitude = oracle.instance_norm(x, channel_axes=(-1,))
    y = jaxnorm.instance_norm(x, channel_axis=-1)
    np.testing.assert_allclose(np.float64(y), y64, rtol=0, atol=tolerance.forward(dtype, 4096, magnitude))


@pytest.mark.slow
def test_float64_at_an_offset():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((2, 4096, 4)) + 1e8
        y = jaxnorm.instance_norm(jnp.asarray(x), channel_axis=-1)
    # NumPy's own float64 mean rounds at this offset: the oracle gets the deviations from it, which are exact
    y64, magnitude = oracle.instance_norm(x - 1e8, channel_axes=(-1,))
    np.testing.assert_allclose(y, y64, rtol=0, atol=tolerance.forward("float64", 4096, magnitude))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_subnormal_and_huge_scales(implementation):
    """eps is felt exactly at a small scale; at a large one float32 still has room."""
    rng = np.random.default_rng(0)
    for scale in (1e-30, 1e-6, 1e-3, 1e3, 1e15):
        x = (rng.standard_normal((2, 3, 300)) * scale).astype(np.float32)
        y64, magnitude = oracle.instance_norm(x)
        y = jaxnorm.instance_norm(x, implementation=implementation)
        np.testing.assert_allclose(y, y64, rtol=0, atol=tolerance.forward("float32", 300, magnitude))
