"""jaxnorm.InstanceNorm as a linen module, in Flax's tools and transformations; InstanceNorm2D.

What it has in common with the NNX layer is tested in test_layers.py.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from cases import each_value, exhaustive, some
from layers import RANDOM, assert_close_trees, assert_equal_trees, normal, result_and_gradients

import jaxnorm

SHAPE = (2, 5, 6, 3)
FLAX = functools.partial(nn.InstanceNorm, use_fast_variance=False)
both_modules = pytest.mark.parametrize("module", [nn.InstanceNorm, jaxnorm.InstanceNorm], ids=["flax", "jaxnorm"])
x64 = pytest.mark.usefixtures("x64")
pytestmark = pytest.mark.slow


def parameters(dtype):
    return {"params": {name: normal(3, seed=4, dtype=dtype) for name in ("scale", "bias")}}


def assert_same_module(ours, theirs, x, positions, **inputs):
    """The same parameters, and with them the same results and gradients."""

    def run(module):
        @jax.jit
        def init_and_apply(x):
            variables = module.init(jax.random.key(0), x, **inputs)
            return variables, result_and_gradients(functools.partial(module.apply, **inputs), variables, x)

        return init_and_apply(x)

    (our_variables, our_results), (their_variables, their_results) = run(ours), run(theirs)
    assert_equal_trees(our_variables, their_variables)
    assert_close_trees(our_results, their_results, x.size, positions)


# The same module


def test_fields():
    def fields(module):
        # Flax itself appends parent and name to every module.
        return [(f.name, f.default) for f in dataclasses.fields(module) if f.name not in ("parent", "name")]

    ours, theirs = fields(jaxnorm.InstanceNorm), fields(nn.InstanceNorm)
    assert ours[: len(theirs)] == theirs
    running = [
        ("track_running_stats", False),
        ("momentum", 0.1),
        ("use_running_average", None),
        ("stats_axis_name", None),
    ]
    assert ours[len(theirs) :] == [("activation", None), ("implementation", None), *running]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias_init": nn.initializers.zeros, "scale_init": nn.initializers.ones},
        {"use_bias": False},
        {"use_scale": False},
        {"use_scale": False, "use_bias": False},
        {"param_dtype": "bfloat16"},
        {"param_dtype": "float16", "dtype": "float32"},
        {"feature_axes": 1},
        {"feature_axes": (3, 1, -1)},
    ],
    ids=[
        "",
        "constant",
        "no bias",
        "no scale",
        "neither",
        "bfloat16",
        "float16",
        "channels-first",
        "several axes",
    ],
)
def test_same_parameters(fields):
    ours, theirs = (
        jax.jit(module(**{**RANDOM, **fields}).init)(jax.random.key(1), jnp.zeros(SHAPE))
        for module in (jaxnorm.InstanceNorm, nn.InstanceNorm)
    )
    assert_equal_trees(ours, theirs)
    assert len(ours.get("params", {})) == 2 - len({"use_scale", "use_bias"} & fields.keys())


def test_same_error_for_parameters_of_another_shape():
    errors = []
    for module in (nn.InstanceNorm, jaxnorm.InstanceNorm):
        with pytest.raises(flax.errors.ScopeParamShapeError, match="scale") as error:
            module().apply({"params": {"scale": jnp.ones(4), "bias": jnp.ones(4)}}, jnp.zeros(SHAPE))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@both_modules
def test_numpy_float64_gives_float32(module):
    x = np.ones(SHAPE)
    assert x.dtype == np.float64
    y, _ = module().init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.float32


# In models


class Net(nn.Module):
    """A small model; Flax names the layers after their class, which is the same for both."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm(use_fast_variance=False)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(2)(self.norm(use_fast_variance=False, **RANDOM)(nn.Conv(4, (3, 3))(x)))


@x64
@pytest.mark.parametrize("direction", some(["from Flax", "to Flax"], "from Flax"))
def test_checkpoints_move_both_ways(direction):
    source, target = Net(nn.InstanceNorm), Net(jaxnorm.InstanceNorm)
    if direction == "to Flax":
        source, target = target, source
    x = normal(*SHAPE, dtype="float64")
    variables = jax.jit(source.init)(jax.random.key(0), x)
    checkpoint = flax.serialization.to_bytes(variables)
    loaded = flax.serialization.from_bytes(jax.eval_shape(target.init, jax.random.key(1), x), checkpoint)
    assert_equal_trees(loaded, variables)
    assert flax.serialization.to_bytes(loaded) == checkpoint
    # The second layer multiplies what the first one rounds, with each of 36 weights.
    applied = jax.jit(target.apply)(loaded, x), jax.jit(source.apply)(variables, x)
    assert_close_trees(*applied, 36, positions=30)


