"""jaxnorm.nnx.InstanceNorm takes the place of flax.nnx.InstanceNorm; what it does beyond that; NNX's transformations.

The layers share their dtypes, masks and axes with the linen ones (jaxnorm/layer.py), which are tested at more length.
"""

import functools
import inspect
import itertools
import json
import math

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tolerance
from flax import nnx

import jaxnorm
from jaxnorm.nnx import InstanceNorm

SHAPE = (2, 5, 6, 3)
POSITIONS = 30
EPSILON = 1e-6
RANDOM = {"scale_init": nnx.initializers.normal(1.0), "bias_init": nnx.initializers.normal(1.0)}
FLAX = functools.partial(nnx.InstanceNorm, use_fast_variance=False)
HALF_AND_SINGLE = ["float16", "bfloat16", "float32"]
x64 = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(1 + 2 * np.random.default_rng(seed).standard_normal(shape), dtype)


def layer(num_features=3, norm=InstanceNorm, **options):
    """A layer whose scale and bias are not 1 and 0."""
    return norm(num_features, **{**RANDOM, **options}, rngs=nnx.Rngs(7))


def assert_is_the_formula(y, module, x, channel_axes=(-1,), **options):
    """y against float64, from the parameters of the module."""
    gamma, beta = (None if p is None else np.asarray(p[...]) for p in (module.scale, module.bias))
    sizes = [x.shape[axis] for axis in sorted(axis % x.ndim for axis in channel_axes)]
    gamma, beta = (None if p is None else p.reshape(sizes) for p in (gamma, beta))
    exact, magnitude = oracle.instance_norm(x, gamma, beta, module.epsilon, channel_axes=channel_axes, **options)
    positions = math.prod(x.shape[axis] for axis in oracle.spatial_axes(x.ndim, channel_axes))
    bound = tolerance.forward(y.dtype.name, positions, magnitude)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0, atol=bound)


