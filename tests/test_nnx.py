"""jaxnorm.nnx.InstanceNorm as an NNX module: its state, its views, NNX's transformations.

What it has in common with the linen layer is tested in test_layers.py.
"""

import functools
import inspect
import json

import flax.serialization
import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import oracle
import pytest
import tolerance
from cases import each_value, exhaustive, some
from flax import nnx
from layers import RANDOM, normal

import jaxnorm
from jaxnorm.nnx import InstanceNorm

SHAPE = (2, 5, 6, 3)
POSITIONS = 30
EPSILON = 1e-6
FLAX = functools.partial(nnx.InstanceNorm, use_fast_variance=False)
x64 = pytest.mark.usefixtures("x64")
pytestmark = pytest.mark.slow


def layer(num_features=3, norm=InstanceNorm, **options):
    """A layer whose scale and bias are not 1 and 0."""
    return norm(num_features, **{**RANDOM, **options}, rngs=nnx.Rngs(7))


def assert_is_the_formula(y, module, x, channel_axes=(-1,), **options):
    layers.assert_is_the_formula(y, layers.parameters_of(module), x, channel_axes, **options)


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
    running = {
        "track_running_stats": False,
        "momentum": 0.1,
        "use_running_average": False,
        "stats_axis_name": None,
    }
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
@pytest.mark.parametrize("to", some([InstanceNorm, nnx.InstanceNorm], InstanceNorm), ids=["from Flax", "to Flax"])
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
    run = nnx.jit(lambda module, x: module(x))
    np.testing.assert_allclose(run(target, x), run(source, x), rtol=0, atol=bound)


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


TRANSFORMATIONS = {"jit": nnx.jit, "remat": nnx.remat, "plain": lambda f: f}


@pytest.mark.parametrize(("transformation", "activation"), each_value(list(TRANSFORMATIONS), ["silu", "none"]))
def test_gradients(activation, transformation):
    transformation = TRANSFORMATIONS[transformation]
    x, dy = 100 + normal(*SHAPE), normal(*SHAPE, seed=1)
    module = layer(activation=oracle.ACTIVATIONS[activation].jax)
    loss = transformation(lambda module, x: jnp.sum(dy * module(x)))
    assert_right_gradients(nnx.grad(loss)(module, x), module, x, dy, activation=activation)


@pytest.mark.parametrize("optimizer", some(["nnx.Optimizer", "plain gradient"], "nnx.Optimizer"))
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


def test_shards_under_vmap_of_nnx():
    # Shards of unequal statistics.
    x = normal(SHARDS, 2, 3, 4, 3) + 100 * jnp.arange(SHARDS).reshape(SHARDS, 1, 1, 1, 1)
    module = layer(axis_name="shards")
    y = nnx.vmap(lambda module, x: module(x), in_axes=(None, 0), axis_name="shards")(module, x)
    assert_is_the_formula(jnp.asarray(whole(y)), module, whole(x))


@exhaustive
@pytest.mark.parametrize("groups", [((0, 1), (2, 3)), None], ids=str)
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


# Running averages in the tools of NNX, as with flax.nnx.BatchNorm


class Block(nnx.Module):
    """A model with every kind of mode."""

    def __init__(self, norm=InstanceNorm, *, rngs, **options):
        self.norm = norm(3, rngs=rngs, **options)
        self.plain = InstanceNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.plain(self.norm(x)))


def tracking(**options):
    return InstanceNorm(3, track_running_stats=True, rngs=nnx.Rngs(0), **options)


def averages(module):
    return np.stack([module.mean[...], module.var[...]])


@pytest.mark.parametrize("raise_if_not_found", [True, False])
def test_view(raise_if_not_found):
    x, model = 5 + normal(*SHAPE), Block(track_running_stats=True, rngs=nnx.Rngs(0))
    evaluated = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=raise_if_not_found)
    before = averages(model.norm)
    y = evaluated(x)
    np.testing.assert_array_equal(averages(model.norm), before)
    # With a mean of 0 and a variance of 1.
    np.testing.assert_allclose(evaluated.norm(x), x / np.sqrt(np.float32(1 + EPSILON)), rtol=1e-6)
    assert y.shape == x.shape
    assert (model.norm.use_running_average, model.dropout.deterministic) == (False, False)
    # A view shares the variables with its model.
    model.norm(x)
    np.testing.assert_array_equal(averages(evaluated.norm), averages(model.norm))
    assert not np.array_equal(averages(model.norm), before)
    assert nnx.view(evaluated, use_running_average=None).norm.use_running_average


def test_view_of_a_layer_alone():
    assert nnx.view(tracking(), use_running_average=True).use_running_average
    assert not nnx.view(tracking(use_running_average=True), use_running_average=False).use_running_average


def test_view_info():
    text = nnx.view_info(Block(track_running_stats=True, rngs=nnx.Rngs(0)))
    assert (
        "InstanceNorm:\n  use_running_average: bool | None = None\n    if True, a layer with running averages" in text
    )


