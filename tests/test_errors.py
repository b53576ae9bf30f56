"""A wrong argument raises an error that states the rule, what was seen and the remedy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from cases import each_value, exhaustive, some

import jaxnorm
from jaxnorm import instance_moments, instance_norm
from jaxnorm.numerics import least_eps

SHAPE = (2, 3, 4, 5)


def raises(exception, *parts):
    """The error, whose message contains the parts in this order."""
    return pytest.raises(exception, match="(?s)" + ".*".join(map(re.escape, parts)))


@pytest.fixture
def x():
    return jnp.arange(np.prod(SHAPE), dtype=jnp.float32).reshape(SHAPE)


@pytest.fixture(params=[instance_norm, instance_moments], ids=lambda function: function.__name__)
def function(request):
    """Both public functions check what they share in the same way."""
    return request.param


# x


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_x_needs_a_spatial_axis(function, shape):
    with raises(ValueError, "rank 3 or more, (N, C, *spatial)", f"got shape {shape}", "layer normalization"):
        function(jnp.zeros(shape))


@pytest.mark.parametrize("value", [1.0, [[[1.0]]], None, "x"], ids=repr)
def test_x_must_be_an_array(function, value):
    with raises(TypeError, "x must be an array", f"got {type(value).__name__}", "jnp.asarray"):
        function(value)


DESCRIBED = jax.ShapeDtypeStruct(SHAPE, "float32")


@pytest.mark.parametrize("name", ["x", "gamma", "beta", "residual", "where", "moments"])
def test_a_description_of_an_array_is_none(x, name):
    description = {"where": jax.ShapeDtypeStruct(SHAPE, bool), "moments": (jnp.ones(3), DESCRIBED)}.get(name, DESCRIBED)
    with raises(TypeError, "must be an array", "got a jax.ShapeDtypeStruct", "jax.eval_shape", "jaxnorm.explain"):
        instance_norm(**{"x": x} | {name: description})
    if name in ("x", "where"):
        with raises(TypeError, f"{name} must be an array", "got a jax.ShapeDtypeStruct"):
            instance_moments(**{"x": x} | {name: description})


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(dtype, "x.astype(") for dtype in ("bool", "uint8", "int16", "int32", "float8_e4m3fn")]
    + [("complex64", "x.real and x.imag")],
)
def test_x_must_be_a_supported_float(function, dtype, remedy):
    x = jnp.zeros(SHAPE, dtype)
    with raises(TypeError, "float16, bfloat16, float32, float64", f"got {dtype} of shape {SHAPE}", remedy):
        function(x)


@pytest.mark.parametrize(
    ("shape", "channel_axis", "spatial_axes", "sizes"),
    [
        ((2, 3, 0), 1, (2,), (0,)),
        ((2, 3, 0, 5), 1, (2, 3), (0, 5)),
        ((2, 4, 0, 3), -1, (1, 2), (4, 0)),
        ((0, 3, 0), 1, (2,), (0,)),
    ],
)
def test_an_instance_needs_a_position(function, shape, channel_axis, spatial_axes, sizes):
    with raises(ValueError, "at least one spatial position", f"{shape}", f"{spatial_axes}", f"{sizes}", "Drop the"):
        function(jnp.zeros(shape), channel_axis=channel_axis)


@pytest.mark.parametrize("transformation", [lambda f: f, jax.jit, jax.vmap, jax.grad], ids=["", "jit", "vmap", "grad"])
def test_errors_are_the_same_for_numpy_and_under_transformations(function, x, transformation):
    call = transformation(functools.partial(function, channel_axis=0))
    seen = SHAPE[1:] if transformation is jax.vmap else SHAPE
    with raises(ValueError, "must not be 0, the batch axis", f"for x of shape {seen}"):
        call(np.asarray(x))


# channel_axis


@pytest.mark.parametrize("axis", [0, -4, (0,), (0, 1), (1, -4)], ids=str)
def test_channel_axis_is_not_the_batch_axis(function, x, axis):
    with raises(
        ValueError, "channel_axis must not be 0, the batch axis", f"channel_axis={axis}", f"{SHAPE}", "x[None]"
    ):
        function(x, channel_axis=axis)


@pytest.mark.parametrize("axis", [4, -5, (1, 4)], ids=str)
def test_channel_axis_must_exist(function, x, axis):
    with raises(ValueError, "must lie in [-4, 4)", f"channel_axis={axis}", f"{SHAPE}", "1 for (N, C, *spatial)"):
        function(x, channel_axis=axis)


@pytest.mark.parametrize(("axis", "means"), [((1, 1), (1, 1)), ((3, -1), (3, 3)), ((1, 2, -3), (1, 1, 2))], ids=str)
def test_channel_axis_names_an_axis_once(function, x, axis, means):
    with raises(ValueError, "must not name an axis twice", f"channel_axis={axis}", f"{SHAPE}", f"means axes {means}"):
        function(x, channel_axis=axis)


@pytest.mark.parametrize(
    "axis",
    [1.0, "1", None, True, (1, "2"), (1.0,), jnp.asarray(1), np.asarray(1)],
    ids=["float", "str", "None", "bool", "str in tuple", "float in tuple", "jax array", "numpy array"],
)
def test_channel_axis_must_be_an_integer(function, x, axis):
    with raises(TypeError, "must be an integer or a tuple of integers", f"channel_axis={axis!r}", f"{SHAPE}"):
        function(x, channel_axis=axis)


def test_channel_axis_must_name_an_axis(function, x):
    with raises(ValueError, "at least one axis", "channel_axis=()", f"{SHAPE}"):
        function(x, channel_axis=())


@pytest.mark.parametrize("axis", [(1, 2, 3), (-1, -2, -3)], ids=str)
def test_channel_axis_leaves_a_spatial_axis(function, x, axis):
    with raises(ValueError, "neither batch nor channel", "channel axes (1, 2, 3)", f"{SHAPE}", "Leave a spatial axis"):
        function(x, channel_axis=axis)


# gamma and beta


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 1), (3, 2), (1, 3), (1, 3, 1, 1), SHAPE], ids=str)
def test_parameter_shape(x, name, shape):
    with raises(
        ValueError,
        f"{name} must have shape (3,) (one per channel) or (2, 3) (one per sample and channel)",
        f"for x of shape {SHAPE} with channel axes (1,): got {shape}.",
    ) as error:
        instance_norm(x, **{name: jnp.ones(shape)})
    assert "would fit" not in str(error.value)


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize(
    ("shape", "channel_axis", "fits"),
    [((5,), 1, "3"), ((2, 5), 1, "3"), ((4,), 1, "2"), ((3,), -1, "1"), ((2, 3), -1, "1"), ((3,), (2, 3), "1")],
)
def test_parameter_shape_of_another_layout(x, name, shape, channel_axis, fits):
    with raises(ValueError, f"got {shape}.", f"It would fit channel_axis={fits}: is x laid out as you think?"):
        instance_norm(x, **{name: jnp.ones(shape)}, channel_axis=channel_axis)


def test_parameter_shape_that_fits_two_other_axes():
    with raises(ValueError, "got (8,).", "It would fit channel_axis=2 or 3:"):
        instance_norm(jnp.zeros((2, 3, 8, 8)), gamma=jnp.ones(8))


def test_parameter_shape_of_several_channel_axes(x):
    # In the order in which the axes stand in x, however channel_axis names them.
    with raises(ValueError, "must have shape (3, 5)", "or (2, 3, 5)", "channel axes (1, 3): got (5, 3)."):
        instance_norm(x, gamma=jnp.ones((5, 3)), channel_axis=(-1, 1))


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize("dtype", ["bool", "int32", "complex64"])
def test_parameter_must_be_floating_point(x, name, dtype):
    with raises(TypeError, f"{name} must be floating point", f"got {dtype}", ".astype("):
        instance_norm(x, **{name: jnp.ones(3, dtype)})


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize("value", [1.0, 1, [1.0, 1.0, 1.0], "ones"], ids=repr)
def test_parameter_must_be_an_array(x, name, value):
    with raises(TypeError, f"{name} must be None or an array", f"got {type(value).__name__}"):
        instance_norm(x, **{name: value})


@pytest.mark.parametrize(
    ("value", "remedy"), [([1.0] * 3, "jnp.asarray"), ((1.0,) * 3, "jnp.asarray"), (2.0, "jnp.full")]
)
def test_parameter_that_is_no_array_is_told_the_remedy(x, value, remedy):
    with raises(TypeError, "gamma must be None or an array", f"got {type(value).__name__} {value!r}", remedy):
        instance_norm(x, gamma=value)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-6], ids=str)
def test_eps_in_the_place_of_a_parameter(x, eps):
    with raises(TypeError, "gamma must be None or an array", f"Did you mean eps={eps}?"):
        instance_norm(x, eps)
    with raises(TypeError, "beta must be None or an array", f"Did you mean eps={eps}?"):
        instance_norm(x, None, eps)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("gamma", "For a scale per position multiply after the norm."),
        ("beta", "For a shift per position pass it as residual, or add it after the norm."),
    ],
)
@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE[1:])], ids=str)
def test_a_parameter_per_position_is_told_where_to_apply_it(x, name, remedy, shape):
    with raises(ValueError, f"{name} must have shape (3,)", f"got {shape}.", remedy):
        instance_norm(x, **{name: jnp.ones(shape)})


@pytest.mark.parametrize(
    ("shape", "channel_axis", "remedy"),
    [
        ((1, 3, 1, 1), 1, ".reshape(3)"),
        ((3, 1, 1), 1, ".reshape(3)"),
        ((1, 5), -1, ".reshape(5)"),
        ((2, 3, 1, 1), 1, ".reshape(2, 3)"),
        ((2, 1, 1, 5), -1, ".reshape(2, 5)"),
        ((1, 3, 4, 1), (1, 2), ".reshape(3, 4)"),
    ],
    ids=str,
)
def test_parameter_with_axes_of_one_is_told_to_reshape(x, shape, channel_axis, remedy):
    gamma = jnp.ones(shape)
    with raises(ValueError, "gamma must have shape", f"got {shape}", f"Convert it with {remedy}"):
        instance_norm(x, gamma, channel_axis=channel_axis)
    wanted = tuple(int(size) for size in remedy[len(".reshape(") : -1].split(","))
    instance_norm(x, gamma.reshape(wanted), channel_axis=channel_axis)


# residual


@pytest.mark.parametrize("residual", [1.0, [1.0], "x", True], ids=repr)
def test_residual_must_be_an_array(x, residual):
    with raises(TypeError, "residual must be None or an array like x", f"got {type(residual).__name__} {residual!r}"):
        instance_norm(x, residual=residual)


@pytest.mark.parametrize(
    ("residual", "seen"),
    [
        (jnp.zeros((1, *SHAPE[1:])), "got (1, 3, 4, 5) float32"),
        (jnp.zeros(SHAPE[1:]), "got (3, 4, 5) float32"),
        (jnp.zeros(SHAPE, jnp.bfloat16), f"got {SHAPE} bfloat16"),
        (jnp.zeros(SHAPE, jnp.int32), f"got {SHAPE} int32"),
    ],
    ids=["shape", "rank", "bfloat16", "int32"],
)
def test_residual_must_be_like_x(x, residual, seen):
    with raises(ValueError, f"shape and dtype of x, {SHAPE} float32", seen, "jnp.broadcast_to(residual, x.shape)"):
        instance_norm(x, residual=residual)


# eps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("eps", [0, 0.0, -1e-5, float("nan"), float("inf"), -float("inf"), 1e-39, 1e-300], ids=str)
def test_eps_must_be_positive_in_the_dtype_of_the_statistics(dtype, eps):
    with raises(ValueError, "eps must be a finite number > 0", f"got {eps!r}", "float32", "9.86e-31", "1e-5 and 1e-6"):
        instance_norm(jnp.zeros(SHAPE, dtype), eps=eps)


def test_least_eps_depends_on_the_dtype():
    with jax.enable_x64(True):
        x = jnp.ones(SHAPE, jnp.float64)
        assert jnp.array_equal(instance_norm(x, eps=1e-290), jnp.zeros_like(x))
        with raises(ValueError, "got 1e-310", "float64"):
            instance_norm(x, eps=1e-310)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", some(["xla", "reference"], "xla"))
@pytest.mark.parametrize(
    ("norm", "channels"),
    [(instance_norm, 1), (functools.partial(jaxnorm.group_norm, num_groups=1), 4)],
    ids=["instance", "group"],
)
def test_least_eps_depends_on_the_number_of_positions(norm, channels, implementation):
    """At that eps the squares of as many numbers as small as its root are not lost; what is smaller is refused."""
    for positions in (4, 1000, 10**6):
        least = float(f"{least_eps(positions, jnp.float32) * 1.01:.3g}")
        x = np.sqrt(least) * np.random.default_rng(0).standard_normal((1, channels, positions // channels))
        y = norm(jnp.asarray(x, jnp.float32), eps=least, implementation=implementation)
        want = (x - x.mean()) / np.sqrt(x.var() + least)
        bound = tolerance.sums_around(1, positions) * np.abs(want).max()
        np.testing.assert_allclose(y, want, rtol=0, atol=bound)
        with raises(ValueError, "eps must be a finite number > 0", "the squares of so many numbers"):
            norm(jnp.asarray(x, jnp.float32), eps=least / 1.1, implementation=implementation)


@pytest.mark.parametrize(
    "eps", [True, "1e-5", None, 1e-5j, np.array(1e-5), jnp.float32(1e-5)], ids=lambda eps: type(eps).__name__
)
def test_eps_must_be_a_python_number(x, eps):
    seen = "a jax.Array" if isinstance(eps, jax.Array) else type(eps).__name__
    with raises(TypeError, "eps must be a Python number", "static under jit", f"got {seen}.", "1e-5"):
        instance_norm(x, eps=eps)


def test_eps_cannot_be_traced(x):
    with raises(TypeError, "eps must be a Python number", "static under jit", "got a traced jax.Array", "not an array"):
        jax.jit(lambda x, eps: instance_norm(x, eps=eps))(x, 1e-5)


# where


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_where_must_be_bool(function, x, dtype):
    with raises(TypeError, "where must be a bool array", f"got an array of {dtype}", "where=weights > 0"):
        function(x, where=jnp.ones(SHAPE, dtype))


@pytest.mark.parametrize("where", [[True], True, "mask"], ids=repr)
def test_where_must_be_an_array(function, x, where):
    with raises(TypeError, "where must be a bool array", f"got a Python {type(where).__name__}"):
        function(x, where=where)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((2, 3, 4, 4), "Every axis must have the size that x has there, or size 1."),
        ((3, 3, 4, 5), "Every axis must have the size that x has there, or size 1."),
        ((1, *SHAPE), "Every axis must have the size that x has there, or size 1."),
        ((2, *SHAPE), "Every axis must have the size that x has there, or size 1."),
        ((2, 3), "Add axes of size 1, such as where[:, :, None, None]."),
        ((2, 4), "Add axes of size 1, such as where[:, None, :, None]."),
        ((2, 4, 5, 1)[:3], "Add axes of size 1, such as where[:, None, :, :]."),
        ((2, 16), "Add axes of size 1, such as where[:, :, None, None]."),
    ],
    ids=str,
)
def test_where_must_be_broadcastable_to_x(function, x, shape, remedy):
    with raises(ValueError, f"where must be broadcastable to the shape of x, {SHAPE}", f"got {shape}", remedy):
        function(x, where=jnp.ones(shape, bool))


def test_where_with_the_axes_that_the_message_adds(function, x):
    function(x, where=jnp.ones((2, 4), bool)[:, None, :, None])


# activation


@pytest.mark.parametrize("activation", ["relu", 0.01], ids=["str", "float"])
def test_activation_must_be_callable(x, activation):
    with raises(TypeError, "activation must be None or a function", f"got {type(activation).__name__}", "jax.nn.relu"):
        instance_norm(x, activation=activation)


def test_activation_is_not_its_result(x):
    with raises(TypeError, "got an array: pass the function, not its result") as error:
        instance_norm(x, activation=jax.nn.relu(x))
    assert "[" not in str(error.value)


@pytest.mark.parametrize("activation", [lambda z: z[..., None], lambda z: (z, z), lambda z: None, jnp.sum])
def test_activation_keeps_the_shape(x, activation):
    with raises(ValueError, "activation must return an array of the shape of its input", "Apply it after the norm."):
        instance_norm(x, activation=activation)


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "gamma",
        "beta",
        "eps",
        "channel_axis",
        "residual",
        "where",
        "moments",
        "axis_index_groups",
        "implementation",
    ],
)
@pytest.mark.parametrize(
    "value", [object(), lambda: None, [object()], (jnp.ones,)], ids=["object", "function", "list", "tuple"]
)
def test_no_message_shows_an_address(x, name, value):
    with pytest.raises((TypeError, ValueError, NameError)) as error:
        instance_norm(**{"x": x} | {name: value})
    assert "0x" not in str(error.value)


# implementation, axis_name


@pytest.mark.parametrize("name", ["triton", "XLA", "", 1], ids=repr)
def test_implementation_must_be_known(x, name):
    with raises(ValueError, "None or one of 'pallas', 'xla', 'reference'", f"got {name!r}"):
        instance_norm(x, implementation=name)


@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="it may run here")
def test_pallas_needs_a_gpu(x):
    with raises(ValueError, "needs a CUDA GPU: this computation runs on cpu", "implementation=None or 'xla'"):
        instance_norm(x, implementation="pallas")


@pytest.mark.parametrize("name", ["xla", "pallas"])
def test_named_implementation_insists(x, name):
    names = "axis_name='shards' outside shard_map and axis_index_groups"
    with raises(ValueError, f"implementation='{name}' does not compute {names}.", "implementation=None or 'reference'"):
        instance_norm(x, axis_name="shards", axis_index_groups=[[0]], implementation=name)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"where": jnp.ones(SHAPE, bool)}, "no masks (where=)"), ({"moments": (jnp.ones(3), jnp.ones(3))}, "moments=")],
    ids=["where", "moments"],
)
def test_the_kernel_has_no_masks_and_no_given_statistics(x, arguments, reason):
    with raises(ValueError, "implementation='pallas' cannot run here", reason, "implementation=None"):
        instance_norm(x, **arguments, implementation="pallas")


@pytest.mark.parametrize(
    ("moments", "exception", "parts"),
    [
        (
            jnp.ones((2, 3)),
            TypeError,
            ["moments must be None or a pair (mean, var)", "got a jax.Array"],
        ),
        ((jnp.ones(3),) * 3, TypeError, ["a pair (mean, var)", "got 3 values"]),
        ((jnp.ones(3), None), TypeError, ["a pair of arrays", "got None in it", "moments=None"]),
        ((jnp.ones(3), 1.0), TypeError, ["the variance of moments", "got float 1.0"]),
        ((jnp.ones(4), jnp.ones(3)), ValueError, ["the mean of moments must have shape (3,)", "or (2, 3)", "got (4,)"]),
    ],
    ids=["one", "three", "None", "number", "shape"],
)
def test_moments(x, moments, exception, parts):
    with raises(exception, *parts):
        instance_norm(x, moments=moments)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "array"), each_value(["float32", "bfloat16"], [np.asarray, jnp.asarray]))
def test_a_variance_is_not_negative(x, array, dtype):
    mean, variance = jnp.zeros(3, dtype), array(jnp.asarray([1, -0.25, 2], dtype))
    message = ("the variance of moments must not be negative, or y is NaN", "got -0.25 in it", "jnp.maximum(var, 0)")
    with raises(ValueError, *message):
        instance_norm(x, moments=(mean, variance))
    with raises(ValueError, *message):
        # Known while it is traced.
        jax.jit(lambda x: instance_norm(x, moments=(mean, variance)))(x)
    # What is traced cannot be looked at: a NaN, as is documented.
    y = jax.jit(lambda variance: instance_norm(x, moments=(mean, variance)))(variance)
    assert jnp.isnan(y[:, 1]).all()
    assert jnp.isfinite(y[:, ::2]).all()
    instance_norm(x, moments=(mean, jnp.maximum(variance, 0)))
    instance_norm(x[:0], moments=(jnp.zeros((0, 3)), jnp.zeros((0, 3))))


def test_moments_and_where_exclude_each_other(x):
    with raises(ValueError, "got both", "Pass where to jaxnorm.instance_moments"):
        instance_norm(x, moments=jaxnorm.instance_moments(x), where=jnp.ones(SHAPE, bool))


def test_pallas_does_not_divide_an_instance(x):
    mesh = jax.make_mesh((1,), ("shards",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, None, "shards")))
    with raises(ValueError, "instances that lie on one device whole", "spread over ('shards',)", "None or 'xla'"):
        instance_norm(sharded, implementation="pallas")


def test_axis_index_groups_need_axis_name(function, x):
    with raises(ValueError, "axis_index_groups needs axis_name", "got [[0, 1]] without one"):
        function(x, axis_index_groups=[[0, 1]])


def test_axis_name_is_not_a_position(function, x):
    # jax.lax.psum takes an integer as an axis of the array.
    with raises(TypeError, "axis_name must be", "got 3"):
        function(x, axis_name=3)


def test_forward_mode_through_the_fused_implementation(x):
    def jvp(implementation):
        return jax.jvp(functools.partial(instance_norm, implementation=implementation), (x,), (jnp.sin(x),))

    for implementation in ("xla", None):
        with raises(TypeError, "forward-mode", "custom_vjp", "implementation='reference'", "Hessian-vector products"):
            jvp(implementation)
    _, tangent = jvp("reference")
    assert jnp.isfinite(tangent).all()


# The layers


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 4, 4), (2, 4, 4, 3)], ids=str)
def test_layer_2d_needs_its_shape(shape):
    layer = jaxnorm.InstanceNorm2D(num_maps=3)
    with raises(ValueError, "shape (N, 3, H, W)", "num_maps=3", f"got {shape}", "use jaxnorm.InstanceNorm"):
        layer.init(jax.random.key(0), jnp.zeros(shape))


def test_layer_2d_does_not_convert_integers():
    with raises(TypeError, "x must be one of", "got int32", "x.astype("):
        jaxnorm.InstanceNorm2D(num_maps=3).init(jax.random.key(0), jnp.zeros(SHAPE, int))


def test_layer_2d_checks_epsilon():
    with raises(ValueError, "must be a finite number > 0", "got 0"):
        jaxnorm.InstanceNorm2D(num_maps=3, epsilon=0).init(jax.random.key(0), jnp.zeros(SHAPE))


def test_unknown_attribute_of_the_package():
    with raises(AttributeError, "module 'jaxnorm' has no attribute 'instancenorm'"):
        _ = jaxnorm.instancenorm


@pytest.mark.parametrize("name", ["InstanceNorm1D", "InstanceNorm3D", "InstanceNorm1d", "InstanceNorm2d"])
def test_there_is_one_layer_for_every_rank(name):
    with raises(AttributeError, f"has no attribute '{name}'", "use InstanceNorm: any rank"):
        getattr(jaxnorm, name)


@pytest.mark.slow
def test_the_layers_need_flax(run_python):
    run_python("""
