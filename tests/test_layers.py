"""The layers, linen and NNX, of instance and group norm, replace Flax's, and do what they do beyond that.

Where they are compared with Flax by value they run in float64, so that a difference in meaning cannot hide in rounding.
Flax is told to compute the two-pass variance, the one that is right.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import each_value, exhaustive, some
from flax import nnx
from layers import (
    INSTANCES,
    KINDS,
    NNX,
    SHAPE,
    Linen,
    NNXGroups,
    assert_close_trees,
    assert_is_the_formula,
    assert_same_as_flax,
    assert_same_dtypes,
    flax_s,
    normal,
    result_and_gradients,
    weights,
)

import jaxnorm

POSITIONS = 30 * 4
HALF_AND_SINGLE = ["float16", "bfloat16", "float32"]
x64 = pytest.mark.usefixtures("x64")
pytestmark = pytest.mark.slow
every_instance_kind = pytest.mark.parametrize("kind", INSTANCES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def raises(exception, *parts):
    """The error, whose message contains the parts in this order."""
    return pytest.raises(exception, match="(?s)" + ".*".join(map(re.escape, parts)))


# The same layer as Flax's


@x64
@pytest.mark.parametrize(
    ("options", "kind"),
    each_value(
        [
            {},
            {"epsilon": 1e-2},
            {"use_bias": False},
            {"use_scale": False},
            {"use_bias": False, "use_scale": False},
            {"param_dtype": "float64"},
        ],
        KINDS,
    ),
    ids=str,
)
def test_same_results(kind, options):
    assert_same_as_flax(kind, SHAPE, POSITIONS, options)


FEATURE_AXES = [
    ((2, 3, 5, 6), 1),
    ((2, 5, 6, 3), [3]),
    ((2, 3, 4, 5, 2), (-1, 2, 1)),
    ((2, 7, 3), -1),
    ((2, 3, 7), 1),
    ((2, 5, 6, 3), np.int64(-1)),
    ((2, 5, 6, 3), (-1, 3)),
    ((2, 5, 6, 3), (1, -1)),
    ((2, 5, 3, 6), 2),
    ((2, 3, 4, 5, 2), 1),
    ((2, 3, 1, 1, 2), -1),
    ((0, 3, 4, 2), -1),
]


@x64
@pytest.mark.parametrize(
    ("kind", "shape", "feature_axes"),
    [
        pytest.param(kind, *case, marks=[] if INSTANCES[i % 2] is kind and i < 3 else exhaustive)
        for i, case in enumerate(FEATURE_AXES)
        for kind in INSTANCES
    ],
    ids=str,
)
def test_same_results_for_feature_axes(kind, shape, feature_axes):
    feature_axes = nnx.List(feature_axes) if kind is NNX and isinstance(feature_axes, list) else feature_axes
    assert_same_as_flax(kind, shape, 60, {"feature_axes": feature_axes})


@x64
@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        (SHAPE, "bool", Linen),
        ((2, 5, 6, 1), "uint8", NNX),
        pytest.param(SHAPE, "bool", NNX, marks=exhaustive),
        pytest.param((2, 5, 6, 1), "uint8", Linen, marks=exhaustive),
        *(
            pytest.param(shape, dtype, kind, marks=exhaustive)
            for shape, dtype in (((1, 5, 6, 1), "int32"), ((2, 1, 6, 12), "float32"), ((5, 6, 1), "bool"))
            for kind in INSTANCES
        ),
    ],
    ids=str,
)
def test_same_results_with_a_mask(kind, shape, dtype):
    mask = (np.random.default_rng(1).random(shape) > 0.4).astype(dtype)
    assert_same_as_flax(kind, SHAPE, POSITIONS, {}, mask=mask)


@every_kind
def test_same_output_dtype(kind, seed):
    dtypes = [None, *HALF_AND_SINGLE]
    for x_dtype, dtype in itertools.product([*HALF_AND_SINGLE, "bool", "uint8", "int16", "int32"], dtypes):
        assert_same_dtypes(kind, x_dtype, dtype, HALF_AND_SINGLE, seed := seed + 1)


@x64
@every_kind
def test_same_output_dtype_with_64_bits(kind, seed):
    for x_dtype, dtype in itertools.product(
        ["bfloat16", "float32", "float64", "int64"], [None, "bfloat16", "float32", "float64"]
    ):
        assert_same_dtypes(kind, x_dtype, dtype, ["bfloat16", "float32", "float64"], seed := seed + 1)


# Numbers in every dtype


def assert_layer_is_the_formula(y, layer, x, **options):
    assert_is_the_formula(y, layer.parameters, x, group_size=layer.group_size, **options)


@pytest.mark.parametrize(
    ("kind", "x_dtype", "dtype", "offset"),
    each_value(KINDS, ["float32", "bfloat16", "float16"], ["bfloat16", None, "float16"], [1e4, 0, 1e2]),
)
def test_the_statistics_see_the_input_as_it_comes(kind, x_dtype, dtype, offset):
    # Whatever dtype says: bfloat16 has 8 bits, so 1e4 and 1e4 + 30 are one number in it.
    x = (normal(*SHAPE) + offset).astype(x_dtype)
    layer = kind(SHAPE, dtype=dtype)
    y = layer(x)
    assert y.dtype == (dtype or "float32")
    assert_layer_is_the_formula(y, layer, x)


@pytest.mark.parametrize(
    ("kind", "x_dtype", "dtype"),
    each_value(KINDS, ["int32", "uint8", "int16", "bool"], [None, "bfloat16", "float16"]),
)
def test_integers_are_converted(kind, x_dtype, dtype):
    # float16 does not reach 70000.
    offset = {"bool": 0, "uint8": 200, "int16": 1000, "int32": 70000}[x_dtype]
    x = jnp.asarray(offset + np.random.default_rng(0).integers(0, 2 if x_dtype == "bool" else 4, SHAPE), x_dtype)
    layer = kind(SHAPE, dtype=dtype)
    y = layer(x)
    assert y.dtype == (dtype or "float32")
    assert_layer_is_the_formula(y, layer, x)


# activation and residual


@pytest.mark.parametrize(
    ("kind", "with_residual", "activation", "implementation", "with_mask"),
    each_value(KINDS, [True, False], ["silu", "relu", "none"], [None, "reference", "xla"], [True, False]),
)
def test_activation_residual_and_mask(kind, with_residual, activation, implementation, with_mask):
    x, mask = 100 + normal(*SHAPE), np.random.default_rng(1).random(SHAPE) > 0.4
    mask[..., ::4] = True
    given = {"residual": normal(*SHAPE, seed=1)} if with_residual else {}
    layer = kind(SHAPE, activation=oracle.ACTIVATIONS[activation].jax, implementation=implementation)
    y = layer(x, **given, **({"mask": mask} if with_mask else {}))
    assert_layer_is_the_formula(y, layer, x, activation=activation, where=mask if with_mask else None, **given)


@x64
@pytest.mark.parametrize(
    ("kind", "activation", "with_residual"),
    each_value(KINDS, ["silu", "leaky_relu", "none"], [True, False]),
)
def test_fused_equals_composed(kind, with_residual, activation):
    """Gradients too."""
    activation = oracle.ACTIVATIONS[activation].jax
    x = normal(*SHAPE, dtype="float64")
    residual = normal(*SHAPE, seed=1, dtype="float64") if with_residual else None
    fused, parameters = kind(SHAPE, activation=activation, implementation="xla").functional()
    norm, _ = flax_s(kind, SHAPE).functional()

    def composed(parameters, x, residual):
        y = norm(parameters, x)
        y = y if residual is None else y + residual
        return y if activation is None else activation(y)

    def ours(parameters, x, residual):
        return fused(parameters, x, residual=residual)

    results = [result_and_gradients(function, parameters, x, residual) for function in (ours, composed)]
    assert_close_trees(*results, x.size, POSITIONS)


@pytest.mark.parametrize(("kind", "activation"), each_value(KINDS, ["tanh", "own"]))
def test_the_result_is_rounded_once(kind, activation):
    x, residual = (normal(*SHAPE, seed=seed, dtype="bfloat16") for seed in range(2))
    layer = kind(SHAPE, dtype=jnp.bfloat16, activation=oracle.ACTIVATIONS[activation].jax)
    y = layer(x, residual=residual)
    assert y.dtype == jnp.bfloat16
    parameters = {name: np.asarray(layer.parameters[key]) for name, key in (("gamma", "scale"), ("beta", "bias"))}
    options = {"eps": 1e-6, "channel_axes": (-1,), "residual": residual, "activation": activation}
    exact, magnitude = oracle.instance_norm(x, **parameters, **options, group_size=kind.group_size)
    # |activation| < 1, whose slope is at most 1: it takes over the error of z, and its result is rounded.
    bound = tolerance.arithmetic("bfloat16", POSITIONS) * magnitude + tolerance.forward("bfloat16", POSITIONS, 1)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0, atol=bound)


@pytest.mark.parametrize(("kind", "residual_dtype"), each_value(INSTANCES, HALF_AND_SINGLE))
def test_the_residual_does_not_change_the_output_dtype(kind, residual_dtype):
    x, residual = (jax.ShapeDtypeStruct(SHAPE, dtype) for dtype in ("bfloat16", residual_dtype))
    for dtype, result in ((None, "float32"), ("bfloat16", "bfloat16")):
        layer = kind(SHAPE, dtype=dtype)
        assert jax.eval_shape(lambda x, residual, layer=layer: layer(x, residual=residual), x, residual).dtype == result


@pytest.mark.parametrize("kind", some(KINDS, Linen, NNXGroups))
@pytest.mark.parametrize("transformation", some([jax.jit, lambda f: f], jax.jit), ids=["jit", ""])
def test_a_module_as_activation_is_trained_with_the_layer(kind, transformation):
    """As if it were called after the norm, with the gradient of its slope."""
    x = normal(*SHAPE, seed=1)
    layer = kind(SHAPE, activation=kind.prelu())
    fused, parameters = layer.functional()
    y, (grads, dx) = transformation(functools.partial(result_and_gradients, fused))(parameters, x)
    named = {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(grads)}

    scale, bias = (np.asarray(layer.parameters[name]) for name in ("scale", "bias"))
    options = {"channel_axes": (-1,), "group_size": kind.group_size}
    z, magnitude = oracle.instance_norm(x, scale, bias, 1e-6, **options)
    slope = np.where(z >= 0, 1, 0.01)
    dy = weights(y.shape)
    bound = tolerance.forward("float32", POSITIONS, magnitude)
    np.testing.assert_allclose(y, slope * z, rtol=0, atol=bound)
    want = oracle.gradients(dy * slope, x, scale, bias, eps=1e-6, **options)
    want["negative_slope"] = np.sum(dy * np.where(z < 0, z, 0))
    # Sums over N and the positions of at most 1, and |xhat| <= sqrt(M); dx is one position of an instance.
    bound = 2 * tolerance.parameter_gradient("float32", "float32", POSITIONS, x.size * np.sqrt(POSITIONS))
    for name, key in {"scale": "gamma", "bias": "beta", "negative_slope": "negative_slope"}.items():
        (got,) = (value for path, value in named.items() if name in path)
        np.testing.assert_allclose(np.reshape(got, want[key].shape), want[key], rtol=0, atol=bound)
    np.testing.assert_allclose(dx, want["x"], rtol=0, atol=bound)


# axis_name: the positions of an instance spread over shards, (shards, N, rows, columns, C)

SHARDS = 4


def whole(x):
    """The shards put together along the rows."""
    return np.moveaxis(np.asarray(x), 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


@pytest.mark.parametrize(("kind", "with_mask"), each_value(KINDS, [True, False]))
def test_shards_under_vmap(kind, with_mask):
    # Shards of unequal statistics, and of unequal counts.
    x = normal(SHARDS, 2, 3, 4, 12) + 100 * jnp.arange(SHARDS).reshape(SHARDS, 1, 1, 1, 1)
    counts = np.random.default_rng(3).random(x.shape) > np.linspace(0.1, 0.9, SHARDS).reshape(SHARDS, 1, 1, 1, 1)
    mask = counts if with_mask else np.ones_like(counts)
    layer = kind(x.shape[1:], axis_name="shards")
    function, parameters = layer.functional()

    def run(parameters, x, mask):
        return function(parameters, x, mask=mask if with_mask else None)

    y = jax.vmap(run, in_axes=(None, 0, 0), axis_name="shards")(parameters, x, mask)
    assert_layer_is_the_formula(jnp.asarray(whole(y)), layer, whole(x), where=whole(mask))


@every_kind
def test_an_axis_that_is_not_mapped(kind):
    layer = kind(SHAPE, axis_name="shards")
    with raises(NameError, "shards"):
        layer(normal(*SHAPE))


# Errors


@every_instance_kind
@pytest.mark.parametrize(
    ("options", "inputs", "exception", "parts"),
    [
        ({"feature_axes": 0}, {}, ValueError, ["feature_axes must not be 0, the batch axis", "got feature_axes=0"]),
        ({"feature_axes": (0, -1)}, {}, ValueError, ["feature_axes must not be 0, the batch axis"]),
        ({"feature_axes": -4}, {}, ValueError, ["feature_axes must not be 0, the batch axis"]),
        ({"feature_axes": 4}, {}, ValueError, ["feature_axes must lie in [-4, 4)"]),
        ({"feature_axes": (1, 2, 3)}, {}, ValueError, ["neither batch nor channel"]),
        ({"feature_axes": 1.5}, {}, TypeError, ["feature_axes must be an integer or a tuple of integers"]),
        ({"feature_axes": "channels"}, {}, TypeError, ["feature_axes must be an integer or a tuple of integers"]),
        ({"epsilon": 0.0}, {}, ValueError, ["epsilon must be a finite number > 0", "got 0.0"]),
        ({"implementation": "triton"}, {}, ValueError, ["got 'triton'"]),
        ({"activation": "relu"}, {}, TypeError, ["activation must be", "'relu'"]),
        ({"axis_index_groups": ((0,),)}, {}, ValueError, ["axis_index_groups needs axis_name"]),
        ({}, {"residual": jnp.zeros((1, 3, 4, 5))}, ValueError, ["residual must have the shape", "got (1, 3, 4, 5)"]),
        ({}, {"mask": jnp.ones((2, 3, 4, 4))}, ValueError, ["mask must be broadcastable", "got (2, 3, 4, 4)"]),
        ({}, {"mask": jnp.ones((2, 5))}, ValueError, ["Add axes of size 1, such as mask[:, None, None, :]."]),
        ({}, {"residual": jax.ShapeDtypeStruct((2, 3, 4, 5), "float32")}, TypeError, ["residual must be an array"]),
    ],
    ids=str,
)
def test_errors_in_the_words_of_the_layer(kind, options, inputs, exception, parts):
    x = normal(2, 3, 4, 5)
    with raises(exception, *parts):
        call_as_first(kind, options, x, inputs)


@every_instance_kind
@pytest.mark.parametrize(
    ("x", "exception", "parts"),
    [
        (jnp.zeros((4, 5)), ValueError, ["rank 3 or more", "got shape (4, 5)"]),
        (jnp.zeros((2, 3, 4, 5), "complex64"), TypeError, ["x must be one of", "got complex64"]),
        (jax.ShapeDtypeStruct((2, 3, 4, 5), "float32"), TypeError, ["x must be an array", "jax.ShapeDtypeStruct"]),
    ],
    ids=["rank", "complex", "description"],
)
def test_inputs_that_are_refused(kind, x, exception, parts):
    with raises(exception, *parts):
        call_as_first(kind, {}, x, {})


def call_as_first(kind, options, x, inputs):
    """The first call of a layer for 5 channels: of a linen one its initialization."""
    if kind is NNX:
        channels = 60 if options.get("feature_axes") == (1, 2, 3) else 5
        jaxnorm.nnx.InstanceNorm(channels, **options, rngs=nnx.Rngs(0))(x, **inputs)
    else:
        jaxnorm.InstanceNorm(**options).init(jax.random.key(0), x, **inputs)


@every_instance_kind
def test_what_is_wrong_with_an_activation_is_said(kind):
    def broken(z):
        raise KeyError("my own mistake")

    def reduces(z):
        return z.sum(-1)

    with raises(KeyError, "my own mistake"):
        call_as_first(kind, {"activation": broken}, normal(2, 3, 4, 5), {})
    with raises(ValueError, "activation must", "shape"):
        call_as_first(kind, {"activation": reduces}, normal(2, 3, 4, 5), {})
    with raises(TypeError, "got an array: pass the function, not its result"):
        call_as_first(kind, {"activation": jax.nn.relu(normal(3))}, normal(2, 3, 4, 5), {})
