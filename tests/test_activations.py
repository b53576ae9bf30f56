"""An activation is fused where that is plain to see and applied after the norm elsewhere: the result is the same."""

import functools
import gc
import re
import weakref

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import each_value, exhaustive, some
from flax import nnx
from jax import lax

import jaxnorm
from jaxnorm.activation import FUNCTIONS, resolve


def flat(function):
    """The function of all elements as a vector."""
    return lambda z: function(z.reshape(-1)).reshape(z.shape)


def scaled_by(slope):
    return lambda z: slope * z


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


# Fused inside jit.
POINTWISE = {
    "power": lambda z: jnp.abs(z) ** 1.7,
    "polynomial": lambda z: z**3 - 2 * z + 1,
    "where": lambda z: jnp.where(z > 0, z, 0.1 * z),
    "clip": lambda z: jnp.clip(z, -1, 1),
    "jit": jax.jit(jax.jit(jnp.sin)),
    "custom_jvp": sine,
    "custom_vjp": slow_sine,
    "calls silu": lambda z: 2 * jax.nn.silu(z) + 1,
    "stop_gradient": lambda z: z + lax.stop_gradient(jnp.sin(z) - z),
    "cast": lambda z: z.astype(jnp.bfloat16).astype(z.dtype),
    "closes over a number": scaled_by(jnp.float32(0.3)),
    "special": jax.scipy.special.ndtr,
}
# Applied after the norm, for the reason that is named.
AFTER = {
    "mean": (lambda z: z - z.mean(), "'reduce_sum'"),
    "cumsum": (flat(jnp.cumsum), "'reshape'|'cumsum'"),
    "flip": (lambda z: jnp.flip(z, -1), "scalar"),
    "roll": (lambda z: jnp.roll(z, 1), "'slice'|scalar|'reshape'"),
    "softmax": (lambda z: jax.nn.softmax(z, 1), "scalar"),
    "glu": (lambda z: z * jax.nn.sigmoid(z[..., ::-1]), "scalar"),
    "size": (lambda z: z / z.size, "shape"),
    "rank": (lambda z: z / (z.ndim + 1), "shape"),
    "interp": (lambda z: jnp.interp(z, jnp.array([-1.0, 1.0]), jnp.array([0.0, 1.0])), "array of shape"),
    "array": (lambda z: z * jnp.linspace(0.5, 1, 5).reshape(1, 1, 5), "scalar|array"),
    "noise": (lambda z: z + jax.random.normal(jax.random.key(0), z.shape), "'random_"),
    "cond": (lambda z: lax.cond(jnp.sum(z) > 1, jnp.sin, jnp.cos, z), "'reduce_sum'"),
    "loop": (lambda z: lax.fori_loop(0, 3, lambda i, u: jnp.sin(u) + i / 2, z), "'scan'"),
    "jvp rule": (sums_in_its_jvp, "'reduce_sum'"),
    "vjp rule": (lambda z: 2 * flips_in_its_vjp(z), "'rev'|scalar"),
}


def inside_jit(activation, x):
    found = []
    jax.eval_shape(lambda x: found.append(resolve(activation, x, jnp.float32)), x)
    return found[0]


def check_same(activations, x, dy, wrap=jax.jit):
    """Each call is activation(norm(x)), forward and backward.

    Args:
      activations: by name; they are compiled as one program, which takes a fraction of the time.
      wrap: jax.jit, or what leaves the calls outside jit.
    """

    def results(norm):
        def run(x, dy):
            found = {}
            for name, activation in activations.items():
                y, pullback = jax.vjp(functools.partial(norm, activation), x)
                found[name] = y, *pullback(dy)
            return found

        return run

    got = wrap(results(lambda activation, x: jaxnorm.instance_norm(x, activation=activation)))(x, dy)
    plain = results(lambda activation, x: activation(oracle.twin(x)))
    want = jax.jit(plain)(x, dy)
    for name in activations:
        for value, wanted in zip(got[name], want[name], strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-9, atol=1e-9, err_msg=name)


