"""jaxnorm.InstanceNorm takes the place of flax.linen.InstanceNorm; what it does beyond that; InstanceNorm2D.

Where the two are compared by value they run in float64, so that a difference in meaning cannot hide in rounding.
Flax is told to compute the two-pass variance, the one that is right.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance

import jaxnorm

SHAPE = (2, 5, 6, 3)
FLAX = functools.partial(nn.InstanceNorm, use_fast_variance=False)
RANDOM = {"scale_init": nn.initializers.normal(1.0), "bias_init": nn.initializers.normal(1.0)}
both_modules = pytest.mark.parametrize("module", [nn.InstanceNorm, jaxnorm.InstanceNorm], ids=["flax", "jaxnorm"])
x64 = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return 1 + 2 * np.random.default_rng(seed).standard_normal(shape)


def weights(*shape):
    """Of the loss <w, y>: at most 1, and of one sign, so that no gradient cancels to nothing."""
    return np.random.default_rng(8).uniform(0.5, 1, shape)


def assert_equal_trees(ours, theirs):
    """The same names, shapes, dtypes and values."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_close_trees(ours, theirs, size, positions):
    """Results and gradients of <w, y> in float64, for x with so many numbers and instances of so many positions.

    |w| <= 1 and |xhat| <= sqrt(M), so that no sum here has more than size terms or terms beyond sqrt(M), up to the
    scale, the activation and 1/std, a factor below 10. Both sides round, and once more to the dtype of a parameter.
    """
    bound = 2 * tolerance.arithmetic("float64", positions) * 10 * size * np.sqrt(positions)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2 * tolerance.unit(a.dtype), atol=bound)


def result_and_gradients(function, *arguments):
    """y and the gradients of <w, y> by all arguments."""

    @jax.jit
    def run(*arguments):
        y, pullback = jax.vjp(function, *arguments)
        return y, pullback(weights(*y.shape))

    return run(*arguments)


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
    running = [("track_running_stats", False), ("momentum", 0.1), ("use_running_average", None)]
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
        module(**{**RANDOM, **fields}).init(jax.random.key(1), jnp.zeros(SHAPE))
        for module in (jaxnorm.InstanceNorm, nn.InstanceNorm)
    )
    assert_equal_trees(ours, theirs)
    assert len(ours.get("params", {})) == 2 - len({"use_scale", "use_bias"} & fields.keys())


@x64
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"epsilon": 1e-2},
        {"use_bias": False},
        {"use_scale": False},
        {"use_bias": False, "use_scale": False},
        {"param_dtype": "float64"},
    ],
    ids=str,
)
def test_same_results(fields):
    fields = {**fields, **RANDOM}
    assert_same_module(jaxnorm.InstanceNorm(**fields), FLAX(**fields), normal(*SHAPE), positions=30)


@pytest.mark.slow
@x64
@pytest.mark.parametrize(
    ("shape", "feature_axes"),
    [
        ((2, 7, 3), -1),
        ((2, 3, 7), 1),
        ((2, 3, 5, 6), 1),
        ((2, 5, 6, 3), [3]),
        ((2, 5, 6, 3), np.int64(-1)),
        ((2, 5, 6, 3), (-1, 3)),
        ((2, 5, 6, 3), (1, -1)),
        ((2, 5, 3, 6), 2),
        ((2, 3, 4, 5, 2), 1),
        ((2, 3, 4, 5, 2), (-1, 2, 1)),
        ((2, 3, 1, 1, 2), -1),
        ((0, 3, 4, 2), -1),
    ],
    ids=str,
)
def test_same_results_for_feature_axes(shape, feature_axes):
    fields = {"feature_axes": feature_axes, **RANDOM}
    assert_same_module(jaxnorm.InstanceNorm(**fields), FLAX(**fields), normal(*shape), positions=60)


