"""Running averages of the layers, against NumPy; as torch.nn.InstanceNorm keeps them."""

import pathlib
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerance
from cases import each_value, exhaustive, some
from flax import nnx
from layers import NNX, Linen, normal

import jaxnorm

STEPS, MOMENTUM, EPSILON = 3, 0.3, 1e-6
SHAPE = (2, 6, 6, 8)
pytestmark = pytest.mark.slow
both = pytest.mark.parametrize("kind", [Linen, NNX])


def tracking(kind, shape, **options):
    return kind(shape, track_running_stats=True, **{"momentum": MOMENTUM, **options})


def train(layer, x, **inputs):
    return layer(x, use_running_average=False, **inputs)


def draw(seed):
    """Batches of one shape, channels-last or channels-first, and a mask or none."""
    rng = np.random.default_rng(seed)
    batch, channels, spatial = rng.integers(1, 4), rng.integers(1, 6), rng.integers(2, 7, rng.integers(1, 4))
    axis = int(rng.choice([1, -1]))
    shape = (batch, channels, *spatial) if axis == 1 else (batch, *spatial, channels)
    batches = (3 + 2 * rng.standard_normal((STEPS, *shape))).astype(np.float32)
    mask = rng.random(shape) < 0.7
    np.moveaxis(mask, axis, 1).reshape(batch, channels, -1)[..., :2] = True
    return batches, axis, mask if rng.random() < 0.5 else None


def by_hand(batches, axis, mask):
    """Means and unbiased variances averaged over the batch, in float64."""
    mean, var = 0.0, 1.0
    for batch in batches:
        counted = np.ones(batch.shape, bool) if mask is None else mask
        x, counted = (np.moveaxis(v, axis, 1).reshape(len(v), v.shape[axis], -1) for v in (np.float64(batch), counted))
        means = np.mean(x, -1, where=counted)
        variances = np.var(x, -1, where=counted, ddof=1)
        mean = (1 - MOMENTUM) * mean + MOMENTUM * means.mean(0)
        var = (1 - MOMENTUM) * var + MOMENTUM * variances.mean(0)
    return mean, var


@both
@pytest.mark.parametrize("case", some(range(4), 0))
def test_the_averages_are_torch_s(kind, case, seed):
    batches, axis, mask = draw((seed, case))
    layer = tracking(kind, batches[0].shape, feature_axes=axis, use_scale=False, use_bias=False)
    given = {} if mask is None else {"mask": mask}
    for x in batches:
        y = train(layer, x, **given)
        # In training the statistics are those of the input.
        plain = jaxnorm.instance_norm(
            x, eps=EPSILON, channel_axis=axis, where=None if mask is None else jnp.asarray(mask)
        )
        np.testing.assert_allclose(y, plain, rtol=0, atol=1e-5)
    mean, var = by_hand(batches, axis, mask)
    relative = 4 * tolerance.arithmetic("float32", batches[0][0].size)
    for got, want in zip(layer.running, (mean, var), strict=True):
        np.testing.assert_allclose(got, want, rtol=relative, atol=relative * 5)

    # In evaluation they are the averages, which stay, and a mask is ignored.
    x = batches[-1]
    shape = [1] * x.ndim
    shape[axis] = -1
    want = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + EPSILON)
    before = [np.asarray(value) for value in layer.running]
    y = layer(x, use_running_average=True, **given)
    np.testing.assert_allclose(y, want, rtol=0, atol=20 * relative)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.running, strict=True))


@both
def test_a_single_position_has_no_unbiased_variance(kind):
    layer = tracking(kind, (3, 1, 2))
    train(layer, np.full((3, 1, 2), 5, np.float32))
    np.testing.assert_allclose(layer.running, [[1.5, 1.5], [0.7, 0.7]], rtol=1e-6)