class Layers(nn.Module):
    """One step of nn.scan over layers."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        return x + jnp.sin(self.norm(**RANDOM)(x)), None


def scanned(norm):
    layers = nn.scan(Layers, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(norm)
    return lambda x: layers(x, None)[0]


def mapped(norm, variable_axis):
    options = {"variable_axes": {"params": variable_axis}, "split_rngs": {"params": variable_axis is not None}}
    return nn.vmap(norm, **options)(**RANDOM)


class Lifted(nn.Module):
    """A Flax module transformed by one of Flax's transformations."""

    norm: type[nn.Module]
    transformation: str

    @nn.compact
    def __call__(self, x):
        lifted = {
            "remat": lambda: nn.remat(self.norm)(**RANDOM),
            "jit": lambda: nn.jit(self.norm)(**RANDOM),
            "scan": lambda: scanned(self.norm),
            "vmap": lambda: mapped(self.norm, 0),
            "vmap with shared parameters": lambda: mapped(self.norm, None),
        }
        return lifted[self.transformation]()(x)


class TwoPass(nn.InstanceNorm):
    """nn.InstanceNorm with the right variance, as a class, since that is what Flax transforms."""

    use_fast_variance: bool = False


class InstanceNorm(jaxnorm.InstanceNorm):
    """Named as Flax names the other one, after the class."""


TwoPass.__name__ = InstanceNorm.__name__


@x64
@pytest.mark.parametrize(
    "transformation", some(["remat", "jit", "scan", "vmap", "vmap with shared parameters"], "scan", "vmap")
)
def test_same_results_under_flax_transformations(transformation):
    ours, theirs = (Lifted(norm, transformation) for norm in (InstanceNorm, TwoPass))
    x = normal(2, *SHAPE, dtype="float64")
    assert_same_module(ours, theirs, x, positions=60)


@x64
def test_remat_with_activation_and_residual():
    fields = {"activation": jnp.tanh, **RANDOM}
    x, residual = (normal(*SHAPE, seed=seed, dtype="float64") for seed in range(2))
    plain = jaxnorm.InstanceNorm(**fields)
    assert_same_module(nn.remat(jaxnorm.InstanceNorm)(**fields), plain, x, positions=30, residual=residual)


class Model(nn.Module):
    """A norm whose activation is a module of the model, or a function that calls it."""

    in_function: bool

    @nn.compact
    def __call__(self, x):
        own = nn.PReLU(negative_slope_init=0.3)

        def activation(z):
            return own(z)

        return jaxnorm.InstanceNorm(activation=activation if self.in_function else own, **RANDOM)(x)


OF_NORM = jaxnorm.InstanceNorm(activation=nn.PReLU(negative_slope_init=0.3))
OF_MODEL = {"InstanceNorm_0/scale", "InstanceNorm_0/bias", "PReLU_0/negative_slope"}


@pytest.mark.parametrize(
    ("model", "paths"),
    [(OF_NORM, {"scale", "bias", "activation/negative_slope"}), (Model(False), OF_MODEL), (Model(True), OF_MODEL)],
    ids=["of the norm", "of the model", "in a function"],
)
def test_where_the_parameters_of_a_module_in_the_activation_are(model, paths):
    x = normal(*SHAPE)
    y, variables = model.init_with_output(jax.random.key(0), x)
    assert set(flax.traverse_util.flatten_dict(variables["params"], sep="/")) == paths
    again = model.apply(variables, x)
    # PReLU is trained: with its slope of 0.3 it is what is computed, at init and later.
    norms = variables["params"].get("InstanceNorm_0", variables["params"])
    plain = jaxnorm.InstanceNorm().apply({"params": {name: norms[name] for name in ("scale", "bias")}}, x)
    for got in (y, again, jax.jit(model.apply)(variables, x)):
        np.testing.assert_allclose(got, jnp.where(plain >= 0, plain, 0.3 * plain), rtol=1e-5, atol=1e-6)


