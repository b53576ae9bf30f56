"""What plain XLA is given on each platform, computed on the CPU: every form of the passes against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance

from jaxnorm import xla
from jaxnorm.call import Operands
from jaxnorm.layout import Layout
from jaxnorm.platforms import SLAB, Cpu, Divided, Generic, Gpu
from jaxnorm.reference import statistics_dtype

pytestmark = [pytest.mark.usefixtures("strict_dtypes"), pytest.mark.slow]

PLATFORMS = [Cpu, Gpu, Generic, Divided]
SEED = 20261124
EPS = 1e-5


def drawn(count):
    """Shapes of up to four spatial axes, with one or two channel axes anywhere."""
    rng = np.random.default_rng(SEED)
    cases = []
    while len(cases) < count:
        rank = int(rng.integers(3, 7))
        shape = (int(rng.integers(1, 4)), *(int(2 ** rng.uniform(0, 7)) for _ in range(rank - 1)))
        axes = rng.choice(np.arange(1, rank), int(rng.integers(1, min(3, rank - 1))), replace=False)
        if 100 <= math.prod(shape) <= 200_000:
            cases.append((shape, tuple(map(int, sorted(axes))), str(rng.choice(["float16", "bfloat16", "float32"]))))
    return cases


# Few and many channels, few and many positions, a single sample.
LISTED = [
    ((2, positions, channels), (2,), "float32") for positions in (7, 8, 17, 2053) for channels in (1, 3, 15, 40)
] + [((1, 300, 5), (2,), "float32"), ((1, 5, 300), (1,), "float32"), ((2, 3, 1), (1,), "float32")]


def check(platform, shape, axes, dtype, activation="silu"):
    """Both passes in the form of a platform."""
    rng = np.random.default_rng(SEED)
    x, dy, residual = (jnp.asarray(rng.standard_normal(shape) * 1.5 + 0.5, dtype) for _ in range(3))
    layout = Layout(shape, axes)
    wide = statistics_dtype(x.dtype)
    gamma, beta = (jnp.asarray(rng.uniform(0.5, 2.0, layout.instances), wide) for _ in range(2))
    function = oracle.ACTIVATIONS[activation].jax

    @jax.jit
    def passes(operands, dy):
        form = platform(layout)
        y, statistics = xla.forward(form, operands, eps=EPS, activation=function)
        return y, statistics, xla.backward(form, operands, statistics, dy, activation=function)

    y, statistics, gradients = passes(Operands(x, gamma, beta, residual), dy)
    given = {"gamma": gamma, "beta": beta, "residual": residual, "channel_axes": axes, "activation": activation}
    want, magnitude = oracle.instance_norm(x, **given)
    positions = layout.positions
    np.testing.assert_allclose(np.float64(y), want, rtol=0, atol=tolerance.forward(dtype, positions, magnitude))
    mean, variance = (value.reshape(layout.instances) for value in oracle.moments(x, axes))
    bound = tolerance.arithmetic("float32", positions)
    got_mean = np.float64(statistics.center) + np.float64(statistics.delta)
    np.testing.assert_allclose(got_mean, mean, rtol=0, atol=bound * np.abs(np.float64(x)).max())
    np.testing.assert_allclose(statistics.variance, variance, rtol=SLAB * bound, atol=1e-12)
    np.testing.assert_array_equal(statistics.counted, positions)

    want = oracle.gradients(dy, x, **given)
    xhat = np.abs(np.float64(x) - oracle.moments(x, axes)[0]) / np.sqrt(oracle.moments(x, axes)[1] + EPS)
    sizes = {"scale": 2 * float((1 / np.sqrt(variance + EPS)).max()), "dz": 2 * float(np.abs(np.float64(dy)).max())}
    atol = tolerance.input_gradient(dtype, positions, want["x"], xhat=float(xhat.max()), **sizes)
    np.testing.assert_allclose(np.float64(gradients.x), want["x"], rtol=0, atol=atol)
    for name, factor in (("gamma", xhat), ("beta", np.ones_like(xhat))):
        terms = (2 * np.abs(np.float64(dy)) * factor).sum(layout.spatial_axes)
        atol = tolerance.parameter_gradient(dtype, jnp.float32, positions, float(terms.max()))
        np.testing.assert_allclose(getattr(gradients, name), want[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("shape", "axes", "dtype"), drawn(6), ids=str)
def test_random_shapes(platform, shape, axes, dtype):
    check(platform, shape, axes, dtype)


@pytest.mark.parametrize("platform", [Cpu, Gpu])
@pytest.mark.parametrize(("shape", "axes", "dtype"), LISTED, ids=str)
def test_few_and_many(platform, shape, axes, dtype):
    check(platform, shape, axes, dtype, activation="leaky_relu")


@pytest.mark.parametrize("shape", [(2, 3, 100, 7), (2, 3, 5, 5, 5), (2, 3, 2, 2), (2, 3, 1, 47)])
def test_the_slab_has_its_share(shape):
    layout = Layout(shape, (1,))
    for platform in (Cpu, Gpu, Generic):
        slab = platform(layout).slab(jnp.zeros(shape))
        assert layout.positions <= SLAB * slab.size // math.prod(layout.instances)
    assert Divided(layout).slab(jnp.zeros(shape)).shape == shape