@x64
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (SHAPE, "bool"),
        ((2, 5, 6, 1), "uint8"),
        ((1, 5, 6, 1), "int32"),
        ((2, 1, 6, 3), "float32"),
        ((5, 6, 1), "bool"),
    ],
    ids=str,
)
def test_same_results_with_a_mask(shape, dtype):
    mask = (np.random.default_rng(1).random(shape) > 0.4).astype(dtype)
    assert_same_module(jaxnorm.InstanceNorm(**RANDOM), FLAX(**RANDOM), normal(*SHAPE), positions=30, mask=mask)


@both_modules
@pytest.mark.parametrize("feature_axes", [0, -4, (0, -1)], ids=str)
def test_same_error_for_the_batch_axis(module, feature_axes):
    with pytest.raises(ValueError, match="The channel axes cannot include the leading dimension as this is assumed"):
        module(feature_axes=feature_axes).init(jax.random.key(0), jnp.zeros(SHAPE))


def test_same_error_for_parameters_of_another_shape():
    errors = []
    for module in (nn.InstanceNorm, jaxnorm.InstanceNorm):
        with pytest.raises(flax.errors.ScopeParamShapeError, match="scale") as error:
            module().apply({"params": {"scale": jnp.ones(4), "bias": jnp.ones(4)}}, jnp.zeros(SHAPE))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


# dtypes

HALF_AND_SINGLE = ["float16", "bfloat16", "float32"]


def parameters(dtype, use_scale=True, use_bias=True):
    used = {"scale": use_scale, "bias": use_bias}
    values = {name: jnp.asarray(normal(3, seed=4), dtype) for name, is_used in used.items() if is_used}
    return {"params": values}


@pytest.mark.parametrize("dtype", [None, *HALF_AND_SINGLE])
@pytest.mark.parametrize("x_dtype", [*HALF_AND_SINGLE, "bool", "uint8", "int16", "int32"])
def test_same_output_dtype(x_dtype, dtype):
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    for param_dtype, use_scale, use_bias in itertools.product(HALF_AND_SINGLE, [False, True], [False, True]):
        fields = {"dtype": dtype, "param_dtype": param_dtype, "use_scale": use_scale, "use_bias": use_bias}
        variables = parameters(param_dtype, use_scale, use_bias)
        ours, theirs = (
            jax.eval_shape(module(**fields).apply, variables, x) for module in (jaxnorm.InstanceNorm, nn.InstanceNorm)
        )
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), fields


@x64
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32", "float64", "int64"])
def test_same_output_dtype_with_64_bits(x_dtype, dtype):
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    for param_dtype in ("bfloat16", "float32", "float64"):
        variables, fields = parameters(param_dtype), {"dtype": dtype, "param_dtype": param_dtype}
        ours, theirs = (
            jax.eval_shape(module(**fields).apply, variables, x) for module in (jaxnorm.InstanceNorm, nn.InstanceNorm)
        )
        assert ours.dtype == theirs.dtype, fields


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype", "result"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),
        ("float16", None, "float32", "float32"),
        ("bfloat16", None, "bfloat16", "bfloat16"),
        ("float16", None, "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "float32", "bfloat16"),
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("float16", "float16", "float16", "float16"),
        ("float16", "bfloat16", "float32", "bfloat16"),
        ("int32", None, "float32", "float32"),
        ("uint8", "bfloat16", "float32", "bfloat16"),
        ("bool", None, "bfloat16", "bfloat16"),
    ],
)
def test_same_results_in_every_dtype(x_dtype, dtype, param_dtype, result):
    fields = {"dtype": dtype, "param_dtype": param_dtype}
    x = jnp.asarray(10 * abs(normal(*SHAPE)) if x_dtype == "uint8" else normal(*SHAPE)).astype(x_dtype)
    variables = parameters(param_dtype)
    ours, theirs = jaxnorm.InstanceNorm(**fields).apply(variables, x), FLAX(**fields).apply(variables, x)
    assert ours.dtype == theirs.dtype == result
    # |xhat scale| + |bias| with |xhat| <= sqrt(M), and both round.
    magnitude = (np.sqrt(30) + 1) * float(abs(variables["params"]["scale"]).max())
    bound = 2 * tolerance.forward(result, 30, magnitude)
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("x_dtype", ["int16", "int32", "float32"])
def test_statistics_see_the_input_as_it_comes(x_dtype, dtype):
    # bfloat16 has 8 bits: 1000, ..., 1003 are one number in it; float16 does not reach 70000.
    offset = 1000 if dtype == "bfloat16" or x_dtype == "int16" else 70000
    x = (offset + np.random.default_rng(0).integers(0, 4, SHAPE)).astype(x_dtype)
    fields = {"dtype": dtype, "use_scale": False, "use_bias": False, "epsilon": 1e-5}
    ours, theirs = jaxnorm.InstanceNorm(**fields).apply({}, x), FLAX(**fields).apply({}, x)
    assert ours.dtype == theirs.dtype == dtype
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((1, 2), keepdims=True)) / np.sqrt(exact.var((1, 2), keepdims=True) + 1e-5)
    bound = tolerance.forward(dtype, 30, abs(exact).max())
    np.testing.assert_allclose(np.asarray(ours, float), exact, rtol=0, atol=bound)