def test_a_module_with_a_state_as_activation():
    x = normal(*SHAPE)
    layer = jaxnorm.InstanceNorm(activation=nn.BatchNorm(use_running_average=False, momentum=0.5))
    variables = layer.init(jax.random.key(0), x)
    for apply in (layer.apply, jax.jit(layer.apply, static_argnames="mutable")):
        y, changed = apply(variables, x, mutable=("batch_stats",))
        # Means of 0 and variances of 1, for half a step from 0 and 1.
        np.testing.assert_allclose(changed["batch_stats"]["activation"]["mean"], np.zeros(3), atol=1e-5)
        np.testing.assert_allclose(y.mean((0, 1, 2)), np.zeros(3), atol=1e-5)


def test_dropout_as_activation():
    layer, keys = (
        jaxnorm.InstanceNorm(activation=nn.Dropout(0.5, deterministic=False)),
        jax.random.split(jax.random.key(0)),
    )
    variables = jax.jit(layer.init)({"params": keys[0], "dropout": keys[1]}, normal(*SHAPE))
    y = jax.jit(layer.apply)(variables, normal(*SHAPE), rngs={"dropout": keys[1]})
    assert 0.3 < float((y == 0).mean()) < 0.7


def test_initialization_calls_the_activation_once():
    calls = []

    def counting(z):
        calls.append(z.dtype)
        return jnp.tanh(z)

    x = normal(*SHAPE, dtype="bfloat16")
    y, variables = jaxnorm.InstanceNorm(activation=counting, dtype="bfloat16").init_with_output(jax.random.key(0), x)
    assert calls == [jnp.float32]
    # The result is that of a later call.
    np.testing.assert_array_equal(y, jaxnorm.InstanceNorm(activation=jnp.tanh, dtype="bfloat16").apply(variables, x))


def test_flax_sees_one_call():
    """Neither interceptors nor captured intermediates see methods that are our own affair."""
    x, methods = normal(*SHAPE), []

    def interceptor(call, args, kwargs, context):
        methods.append(context.method_name)
        return call(*args, **kwargs)

    layer = jaxnorm.InstanceNorm(track_running_stats=True, use_running_average=True)
    variables = layer.init(jax.random.key(0), x)
    with nn.intercept_methods(interceptor):
        _, captured = layer.apply(variables, x, capture_intermediates=lambda module, name: True)
    assert methods == ["__call__"]
    assert set(captured["intermediates"]) == {"__call__"}


# axis_name: the positions of an instance spread over shards, (shards, N, rows, columns, C)

SHARDS = 8
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
SHARDED_SHAPE = (SHARDS, 2, 3, 4, 3)
SHARDED = 1 + 2 * np.random.default_rng(0).standard_normal(SHARDED_SHAPE)


