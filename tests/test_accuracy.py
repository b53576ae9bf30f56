"""Every implementation against float64: layouts, ranks, dtypes, parameter forms, residual, activations."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance

import jaxnorm

pytestmark = pytest.mark.usefixtures("strict_dtypes")

IMPLEMENTATIONS = ["xla", "reference"]
DTYPES = ["float16", "bfloat16", "float32", "float64"]
# channels-first shapes; R is ragged and, in rank 3, beyond one chunk and one provisional center
SHAPES = {3: (2, 5, 1001), 4: (3, 4, 9, 13), 5: (2, 3, 4, 5, 6)}


def draw(shape, dtype, seed=0, *, offset=0.5):
    """Numbers of the dtype itself: the oracle sees what the implementation sees."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 1.5 + offset, dtype)


def parameter(form, instances, seed):
    """gamma or beta in float32."""
    if form == "none":
        return None
    shape = instances[1:] if form == "shared" else instances
    return jnp.asarray(np.random.default_rng(seed).uniform(0.5, 2.0, shape), jnp.float32)


def check(
    implementation, dtype, shape, channel_axes, *, gamma="shared", beta="shared", residual=False, activation="none"
):
    """Forward and all gradients of one call, against the oracle and its twin."""
    with jax.enable_x64(dtype == "float64"):
        x, dy = draw(shape, dtype, 0), draw(shape, dtype, 1, offset=0.1)
        instances = tuple(shape[a] for a in (0, *sorted(a % len(shape) for a in channel_axes)))
        given = {
            "gamma": parameter(gamma, instances, 2),
            "beta": parameter(beta, instances, 3),
            "residual": draw(shape, dtype, 4) if residual else None,
        }
        given = {name: value for name, value in given.items() if value is not None}

        def call(x, given):
            return jaxnorm.instance_norm(
                x,
                **given,
                channel_axis=channel_axes,
                activation=oracle.ACTIVATIONS[activation].jax,
                implementation=implementation,
            )

        y, pullback = jax.vjp(call, x, given)
        dx, grads = pullback(dy)

    positions = int(np.prod([shape[a] for a in oracle.spatial_axes(len(shape), channel_axes)]))
    options = {"channel_axes": channel_axes, "activation": activation}
    y64, magnitude = oracle.instance_norm(x, **given, **options)
    assert y.dtype == dtype
    assert y.shape == shape
    np.testing.assert_allclose(np.float64(y), y64, rtol=0, atol=tolerance.forward(dtype, positions, magnitude))

    want = oracle.gradients(dy, x, **given, **options)
    mean, var = oracle.moments(x, channel_axes)
    xhat = np.abs(np.float64(x) - mean) / np.sqrt(var + 1e-5)
    dz = 2 * float(np.abs(np.float64(dy)).max())
    scale = float((1 / np.sqrt(var + 1e-5)).max()) * (2.0 if "gamma" in given else 1.0)
    for name, got in {"x": dx, **grads}.items():
        assert got.dtype == (jnp.float32 if name in ("gamma", "beta") else dtype), name
        assert got.shape == want[name].shape, name
        if name == "x":
            atol = tolerance.input_gradient(dtype, positions, want[name], scale=scale, dz=dz, xhat=float(xhat.max()))
        elif name == "residual":
            # dz = dy * activation'(z): an error of z moves the derivative, whose own derivative stays below 2
            atol = dz * (2 * tolerance.arithmetic(dtype, positions) * magnitude + tolerance.unit(dtype))
        else:
            terms = 2 * np.abs(np.float64(dy)) * (xhat if name == "gamma" else 1.0)
            axes = tuple(a for a in range(len(shape)) if a not in {c % len(shape) for c in channel_axes})
            atol = tolerance.parameter_gradient(dtype, jnp.float32, positions, float(terms.sum(axes).max()))
        np.testing.assert_allclose(np.float64(got), want[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layout_rank_dtype(implementation, channels, rank, dtype):
    batch, channel, *spatial = SHAPES[rank]
    shape, axes = ((batch, channel, *spatial), (1,)) if channels == "first" else ((batch, *spatial, channel), (-1,))
    check(implementation, dtype, shape, axes, residual=True, activation="silu")


@pytest.mark.parametrize(
    ("gamma", "beta"), [(g, b) for g in ("none", "shared", "each") for b in ("none", "shared", "each")]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameter_forms(implementation, gamma, beta):
    check(implementation, "float32", (3, 7, 9, 4), (-1,), gamma=gamma, beta=beta)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_activation_and_residual(implementation, activation, residual):
    check(implementation, "float32", (2, 3, 8, 9), (1,), residual=residual, activation=activation)


@pytest.mark.parametrize("axes", [(2,), (1, 2), (-2, -1), (1, -1), (2, 1)], ids=str)
@pytest.mark.parametrize("gamma", ["shared", "each"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_channel_axes(implementation, gamma, axes):
    check(implementation, "float32", (2, 3, 4, 5), axes, gamma=gamma, residual=True, activation="tanh")


@pytest.mark.parametrize("positions", [255, 256, 257, 4096, 70001])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sizes_around_the_provisional_center(implementation, positions):
    check(implementation, "float32", (1, positions, 3), (-1,), activation="leaky_relu")


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


def test_moments_over_several_channel_axes():
    x = draw((2, 3, 4, 5), "float32")
    mean, _ = jaxnorm.instance_moments(x, channel_axis=(1, 3))
    mean64, _ = oracle.moments(x, (1, 3))
    np.testing.assert_allclose(mean, mean64[:, :, 0], atol=tolerance.arithmetic("float32", 4) * 5)
