"""What must hold for any shape, layout and dtype, and relations between two calls (metamorphic)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import some

import jaxnorm

pytestmark = pytest.mark.slow

IMPLEMENTATIONS = ["xla", "reference"]


def random_call(rng):
    """Shape, channel axes and dtype of a call."""
    shape = tuple(map(int, rng.integers(1, 8, rng.integers(3, 6))))
    axes = rng.choice(np.arange(1, len(shape)), rng.integers(1, len(shape) - 1), replace=False)
    axes = axes - len(shape) if rng.random() < 0.5 else axes
    return shape, tuple(map(int, axes)), str(rng.choice(["float16", "bfloat16", "float32"]))


@pytest.mark.parametrize("case", some(range(60), *range(8)))
def test_any_shape_axes_and_dtype(case, seed):
    rng = np.random.default_rng((seed, case))
    shape, axes, dtype = random_call(rng)
    x = jnp.asarray(rng.standard_normal(shape) * 3 + 1, dtype)
    y = jaxnorm.instance_norm(x, channel_axis=axes, implementation=IMPLEMENTATIONS[case % 2])
    y64, magnitude = oracle.instance_norm(x, channel_axes=axes)
    positions = int(np.prod([shape[a] for a in oracle.spatial_axes(len(shape), axes)]))
    assert y.shape == shape
    assert y.dtype == dtype
    # eps weighs where a few positions happen to lie close together: 1 / sqrt(var + eps) then amplifies no further
    np.testing.assert_allclose(np.float64(y), y64, rtol=0, atol=tolerance.forward(dtype, positions, magnitude + 1))


@pytest.fixture(params=some(IMPLEMENTATIONS, "xla"))
def norm(request):
    return functools.partial(jaxnorm.instance_norm, implementation=request.param)


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_shift_and_scale_of_an_instance_change_nothing(norm):
    """The point of the paper: the contrast of the content does not reach the output."""
    x = draw(3, 4, 20, 20)
    a = np.float32(2.0) ** np.arange(12).reshape(3, 4, 1, 1)  # powers of two, so that a * x + b rounds little
    b = np.arange(12, dtype=np.float32).reshape(3, 4, 1, 1) * 64
    # b rounds x by up to 2^-24 max |a x + b| / a; the rest is the norm's own
    atol = 2 * tolerance.forward("float32", 400, 5.0) + float((2**-23 * (np.abs(b) + 5 * a) / a).max())
    np.testing.assert_allclose(norm(a * x + b, eps=1e-12), norm(x, eps=1e-12), rtol=0, atol=atol)


def test_permuted_channels_and_samples_permute_the_result(norm):
    x, gamma, beta, residual = draw(4, 6, 9, 9), draw(6), draw(6), draw(4, 6, 9, 9)
    samples, channels = np.array([2, 0, 3, 1]), np.array([5, 3, 0, 1, 4, 2])
    y = norm(x, gamma, beta, residual=residual)
    permuted = norm(x[samples][:, channels], gamma[channels], beta[channels], residual=residual[samples][:, channels])
    np.testing.assert_array_equal(permuted, y[samples][:, channels])


def test_permuted_positions_permute_the_result(norm):
    x = draw(2, 3, 500)
    order = np.random.default_rng(0).permutation(500)
    np.testing.assert_allclose(
        norm(x[:, :, order]), norm(x)[:, :, order], atol=2 * tolerance.forward("float32", 500, 5.0)
    )


def test_channels_first_equals_channels_last(norm):
    x, gamma, residual = draw(2, 5, 12, 11), draw(2, 5), draw(2, 5, 12, 11)
    to_last = functools.partial(np.moveaxis, source=1, destination=-1)
    first = norm(x, gamma, residual=residual, activation=jax.nn.relu)
    last = norm(to_last(x), gamma, residual=to_last(residual), activation=jax.nn.relu, channel_axis=-1)
    np.testing.assert_allclose(
        to_last(np.asarray(first)), last, rtol=0, atol=2 * tolerance.forward("float32", 132, 10.0)
    )


@pytest.mark.parametrize("mapped", some(["shared", "each"], "each"))
def test_vmapped_call_equals_the_batch_call(norm, mapped):
    x, residual = draw(3, 2, 4, 8, 8), draw(3, 2, 4, 8, 8)
    gamma = draw(4) if mapped == "shared" else draw(3, 2, 4)
    call = lambda x, gamma, residual: norm(x, gamma, residual=residual, activation=jax.nn.silu)  # noqa: E731
    got = jax.vmap(call, in_axes=(0, None if mapped == "shared" else 0, 0))(x, gamma, residual)
    flat = gamma if mapped == "shared" else gamma.reshape(6, 4)
    want = call(x.reshape(6, 4, 8, 8), flat, residual.reshape(6, 4, 8, 8)).reshape(x.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * tolerance.forward("float32", 64, 10.0))


def test_gradient_is_orthogonal_to_shift_and_scale(norm):
    """dx sums to zero over an instance, and so does dx * x up to eps: y does not see shift and scale."""
    x, dy = draw(2, 3, 400) + 5, draw(2, 3, 400)[:, ::-1]
    (dx,) = jax.vjp(functools.partial(norm, eps=1e-12), x)[1](dy)
    scale = float(np.abs(dx).sum(-1).max())
    np.testing.assert_allclose(np.float64(dx).sum(-1), 0, atol=scale * tolerance.arithmetic("float32", 400))
    centered = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    np.testing.assert_allclose(
        (np.float64(dx) * centered).sum(-1), 0, atol=4 * scale * tolerance.arithmetic("float32", 400)
    )


def test_conditional_norm_transfers_the_moments(norm):
    """Adaptive instance norm: the result has the moments of the style image."""
    content, style = draw(2, 3, 30, 30), 4 + 3 * draw(2, 3, 25, 25)
    mean, var = jaxnorm.instance_moments(style)
    got_mean, got_var = jaxnorm.instance_moments(norm(content, jnp.sqrt(var), mean, eps=1e-12))
    np.testing.assert_allclose(got_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(got_var, var, rtol=1e-5)