@both_modules
def test_numpy_float64_gives_float32(module):
    x = normal(*SHAPE)
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
@pytest.mark.parametrize("direction", ["from Flax", "to Flax"])
def test_checkpoints_move_both_ways(direction):
    source, target = Net(nn.InstanceNorm), Net(jaxnorm.InstanceNorm)
    if direction == "to Flax":
        source, target = target, source
    x = normal(*SHAPE)
    variables = source.init(jax.random.key(0), x)
    checkpoint = flax.serialization.to_bytes(variables)
    loaded = flax.serialization.from_bytes(target.init(jax.random.key(1), x), checkpoint)
    assert_equal_trees(loaded, variables)
    assert flax.serialization.to_bytes(loaded) == checkpoint
    # The second layer multiplies what the first one rounds, with each of 36 weights.
    assert_close_trees(target.apply(loaded, x), source.apply(variables, x), 36, positions=30)


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


@pytest.mark.slow
@x64
@pytest.mark.parametrize("transformation", ["remat", "jit", "scan", "vmap", "vmap with shared parameters"])
def test_same_results_under_flax_transformations(transformation):
    ours, theirs = (Lifted(norm, transformation) for norm in (InstanceNorm, TwoPass))
    x = normal(2, *SHAPE)
    assert_same_module(ours, theirs, x, positions=60)


@x64
def test_remat_with_activation_and_residual():
    fields = {"activation": jnp.tanh, **RANDOM}
    x, residual = normal(*SHAPE), normal(*SHAPE, seed=1)
    plain = jaxnorm.InstanceNorm(**fields)
    assert_same_module(nn.remat(jaxnorm.InstanceNorm)(**fields), plain, x, positions=30, residual=residual)


# activation and residual


@x64
@pytest.mark.parametrize(
    "activation",
    [None, functools.partial(nn.leaky_relu, negative_slope=0.2), nn.silu],
    ids=["none", "leaky_relu", "silu"],
)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_fused_equals_composed(with_residual, activation):
    x = normal(*SHAPE)
    residual = normal(*SHAPE, seed=1) if with_residual else None
    variables = parameters("float32")
    layer = jaxnorm.InstanceNorm(activation=activation, implementation="xla")

    def fused(variables, x, residual):
        return layer.apply(variables, x, residual=residual)

    def composed(variables, x, residual):
        y = FLAX().apply(variables, x)
        y = y if residual is None else y + residual
        return y if activation is None else activation(y)

    results = [result_and_gradients(function, variables, x, residual) for function in (fused, composed)]
    assert_close_trees(*results, x.size, positions=30)


@x64
def test_activation_and_residual_with_a_mask():
    x, residual, mask = normal(*SHAPE), normal(*SHAPE, seed=1), np.random.default_rng(1).random(SHAPE) > 0.4
    variables = parameters("float32")
    fused = jaxnorm.InstanceNorm(activation=jnp.tanh).apply(variables, x, residual=residual, mask=mask)
    composed = jnp.tanh(FLAX().apply(variables, x, mask=mask) + residual)
    assert_close_trees(fused, composed, 1, positions=30)