def drawn(shape=(2, 3, 5), seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape)) for _ in range(2))


def eager(function):
    return function


# The set has no order of its own, and tests need the same order in every process.
OF_JAX = {f"{f.__module__}.{f.__name__}": f for f in sorted(FUNCTIONS, key=lambda f: (f.__name__, f.__module__))}


def test_functions_of_jax_are_fused_everywhere(x64):
    """Eagerly and inside jit."""
    assert len(OF_JAX) == len(FUNCTIONS)
    x, _ = drawn()
    for name, function in OF_JAX.items():
        assert resolve(function, x, jnp.float64).fused is function, name
        assert inside_jit(function, x).fused is function, name


@pytest.mark.slow
def test_functions_of_jax_are_pointwise(x64):
    """The result at a position depends on the operand at that position only."""
    z = jnp.linspace(0.1, 0.9, 30)
    order = np.random.default_rng(0).permutation(30)

    @jax.jit
    def shuffled_and_whole(z):
        return {name: (function(z[order].reshape(2, 3, 5)), function(z)[order]) for name, function in OF_JAX.items()}

    for name, (shuffled, whole) in shuffled_and_whole(z).items():
        np.testing.assert_allclose(shuffled.ravel(), whole, rtol=1e-12, err_msg=name)


# sqrt and log1p are NaN for negative numbers.
COMPUTED = {name: function for name, function in OF_JAX.items() if function.__name__ not in ("sqrt", "log1p")}
A_FEW = {name: COMPUTED[name] for name in list(COMPUTED)[::9]}


@pytest.mark.slow
@pytest.mark.parametrize("functions", some([A_FEW, COMPUTED], A_FEW), ids=["a few", "all"])
@pytest.mark.parametrize("wrap", some([jax.jit, eager], jax.jit))
def test_functions_of_jax_have_their_results(wrap, functions, x64):
    check_same(functions, *drawn(), wrap)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [jax.jit, eager])
def test_pointwise_functions_are_fused_inside_jit(wrap, x64):
    x, dy = drawn()
    for name, activation in POINTWISE.items():
        assert inside_jit(activation, x).fused is not None, name
        assert resolve(activation, x, jnp.float64).after is activation, name
    # Outside jit, each is applied after the norm in the same way.
    few = ("where", "custom_vjp")
    check_same(POINTWISE if wrap is jax.jit else {name: POINTWISE[name] for name in few}, x, dy, wrap)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [jax.jit, pytest.param(eager, marks=exhaustive)])
def test_others_are_applied_after_the_norm(wrap, x64):
    x, dy = drawn()
    check_same({name: activation for name, (activation, _) in AFTER.items()}, x, dy, wrap)


@pytest.mark.parametrize("name", AFTER)
def test_the_reason_why_others_are_applied_after_the_norm(name, x64):
    activation, reason = AFTER[name]
    found = inside_jit(activation, drawn()[0])
    assert found.after is activation
    assert re.search(reason, found.why_after), found.why_after


def test_partials_are_told_apart_by_their_numbers():
    x = jnp.ones((1, 2, 3))

    def fused(**keywords):
        return resolve(functools.partial(jax.nn.leaky_relu, **keywords), x, jnp.float32).fused

    values = [0.0, -0.0, 1, True, 1.0, 0.1, float("nan")]
    assert len({fused(negative_slope=value) for value in values}) == len(values)
    for value in values:
        assert fused(negative_slope=value) == fused(negative_slope=value)
    assert fused(negative_slope=jnp.float32(0.1)) is None