def apply_to_shards(module, mapping, variables, x, mask=None):
    """module.apply to shards, mapped by vmap, pmap or shard_map."""
    apply = module.apply if mask is None else lambda variables, x, mask: module.apply(variables, x, mask=mask)
    inputs = (x,) if mask is None else (x, mask)
    if mapping in ("vmap", "pmap"):
        transformation = {"vmap": jax.vmap, "pmap": jax.pmap}[mapping]
        return transformation(apply, in_axes=(None, *(0 for _ in inputs)), axis_name="shards")(variables, *inputs)

    mesh = jax.make_mesh((SHARDS,), ("shards",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("shards")

    def body(variables, *inputs):
        return apply(variables, *(v[0] for v in inputs))[None]

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(replicated, *(split for _ in inputs)),
        out_specs=split,
        check_vma=mapping == "shard_map",
    )(variables, *inputs)


def apply_to_whole(module, groups, variables, x):
    """The same without axis_name: the shards of a group put together along the rows, and apart again."""
    module = dataclasses.replace(module, axis_name=None, axis_index_groups=None)
    parts = []
    for group in groups:
        shards = x[np.array(group)]
        count, batch, rows, *rest = shards.shape
        whole = jnp.moveaxis(shards, 0, 1).reshape(batch, count * rows, *rest)
        y = module.apply(variables, whole)
        parts.append(jnp.moveaxis(y.reshape(batch, count, rows, *rest), 1, 0))
    return jnp.concatenate(parts)


def run_on_shards(norm, mapping, groups):
    """Results and gradients on shards, as NumPy arrays, so that they can come from another process."""
    module = norm(axis_name="shards", axis_index_groups=groups)
    results = result_and_gradients(
        functools.partial(apply_to_shards, module, mapping),
        parameters("float64"),
        SHARDED,
    )
    return jax.tree.map(np.asarray, results)


def run_on_whole(groups):
    groups = [range(SHARDS)] if groups is None else groups
    module = jaxnorm.InstanceNorm(axis_name="shards")
    return result_and_gradients(
        functools.partial(apply_to_whole, module, groups),
        parameters("float64"),
        SHARDED,
    )


def use_devices():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", SHARDS)
    jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def devices():
    """A process with a CPU device for every shard, and 64 bits."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=use_devices) as executor:
        yield executor


@x64
@pytest.mark.parametrize(
    ("mapping", "groups"),
    [
        ("shard_map", None),
        pytest.param("shard_map without check_vma", None, marks=exhaustive),
        pytest.param("pmap", None, marks=exhaustive),
        # JAX has no axis_index_groups in vmap, nor in shard_map with check_vma.
        ("shard_map without check_vma", GROUPS),
        pytest.param("pmap", GROUPS, marks=exhaustive),
    ],
    ids=str,
)
def test_shards_on_devices(devices, mapping, groups):
    ours, theirs = devices.submit(compare_on_devices, mapping, groups).result()
    size, positions = np.prod(SHARDED_SHAPE), SHARDS * 12
    assert_close_trees(ours, run_on_whole(groups), size, positions)
    assert_close_trees(ours, theirs, size, positions)


def compare_on_devices(mapping, groups):
    assert jax.device_count() == SHARDS
    return tuple(run_on_shards(norm, mapping, groups) for norm in (jaxnorm.InstanceNorm, FLAX))


@x64
@both_modules
def test_groups_under_vmap_are_not_implemented_by_jax(module):
    with pytest.raises(NotImplementedError, match="axis_index_groups not supported in vmap"):
        apply_to_shards(
            module(axis_name="shards", axis_index_groups=GROUPS),
            "vmap",
            parameters("float64"),
            SHARDED,
        )


# InstanceNorm2D


@pytest.mark.parametrize(("dtype", "epsilon"), each_value(["float32", "bfloat16"], [1e-5, 0.5]))
def test_2d_is_the_formula(epsilon, dtype):
    data = jnp.asarray(normal(5, 3, 4, 6), dtype)
    scale, bias = jnp.asarray([0.5, -1.0, 2.0]), jnp.asarray([1.0, 0.0, -3.0])
    y = jaxnorm.InstanceNorm2D(num_maps=3, epsilon=epsilon).apply({"params": {"scale": scale, "bias": bias}}, data)
    assert (y.shape, y.dtype) == (data.shape, data.dtype)
    exact = np.asarray(data, np.float64)
    z = (exact - exact.mean((2, 3), keepdims=True)) / np.sqrt(exact.var((2, 3), keepdims=True) + epsilon)
    expected = z * np.asarray(scale).reshape(1, 3, 1, 1) + np.asarray(bias).reshape(1, 3, 1, 1)
    bound = tolerance.forward(dtype, 24, 2 * abs(z).max() + 3)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=bound)


def test_2d_defaults():
    layer = jaxnorm.InstanceNorm2D(3)
    assert (layer.num_maps, layer.epsilon, layer.affine, layer.name) == (3, 1e-5, True, None)
    assert jaxnorm.InstanceNorm2D(3, 1e-3, False, name="norm").name == "norm"


def test_2d_parameters():
    data = jnp.asarray(normal(5, 3, 4, 6), jnp.float32)
    variables = jaxnorm.InstanceNorm2D(3).init(jax.random.key(0), data)
    assert_equal_trees(variables, {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}})
    assert jaxnorm.InstanceNorm2D(3, affine=False).init(jax.random.key(0), data) == {}
    assert jnp.array_equal(
        jaxnorm.InstanceNorm2D(3, affine=False).apply({}, data), jaxnorm.InstanceNorm2D(3).apply(variables, data)
    )


@x64
def test_2d_parameters_are_float32_with_64_bits_too():
    variables = jaxnorm.InstanceNorm2D(3).init(jax.random.key(0), jnp.zeros((5, 3, 4, 6), jnp.float32))
    assert {value.dtype.name for value in jax.tree.leaves(variables)} == {"float32"}


@x64
def test_2d_is_instance_norm_of_channels_first():
    data, variables = normal(5, 3, 4, 6, dtype="float64"), parameters("float64")
    results = [
        result_and_gradients(layer.apply, variables, data)
        for layer in (jaxnorm.InstanceNorm2D(3), FLAX(feature_axes=1, epsilon=1e-5))
    ]
    assert_close_trees(*results, data.size, positions=24)
