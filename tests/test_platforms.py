"""What plain XLA is given on each platform, computed on the CPU: every form of the passes against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import each_value, some
from jax import export

import jaxnorm
from jaxnorm.layout import Layout
from jaxnorm.platforms import SLAB, Cpu, Divided, Generic, Gpu

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# A platform that has a form of its own, one that has none, and sizes that are not known when JAX lowers.
FORMS = ["cpu", "cuda", "tpu", "symbolic"]
EPS = 1e-5


def random_case(rng):
    """A shape of up to four spatial axes, one or two channel axes anywhere, and a dtype."""
    while True:
        rank = int(rng.integers(3, 7))
        shape = (int(rng.integers(1, 4)), *(int(2 ** rng.uniform(0, 7)) for _ in range(rank - 1)))
        axes = rng.choice(np.arange(1, rank), int(rng.integers(1, min(3, rank - 1))), replace=False)
        if 100 <= math.prod(shape) <= 200_000:
            return shape, tuple(map(int, sorted(axes))), str(rng.choice(["float16", "bfloat16", "float32"]))


# Few and many channels, few and many positions, a single sample.
LISTED = [
    ((2, positions, channels), (2,), "float32") for positions in (7, 8, 17, 2053) for channels in (1, 3, 15, 40)
] + [((1, 300, 5), (2,), "float32"), ((1, 5, 300), (1,), "float32"), ((2, 3, 1), (1,), "float32")]


def lowered_for(form, function, spatial_axes, x, *arguments):
    """function(x, ...), compiled of the module that JAX makes for a form; the CPU can run it."""
    types = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in (x, *arguments)]
    if form == "symbolic":
        sizes = ", ".join(f"s{axis}" if axis in spatial_axes else str(size) for axis, size in enumerate(x.shape))
        shape = export.symbolic_shape(sizes)
        types = [jax.ShapeDtypeStruct(shape, own.dtype) if own.shape == x.shape else own for own in types]
    exported = export.export(
        jax.jit(function),
        platforms=("cpu" if form == "symbolic" else form,),
        disabled_checks=[export.DisabledSafetyCheck.platform()],
    )(*types)
    return exported.call(x, *arguments)


def check(form, shape, axes, dtype, *, group_size=1, activation="silu", seed=0):
    """Both passes in a form."""
    rng = np.random.default_rng(seed)
    x, dy, residual = (jnp.asarray(rng.standard_normal(shape) * 1.5 + 0.5, dtype) for _ in range(3))
    instances = (shape[0], *(shape[axis] for axis in axes))
    gamma, beta = (jnp.asarray(rng.uniform(0.5, 2.0, instances), "float32") for _ in range(2))
    spatial_axes = oracle.spatial_axes(len(shape), axes)

    def norm(x, gamma, beta, residual):
        options = {"channel_axis": axes[0], "group_size": group_size} if group_size > 1 else {"channel_axis": axes}
        options |= {"eps": EPS, "activation": oracle.ACTIVATIONS[activation].jax, "implementation": "xla"}
        normalize = jaxnorm.group_norm if group_size > 1 else jaxnorm.instance_norm
        return normalize(x, gamma, beta, residual=residual, **options)

    def passes(x, gamma, beta, residual, dy):
        y, pullback = jax.vjp(norm, x, gamma, beta, residual)
        return y, *pullback(dy)

    y, *gradients = lowered_for(form, passes, spatial_axes, x, gamma, beta, residual, dy)
    given = {"gamma": gamma, "beta": beta, "residual": residual}
    options = {"channel_axes": axes, "activation": activation, "group_size": group_size}
    want, magnitude = oracle.instance_norm(x, **given, **options)
    positions = math.prod(shape[axis] for axis in spatial_axes) * group_size
    np.testing.assert_allclose(np.float64(y), want, rtol=0, atol=tolerance.forward(dtype, positions, magnitude))

    want = oracle.gradients(dy, x, **given, **options)
    mean, variance = oracle.moments(x, axes, group_size=group_size)
    xhat = np.abs(np.float64(x) - mean) / np.sqrt(variance + EPS)
    # |activation'| < 1.1, whose own slope is below 2, and gamma < 2.
    dz = 2 * np.abs(np.float64(dy))
    scale = 2 * float((1 / np.sqrt(variance + EPS)).max())
    bounds = {
        "x": tolerance.input_gradient(
            dtype, positions, want["x"], xhat=float(xhat.max()), scale=scale, dz=float(dz.max())
        ),
        "residual": float(dz.max()) * (2 * tolerance.arithmetic(dtype, positions) * magnitude + tolerance.unit(dtype)),
    }
    for name, factor in (("gamma", xhat), ("beta", 1)):
        terms = (dz * factor).sum(spatial_axes)
        bounds[name] = tolerance.parameter_gradient(dtype, jnp.float32, positions, float(terms.max()))
    for name, value in zip(("x", "gamma", "beta", "residual"), gradients, strict=True):
        np.testing.assert_allclose(np.float64(value), want[name], rtol=0, atol=bounds[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", some(range(6), 0, 1))
def test_random_shapes(form, case, seed):
    shape, axes, dtype = random_case(np.random.default_rng((seed, case)))
    check(form, shape, axes, dtype, seed=(seed, case))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "form"), each_value(LISTED, ["cuda", "cpu"]), ids=str)
def test_few_and_many(form, case):
    check(form, *case, activation="leaky_relu")


@pytest.mark.parametrize(
    ("case", "form"),
    each_value([((2, 37, 24), (2,), 8), ((2, 24, 37), (1,), 3), ((3, 12), (1,), 4)], FORMS),
    ids=str,
)
def test_groups(form, case):
    shape, axes, group_size = case
    check(form, shape, axes, "float32", group_size=group_size)


@pytest.mark.parametrize("shape", [(2, 3, 100, 7), (2, 3, 5, 5, 5), (2, 3, 2, 2), (2, 3, 1, 47)])
def test_the_slab_has_its_share(shape):
    layout = Layout(shape, (1,))
    for platform in (Cpu, Gpu, Generic):
        slab = platform(layout).slab(jnp.zeros(shape))
        assert layout.positions <= SLAB * slab.size // math.prod(layout.instances)
    assert Divided(layout).slab(jnp.zeros(shape)).shape == shape