@pytest.mark.slow
@pytest.mark.parametrize(("wrap", "dtype"), each_value([jax.jit, eager], ["bfloat16", "float16"]))
def test_the_activation_sees_float32_and_the_result_has_the_dtype_of_x(wrap, dtype):
    """Fused inside jit, and applied after the norm outside."""
    seen = []

    def spy(z):
        seen.append(z.dtype)
        return jnp.tanh(z)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 40)), dtype)
    y = wrap(lambda x: jaxnorm.instance_norm(x, residual=x, activation=spy))(x)
    assert set(seen) == {jnp.dtype("float32")}
    assert y.dtype == dtype
    want, _ = oracle.instance_norm(x, residual=x, activation="tanh")
    _, magnitude = oracle.instance_norm(x, residual=x)
    # |tanh| < 1, whose slope is at most 1: it takes over the error of z, and its result is rounded once.
    bound = tolerance.arithmetic(dtype, 40) * magnitude + tolerance.forward(dtype, 40, 1)
    np.testing.assert_allclose(np.float64(y), want, rtol=0, atol=bound)


@pytest.mark.parametrize(("implementation", "wrap"), each_value(["reference", None, "xla"], [jax.jit, eager]))
def test_the_shape_must_stay(implementation, wrap):
    call = wrap(lambda x: jaxnorm.instance_norm(x, activation=lambda z: z.mean(-1), implementation=implementation))
    with pytest.raises(ValueError, match=r"shape of its input, \(2, 3, 4\): got shape \(2, 3\)"):
        call(jnp.ones((2, 3, 4)))


# Learned slopes and modules.


def leaky(slope):
    return lambda z: jnp.where(z > 0, z, slope * z)


@pytest.mark.slow
@pytest.mark.parametrize("mode", some(["grad", "jit", "vmap", "scan", "remat", "second"], "grad", "scan", "second"))
def test_learned_slopes_have_gradients(mode, x64):
    x, dy = drawn((2, 3, 7))
    slopes = jnp.asarray([0.2, 0.4, 0.6])

    def gradients(norm):
        def loss(x, s):
            return jnp.sum(dy * norm(leaky(s), x))

        grad = jax.grad(loss, (0, 1))
        match mode:
            case "grad":
                return grad(x, slopes[0])
            case "jit":
                return jax.jit(grad)(x, slopes[0])
            case "vmap":
                return jax.vmap(grad, (None, 0))(x, slopes)
            case "remat":
                return jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(x, slopes[0])
            case "second":
                return jax.jit(jax.grad(lambda *a: sum(jnp.sum(jnp.sin(g)) for g in grad(*a)), (0, 1)))(x, slopes[0])
        return jax.grad(lambda x, s: jnp.sum(dy * lax.scan(lambda u, s: (norm(leaky(s), u), None), x, s)[0]), (0, 1))(
            x, slopes
        )

    got = gradients(lambda f, x: jaxnorm.instance_norm(x, activation=f))
    want = jax.jit(lambda: gradients(lambda f, x: f(oracle.twin(x))))()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


class Learned(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        slope = flax.linen.PReLU()
        return jaxnorm.InstanceNorm(activation=lambda z: 1 * slope(z))(x)


@pytest.mark.slow
def test_prelu_of_linen():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 4, 4, 3)), jnp.float32)
    variables = jax.jit(Learned().init)(jax.random.key(0), x)
    assert variables["params"]["PReLU_0"]["negative_slope"] == pytest.approx(0.01)

    def plain(variables, x):
        norm = jaxnorm.InstanceNorm(implementation="reference")
        z = norm.apply({"params": variables["params"]["InstanceNorm_0"]}, x)
        return jnp.where(z > 0, z, variables["params"]["PReLU_0"]["negative_slope"] * z)

    grads = [jax.jit(jax.grad(lambda v, f=f: jnp.sum(jnp.sin(f(v, x)))))(variables) for f in (Learned().apply, plain)]
    for got, want in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_prelu_of_nnx():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, 4, 4)), jnp.float32)

    def loss(module, implementation):
        return jnp.sum(jnp.sin(jaxnorm.instance_norm(x, activation=module, implementation=implementation)))

    got, want = (nnx.jit(nnx.grad(loss), static_argnums=1)(nnx.PReLU(0.3), name) for name in ("xla", "reference"))
    np.testing.assert_allclose(got["negative_slope"][...], want["negative_slope"][...], rtol=1e-5)