def test_fused_result_is_rounded_once():
    x, residual = (jnp.asarray(normal(*SHAPE, seed=seed), jnp.bfloat16) for seed in range(2))
    layer = jaxnorm.InstanceNorm(dtype=jnp.bfloat16, activation=jnp.tanh, epsilon=1e-5)
    variables = layer.init(jax.random.key(0), x)
    y = layer.apply(variables, x, residual=residual)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    z = (exact - exact.mean((1, 2), keepdims=True)) / np.sqrt(exact.var((1, 2), keepdims=True) + 1e-5)
    z = z + np.asarray(residual, np.float64)
    # |tanh z| < 1, and it takes over the error of z as it is at most.
    error = tolerance.arithmetic("bfloat16", 30) * abs(z).max()
    bound = error + tolerance.forward("bfloat16", 30, 1)
    np.testing.assert_allclose(np.asarray(y, np.float64), np.tanh(z), rtol=0, atol=bound)


@pytest.mark.parametrize("residual_dtype", ["float16", "bfloat16", "float32"])
def test_residual_does_not_change_the_output_dtype(residual_dtype):
    x, residual = jnp.asarray(normal(*SHAPE), jnp.bfloat16), jnp.asarray(normal(*SHAPE), residual_dtype)
    for dtype, result in ((None, "float32"), ("bfloat16", "bfloat16")):
        y, _ = jaxnorm.InstanceNorm(dtype=dtype).init_with_output(jax.random.key(0), x, residual=residual)
        assert y.dtype == result


# axis_name: the positions of an instance spread over shards, (shards, N, rows, columns, C)

SHARDS = 8
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
SHARDED_SHAPE = (SHARDS, 2, 3, 4, 3)


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
        functools.partial(apply_to_shards, module, mapping), parameters("float64"), normal(*SHARDED_SHAPE)
    )
    return jax.tree.map(np.asarray, results)


def run_on_whole(groups):
    groups = [range(SHARDS)] if groups is None else groups
    module = jaxnorm.InstanceNorm(axis_name="shards")
    return result_and_gradients(
        functools.partial(apply_to_whole, module, groups), parameters("float64"), normal(*SHARDED_SHAPE)
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
def test_shards_under_vmap():
    assert_close_trees(
        run_on_shards(jaxnorm.InstanceNorm, "vmap", None),
        run_on_whole(None),
        np.prod(SHARDED_SHAPE),
        positions=SHARDS * 12,
    )


@x64
def test_shards_with_a_mask_that_counts_differently_on_each():
    x, variables = normal(*SHARDED_SHAPE), parameters("float64")
    mask = np.random.default_rng(3).random(SHARDED_SHAPE) > np.linspace(0.1, 0.9, SHARDS).reshape(SHARDS, 1, 1, 1, 1)
    y = apply_to_shards(jaxnorm.InstanceNorm(axis_name="shards"), "vmap", variables, x, mask)

    def whole(v):
        return np.moveaxis(v, 0, 1).reshape(2, SHARDS * 3, 4, 3)

    expected = jaxnorm.InstanceNorm().apply(variables, whole(x), mask=whole(mask))
    assert_close_trees(whole(np.asarray(y)), expected, 1, positions=SHARDS * 12)


@pytest.mark.slow
@x64
@pytest.mark.parametrize(
    ("mapping", "groups"),
    [
        ("shard_map", None),
        ("shard_map without check_vma", None),
        ("pmap", None),
        # JAX has no axis_index_groups in vmap, nor in shard_map with check_vma.
        ("shard_map without check_vma", GROUPS),
        ("pmap", GROUPS),
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
            module(axis_name="shards", axis_index_groups=GROUPS), "vmap", parameters("float64"), normal(*SHARDED_SHAPE)
        )


# InstanceNorm2D


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
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
    data, variables = normal(5, 3, 4, 6), parameters("float64")
    results = [
        result_and_gradients(layer.apply, variables, data)
        for layer in (jaxnorm.InstanceNorm2D(3), FLAX(feature_axes=1, epsilon=1e-5))
    ]
    assert_close_trees(*results, data.size, positions=24)
