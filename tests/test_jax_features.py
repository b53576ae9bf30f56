"""What JAX does with a function besides transforming it: compiling ahead, exporting, donating, caching, debugging."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import each_value, exhaustive, some
from checked_call import draw
from jax import export
from jax.experimental import checkify

import jaxnorm

pytestmark = [pytest.mark.usefixtures("strict_dtypes"), pytest.mark.slow]

SHAPE = (4, 3, 6, 5)


@pytest.fixture(params=some(["xla", "reference"], "xla"))
def step(request):
    """(x, gamma) -> y and the gradients of its energy."""

    def step(x, gamma):
        def energy(x, gamma):
            y = jaxnorm.instance_norm(x, gamma, activation=jax.nn.silu, implementation=request.param)
            return jnp.sum(jnp.square(y)), y

        return jax.grad(energy, (0, 1), has_aux=True)(x, gamma)

    return step


@pytest.fixture
def arguments():
    return draw(SHAPE, "float32"), draw(SHAPE[1:2], "float32", 1)


def assert_same(got, want):
    """The same program: only the order of sums may differ."""
    unit = tolerance.arithmetic("float32", 30)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=10 * unit * float(np.abs(w).max()))


def test_compiled_ahead_of_time(step, arguments):
    compiled = jax.jit(step).lower(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments)).compile()
    assert_same(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize("platforms", some([None, ("cpu", "cuda"), ("tpu",)], ("cpu", "cuda")), ids=str)
def test_export_round_trip(step, arguments, platforms):
    exported = export.export(jax.jit(step), platforms=platforms)(*arguments)
    loaded = export.deserialize(exported.serialize())
    if loaded.platforms != ("tpu",):
        assert_same(loaded.call(*arguments), step(*arguments))


def test_export_with_symbolic_sizes(arguments):
    """Batch and spatial sizes that are not known yet."""
    norm = jax.jit(functools.partial(jaxnorm.instance_norm, activation=jax.nn.relu))
    shape = export.symbolic_shape("n, 3, h, w")
    loaded = export.deserialize(export.export(norm)(jax.ShapeDtypeStruct(shape, jnp.float32)).serialize())
    for shape in (SHAPE, (1, 3, 7, 40)):
        x = draw(shape, "float32")
        want, magnitude = oracle.instance_norm(x, activation="relu")
        atol = tolerance.forward("float32", shape[2] * shape[3], magnitude)
        np.testing.assert_allclose(loaded.call(x), want, rtol=0, atol=atol)


def test_donated_x_is_used_for_y(arguments):
    norm = functools.partial(jaxnorm.instance_norm, implementation="xla")
    compiled = jax.jit(norm, donate_argnums=0).lower(arguments[0]).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == arguments[0].nbytes
    want = norm(arguments[0])
    given = jnp.array(arguments[0])
    assert_same(compiled(given), want)
    assert given.is_deleted()


def test_disable_jit(step, arguments):
    want = step(*arguments)
    with jax.disable_jit():
        assert_same(step(*arguments), want)


def test_debug_nans_finds_nothing_where_there_is_nothing(step, arguments):
    x = arguments[0].at[0].set(7.0)  # a constant instance
    with jax.debug_nans(True):
        step(x, arguments[1])
        with pytest.raises(FloatingPointError, match="nan"):
            step(x.at[1, 1, 1, 1].set(jnp.nan), arguments[1])


CONTEXTS = {
    "debug_infs": lambda: jax.debug_infs(True),
    "checking_leaks": jax.checking_leaks,
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "numpy_rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "numpy_dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "enable_checks": lambda: jax.enable_checks(True),
    "log_compiles": lambda: jax.log_compiles(True),
}


@pytest.mark.parametrize(("context", "is_jitted"), each_value(list(CONTEXTS), [False, True]))
def test_under_the_switches_of_jax(context, is_jitted, step, arguments):
    want = step(*arguments)
    if context == "transfer_guard" and not is_jitted:
        # jax.grad itself transfers a one.
        step = functools.partial(jaxnorm.instance_norm, activation=jax.nn.silu)
        want = step(*arguments)
    with CONTEXTS[context]():
        got = (jax.jit(step) if is_jitted else step)(*arguments)
    assert_same(got, want)


@pytest.mark.parametrize("wrap", some([lambda f: f, jax.jit], jax.jit), ids=["eager", "jit"])
def test_checkify_sees_a_nan_that_is_made_in_the_norm(wrap, step, arguments):
    checked = wrap(checkify.checkify(step, errors=checkify.nan_checks))
    assert checked(*arguments)[0].get() is None
    error, _ = checked(arguments[0].at[1, 1, 1, 1].set(jnp.nan), arguments[1])
    assert "nan generated" in error.get()


@pytest.mark.parametrize("transformation", [jax.jacfwd, lambda f: lambda x: jax.linearize(f, x)[1](x)])
def test_forward_mode_says_what_it_cannot(transformation, arguments):
    def energy(implementation):
        return lambda x: jnp.sum(jaxnorm.instance_norm(x, implementation=implementation))

    with pytest.raises(TypeError, match="to a custom_vjp function"):
        transformation(energy(None))(arguments[0])
    jax.jit(transformation(energy("reference")))(arguments[0])


@exhaustive
def test_forward_over_reverse(arguments):
    """hessian, and linearize of a gradient."""
    x = arguments[0][:1, :, :2, :3]

    def energy(implementation):
        return lambda x: jnp.sum(jnp.sin(jaxnorm.instance_norm(x, implementation=implementation)))

    got, want = (jax.jit(jax.hessian(energy(name)))(x) for name in (None, "reference"))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(jnp.abs(want).max()))
    got, want = (
        jax.jit(lambda x, name=name: jax.linearize(jax.grad(energy(name)), x)[1](x))(x) for name in (None, "reference")
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(jnp.abs(want).max()))


CACHE = """
import sys
import jax, jax.numpy as jnp
import jaxnorm
from jax._src import monitoring

hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
if int(sys.argv[2]) > 1:
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType[sys.argv[3]],))
    place = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
else:
    place = lambda a: a
x = place(jnp.ones((4, 3, 8, 8)))
step = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jaxnorm.instance_norm(x, activation=jax.nn.silu)))))
del hits[:]
step(x).block_until_ready()
print(len(hits))
"""


@pytest.mark.parametrize(
    "devices_and_axes", some([(1, "Auto"), (4, "Auto"), (4, "Explicit")], (4, "Explicit")), ids=str
)
def test_the_compilation_cache_serves_other_processes(tmp_path, run_python, devices_and_axes):
    devices, axes = devices_and_axes
    program = f"""
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count={devices}"
sys.argv = ["", {str(tmp_path)!r}, "{devices}", "{axes}"]
{CACHE}"""
    assert int(run_python(program)) == 0
    assert int(run_python(program)) > 0