def test_a_function_that_changed_is_another():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 1, 7)), jnp.float32)

    class Scaled:
        factor = 1.0

        def __call__(self, z):
            return self.factor * z

    scaled, plain = Scaled(), jaxnorm.instance_norm(x)
    for factor in (1.0, 2.0, jnp.float32(4), jnp.float32(8)):
        scaled.factor = factor
        np.testing.assert_array_equal(jaxnorm.instance_norm(x, activation=scaled), factor * plain)
        np.testing.assert_array_equal(jax.jit(lambda x: jaxnorm.instance_norm(x, activation=scaled))(x), factor * plain)


# What is compiled, and what is kept.


def count_compilations(call):
    """How often a call compiles anything."""
    compiled = []

    def listen(event, *_, **__):
        compiled.extend([event] if "backend_compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled(factor, z):
    return factor * z


scaled.defvjp(lambda factor, z: (factor * z, None), lambda factor, _, dy: (factor * dy,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "transform"), each_value(["lambda", "slope", "nondiff_argnums", "partial"], ["call", "grad", "vmap"])
)
def test_a_fresh_function_does_not_compile_again(form, transform):
    x = jnp.ones((2, 2, 3, 97))

    def call():
        slope = jnp.float32(0.3)
        activation = {
            "lambda": lambda z: jnp.where(z > 0, z, 0.3 * z),
            "slope": lambda z: jnp.where(z > 0, z, slope * z),
            "nondiff_argnums": functools.partial(scaled, 0.3),
            "partial": functools.partial(jax.nn.leaky_relu, negative_slope=0.3),
        }[form]

        def norm(x):
            return jaxnorm.instance_norm(x, activation=activation)

        match transform:
            case "grad":
                norm = jax.grad(lambda x, norm=norm: jnp.sum(norm(x)))
            case "vmap":
                norm = jax.vmap(norm)
        return jax.block_until_ready(norm(x if transform != "vmap" else x[None]))

    call()
    assert count_compilations(call) == 0


class Model:
    """Its activation closes over it."""

    def __init__(self):
        self.weights = jnp.ones(1000)

    def __call__(self, x):
        return jaxnorm.instance_norm(x, activation=lambda z: jnp.where(z > 0, z, 0.1 * z) * (self.weights.size > 0))


@pytest.mark.slow
@pytest.mark.parametrize("transform", some([eager, jax.jit, jax.grad], eager, jax.grad), ids=["eager", "jit", "grad"])
def test_a_model_is_freed_when_it_is_deleted(transform):
    x, alive = jnp.ones((2, 3, 8)), []
    for _ in range(3):
        model = Model()
        jax.block_until_ready(transform(lambda x, model=model: jnp.sum(model(x)))(x))
        alive.append(weakref.ref(model))
        del model
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


@pytest.mark.slow
def test_nothing_leaks():
    x = jnp.ones((2, 3, 8))

    @jax.jit
    def step(x, slope):
        for activation in (jax.nn.relu, lambda z: slope * z, lambda z: z - z.mean()):
            x = jaxnorm.instance_norm(x, activation=activation)
        return jnp.sum(x)

    with jax.checking_leaks():
        jax.block_until_ready(jax.grad(step, (0, 1))(x, 0.3))


NEXT_JAX = """
import functools, jax, jax.numpy as jnp, jaxnorm
from jaxnorm.activation import resolve

x = jnp.ones((2, 3, 8, 8))
for activation in (
    jax.nn.relu, jax.nn.gelu, jax.nn.silu, functools.partial(jax.nn.leaky_relu, negative_slope=0.2), None
):
    assert activation is None or resolve(activation, x, jnp.float32).fused is not None
    norm = functools.partial(jaxnorm.instance_norm, activation=activation)
    step = jax.jit(jax.grad(lambda x: jnp.sum(norm(x) ** 2)))
    text = step.lower(x).compile().as_text()
    # Names of operations say where they were traced.
    print([line.partition(", metadata")[0].strip() for line in text.splitlines()[1:] if " = " in line])
jax.block_until_ready(jax.jit(jax.grad(lambda x, s: jnp.sum(jaxnorm.instance_norm(
    x, activation=lambda z: jax.nn.relu(z) * s)), (0, 1)))(x, 0.3))
jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(norm(x) ** 3))(x) ** 2))(x)
jax.jit(jax.grad(jax.checkpoint(lambda x: jnp.sum(norm(x) ** 2))))(x)
"""


@exhaustive
def test_the_next_implementations_of_custom_rules_compile_the_same(run_python):
    """JAX contains them already, behind flags."""
    flags = ("JAX_CUSTOM_JVP3", "JAX_CUSTOM_VJP3", "JAX_REMAT3")
    before = run_python(NEXT_JAX)
    for chosen in (*((flag,) for flag in flags), flags):
        environment = "".join(f"import os; os.environ[{flag!r}] = '1'\n" for flag in chosen)
        assert run_python(environment + NEXT_JAX) == before, chosen


# Programs that nobody listed.

_STEPS = [
    jnp.sin,
    jnp.tanh,
    jax.nn.softplus,
    sine,
    jax.nn.silu,
    lambda z: jnp.where(z > 0.3, z, 0.2 * z),
    lambda z: jnp.clip(z, -1, 1),
    lambda z: lax.integer_pow(z, 2),
    lambda z: lax.stop_gradient(z) * z,
    # Not pointwise, or not known to be.
    lambda z: z - jnp.mean(z),
    jnp.flip,
    lambda z: z + jnp.max(z),
    flat(jnp.cumsum),
    lambda z: z * z.size / 30,
    lambda z: z + jnp.arange(z.size, dtype=z.dtype).reshape(z.shape) / 30,
    lambda z: lax.cond(jnp.sum(z) > 1, jnp.sin, jnp.cos, z),
    lambda z: jnp.select([z < -1, z > 1], [z / 2, 0.5 + z / 2], z),
]
_WRAPPERS = [jax.jit, jax.checkpoint, lambda f: lambda z: lax.fori_loop(0, 2, lambda _, u: f(u), z)]


def random_program(rng):
    """A function of z and a slope."""
    chain = []
    for _ in range(rng.integers(1, 4)):
        step = _STEPS[rng.integers(len(_STEPS))]
        for _ in range(rng.integers(0, 3)):
            step = _WRAPPERS[rng.integers(len(_WRAPPERS))](step)
        chain.append((step, rng.random() < 0.5))

    def program(z, slope):
        for step, is_scaled in chain:
            z = slope * step(z) if is_scaled else step(z) + 0.5 * z
        return z

    return program


@pytest.mark.slow
@pytest.mark.parametrize("case", some(range(25), *range(4)))
def test_random_programs_are_applied_as_they_are(case, seed, x64):
    """In float64, to tell a mistake from rounding."""
    rng = np.random.default_rng((seed, case))
    program, x_dy = random_program(rng), drawn(seed=rng.integers(2**16))
    is_traced = rng.random() < 0.5

    def gradients(norm):
        def loss(x, dy, slope):
            return jnp.sum(dy * norm(x, lambda z: program(z, slope if is_traced else 0.7)))

        return jax.jit(jax.value_and_grad(loss, (0, 2)))(*x_dy, jnp.asarray(0.7))

    got = gradients(lambda x, f: jaxnorm.instance_norm(x, activation=f))
    want = gradients(lambda x, f: f(oracle.twin(x)))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)