import sys

class WithoutFlax:
    def find_spec(self, name, *others):
        if name.partition(".")[0] == "flax":
            raise ModuleNotFoundError("No module named 'flax'", name="flax")

sys.meta_path.insert(0, WithoutFlax())
import jax.numpy as jnp
import jaxnorm
jaxnorm.instance_norm(jnp.ones((1, 2, 3)))
for ask in ("jaxnorm.InstanceNorm", "jaxnorm.nnx", "from jaxnorm import InstanceNorm2D", "from jaxnorm import nnx"):
    try:
        exec(ask)
    except ModuleNotFoundError as error:
        assert str(error) == "The layers need Flax: pip install flax. The functions work without it.", error
    else:
        raise AssertionError(ask)
""")


@pytest.mark.slow
def test_flax_is_imported_before_our_modules_that_need_it(run_python):
    """Two threads that import Flax's modules, which import each other, from different ends would wait forever."""
    run_python("""
import sys
import jaxnorm

class Watch:
    def find_spec(self, name, *others):
        if name.partition(".")[0] == "flax":
            early = {"jaxnorm.flax_module", "jaxnorm.nnx", "jaxnorm.layer"} & set(sys.modules)
            assert not early, (name, early)

sys.meta_path.insert(0, Watch())
jaxnorm.InstanceNorm, jaxnorm.nnx
assert "flax.linen" in sys.modules
""")


@pytest.mark.slow
@exhaustive
@pytest.mark.parametrize("attempt", range(4))
def test_threads_may_ask_for_the_layers_at_once(run_python, attempt):
    run_python("""
import threading
import jaxnorm

found, start = [], threading.Barrier(6)

def ask(name):
    start.wait()
    found.append(getattr(jaxnorm, name))

names = ["InstanceNorm", "nnx", "InstanceNorm2D"] * 2
threads = [threading.Thread(target=ask, args=[name], daemon=True) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
assert len(found) == 6, found
""")