def assert_equal_states(ours, theirs):
    """The same names, types, metadata, dtypes and values."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), (_, b) in zip(nnx.to_flat_state(ours), nnx.to_flat_state(theirs), strict=True):
        assert type(a) is type(b), path
        assert a.get_metadata() == b.get_metadata(), path
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


# The same module


def test_signature():
    ours, theirs = (inspect.signature(norm.__init__).parameters for norm in (InstanceNorm, nnx.InstanceNorm))
    running = {"track_running_stats": False, "momentum": 0.1, "use_running_average": False}
    assert list(ours) == [*theirs, "activation", "implementation", *running]
    assert {name: ours[name].default for name in running} == running
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    assert ours["activation"].default is ours["implementation"].default is None


def test_it_is_a_flax_layer():
    assert issubclass(InstanceNorm, nnx.InstanceNorm)


@pytest.mark.parametrize(
    "options",
    [
        {},
        RANDOM,
        {**RANDOM, "use_bias": False},
        {**RANDOM, "use_scale": False},
        {"use_scale": False, "use_bias": False},
        {**RANDOM, "param_dtype": jnp.bfloat16, "dtype": jnp.float32},
        {"feature_axes": 1, "epsilon": 1e-3, "axis_name": "shards", "axis_index_groups": ((0, 1),)},
        {"scale_metadata": {"tag": "scale"}, "bias_metadata": {"tag": "bias", "decay": False}},
    ],
    ids=["defaults", "random", "no bias", "no scale", "neither", "dtypes", "other fields", "metadata"],
)
def test_same_state_from_the_same_keys(options):
    our_rngs, their_rngs = nnx.Rngs(0, params=1), nnx.Rngs(0, params=1)
    ours, theirs = InstanceNorm(4, **options, rngs=our_rngs), nnx.InstanceNorm(4, **options, rngs=their_rngs)
    assert_equal_states(nnx.state(ours), nnx.state(theirs))
    assert our_rngs.params.count[...] == their_rngs.params.count[...]
    beyond = {"activation": None, "implementation": None}
    fields = [name for name in vars(theirs) if name not in ("scale", "bias") and not name.startswith("_")]
    assert {name: getattr(ours, name) for name in (*fields, *beyond)} == (
        {name: getattr(theirs, name) for name in fields} | beyond
    )


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List([norm(4, **RANDOM, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.norms[0](self.conv(x))
        return self.head(self.norms[1](jnp.sin(x)))


@x64
@pytest.mark.parametrize("to", [InstanceNorm, nnx.InstanceNorm], ids=["from Flax", "to Flax"])
def test_checkpoints_move_both_ways(to):
    source_norm = FLAX if to is InstanceNorm else InstanceNorm
    target_norm = InstanceNorm if to is InstanceNorm else FLAX
    source, target = Net(source_norm, nnx.Rngs(0)), Net(target_norm, nnx.Rngs(1))
    checkpoint = flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(source)))
    state = nnx.state(target)
    nnx.replace_by_pure_dict(state, flax.serialization.from_bytes(nnx.to_pure_dict(state), checkpoint))
    nnx.update(target, state)
    assert_equal_states(nnx.state(target), nnx.state(source))
    x = normal(*SHAPE, dtype="float64")
    # Two norms, each with |xhat| <= sqrt(M); the second multiplies what the first one rounds.
    bound = 2 * tolerance.arithmetic("float64", POSITIONS) * 100 * POSITIONS
    np.testing.assert_allclose(target(x), source(x), rtol=0, atol=bound)


# dtypes


@pytest.mark.parametrize("dtype", [None, *HALF_AND_SINGLE])
@pytest.mark.parametrize("x_dtype", [*HALF_AND_SINGLE, "bool", "uint8", "int32"])
def test_same_output_dtype(x_dtype, dtype):
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    for param_dtype, use_scale, use_bias in itertools.product(HALF_AND_SINGLE, [False, True], [False, True]):
        options = {"dtype": dtype, "param_dtype": param_dtype, "use_scale": use_scale, "use_bias": use_bias}
        ours, theirs = (jax.eval_shape(layer(norm=norm, **options), x) for norm in (InstanceNorm, nnx.InstanceNorm))
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), options


@pytest.mark.parametrize("offset", [0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("x_dtype", HALF_AND_SINGLE)
def test_numbers_at_an_offset(x_dtype, dtype, offset):
    # Whatever dtype says, the statistics see x as it comes.
    x = (normal(*SHAPE) + offset).astype(x_dtype)
    module = layer(dtype=dtype)
    y = module(x)
    assert y.dtype == (dtype or "float32")
    assert_is_the_formula(y, module, x)


def test_integers_are_converted():
    x, module = jnp.arange(math.prod(SHAPE)).reshape(SHAPE) + 1000, layer()
    assert_is_the_formula(module(x), module, x)


def test_own_promote_dtype_is_obeyed():
    seen = []

    def to_bfloat16(arguments, /, *, dtype=None, inexact=True):
        seen.append(([a.shape for a in arguments], dtype, inexact))
        return tuple(a.astype(jnp.bfloat16) for a in arguments)

    x = 100 + normal(2, 3, 4, 2)
    options = {"num_features": 6, "feature_axes": (1, 3), "param_dtype": jnp.bfloat16, "promote_dtype": to_bfloat16}
    modules = [layer(norm=norm, **options) for norm in (InstanceNorm, FLAX)]
    ours, theirs = (module(x) for module in modules)
    assert seen == 2 * [([(2, 3, 4, 2), (6,), (6,)], None, True)]
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    # The numbers of the rounded x, which are far from those of x: at 100 bfloat16 has steps of 0.5.
    rounded = x.astype(jnp.bfloat16)
    assert_is_the_formula(ours, modules[0], rounded, (1, 3))


def test_own_promote_dtype_without_parameters():
    module = layer(use_scale=False, use_bias=False, promote_dtype=lambda args, dtype: (args[0] ** 2, *args[1:]))
    assert_is_the_formula(module(normal(*SHAPE)), module, normal(*SHAPE) ** 2)


# Axes and masks


@pytest.mark.parametrize(
    ("shape", "feature_axes"),
    [
        ((2, 7, 3), -1),
        ((2, 3, 5, 6), 1),
        ((2, 3, 5, 6), -3),
        ((2, 5, 3, 6), 2),
        ((2, 5, 6, 3), (-1, 3)),
        ((2, 5, 6, 3), (-1, 1)),
        ((2, 3, 4, 5, 2), (-1, 2, 1)),
    ],
    ids=str,
)
def test_feature_axes(shape, feature_axes):
    axes = tuple({axis % len(shape) for axis in np.atleast_1d(feature_axes)})
    x, num_features = normal(*shape), math.prod(shape[axis] for axis in axes)
    ours, theirs = (layer(num_features, norm, feature_axes=feature_axes) for norm in (InstanceNorm, FLAX))
    y = ours(x)
    assert_is_the_formula(y, ours, x, axes)
    # Flax counts num_features alike, and reads the parameters in the same order.
    assert_is_the_formula(theirs(x), ours, x, axes)


@pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPE, "bool"), ((1, 5, 6, 1), "int32"), ((5, 6, 1), "float32")], ids=str
)
def test_mask(shape, dtype):
    mask = np.random.default_rng(1).random(shape) > 0.4
    x, module = 100 + normal(*SHAPE), layer()
    assert_is_the_formula(module(x, mask=mask.astype(dtype)), module, x, where=mask)


# activation and residual


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_activation_and_residual(with_residual, activation, implementation):
    x = 100 + normal(*SHAPE)
    residual = normal(*SHAPE, seed=1) if with_residual else None
    module = layer(activation=oracle.ACTIVATIONS[activation].jax, implementation=implementation)
    y = module(x, residual=residual)
    assert_is_the_formula(y, module, x, activation=activation, residual=residual)


def test_activation_and_residual_with_a_mask():
    x, residual, mask = normal(*SHAPE), normal(*SHAPE, seed=1), np.random.default_rng(1).random(SHAPE) > 0.4
    module = layer(activation=jnp.tanh)
    y = module(x, residual=residual, mask=mask)
    assert_is_the_formula(y, module, x, activation="tanh", residual=residual, where=mask)


def test_activation_with_parameters_is_trained():
    x, w = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    fused = layer(activation=nnx.PReLU())
    plain, slope = layer(), nnx.PReLU()
    grads = nnx.grad(lambda module: jnp.sum(w * module(x)))(fused)
    expected = nnx.grad(lambda modules: jnp.sum(w * modules[1](modules[0](x))))(nnx.List([plain, slope]))
    for ours, theirs in (
        (grads["scale"], expected[0]["scale"]),
        (grads["bias"], expected[0]["bias"]),
        (grads["activation"]["negative_slope"], expected[1]["negative_slope"]),
    ):
        # Sums of |w xhat| over N and the positions, at most.
        terms = float(jnp.sum(abs(w))) * np.sqrt(POSITIONS)
        bound = 2 * tolerance.parameter_gradient("float32", "float32", POSITIONS, terms)
        np.testing.assert_allclose(ours[...], theirs[...], rtol=0, atol=bound)


# Gradients and training


def assert_right_gradients(grads, module, x, dy, **options):
    """Gradients of <dy, y> by the parameters, against float64. |activation'| <= 2 here."""
    gamma, beta = np.asarray(module.scale[...]), np.asarray(module.bias[...])
    exact = oracle.gradients(dy, x, gamma, beta, eps=EPSILON, channel_axes=(-1,), **options)
    mean, var = oracle.moments(x, (-1,))
    xhat = (np.asarray(x, np.float64) - mean) / np.sqrt(var + EPSILON)
    for name, ours, factor in (("gamma", grads["scale"], abs(xhat)), ("beta", grads["bias"], 1)):
        terms = (2 * abs(np.asarray(dy, np.float64)) * factor).sum((0, 1, 2)).max()
        bound = tolerance.parameter_gradient("float32", "float32", POSITIONS, terms)
        np.testing.assert_allclose(ours[...], exact[name], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("transformation", [lambda f: f, nnx.jit, nnx.remat], ids=["plain", "jit", "remat"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradients(activation, transformation):
    x, dy = 100 + normal(*SHAPE), normal(*SHAPE, seed=1)
    module = layer(activation=oracle.ACTIVATIONS[activation].jax)
    loss = transformation(lambda module, x: jnp.sum(dy * module(x)))
    assert_right_gradients(nnx.grad(loss)(module, x), module, x, dy, activation=activation)


@pytest.mark.parametrize("optimizer", ["nnx.Optimizer", "plain gradient"])
def test_training_reduces_the_loss(optimizer):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)
            self.norm = InstanceNorm(3, activation=jax.nn.silu, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.conv(x), residual=x)

    # What another such block computes: a loss near zero is within reach.
    model, x = Block(nnx.Rngs(0)), normal(4, 8, 8, 3)
    target = Block(nnx.Rngs(1))(x)
    descent = nnx.Optimizer(model, optax.adam(0.06), wrt=nnx.Param) if optimizer == "nnx.Optimizer" else None

    @nnx.jit
    def step(model, descent):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
        if descent is None:
            nnx.update(model, jax.tree.map(lambda p, g: p - 0.3 * g, nnx.state(model, nnx.Param), grads))
        else:
            descent.update(model, grads)
        return loss

    losses = [float(step(model, descent)) for _ in range(60)]
    assert losses[-1] < losses[0] / 100
    assert not np.array_equal(model.norm.scale[...], jnp.ones(3))
    assert not np.array_equal(model.norm.bias[...], jnp.zeros(3))


# NNX's transformations


def test_jit_split_and_merge():
    x, module = 100 + normal(*SHAPE), layer(activation=jax.nn.relu)
    graph, state = nnx.split(module)
    merged = nnx.merge(graph, state)
    assert isinstance(merged, InstanceNorm)
    assert_equal_states(nnx.state(merged), nnx.state(module))
    for y in (
        nnx.jit(lambda module, x: module(x))(module, x),
        nnx.jit(module)(x),
        jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x),
        merged(x),
        nnx.clone(module)(x),
    ):
        assert_is_the_formula(y, module, x, activation="relu")


def test_jit_compiles_once_for_equal_layers():
    traces = []

    @nnx.jit
    def run(module, x):
        traces.append(x.shape)
        return module(x)

    x = normal(*SHAPE)
    for _ in range(2):
        run(layer(activation=jax.nn.relu), x)
    assert len(traces) == 1


def test_vmap_over_layers():
    x = 100 + normal(4, *SHAPE)
    keys = nnx.Rngs(0).split(4)
    layers = nnx.vmap(lambda rngs: InstanceNorm(3, **RANDOM, rngs=rngs))(keys)
    assert layers.scale.shape == (4, 3)
    y = nnx.vmap(lambda module, x: module(x))(layers, x)
    for index in range(4):
        one = layer()
        nnx.update(one, jax.tree.map(lambda p, index=index: p[index], nnx.state(layers)))
        assert_is_the_formula(y[index], one, x[index])


@x64
def test_scan_over_layers():
    layers = nnx.vmap(lambda rngs: InstanceNorm(3, **RANDOM, rngs=rngs))(nnx.Rngs(0).split(3))
    forward = nnx.scan(lambda x, module: x + jnp.sin(module(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    x = expected = normal(*SHAPE, dtype="float64")
    for index in range(3):
        one = layer()
        nnx.update(one, jax.tree.map(lambda p, index=index: p[index], nnx.state(layers)))
        expected = expected + jnp.sin(one(expected))
    # Each layer multiplies the error of the one before by 1 + |scale| / std (2 + |xhat|), here below 10.
    bound = 2 * 10**3 * tolerance.forward("float64", POSITIONS, float(abs(expected).max()))
    np.testing.assert_allclose(forward(x, layers), expected, rtol=0, atol=bound)


# axis_name: the positions of an instance spread over shards, (shards, N, rows, columns, C)

SHARDS = 4


def whole(x):
    """The shards put together along the rows."""
    return np.moveaxis(np.asarray(x), 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


@pytest.mark.parametrize("vmap", [jax.vmap, nnx.vmap], ids=["jax.vmap", "nnx.vmap"])
def test_shards_under_vmap(vmap):
    # Shards of unequal statistics.
    x = normal(SHARDS, 2, 3, 4, 3) + 100 * jnp.arange(SHARDS).reshape(SHARDS, 1, 1, 1, 1)
    module = layer(axis_name="shards")
    y = vmap(lambda module, x: module(x), in_axes=(None, 0), axis_name="shards")(module, x)
    assert_is_the_formula(jnp.asarray(whole(y)), module, whole(x))


def test_shards_under_vmap_with_a_mask():
    x = normal(SHARDS, 2, 3, 4, 3)
    mask = np.random.default_rng(3).random(x.shape) > np.linspace(0.1, 0.9, SHARDS).reshape(SHARDS, 1, 1, 1, 1)
    module = layer(axis_name="shards")
    y = jax.vmap(lambda x, mask: module(x, mask=mask), axis_name="shards")(x, mask)
    assert_is_the_formula(jnp.asarray(whole(y)), module, whole(x), where=whole(mask))


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, ((0, 1), (2, 3))], ids=str)
def test_shards_under_shard_map(run_python, groups):
    printed = run_python(f"""
import jax, json
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", {SHARDS})
import numpy as np
from flax import nnx
import jaxnorm

P = jax.sharding.PartitionSpec
mesh = jax.make_mesh(({SHARDS},), ("shards",), axis_types=(jax.sharding.AxisType.Auto,))
x = np.random.default_rng(0).standard_normal((2, {3 * SHARDS}, 4, 3)).astype(np.float32)
x += np.arange({3 * SHARDS}, dtype=np.float32).reshape(1, -1, 1, 1)
module = jaxnorm.nnx.InstanceNorm(3, axis_name="shards", axis_index_groups={groups}, rngs=nnx.Rngs(0))
run = jax.shard_map(module, mesh=mesh, in_specs=P(None, "shards"), out_specs=P(None, "shards"), check_vma={not groups})
print(json.dumps([np.asarray(v).tolist() for v in (x, run(x))]))
""")
    x, y = (jnp.asarray(v, jnp.float32) for v in json.loads(printed))
    for rows in [slice(None)] if groups is None else [slice(0, 6), slice(6, 12)]:
        assert_is_the_formula(y[:, rows], InstanceNorm(3, rngs=nnx.Rngs(0)), x[:, rows])


# Errors


def raises(exception, *parts):
    """An error whose message has all the parts."""
    return pytest.raises(exception, match="".join(rf"(?=[\s\S]*{part})" for part in parts))


@pytest.mark.parametrize(
    ("num_features", "options", "parts"),
    [
        (4, {}, ["got num_features=4 for x of shape \\(2, 5, 6, 3\\), which has 3", "num_features=3"]),
        (5, {}, ["It would fit feature_axes=1: is x laid out"]),
        (1, {}, ["num_features=3"]),
        (3, {"feature_axes": (1, 3)}, ["has 15 along \\(1, 3\\)"]),
        (4, {"use_scale": False, "use_bias": False}, ["num_features=3"]),
    ],
    ids=str,
)
def test_num_features_must_fit(num_features, options, parts):
    with raises(ValueError, "num_features must be the number of channels", *parts):
        layer(num_features, **options)(normal(*SHAPE))


def test_loaded_parameters_must_fit():
    module = layer()
    nnx.update(module, nnx.state(layer(4)))
    with raises(ValueError, "(scale|bias) must have shape \\(3,\\), since num_features=3", "got \\(4,\\)", "Load"):
        module(normal(*SHAPE))


@pytest.mark.parametrize(
    ("options", "inputs", "exception", "part"),
    [
        ({"feature_axes": 0}, {}, ValueError, "cannot include the leading dimension.*feature_axes="),
        ({"feature_axes": 4}, {}, ValueError, "feature_axes must lie in"),
        ({"feature_axes": 1.5}, {}, TypeError, "feature_axes must be an integer"),
        ({"epsilon": 0.0}, {}, ValueError, "epsilon must be a finite number > 0"),
        ({"implementation": "triton"}, {}, ValueError, "implementation must be .* got 'triton'"),
        ({"activation": "relu"}, {}, TypeError, "activation must be"),
        ({"axis_index_groups": ((0,),)}, {}, ValueError, "axis_index_groups needs axis_name"),
        ({}, {"residual": jnp.zeros((1, 5, 6, 3))}, ValueError, "residual must have the shape"),
        ({}, {"mask": jnp.ones((2, 3, 4, 4))}, ValueError, "mask must be broadcastable"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) and "shape" not in str(value) else "",
)
def test_errors_in_the_words_of_the_layer(options, inputs, exception, part):
    with pytest.raises(exception, match=part):
        layer(**options)(normal(*SHAPE), **inputs)


def test_needs_a_spatial_axis():
    with pytest.raises(ValueError, match="rank 3 or more"):
        layer()(normal(2, 3))


# Imports


@pytest.mark.parametrize(
    "program",
    ["jaxnorm.nnx.InstanceNorm", "from jaxnorm import nnx; nnx.InstanceNorm", "import jaxnorm.nnx; jaxnorm.nnx"],
)
def test_flax_is_imported_with_the_layer_only(run_python, program):
    run_python(
        "import sys, jaxnorm\n"
        "assert 'flax' not in sys.modules\n"
        f"{program}\n"
        "assert sys.modules['jaxnorm.nnx'] is jaxnorm.nnx and 'flax' in sys.modules"
    )


def test_the_package_lists_it():
    assert "nnx" in jaxnorm.__all__
