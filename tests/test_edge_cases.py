"""What is defined though unusual: empty, constant and non-finite instances, masks, NumPy input, repeated calls."""

import contextlib
import functools
import itertools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from cases import each_value, exhaustive
from jax.ad_checkpoint import print_saved_residuals
from jax.test_util import check_grads

from jaxnorm import group_norm, instance_moments, instance_norm

pytestmark = [pytest.mark.usefixtures("strict_dtypes"), pytest.mark.slow]

EPS = 1e-5
every_implementation = pytest.mark.parametrize("implementation", ["xla", "reference"])
every_layout_and_implementation = pytest.mark.parametrize(
    ("channel_axis", "implementation"), each_value([1, -1], ["xla", "reference"])
)
every_layout = pytest.mark.parametrize("channel_axis", [1, -1], ids=["channels-first", "channels-last"])
leaky_relu = functools.partial(jax.nn.leaky_relu, negative_slope=0.25)


def normal(*shape, seed=0):
    """An array (N, C, *spatial), or parameters."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("channel_axis", "activation", "implementation"))
def norm_and_gradients(arguments, dy, *, channel_axis=1, activation=None, where=None, implementation=None):
    """y and the gradients of <dy, y> by x, gamma, beta and residual; all but where is laid out (N, C, *spatial)."""

    def norm(x, gamma, beta, residual):
        x, residual = (None if v is None else jnp.moveaxis(v, 1, channel_axis) for v in (x, residual))
        options = {"activation": activation, "where": where, "implementation": implementation}
        y = instance_norm(x, gamma, beta, EPS, channel_axis=channel_axis, residual=residual, **options)
        return jnp.moveaxis(y, channel_axis, 1)

    y, pullback = jax.vjp(norm, *arguments)
    return y, pullback(dy)


# Nothing to normalize


@pytest.mark.parametrize(
    ("shapes", "channel_axis", "implementation"),
    each_value(
        [((0, 3, 4, 5), (3,)), ((2, 0, 4, 5), (2, 0)), ((2, 0, 4, 5), (0,)), ((0, 3, 4, 5), (0, 3))],
        [1, -1],
        ["xla", "reference"],
    ),
    ids=str,
)
def test_no_instances(shapes, channel_axis, implementation):
    shape, parameter = shapes
    arguments = [normal(*size) for size in (shape, parameter, parameter, shape)]
    y, gradients = norm_and_gradients(
        arguments, normal(*shape), channel_axis=channel_axis, activation=leaky_relu, implementation=implementation
    )
    assert (y.shape, y.dtype) == (shape, jnp.float32)
    for gradient, argument in zip(gradients, arguments, strict=True):
        assert jnp.array_equal(gradient, jnp.zeros_like(argument))


@every_implementation
def test_no_instances_at_second_order(implementation):
    shape = (0, 3, 4, 5)
    arguments = [normal(*size) for size in (shape, (3,), (3,), shape)]

    def penalty(*arguments):
        _, gradients = norm_and_gradients(arguments, normal(*shape), activation=jnp.tanh, implementation=implementation)
        return sum(jnp.sum(g**2) for g in gradients)

    gradients = jax.jit(jax.grad(penalty, (0, 1, 2, 3)))(*arguments)
    for gradient, argument in zip(gradients, arguments, strict=True):
        assert jnp.array_equal(gradient, jnp.zeros_like(argument))


def test_moments_of_no_instances():
    for shape in ((0, 3, 4), (2, 0, 4)):
        mean, var = instance_moments(jnp.zeros(shape))
        assert mean.shape == var.shape == shape[:2]


# Nothing to divide by


@pytest.mark.parametrize(
    ("spatial", "channel_axis", "implementation"),
    each_value([(20, 20), (1, 1, 1), (1,)], [1, -1], ["xla", "reference"]),
    ids=str,
)
def test_constant_instance(spatial, channel_axis, implementation):
    for value in (0.0, 0.1, -3.0, 1e6):
        check_constant_instance(spatial, value, channel_axis, implementation)


def check_constant_instance(spatial, value, channel_axis, implementation):
    shape, positions = (2, 3, *spatial), int(np.prod(spatial))
    x = np.full(shape, value, np.float32)
    gamma, beta, residual, dy = 1 + normal(3) / 4, normal(3, seed=1), normal(*shape, seed=2), normal(*shape, seed=3)
    y, (dx, dgamma, dbeta, dresidual) = norm_and_gradients(
        [x, gamma, beta, residual], dy, channel_axis=channel_axis, activation=leaky_relu, implementation=implementation
    )

    per_channel = (1, 3) + (1,) * len(spatial)
    axes = tuple(range(2, 2 + len(spatial)))
    # In float32 like the result, so that both are on the same side of the kink of the activation.
    z = beta.reshape(per_channel) + residual
    slope = np.where(z > 0, 1, np.float32(0.25))
    dz = (slope * dy).astype(np.float64)
    rstd = EPS**-0.5
    # The mean is off by (1 + log2 M) u |x| and so is every deviation, all by the same; the mean of the deviations
    # takes it back but for (1 + log2 M) u of it.
    u = tolerance.unit("float32")
    rounding = (1 + np.log2(positions)) * u
    xhat = rounding**2 * abs(value) * rstd
    np.testing.assert_allclose(y, slope * z, rtol=2 * u, atol=xhat * gamma.max())

    expected = gamma.reshape(per_channel) * rstd * (dz - dz.mean(axes, keepdims=True))
    bound = tolerance.input_gradient(
        "float32", positions, expected, scale=float(gamma.max()) * rstd, dz=float(abs(dz).max()), xhat=xhat
    )
    np.testing.assert_allclose(dx, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(dresidual, dz, rtol=u)
    np.testing.assert_allclose(dbeta, dz.sum((0, *axes)), rtol=0, atol=rounding * 2 * abs(dz).sum())
    np.testing.assert_allclose(dgamma, np.zeros(3), rtol=0, atol=xhat * abs(dz).sum())


@pytest.mark.parametrize(("spatial", "implementation"), each_value([(7, 9), (1,)], ["xla", "reference"]), ids=str)
def test_constant_instance_at_second_order(spatial, implementation):
    """The gradient of |dx|^2, where xhat is linear in x to second order: rstd (x - mean).

    With P v = v - mean(v), r = rstd, and the loss <w, sin(gamma xhat + beta)>:

        dx = gamma r P(w sin')      Hessian = gamma^2 r^2 P diag(w sin'') P      result = 2 Hessian dx
    """
    shape, positions = (2, 3, *spatial), int(np.prod(spatial))
    w, gamma, beta = normal(*shape), 1 + normal(3) / 4, normal(3, seed=1)

    @jax.jit
    @jax.grad
    def result(x):
        def loss(x):
            return jnp.sum(w * instance_norm(x, gamma, beta, EPS, activation=jnp.sin, implementation=implementation))

        return jnp.sum(jax.grad(loss)(x) ** 2)

    def project(v):
        return v - v.mean(tuple(range(2, v.ndim)), keepdims=True)

    gamma_r = gamma.reshape(1, 3, *(1 for _ in spatial)) * EPS**-0.5
    angle = beta.astype(np.float64).reshape(1, 3, *(1 for _ in spatial))
    expected = 2 * gamma_r**3 * project(-w * np.sin(angle) * project(w * np.cos(angle)))
    # Each mean doubles the largest term at most; z is off by xhat at most (see above).
    scale = 8 * abs(gamma_r**3).max() * abs(w).max() ** 2
    u = tolerance.unit("float32")
    for value in (0.1, 1e6):
        xhat = ((1 + np.log2(positions)) * u) ** 2 * value * EPS**-0.5
        bound = (3 * tolerance.arithmetic("float32", positions) + 2 * xhat * gamma.max()) * scale
        np.testing.assert_allclose(result(np.full(shape, value, np.float32)), expected, rtol=0, atol=bound)


@every_implementation
def test_constant_instance_beside_others(implementation):
    x = normal(2, 3, 4, 5)
    constant = x.copy()
    constant[1, 2] = 0.1
    dy = normal(2, 3, 4, 5, seed=1)
    y, (dx, *_) = norm_and_gradients([x, None, None, None], dy, implementation=implementation)
    y_beside, (dx_beside, *_) = norm_and_gradients([constant, None, None, None], dy, implementation=implementation)
    others = np.ones((2, 3), bool)
    others[1, 2] = False
    assert np.array_equal(y[others], y_beside[others])
    assert np.array_equal(dx[others], dx_beside[others])


# Gradients of parameters


@pytest.mark.parametrize(
    ("parameter_dtype", "channel_axis", "implementation"),
    each_value(["bfloat16", "float32"], [1, -1], ["xla", "reference"]),
)
def test_parameter_gradients_are_summed_before_they_are_rounded(parameter_dtype, channel_axis, implementation):
    # As many as a batch of small images.
    x, dy = normal(64, 3, 2, 5), normal(64, 3, 2, 5, seed=1) + 1
    gamma, beta = (jnp.asarray(1 + normal(3, seed=seed) / 4, parameter_dtype) for seed in (2, 3))
    _, (_, dgamma, dbeta, _) = norm_and_gradients(
        [x, gamma, beta, None], dy, channel_axis=channel_axis, implementation=implementation
    )
    assert dgamma.dtype == dbeta.dtype == parameter_dtype

    exact = x.astype(np.float64)
    xhat = (exact - exact.mean((2, 3), keepdims=True)) / np.sqrt(exact.var((2, 3), keepdims=True) + EPS)
    for gradient, terms in ((dgamma, dy * xhat), (dbeta, dy.astype(np.float64))):
        expected = terms.sum((0, 2, 3))
        computed = tolerance.parameter_gradient("float32", "float32", terms[:, 0].size, abs(terms).sum((0, 2, 3)).max())
        bound = computed + tolerance.unit(parameter_dtype) * abs(expected).max()
        np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=0, atol=bound)


# NaN and inf


@every_layout_and_implementation
def test_non_finite_values_stay_in_their_instance(channel_axis, implementation):
    # Large enough that the first rows alone give the provisional center of the fused implementation.
    n, c, shape = 1, 2, (2, 3, 20, 20)
    x, residual, dy = (normal(*shape, seed=seed) for seed in range(3))
    options = {"channel_axis": channel_axis, "implementation": implementation, "activation": leaky_relu}

    for per_sample in (True, False):
        parameter = (2, 3) if per_sample else (3,)
        rest = [1 + normal(*parameter, seed=3) / 4, normal(*parameter, seed=4), residual]
        y, clean = norm_and_gradients([x, *rest], dy, **options)
        others = np.ones((2, 3), bool)
        others[n, c] = False
        of_parameter = others if per_sample else np.arange(3) != c
        for position, value in itertools.product([(0, 0), (19, 19)], [np.nan, np.inf, -np.inf]):
            broken = x.copy()
            broken[(n, c, *position)] = value
            y_broken, gradients = norm_and_gradients([broken, *rest], dy, **options)
            assert not np.isfinite(y_broken[n, c]).all()
            assert not np.isfinite(gradients[0][n, c]).any()
            # Bit for bit: other instances are computed from other numbers.
            assert np.array_equal(y_broken[others], y[others])
            for broken_gradient, gradient, rows in zip(
                gradients, clean, [others, of_parameter, of_parameter, others], strict=True
            ):
                assert np.array_equal(broken_gradient[rows], gradient[rows])


@every_implementation
def test_non_finite_cotangent_stays_in_its_instance(implementation):
    x, dy = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    broken = dy.copy()
    broken[0, 1, 2, 3] = np.nan
    _, (dx, *_) = norm_and_gradients([x, None, None, None], dy, implementation=implementation)
    _, (dx_broken, *_) = norm_and_gradients([x, None, None, None], broken, implementation=implementation)
    others = np.ones((2, 3), bool)
    others[0, 1] = False
    assert np.isnan(dx_broken[0, 1]).all()
    assert np.array_equal(dx_broken[others], dx[others])


# NumPy and Python numbers


@every_implementation
def test_numpy_arguments(implementation):
    x, gamma, beta, residual = normal(2, 3, 4, 5), normal(3), normal(3), normal(2, 3, 4, 5, seed=1)
    norm = functools.partial(instance_norm, implementation=implementation)
    y = norm(x, gamma, beta, residual=residual)
    assert isinstance(y, jax.Array)
    assert jnp.array_equal(y, norm(*map(jnp.asarray, (x, gamma, beta)), residual=jnp.asarray(residual)))


@every_implementation
def test_numpy_float64_is_taken_as_jax_takes_it(implementation):
    # As float32, where 64 bits are off: jnp.asarray does so without a word, too.
    arguments = [normal(2, 3, 4, 5), normal(3), normal(3)]
    residual = normal(2, 3, 4, 5, seed=1)
    norm = functools.partial(instance_norm, implementation=implementation)
    y = norm(*(v.astype(np.float64) for v in arguments), residual=residual.astype(np.float64))
    assert y.dtype == jnp.float32
    assert jnp.array_equal(y, norm(*arguments, residual=residual))


def test_numpy_mask():
    x, mask = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1) > 0
    assert jnp.array_equal(instance_norm(x, where=mask), instance_norm(jnp.asarray(x), where=jnp.asarray(mask)))


@every_implementation
@pytest.mark.parametrize("eps", [1, np.float64(1.0), np.float32(1.0), np.int32(1)], ids=lambda eps: type(eps).__name__)
def test_eps_may_be_any_real_number(eps, implementation):
    x = normal(2, 3, 4, 5)
    y = instance_norm(x, eps=eps, implementation=implementation)
    assert jnp.array_equal(y, instance_norm(x, eps=1.0, implementation=implementation))


def test_channel_axis_may_be_a_numpy_integer_or_a_list():
    x = normal(2, 3, 4, 5)
    assert jnp.array_equal(instance_norm(x, channel_axis=np.int64(-1)), instance_norm(x, channel_axis=3))
    assert jnp.array_equal(instance_norm(x, channel_axis=[3, -3]), instance_norm(x, channel_axis=(1, 3)))


# Compiled once


@contextlib.contextmanager
def counted_compilations():
    """A list that grows with every compilation inside."""
    seen = []

    def listener(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


unused_sizes = itertools.count(2)


ACTIVATIONS = {
    "function": lambda: jax.nn.silu,
    "partial": lambda: functools.partial(jax.nn.leaky_relu, negative_slope=0.01),
}


@pytest.mark.parametrize(
    ("activation", "order", "implementation"), each_value(["partial", "function"], [0, 2], ["xla", "reference"])
)
def test_new_values_do_not_compile_again(activation, order, implementation):
    # A shape of its own, so that the first call does compile.
    shape = (2, 3, 1, next(unused_sizes))
    first, second = (jnp.asarray(normal(*shape, seed=seed)) for seed in range(2))

    def call(x):
        # The activation is written into the call, as a user would: a new partial every time.
        def loss(x):
            return jnp.sum(instance_norm(x, activation=ACTIVATIONS[activation](), implementation=implementation))

        def penalty(x):
            return jnp.sum(jax.grad(loss)(x) ** 2)

        return loss(x) if order == 0 else jax.grad(penalty)(x)

    with counted_compilations() as seen:
        call(first)
        assert seen
        seen.clear()
        call(second)
        assert not seen


def test_other_partials_are_told_apart():
    x = normal(2, 3, 4, 5)
    for slope in (0.1, 0.2, 0.1):
        y = instance_norm(x, activation=functools.partial(jax.nn.leaky_relu, negative_slope=slope))
        assert jnp.array_equal(y, instance_norm(x, activation=lambda z, a=slope: jax.nn.leaky_relu(z, a)))


# What the backward pass keeps


def saved_arrays(capsys, norm, *arguments):
    """What print_saved_residuals says of the saved arrays as large as x."""
    print_saved_residuals(norm, *arguments)
    size = f"[{','.join(map(str, arguments[0].shape))}]"
    return sorted(line for line in capsys.readouterr().out.splitlines() if size in line)


@pytest.mark.parametrize(
    ("normalize", "jit", "dtype", "channel_axis"),
    each_value([instance_norm, group_norm], [True, False], ["float32", "bfloat16"], [1, -1]),
)
def test_only_x_is_saved(capsys, normalize, jit, dtype, channel_axis):
    if normalize is group_norm:
        normalize = functools.partial(group_norm, group_size=3)
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    x, residual = (jnp.asarray(normal(2, 3, 4, 3, seed=seed), dtype) for seed in range(2))
    gamma = jnp.ones(3)
    from_x, from_residual = (f"{short}[2,3,4,3] from the argument {name}" for name in ("x", "residual"))

    def norm(activation):
        def plain(x, gamma, residual=None):
            return normalize(
                x, gamma, residual=residual, channel_axis=channel_axis, activation=activation, implementation="xla"
            )

        return jax.jit(plain) if jit else plain

    # The gradients depend on the residual only where an activation does.
    assert saved_arrays(capsys, norm(None), x, gamma) == [from_x]
    assert saved_arrays(capsys, norm(None), x, gamma, residual) == [from_x]
    assert saved_arrays(capsys, norm(jax.nn.gelu), x, gamma) == [from_x]
    assert saved_arrays(capsys, norm(jax.nn.gelu), x, gamma, residual) == [from_residual, from_x]


# where


def masked_by_hand(x, where, eps):
    """y, mean and var in float64: the statistics of the positions that count, for all positions."""
    x, where = np.asarray(x, np.float64), np.broadcast_to(where, x.shape)
    y, mean, var = np.empty(x.shape), np.empty(x.shape[:2]), np.empty(x.shape[:2])
    for instance in np.ndindex(x.shape[:2]):
        counted = x[instance][where[instance]]
        mean[instance], var[instance] = counted.mean(), counted.var()
        y[instance] = (x[instance] - mean[instance]) / np.sqrt(var[instance] + eps)
    return y, mean, var


def random_mask(shape, seed=9):
    """At least one position of each instance counts, and one does not."""
    mask = np.random.default_rng(seed).random(shape) > 0.5
    mask[..., 0, 0], mask[..., 1, 1] = True, False
    return mask


MASKS = [(2, 3, 4, 5), (2, 1, 4, 5), (1, 1, 4, 5), (3, 4, 5), (1, 3, 4, 5), (4, 5)]


@pytest.mark.parametrize(
    ("shape", "channel_axis", "implementation"),
    each_value(MASKS, [1, -1], [None, "reference"]),
    ids=str,
)
def test_where_is_the_norm_of_the_counted_positions(shape, channel_axis, implementation):
    x, mask = 3 * normal(2, 3, 4, 5) + 1, random_mask(shape)
    expected, mean, var = masked_by_hand(x, mask, EPS)
    if len(shape) == 4:
        where = np.moveaxis(mask, 1, channel_axis)
    elif channel_axis == 1:
        where = mask
    else:
        where = np.moveaxis(mask[None] if len(shape) == 2 else mask, 0, -1)
    options = {"channel_axis": channel_axis, "where": where}

    y = instance_norm(np.moveaxis(x, 1, channel_axis), eps=EPS, implementation=implementation, **options)
    bound = tolerance.forward("float32", 20, abs(expected).max())
    np.testing.assert_allclose(np.moveaxis(y, channel_axis, 1), expected, rtol=0, atol=bound)
    got_mean, got_var = instance_moments(np.moveaxis(x, 1, channel_axis), **options)
    relative = tolerance.arithmetic("float32", 20)
    np.testing.assert_allclose(got_mean, mean, rtol=0, atol=relative * abs(x).max())
    np.testing.assert_allclose(got_var, var, rtol=2 * relative)


def test_where_everything_counts():
    x, mask = normal(2, 3, 4, 5), np.ones((2, 3, 4, 5), bool)
    bound = tolerance.forward("float32", 20, 5)
    np.testing.assert_allclose(instance_norm(x, where=mask), instance_norm(x), rtol=0, atol=bound)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("implementation", "order", "mode"),
    [
        ("xla", 1, "rev"),
        pytest.param("xla", 2, "rev", marks=exhaustive),
        pytest.param("reference", 2, "rev", marks=exhaustive),
        pytest.param("reference", 1, "fwd", marks=exhaustive),
    ],
)
def test_where_derivatives(implementation, order, mode):
    x = normal(2, 2, 3, 4).astype(np.float64)
    mask = random_mask((2, 2, 3, 4))

    def function(x):
        norm = functools.partial(instance_norm, activation=jnp.tanh, implementation=implementation)
        return norm(x, where=mask), instance_moments(x, where=mask)

    check_grads(jax.jit(function), (x,), order=order, modes=(mode,))


@every_layout
def test_where_values_that_do_not_count_change_nothing(channel_axis):
    x, mask = normal(2, 3, 4, 5), random_mask((2, 3, 4, 5))
    arguments = [1 + normal(3, seed=1) / 4, normal(3, seed=2), normal(2, 3, 4, 5, seed=3)]
    # The loss does not see those positions either: padding, say.
    dy = np.where(mask, normal(2, 3, 4, 5, seed=4), np.float32(0))
    where = np.moveaxis(mask, 1, channel_axis)
    options = {"channel_axis": channel_axis, "where": where, "activation": leaky_relu}

    y, (dx, *gradients) = norm_and_gradients([x, *arguments], dy, **options)
    for value in (np.nan, np.inf, 1e38):
        broken = np.where(mask, x, np.float32(value))
        y_broken, (dx_broken, *gradients_broken) = norm_and_gradients([broken, *arguments], dy, **options)
        assert np.array_equal(y_broken[mask], y[mask])
        assert np.array_equal(dx_broken[mask], dx[mask])
        assert np.array_equal(dx_broken[~mask], np.zeros_like(dx[~mask]))
        for broken_gradient, gradient in zip(gradients_broken, gradients, strict=True):
            assert np.array_equal(broken_gradient, gradient)


def test_where_a_value_that_does_not_count_is_normalized_nevertheless():
    x, mask = normal(2, 3, 4, 5), random_mask((2, 3, 4, 5))
    broken = np.where(mask, x, np.float32(np.nan))
    assert np.array_equal(np.isnan(instance_norm(broken, where=mask)), ~mask)


@every_layout
def test_where_nothing_counts_the_instance_is_nan(channel_axis):
    x, mask = normal(2, 3, 4, 5), random_mask((2, 3, 4, 5))
    empty = mask.copy()
    empty[1, 2] = False
    others = empty.any((2, 3))

    def run(mask):
        where = np.moveaxis(mask, 1, channel_axis)
        moments = instance_moments(np.moveaxis(x, 1, channel_axis), channel_axis=channel_axis, where=where)
        dy = normal(2, 3, 4, 5, seed=1)
        y, (dx, *_) = norm_and_gradients([x, None, None, None], dy, channel_axis=channel_axis, where=where)
        return *moments, y, dx

    for got, expected in zip(run(empty), run(mask), strict=True):
        assert np.isnan(got[1, 2]).all()
        assert np.array_equal(got[others], expected[others])
