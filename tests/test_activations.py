"""What an activation may be: elementwise or refused, comparable, with what it closes over as arguments."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

import jaxnorm
from jaxnorm import activations
from jaxnorm.activations.cost import is_dear

FLOAT32 = jnp.dtype("float32")


def flat(function):
    """The function of all elements as a vector."""
    return lambda z: function(z.reshape(-1)).reshape(z.shape)


@jax.custom_jvp
def sine(z):
    return jnp.sin(z)


sine.defjvp(lambda primals, tangents: (sine(*primals), tangents[0] * jnp.cos(primals[0])))


@jax.custom_vjp
def slow_sine(z):
    return jnp.sin(z)


slow_sine.defvjp(lambda z: (jnp.sin(z), z), lambda z, dy: (dy * jnp.cos(z) / 2,))


@jax.custom_jvp
def sums_in_its_jvp(z):
    return jnp.sin(z)


sums_in_its_jvp.defjvp(lambda primals, tangents: (sums_in_its_jvp(*primals), tangents[0] - jnp.sum(tangents[0])))


@jax.custom_vjp
def flips_in_its_vjp(z):
    return jnp.sin(z)


flips_in_its_vjp.defvjp(lambda z: (jnp.sin(z), None), lambda _, dy: (jnp.flip(dy),))

ELEMENTWISE = {
    **{
        name: getattr(jax.nn, name)
        for name in (
            *("celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_tanh", "identity", "leaky_relu", "log_sigmoid"),
            *("mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "sparse_plus"),
            *("sparse_sigmoid", "squareplus"),
        )
    },
    **{
        name: getattr(jax.scipy.special, name)
        for name in (
            *("digamma", "entr", "erf", "erfinv", "erfc", "expit", "gamma", "gammaln", "i0", "i0e", "i1", "i1e"),
            *("log_ndtr", "logit", "ndtr", "ndtri", "spence"),
        )
    },
    "sinc": jnp.sinc,
    "round": jnp.round,
    "power": lambda z: jnp.abs(z) ** 1.7,
    "polynomial": lambda z: z**3 - 2 * z + 1,
    "polyval": lambda z: jnp.polyval(jnp.arange(4.0), z),
    "where": lambda z: jnp.where(z > 0, z, 0),
    "clip": lambda z: jnp.clip(z, -1, 1),
    "select": lambda z: jnp.select([z < -1, z > 1], [z * 0.1, z * 2], z),
    "piecewise": lambda z: jnp.piecewise(z, [z < 0, z >= 0], [lambda u: -u, lambda u: u * 2]),
    "jit": jax.jit(jax.jit(jnp.sin)),
    "checkpoint": jax.checkpoint(lambda z: jnp.sin(z) * z),
    "custom_jvp": sine,
    "custom_vjp": slow_sine,
    "stop_gradient": lambda z: z + lax.stop_gradient(jnp.sin(z) - z),
    "cast": lambda z: z.astype(jnp.bfloat16).astype(z.dtype),
    "bits": lambda z: lax.bitcast_convert_type(lax.bitcast_convert_type(z, jnp.int32) & -256, jnp.float32),
    "constant": lambda z: jnp.full_like(z, 2.0),
    "constant array": lambda z: jnp.where(z > 0, z, np.zeros(z.shape, np.float32)),
    "maxout": lambda z: jnp.stack([z, 0.5 * z, -z]).max(0),
    "maxout, last": lambda z: jnp.stack([z, 0.5 * z, -z], -1).max(-1),
    "flat": flat(jnp.tanh),
    "vmap": flat(jax.vmap(jnp.tanh)),
    "vectorize": jnp.vectorize(lambda z: lax.cond(z > 0, jnp.sin, jnp.cos, z)),
    "fori_loop": lambda z: lax.fori_loop(0, 3, lambda i, u: jnp.sin(u) + i / 2, z),
    "while_loop": lambda z: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, z))[1],
    "scan": lambda z: lax.scan(lambda u, a: (u * z + a, None), jnp.zeros_like(z), jnp.arange(4.0))[0],
    "cond": lambda z: lax.cond(jnp.float32(2) > 1, jnp.sin, jnp.cos, z),
    "its own derivative": lambda z: jax.jvp(jnp.tanh, (z,), (jnp.ones_like(z),))[1],
    "derivative of a sum": jax.grad(lambda z: jnp.sum(jnp.tanh(z))),
    "random scalar": lambda z: z * jax.random.normal(jax.random.key(0)),
    "partial": functools.partial(jax.nn.leaky_relu, negative_slope=0.2),
    "module": nnx.PReLU(),
}

# The primitive, or the word, that the error names.
MIXING = {
    "mean": (lambda z: z - z.mean(), "'reduce_sum'"),
    "norm": (lambda z: z / jnp.sqrt(jnp.sum(z * z)), "'reduce_sum'"),
    "max": (lambda z: z - z.max(), "'reduce_max'"),
    "cumsum": (flat(jnp.cumsum), "'cumsum'"),
    "sort": (flat(jnp.sort), "'sort'"),
    "flip": (jnp.flip, "'rev'"),
    "roll": (lambda z: jnp.roll(z, 1), "'slice'"),
    "softmax": (flat(jax.nn.softmax), "'reduce_max'"),
    "logsumexp": (lambda z: z - jax.nn.logsumexp(z), "'reduce_max'"),
    "argsort": (flat(lambda z: jnp.argsort(z).astype(z.dtype)), "'iota'"),
    "first element": (lambda z: z - z.reshape(-1)[0], "'slice'"),
    "any": (lambda z: jnp.where(jnp.any(z > 1), z, 0), "'reduce_or'"),
    "standardize": (flat(jax.nn.standardize), "'reduce_sum'"),
    "median": (lambda z: z - jnp.median(z), "'reduce_or'"),
    "arange": (lambda z: z + jnp.arange(z.size, dtype=z.dtype).reshape(z.shape), "'iota'"),
    "while": (lambda z: lax.while_loop(lambda u: jnp.sum(u * u) > 1, lambda u: u / 2, z), "'reduce_sum'"),
    "vdot": (lambda z: z * jnp.vdot(z, z), "'dot_general'"),
    "cond": (lambda z: lax.cond(jnp.sum(z) > 0, lambda u: u, lambda u: -u, z), "'reduce_sum'"),
    "predicate": (flat(lambda z: lax.while_loop(lambda u: u[3] > 1, lambda u: u / 2, z)), "'while'|'slice'|failed"),
    "size": (lambda z: z / z.size, "shape"),
    "rank": (lambda z: z / (z.ndim + 1), "shape"),
    "count": (lambda z: z / jnp.sum(jnp.ones_like(z)), "'reduce_sum'"),
    "counting loop": (lambda z: z * lax.fori_loop(0, z.size, lambda _, c: c + 1.0, 0.0), "shape"),
    "noise": (lambda z: z + jax.random.normal(jax.random.key(0), z.shape), "'random_bits'"),
    "dropout": (lambda z: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, z.shape), z, 0), "'random_bits'"),
    "transpose": (lambda z: z.T.reshape(z.shape), "'reshape'"),
    "array of its own": (lambda z: z + np.linspace(0, 1, z.size, dtype="f").reshape(z.shape), "an array of its own"),
    "fft": (flat(lambda z: jnp.fft.ifft(jnp.fft.fft(z)).real), "'fft'"),
    "scan": (flat(lambda z: lax.scan(lambda c, u: (c + u, c), 0.0, z)[1]), "'scan'|failed"),
    "gather": (lambda z: z.reshape(-1)[jnp.zeros(z.shape, int)], "'gather'"),
    "nested": (jax.jit(jax.checkpoint(lambda z: sine(jnp.flip(z)))), "'rev'"),
    "in a body": (lambda z: lax.fori_loop(0, 2, lambda _, u: u - jnp.mean(u), z), "'reduce_sum'"),
    "in a branch": (lambda z: lax.cond(jnp.float32(1) > 0, jnp.flip, jnp.sin, z), "'rev'"),
    "jvp rule": (sums_in_its_jvp, "derivative rule 'reduce_sum'"),
    "vjp rule": (lambda z: 2 * flips_in_its_vjp(z), "derivative rule 'rev'"),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_is_accepted(name):
    prepared = activations.prepare(ELEMENTWISE[name], FLOAT32)
    z = jnp.asarray(np.random.default_rng(0).uniform(-0.9, 0.9, (2, 3, 4)), jnp.float32)
    got = prepared.function(z, *prepared.captures)
    # The inverse check: what it does to an array it does to every element of it.
    each = [ELEMENTWISE[name](element) for element in z.reshape(-1)]
    np.testing.assert_allclose(got, jnp.stack(each).reshape(z.shape), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_positions_is_refused(name):
    activation, named = MIXING[name]
    with pytest.raises(ValueError, match=f"activation must be elementwise .*({named}).*pply it after the norm"):
        activations.prepare(activation, FLOAT32)


@pytest.mark.parametrize("implementation", [None, "xla", "reference", "pallas"])
def test_every_implementation_refuses(implementation):
    x = jnp.ones((1, 4, 4, 8))
    with pytest.raises(ValueError, match="'reduce_sum' mixes positions"):
        jaxnorm.instance_norm(x, activation=lambda z: z - z.mean(), implementation=implementation)


def test_explain_refuses():
    with pytest.raises(ValueError, match="'rev' mixes positions"):
        jaxnorm.explain(jax.ShapeDtypeStruct((1, 4, 4, 8), FLOAT32), activation=jnp.flip, device="H100")


class Callable:
    def __call__(self, z):
        return z - z.mean()


@pytest.mark.parametrize(
    "activation", [jax.nn.softmax, lambda z: z - z.mean(), Callable(), functools.partial(jnp.flip, axis=0), object()]
)
def test_messages_have_no_addresses(activation):
    with pytest.raises((TypeError, ValueError)) as error:
        activations.prepare(activation, FLOAT32)
    assert "0x" not in str(error.value)


# What it closes over


def leaky(slope):
    return lambda z: jnp.where(z > 0, z, slope * z)


LEARNED = {
    "leaky_relu": leaky,
    "jit": lambda s: jax.jit(leaky(s)),
    "partial": lambda s: functools.partial(jax.nn.leaky_relu, negative_slope=s),
    "custom_jvp": lambda s: lambda z: jax.nn.softplus(s * z) + jax.nn.relu(z) * s,
    "checkpoint": lambda s: jax.checkpoint(lambda z: jnp.sin(z * s) * s),
    "cond": lambda s: lambda z: lax.cond(s > 0, lambda u: u * s, jnp.sin, z),
    "fori_loop": lambda s: lambda z: lax.fori_loop(0, 3, lambda i, u: jnp.sin(u * s) + i, z),
    "select": lambda s: lambda z: jnp.select([z < -1, z > 1], [s * z, z / s], z),
    "swish": lambda s: lambda z: s * z * jax.nn.sigmoid(jnp.exp(s) * z),
    "alone": lambda s: lambda z: jnp.full_like(z, 1) * s,
}


@functools.partial(jax.jit, static_argnums=0)
def apply(function, z, *captures):
    return function(z, *captures)


def hoisted(activation, z):
    """The activation on (B, R, K), with a value of what it closes over per instance."""
    prepared = activations.prepare(activation, z.dtype)
    assert prepared.captures
    return apply(prepared.function, z, *(jnp.broadcast_to(c, (z.shape[0], 1, z.shape[2])) for c in prepared.captures))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "second") for name in LEARNED),
        *((name, mode) for name in ("leaky_relu", "custom_jvp") for mode in ("grad", "jit", "vmap", "scan", "remat")),
    ],
)
def test_captures_are_differentiated(name, mode, x64):
    rng = np.random.default_rng(1)
    z, dy = (jnp.asarray(rng.standard_normal((2, 5, 3))) for _ in range(2))
    slopes = jnp.asarray(rng.uniform(0.2, 0.6, 3))

    def gradients(call):
        def loss(z, s):
            return jnp.sum(dy * call(LEARNED[name](s), z))

        grad = jax.grad(loss, (0, 1))
        match mode:
            case "grad":
                return grad(z, slopes[0])
            case "jit":
                return jax.jit(grad)(z, slopes[0])
            case "vmap":
                return jax.vmap(grad, (None, 0))(z, slopes)
            case "remat":
                return jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(z, slopes[0])
            case "second":
                return jax.jit(jax.grad(lambda *a: sum(jnp.sum(jnp.sin(g)) for g in grad(*a)), (0, 1)))(z, slopes[0])

        def through(z, s):
            return jnp.sum(dy * lax.scan(lambda u, s: (call(LEARNED[name](s), u), None), z, s)[0])

        return jax.grad(through, (0, 1))(z, slopes)

    for got, want in zip(gradients(hoisted), gradients(lambda f, z: f(z)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "value", [True, np.int8(-3), np.uint16(50000), np.int32(-(2**31) + 12345), np.uint32(2**32 - 7), np.float16(0.3)]
)
def test_captured_numbers_of_any_type_are_exact(value):
    seen = jnp.asarray(value)
    activation = lambda z: jnp.where(z > 0, z, (seen == value).astype(z.dtype))  # noqa: E731
    prepared = activations.prepare(activation, FLOAT32)
    assert {capture.dtype for capture in prepared.captures} == {FLOAT32}
    z = jnp.linspace(-1, 1, 6).reshape(1, 6, 1)
    np.testing.assert_array_equal(hoisted(activation, z), activation(z))
    gradient = jax.grad(lambda z: jnp.sum(hoisted(activation, z)))(z)
    np.testing.assert_array_equal(gradient, jax.grad(lambda z: jnp.sum(activation(z)))(z))


def test_new_values_make_equal_functions():
    def prepared(slope):
        return activations.prepare(leaky(slope), FLOAT32)

    first, second = prepared(jnp.float32(0.1)), prepared(jnp.float32(0.2))
    assert first.function == second.function
    assert hash(first.function) == hash(second.function)
    assert [float(c) for p in (first, second) for c in p.captures] == pytest.approx([0.1, 0.2])


def test_an_array_that_is_closed_over_must_be_traced_as_scalars():
    def call(slopes):
        return activations.prepare(lambda z: z * slopes.mean(), FLOAT32)

    with pytest.raises(ValueError, match=r"must be scalars: .*float32\[3\].*Take the scalars out of it before"):
        jax.jit(call)(jnp.ones(3))


def test_a_traced_value_inside_a_derivative_rule_is_refused():
    def call(slope):
        @jax.custom_jvp
        def scale(z):
            return slope * z

        scale.defjvp(lambda primals, tangents: (scale(*primals), tangents[0] * slope))
        return activations.prepare(lambda z: scale(z) + 1, FLOAT32)

    with pytest.raises(ValueError, match=r"'scale' closes over an array\. Pass it to 'scale'"):
        jax.jit(call)(1.0)
    # As a constant it has no derivative to lose.
    assert not call(jnp.float32(2)).captures


class Learned(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, implementation=None):
        slope = flax.linen.PReLU()
        return jaxnorm.InstanceNorm(activation=lambda z: 1 * slope(z), implementation=implementation)(x)


def test_prelu_of_linen():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 4, 4, 3)), jnp.float32)
    variables = jax.jit(Learned().init)(jax.random.key(0), x)
    assert variables["params"]["PReLU_0"]["negative_slope"] == pytest.approx(0.01)
    grads = [
        jax.jit(jax.grad(lambda v, i=i: jnp.sum(jnp.sin(Learned().apply(v, x, implementation=i)))))(variables)
        for i in ("xla", "reference")
    ]
    for got, want in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_prelu_of_nnx():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, 4, 4)), jnp.float32)

    def loss(module, implementation):
        return jnp.sum(jnp.sin(jaxnorm.instance_norm(x, activation=module, implementation=implementation)))

    got, want = (nnx.jit(nnx.grad(loss), static_argnums=1)(nnx.PReLU(0.3), name) for name in ("xla", "reference"))
    np.testing.assert_allclose(got["negative_slope"][...], want["negative_slope"][...], rtol=1e-5)


# Equal where they do the same


def key_of(activation):
    return activations.prepare(activation, FLOAT32).function


def test_functions_are_told_apart_by_what_they_do():
    fresh = [lambda z, a=a: jnp.where(z > 0, z, a * z) for a in (0.0, -0.0, 1, True, 0.1, np.nan)]
    assert len({key_of(activation) for activation in fresh}) == 5  # 1 and True are one number here
    for a in (0.0, -0.0, 1, True, 0.1, np.nan):
        assert key_of(lambda z, a=a: jnp.where(z > 0, z, a * z)) in set(map(key_of, fresh))
    assert key_of(lambda z: jnp.sin(z) + 1) != key_of(lambda z: jnp.cos(z) + 1)
    assert key_of(lambda z: jax.nn.relu(z) * 2) == key_of(lambda z: jax.nn.relu(z) * 2)
    assert key_of(lambda z: slow_sine(z) + 1) == key_of(lambda z: slow_sine(z) + 1)
    # The same value, but another derivative.
    other = jax.custom_jvp(sine.fun)
    other.defjvp(lambda primals, tangents: (other(*primals), 2 * tangents[0]))
    assert key_of(lambda z: sine(z) + 1) != key_of(lambda z: other(z) + 1)


def test_a_function_that_changed_is_another():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 1, 7)), jnp.float32)

    class Scaled:
        factor = 1.0

        def __call__(self, z):
            return self.factor * z

    scaled, norm = Scaled(), functools.partial(jaxnorm.instance_norm, x)
    plain = norm()
    np.testing.assert_array_equal(norm(activation=scaled), plain)
    scaled.factor = 2.0
    np.testing.assert_array_equal(norm(activation=scaled), 2 * plain)
    scaled.factor = jnp.float32(4)
    np.testing.assert_array_equal(norm(activation=scaled), 4 * plain)
    scaled.factor = jnp.float32(8)
    np.testing.assert_array_equal(norm(activation=scaled), 8 * plain)


@pytest.mark.parametrize("form", ["lambda", "slope", "custom rule", "partial"])
def test_a_fresh_function_does_not_compile_again(form):
    x = jnp.ones((1, 2, 3, 97))

    def call(i):
        slope = jnp.float32(i)
        activation = {
            "lambda": lambda z: jnp.where(z > 0, z, 0.3 * z),
            "slope": lambda z: jnp.where(z > 0, z, slope * z),
            "custom rule": lambda z: jax.nn.softplus(z) - 1,
            "partial": functools.partial(jax.nn.leaky_relu, negative_slope=slope),
        }[form]
        return jax.block_until_ready(jax.grad(lambda x: jnp.sum(jaxnorm.instance_norm(x, activation=activation)))(x))

    call(0)
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for i in range(1, 4):
            call(i)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled


# Programs that nobody listed: compositions of elementwise steps, and the same with one step that mixes positions.

_UNARY = [
    jnp.sin,
    jnp.tanh,
    jax.nn.relu,
    jax.nn.softplus,
    sine,
    jax.nn.silu,
    lambda z: jnp.where(z > 0.3, z, 0.2 * z),
    lambda z: jnp.clip(z, -1, 1),
    lambda z: lax.integer_pow(z, 2),
    lambda z: z.astype(jnp.bfloat16).astype(z.dtype),
    lambda z: jnp.select([z < -1, z > 1], [z / 2, 0.5 + z / 2], z),
    lambda z: lax.stop_gradient(z) * z,
]
_BINARY = [jnp.add, jnp.multiply, jnp.minimum, lambda a, b: jnp.where(a > b, a, b / 2)]
_MIXERS = [
    lambda z: z - jnp.mean(z),
    jnp.flip,
    lambda z: z + jnp.max(z),
    flat(jnp.cumsum),
    flat(jnp.sort),
    lambda z: z * z.size,
    lambda z: z + jnp.arange(z.size, dtype=z.dtype).reshape(z.shape),
    lambda z: jnp.where(jnp.any(z > 0), z, -z),
    lambda z: lax.cond(jnp.sum(z) > 0, jnp.sin, jnp.cos, z),
]


def _with_rule(function):
    @jax.custom_jvp
    def wrapped(z):
        return function(z)

    wrapped.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return wrapped


_OPEN = [jax.jit, jax.checkpoint, _with_rule, lambda f: lambda z: lax.fori_loop(0, 2, lambda _, u: f(u), z)]


@st.composite
def programs(draw, mixing):
    """A function of z and a slope. If mixing, somewhere in it is a step that mixes positions, and what it gives counts.

    vectorize hides the array from what it wraps, so that it would hide what mixes positions too.
    """
    steps = draw(st.integers(1, 4))
    mixes_at = draw(st.integers(0, steps - 1)) if mixing else None

    def wrapped(step, is_mixer):
        for _ in range(draw(st.integers(0, 2))):
            wrapper = draw(st.sampled_from([*_OPEN, *([] if is_mixer else [jnp.vectorize])]))
            step = wrapper(step)
        return step

    chain = []
    for i in range(steps):
        one = draw(st.sampled_from(_MIXERS if i == mixes_at else _UNARY))
        chain.append((wrapped(one, i == mixes_at), draw(st.sampled_from([None, *_BINARY])), draw(st.booleans())))

    def program(z, slope):
        for step, combine, scaled in chain:
            value = step(z)
            if scaled:
                value = slope * value
            # Through add, whatever else: a select or a minimum may drop what was mixed.
            z = value if combine is None else value + 0.5 * combine(z, value)
        return z

    return program


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(programs(mixing=False), st.sampled_from(["traced", "constant"]), st.integers(0, 2**16))
def test_random_elementwise_programs_agree(program, form, seed):
    """Both implementations, forward and gradients, in float64 to tell a mistake from rounding."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x, dy = (jnp.asarray(rng.standard_normal((2, 3, 5))) for _ in range(2))

        def loss(x, slope, implementation):
            activation = lambda z: program(z, slope if form == "traced" else 0.7)  # noqa: E731
            return jnp.sum(dy * jaxnorm.instance_norm(x, activation=activation, implementation=implementation))

        value = jax.value_and_grad(loss, (0, 1))
        got, want = (value(x, jnp.asarray(0.7), name) for name in ("xla", "reference"))
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(programs(mixing=True), st.booleans())
def test_random_programs_that_mix_positions_are_refused_by_all(program, is_captured):
    x = jnp.ones((2, 4, 4, 8))

    def seen(slope):
        activation = lambda z: program(z, slope if is_captured else 0.7)  # noqa: E731
        calls = [functools.partial(jaxnorm.instance_norm, x, implementation=name) for name in ("xla", "reference")]
        calls += [functools.partial(jaxnorm.explain, x, device="H100")]
        for call in calls:
            with pytest.raises(ValueError, match="activation must be elementwise"):
                call(activation=activation)
        return slope

    jax.jit(seen)(0.7)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(programs(mixing=False), st.booleans())
def test_random_elementwise_programs_are_accepted(program, is_captured):
    def seen(slope):
        activations.prepare(lambda z: program(z, slope if is_captured else 0.7), FLOAT32)
        return slope

    jax.jit(seen)(0.7)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.leaky_relu, jax.nn.hard_swish, None])
def test_arithmetic_takes_no_time(activation):
    assert not is_dear(activation, jnp.float32, 0)


def horner(z):
    for _ in range(5):
        z = 0.1 * z * z + 1
    return z


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jnp.sin, horner])
def test_series_and_polynomials_do(activation):
    assert is_dear(activation, jnp.float32, 0)