@both
def test_samples_in_which_nothing_counts_are_left_out(kind):
    x, mask = normal(*SHAPE), np.ones(SHAPE, bool)
    mask[1] = False
    mask[:, :, :, 3] = False
    layer = tracking(kind, SHAPE)
    y = train(layer, x, mask=mask)
    assert np.isfinite(y[0, ..., :3]).all()
    mean, var = by_hand([x[:1]], -1, None)
    counts = np.arange(8) != 3
    for got, want, old in zip(layer.running, (mean, var), (0, 1), strict=True):
        np.testing.assert_allclose(got, np.where(counts, want, old), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("transformation", some([lambda f: f, jax.jit], jax.jit), ids=["", "jit"])
def test_without_a_sample_the_old_values_stay(kind, transformation):
    layer = tracking(kind, SHAPE)
    train(layer, normal(*SHAPE))
    before = layer.running
    run, state = layer.training()
    for x, mask in ((normal(*SHAPE), np.zeros(SHAPE, bool)), (normal(0, *SHAPE[1:]), None)):
        _, after = transformation(run)(state, x, mask=mask)
        np.testing.assert_array_equal(after["mean"], before[0])
        np.testing.assert_array_equal(after["var"], before[1])


@pytest.mark.parametrize(
    ("deviation", "epsilon", "kind"), each_value([3e-6, 1e-5, 1.0, 1e19], [1e-3, 1e-6], [Linen, NNX])
)
def test_the_variance_is_the_variance_itself(kind, deviation, epsilon):
    """Whatever eps is. At 1e19 the variances of 4 samples are 4e38 together, beyond float32."""
    x = np.float32(deviation * np.random.default_rng(0).standard_normal((4, 6, 6, 8)))
    layer = tracking(kind, x.shape, epsilon=epsilon, momentum=1)
    train(layer, x)
    want = np.var(np.float64(x), (1, 2), ddof=1).mean(0)
    np.testing.assert_allclose(layer.running[1], want, rtol=1e-6)


# Statistics over a mapped axis

DEVICES = 4


def check_averages_over_the_axis(kind, mapped):
    """The averages are those of the whole batch, also where a device has samples in which nothing counts.

    mapped: (function, axis) to a function of the state, x, mask, whose averages are of the whole axis.
    """
    x = np.asarray(normal(DEVICES, *SHAPE) + 10 * jnp.arange(DEVICES).reshape(DEVICES, 1, 1, 1, 1))
    mask = np.ones(x.shape, bool)
    mask[1, 0], mask[2] = False, False
    layer = tracking(kind, SHAPE, stats_axis_name="batch")
    run, state = layer.training()

    def step(state, x, mask):
        return run(state, x, mask=mask)

    y, averages = mapped(step)(state, x, mask)
    whole = tracking(kind, SHAPE)
    want = train(whole, x.reshape(-1, *SHAPE[1:]), mask=mask.reshape(-1, *SHAPE[1:]))
    np.testing.assert_allclose(np.reshape(y, want.shape), want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(averages["mean"], whole.running[0], rtol=1e-5)
    np.testing.assert_allclose(averages["var"], whole.running[1], rtol=1e-5)
    return averages


def under_vmap(step):
    # Where they differed along the axis, out_axes=None would be an error.
    return jax.vmap(step, in_axes=(None, 0, 0), out_axes=(0, None), axis_name="batch")


def under_shard_map(step):
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    one, all_of = jax.P("batch"), jax.P()

    def on_device(state, x, mask):
        y, averages = step(state, x[0], mask[0])
        return y[None], averages

    return jax.shard_map(on_device, mesh=mesh, in_specs=(all_of, one, one), out_specs=(one, all_of))


def under_pmap(step):
    mapped = jax.pmap(step, in_axes=(None, 0, 0), axis_name="batch")

    def run(*inputs):
        y, averages = mapped(*inputs)
        for value in averages.values():
            np.testing.assert_array_equal(value, np.broadcast_to(value[:1], value.shape))
        return y, {name: value[0] for name, value in averages.items()}

    return run


@both
def test_averages_over_a_mapped_axis(kind):
    check_averages_over_the_axis(kind, under_vmap)


@exhaustive
@pytest.mark.parametrize("mapping", ["under_shard_map", "under_pmap"])
@pytest.mark.parametrize("kind", ["Linen", "NNX"])
def test_averages_over_devices(run_python, mapping, kind):
    run_python(f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", {DEVICES})
import test_running_statistics as tests
tests.check_averages_over_the_axis(tests.{kind}, tests.{mapping})
""")


def test_averages_over_the_axis_of_flax_s_vmap():
    """With batch_stats that are shared; Flax's BatchNorm does the same with its axis_name."""
    x = normal(DEVICES, *SHAPE) + 10 * jnp.arange(DEVICES).reshape(DEVICES, 1, 1, 1, 1)
    shared = {"variable_axes": {"params": None, "batch_stats": None}, "split_rngs": {"params": False}}
    options = {"track_running_stats": True, "use_running_average": False, "stats_axis_name": "batch"}
    mapped = nn.vmap(jaxnorm.InstanceNorm, axis_name="batch", **shared)(momentum=MOMENTUM, **options)
    variables = mapped.init(jax.random.key(0), x)
    _, changed = mapped.apply(variables, x, mutable=["batch_stats"])
    mean, var = by_hand([x.reshape(-1, *SHAPE[1:])], -1, None)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["var"], var, rtol=1e-5)


def test_averages_over_the_axis_of_nnx_vmap():
    x = normal(DEVICES, *SHAPE) + 10 * jnp.arange(DEVICES).reshape(DEVICES, 1, 1, 1, 1)
    layer = tracking(NNX, SHAPE, stats_axis_name="batch").module
    nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="batch")(layer, x)
    mean, var = by_hand([x.reshape(-1, *SHAPE[1:])], -1, None)
    np.testing.assert_allclose(layer.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], var, rtol=1e-5)