@pytest.mark.parametrize(
    ("to_eval", "to_train"),
    [
        (lambda model: model.eval(), lambda model: model.train()),
        (
            lambda model: model.set_attributes(deterministic=True, use_running_average=True),
            lambda model: model.set_attributes(deterministic=False, use_running_average=False),
        ),
        (
            lambda model: model.set_attributes(InstanceNorm, use_running_average=True),
            lambda model: model.set_attributes(InstanceNorm, use_running_average=False),
        ),
    ],
    ids=["eval", "set_attributes", "filtered"],
)
def test_modes(to_eval, to_train):
    x, model = 5 + normal(*SHAPE), Block(track_running_stats=True, rngs=nnx.Rngs(0))
    for mode, changes in ((to_eval, False), (to_train, True)):
        mode(model)
        before = averages(model.norm)
        model(x)
        assert np.array_equal(averages(model.norm), before) != changes


def one_step(module, x):
    module(x)
    return averages(module)


def step_of_merged(module, x):
    graph, batch_stats, rest = nnx.split(module, nnx.BatchStat, ...)

    @jax.jit
    def step(batch_stats):
        merged = nnx.merge(graph, batch_stats, rest)
        merged(x)
        return nnx.state(merged, nnx.BatchStat)

    nnx.update(module, step(batch_stats))
    return averages(module)


def step_of_vmap(module, x):
    """A layer for every part of the batch, with averages of its own; their mean here."""

    make = nnx.vmap(lambda rngs: InstanceNorm(3, track_running_stats=True, rngs=rngs))
    several = make(nnx.Rngs(0).split(len(x)))
    nnx.vmap(lambda layer, part: layer(part[None]))(several, x)
    return averages(several).mean(1)


def step_of_scan(module, x):
    """The parts of the batch one after the other, with a weight that makes it their mean."""
    fresh = InstanceNorm(3, track_running_stats=True, momentum=1.0, rngs=nnx.Rngs(0))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(layer, part):
        layer(part[None])
        return layer, jnp.stack([layer.mean[...], layer.var[...]])

    _, each = run(fresh, x)
    return (1 - module.momentum) * np.array([[0.0], [1.0]]) + module.momentum * np.asarray(each).mean(0)


@pytest.mark.parametrize(
    "step",
    [
        one_step,
        lambda module, x: (nnx.jit(lambda module: module(x))(module), averages(module))[1],
        lambda module, x: (nnx.remat(lambda module: module(x))(module), averages(module))[1],
        lambda module, x: (nnx.grad(lambda module: module(x).sum())(module), averages(module))[1],
        step_of_merged,
        step_of_vmap,
        step_of_scan,
    ],
    ids=["eager", "jit", "remat", "grad", "split and merge", "vmap", "scan"],
)
def test_averages_are_the_same_under_every_transformation(step):
    x = 5 + normal(*SHAPE)
    got = step(tracking(), x)
    exact = np.asarray(x, np.float64)
    want = 0.1 * exact.mean((0, 1, 2)), 0.9 + 0.1 * exact.var((1, 2), ddof=1).mean(0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_linen_and_nnx_wrap_each_other():
    x = 5 + normal(*SHAPE)
    want = one_step(tracking(), x)
    as_linen = nnx.bridge.ToLinen(InstanceNorm, (3,), {"track_running_stats": True})
    variables = as_linen.init(jax.random.key(0), x)
    _, changed = as_linen.apply(variables, x, mutable=["batch_stats"])
    got = changed["batch_stats"]
    np.testing.assert_allclose(np.stack([got["mean"], got["var"]]), want, rtol=1e-5)

    as_nnx = nnx.bridge.ToNNX(jaxnorm.InstanceNorm(track_running_stats=True), rngs=nnx.Rngs(0))
    as_nnx.lazy_init(x, use_running_average=False)
    as_nnx(x, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(np.stack([as_nnx.mean[...], as_nnx.var[...]]), want, rtol=1e-5)


def test_model_surgery():
    """A layer of Flax whose class is replaced is one of ours, with our defaults."""
    x, model = 100 + normal(*SHAPE), Block(nnx.InstanceNorm, **RANDOM, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(model):
        if type(module) is nnx.InstanceNorm:
            module.__class__ = InstanceNorm
    assert_is_the_formula(model.norm(x), model.norm, x)
    nnx.view(model, deterministic=True, use_running_average=True)(x)
    model.eval()
    graph, state = nnx.split(model)
    assert_is_the_formula(nnx.merge(graph, state).norm(x), model.norm, x)
    model.norm.set_attributes(activation=jax.nn.relu)
    assert_is_the_formula(model.norm(x), model.norm, x, activation="relu")


# Imports


PROGRAMS = ["jaxnorm.nnx.InstanceNorm", "from jaxnorm import nnx; nnx.InstanceNorm", "import jaxnorm.nnx; jaxnorm.nnx"]


@pytest.mark.parametrize("program", some(PROGRAMS, PROGRAMS[0]))
def test_flax_is_imported_with_the_layer_only(run_python, program):
    run_python(
        "import sys, jaxnorm\n"
        "assert 'flax' not in sys.modules\n"
        f"{program}\n"
        "assert sys.modules['jaxnorm.nnx'] is jaxnorm.nnx and 'flax' in sys.modules"
    )


def test_the_package_lists_it():
    assert "nnx" in jaxnorm.__all__