@both
def test_averages_of_instances_that_are_spread(kind):
    """axis_name spreads the positions of an instance, stats_axis_name the samples: both at once."""
    x = normal(2, 3, *SHAPE) + 10 * jnp.arange(3).reshape(1, 3, 1, 1, 1, 1)
    layer = tracking(kind, SHAPE, axis_name="rows", stats_axis_name="batch")
    run, state = layer.training()
    over_rows = jax.vmap(run, in_axes=(None, 0), out_axes=(0, None), axis_name="rows")
    _, averages = jax.vmap(over_rows, in_axes=(None, 0), out_axes=(0, None), axis_name="batch")(state, x)
    whole = np.moveaxis(np.asarray(x), 1, 2).reshape(4, -1, *SHAPE[2:])
    for got, want in zip((averages["mean"], averages["var"]), by_hand([whole], -1, None), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


# Arguments


def test_initializing_updates_nothing():
    layer = jaxnorm.InstanceNorm(track_running_stats=True, use_running_average=False, stats_axis_name="batch")
    variables = layer.init(jax.random.key(0), np.full((3, 4, 2), 5, np.float32))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0, 0])


def test_without_running_averages_there_are_none():
    x = np.ones((2, 4, 3), np.float32)
    assert set(jaxnorm.InstanceNorm().init(jax.random.key(0), x)) == {"params"}
    layer = jaxnorm.nnx.InstanceNorm(3, rngs=nnx.Rngs(0))
    assert not nnx.state(layer, nnx.BatchStat)
    # eval() of a whole model sets the attribute of every layer.
    layer.eval()
    np.testing.assert_array_equal(layer(x), np.zeros_like(x))


@both
def test_use_running_average_needs_running_averages(kind):
    message = "needs running averages: got track_running_stats=False"
    with pytest.raises(ValueError, match=message):
        kind(SHAPE)(normal(*SHAPE), use_running_average=True)
    with pytest.raises(ValueError, match=message):
        kind(SHAPE, use_running_average=True)


@both
def test_use_running_average_must_be_said(kind):
    """In our own words; Flax's BatchNorm raises as well."""
    layer = tracking(kind, SHAPE, use_running_average=None)
    with pytest.raises(ValueError, match=r"use_running_average must be True or False .* got None\. Pass .*False in tr"):
        layer(normal(*SHAPE))


@both
def test_the_call_overrides_the_layer(kind):
    layer, x = tracking(kind, SHAPE, use_running_average=True), 5 + normal(*SHAPE)
    layer(x)
    np.testing.assert_array_equal(layer.running[0], np.zeros(8))
    train(layer, x)
    assert (np.asarray(layer.running[0]) > 1).all()


@both
@pytest.mark.parametrize("momentum", [1.5, -1])
def test_momentum_lies_between_0_and_1(kind, momentum):
    message = rf"momentum must lie in \[0, 1\].*got {momentum}\. Flax's momentum of 0\.9 is 0\.1"
    with pytest.raises(ValueError, match=message):
        tracking(kind, SHAPE, momentum=momentum)


@both
def test_a_momentum_of_flax_s_kind_warns_once(kind):
    with warnings.catch_warnings(record=True) as caught:
        # As Python does by default.
        warnings.simplefilter("default")
        for momentum in (0, 0.1, 0.5, 1):
            tracking(kind, SHAPE, momentum=momentum)
        assert not caught
        for _ in range(3):
            tracking(kind, SHAPE, momentum=0.9)
    assert len(caught) == 1
    assert "replaces 90% of the running statistics" in str(caught[0].message)
    assert "Flax's momentum of 0.9 is 0.1 here" in str(caught[0].message)
