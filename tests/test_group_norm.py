"""group_norm: numbers and gradients against float64, what unusual groups are, transformations, and relations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from checked_call import check, draw
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm import xla
from jaxnorm.__main__ import main
from jaxnorm.call import Operands
from jaxnorm.layout import Layout
from jaxnorm.platforms import Cpu, Divided, Generic, Gpu

pytestmark = pytest.mark.usefixtures("strict_dtypes")
every_implementation = pytest.mark.parametrize("implementation", ["xla", "reference"])
every_layout = pytest.mark.parametrize("channel_axis", [1, -1], ids=["channels-first", "channels-last"])


def laid_out(x, channel_axis):
    """(N, C, *spatial) with the channels where they are wanted."""
    return np.moveaxis(x, 1, channel_axis)


def per_channel(values):
    """(C,) to broadcast against (N, C, H, W)."""
    return np.asarray(values).reshape(1, -1, 1, 1)


def assert_right(x, group_size, channel_axis, where=None, implementation=None, eps=1e-5):
    """y for an x of (N, C, *spatial) against float64, each sample with its own tolerance."""
    x = jnp.asarray(laid_out(x, channel_axis), "float32")
    where = None if where is None else jnp.asarray(laid_out(where, channel_axis))
    options = {"group_size": group_size, "channel_axis": channel_axis, "where": where, "eps": eps}
    y = jax.jit(functools.partial(jaxnorm.group_norm, implementation=implementation, **options))(x)
    want, _ = oracle.instance_norm(x, None, None, eps, channel_axes=(channel_axis,), group_size=group_size, where=where)
    positions = group_size * x[0].size // x.shape[channel_axis]
    for got, wanted in zip(np.float64(y), want, strict=True):
        bound = tolerance.forward("float32", positions, float(np.nanmax(np.abs(wanted), initial=1)))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


# Numbers


@every_implementation
@pytest.mark.parametrize(
    ("dtype", "shape", "axis", "group_size", "options"),
    [
        ("float32", (2, 5, 7, 12), -1, 3, {"activation": "silu", "residual": True}),
        ("float32", (2, 12, 5, 7), 1, 4, {"activation": "gelu", "gamma": "per sample", "beta": "per sample"}),
        ("bfloat16", (3, 4, 16, 32), -1, 8, {"activation": "silu", "residual": True}),
        ("float16", (2, 6, 33), 1, 2, {"activation": "relu"}),
        ("float64", (2, 3, 4, 5, 6), -1, 2, {"activation": "tanh", "residual": True}),
        ("float32", (2, 3, 6, 5), 2, 3, {"gamma": "none", "beta": "none"}),
        # A single group, a single channel, and no positions.
        ("float32", (2, 9, 10), -1, 10, {}),
        ("float32", (2, 8, 1), -1, 1, {}),
        ("float32", (3, 64), 1, 16, {"activation": "silu", "residual": True, "gamma": "per sample"}),
        ("bfloat16", (1, 6), -1, 6, {}),
    ],
    ids=str,
)
def test_numbers_and_gradients(implementation, dtype, shape, axis, group_size, options):
    check(implementation, dtype, shape, (axis,), group_size=group_size, **options)


@every_implementation
@every_layout
@pytest.mark.parametrize("group_size", [8, 512])
def test_offsets_of_channels(group_size, channel_axis, implementation):
    """The channels of a group may lie anywhere, and one of them far from the others."""
    rng, channels = np.random.default_rng(0), np.arange(512)
    offsets = [
        np.full(512, 1e6),
        1e4 * rng.standard_normal(512),
        1e4 * (channels % 8 == 0),
        1e4 * (channels % 8 == 7),
        1e6 + 1e4 * (channels % 8 == 0),
        1e4 * (channels == 0),
    ]
    x = rng.standard_normal((len(offsets), 512, 9, 10)) + np.stack(offsets)[:, :, None, None]
    assert_right(x, group_size, channel_axis, implementation=implementation)


@every_layout
@pytest.mark.parametrize("offset", [0, 1e4])
def test_spreads_of_channels(channel_axis, offset):
    """From 1e-4 to 1e4 in one group."""
    x = np.random.default_rng(0).standard_normal((2, 16, 9, 10)) * per_channel(10.0 ** np.linspace(-4, 4, 16))
    assert_right(x + offset, 8, channel_axis)


@every_implementation
@every_layout
@pytest.mark.parametrize("scale", [1e30, 1e37, "one channel"])
def test_huge_numbers(scale, channel_axis, implementation):
    x = np.random.default_rng(0).standard_normal((2, 6, 9, 10))
    x = x * (np.where(per_channel(np.arange(6)) % 3 == 1, 1e30, 1) if scale == "one channel" else scale)
    assert_right(x, 3, channel_axis, implementation=implementation)


@every_implementation
def test_where_squares_overflow(implementation):
    """As in one instance: the variance counts as infinite, and nothing is NaN."""
    x = np.random.default_rng(0).standard_normal((1, 6, 9, 10)).astype(np.float32)
    x[0, 1, 2, 3] = 3e38
    y = jaxnorm.group_norm(x, group_size=3, implementation=implementation)
    assert np.isfinite(y).all()
    assert_right(x[:, 3:], 3, 1, implementation=implementation)


@every_implementation
def test_constant_groups_are_shifted_to_zero(implementation):
    x = jnp.full((2, 8, 5, 5), 12345.678)
    assert not np.any(jaxnorm.group_norm(x, num_groups=2, implementation=implementation))


@pytest.mark.parametrize("platform", [Cpu, Gpu, Generic, Divided])
@pytest.mark.parametrize(
    ("shape", "axis", "group_size"), [((2, 37, 24), 2, 8), ((2, 24, 37), 1, 3), ((3, 12), 1, 4)], ids=str
)
def test_the_form_of_every_platform(platform, shape, axis, group_size):
    """What XLA is given on GPUs and TPUs, computed on the CPU."""
    x, dy = draw(shape, "float32"), draw(shape, "float32", 1)
    layout = Layout(shape, (axis,), 1, group_size)
    gamma, beta = (jnp.asarray(np.random.default_rng(s).uniform(0.5, 2, layout.instances), "float32") for s in (2, 3))

    @jax.jit
    def passes(x, dy):
        form, operands = platform(layout), Operands(x, gamma, beta)
        y, statistics = xla.forward(form, operands, eps=1e-5, activation=jax.nn.silu)
        return y, xla.backward(form, operands, statistics, dy, activation=jax.nn.silu)

    y, gradients = passes(x, dy)
    options = {"channel_axes": (axis,), "group_size": group_size, "activation": "silu"}
    want, magnitude = oracle.instance_norm(x, gamma, beta, **options)
    positions = layout.positions * group_size
    np.testing.assert_allclose(np.float64(y), want, rtol=0, atol=tolerance.forward("float32", positions, magnitude))
    wanted = oracle.gradients(dy, x, gamma, beta, **options)
    # |gamma| <= 2, |dy| < 8, 1/std < 2 and |xhat| < 8 here.
    atol = tolerance.input_gradient("float32", positions, wanted["x"], scale=4, dz=8, xhat=8)
    np.testing.assert_allclose(np.float64(gradients.x), wanted["x"], rtol=0, atol=atol)
    for name in ("gamma", "beta"):
        atol = tolerance.parameter_gradient("float32", "float32", positions, 64 * layout.positions)
        np.testing.assert_allclose(getattr(gradients, name), wanted[name], rtol=0, atol=atol)


# Masks


@every_implementation
@every_layout
@pytest.mark.parametrize("offset", [0, 1e4, 1e6])
def test_masks(offset, channel_axis, implementation):
    """A channel of which nothing counts is normalized by its group; a group of which nothing counts is NaN, alone."""
    rng, channel = np.random.default_rng(0), np.arange(12).reshape(12, 1, 1)
    one_position = (channel % 4 == 2) & (np.arange(90).reshape(9, 10) == 17)
    counted = [True, channel % 4 != 0, channel % 4 != 3, channel // 4 != 1, one_position]
    x = offset + rng.standard_normal((len(counted), 12, 9, 10))
    where = (rng.random(x.shape) < 0.5) & np.stack([np.broadcast_to(mask, x.shape[1:]) for mask in counted])
    where[-1] = one_position
    # Beside a single position, whose variance is 0, the others are far away.
    assert_right(x, 4, channel_axis, where, implementation, eps=1e-2)


@every_implementation
@pytest.mark.parametrize("shape", [(9, 10), (12, 1, 1), (2, 1, 9, 1), (2, 12, 9, 10)], ids=str)
def test_masks_are_broadcast(shape, implementation):
    rng = np.random.default_rng(0)
    x, where = rng.standard_normal((2, 12, 9, 10)).astype(np.float32), rng.random(shape) < 0.6
    norm = functools.partial(jaxnorm.group_norm, num_groups=3, implementation=implementation)
    got, want = (norm(x, where=mask) for mask in (where, np.broadcast_to(where, x.shape)))
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * tolerance.forward("float32", 360, 5))


@every_implementation
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_does_not_count_is_in_no_gradient(bad, implementation):
    """A whole channel and some positions."""
    rng = np.random.default_rng(0)
    x, where = rng.standard_normal((2, 12, 9, 10)).astype(np.float32), rng.random((2, 12, 9, 10)) < 0.6
    where[:, 4] = False

    @jax.jit
    def gradient(x):
        y = functools.partial(jaxnorm.group_norm, num_groups=3, where=where, implementation=implementation)
        return jax.grad(lambda x: jnp.sum(jnp.where(where, jnp.sin(y(x)), 0)))(x)

    got, want = gradient(np.where(where, x, bad)), gradient(np.where(where, x, 0))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert np.isfinite(got).all()


@every_implementation
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_group(bad, implementation):
    x = np.random.default_rng(0).standard_normal((2, 12, 9, 10)).astype(np.float32)
    x[1, 5, 3, 3] = bad

    def norm(x):
        return jaxnorm.group_norm(x, num_groups=3, activation=jax.nn.silu, implementation=implementation)

    y, dx = norm(x), jax.grad(lambda x: jnp.sum(jnp.sin(norm(x))))(x)
    hit = np.zeros((2, 12, 9, 10), bool)
    hit[1, 4:8] = True
    for value in (y, dx):
        np.testing.assert_array_equal(np.isfinite(value), ~hit)


@every_implementation
@every_layout
@pytest.mark.parametrize("shape", [(0, 8, 5), (2, 0, 5), (0, 8)], ids=str)
def test_no_samples_and_no_channels(shape, channel_axis, implementation):
    x = jnp.asarray(laid_out(np.zeros(shape), channel_axis), "float32")
    options = {"num_groups": 2, "channel_axis": channel_axis, "implementation": implementation}
    norm = functools.partial(jaxnorm.group_norm, **options)
    for value in (norm(x), jax.grad(lambda x: jnp.sum(norm(x)))(x)):
        assert (value.shape, value.dtype) == (x.shape, x.dtype)


# Relations


def both(function, *arguments):
    """y, and the gradients of <w, y>."""
    y, pullback = jax.vjp(function, *arguments)
    return y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


@every_implementation
@every_layout
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_channel_per_group_is_instance_norm_bit_for_bit(dtype, channel_axis, implementation):
    x, gamma, beta = draw((3, 12, 7, 12), dtype), draw((12,), "float32", 1), draw((3, 12), "float32", 2)
    options = {"channel_axis": channel_axis, "activation": jax.nn.silu, "implementation": implementation}
    groups = jax.jit(functools.partial(both, functools.partial(jaxnorm.group_norm, num_groups=12, **options)))
    instances = jax.jit(functools.partial(both, functools.partial(jaxnorm.instance_norm, **options)))
    jax.tree.map(np.testing.assert_array_equal, groups(x, gamma, beta), instances(x, gamma, beta))


@every_implementation
@every_layout
def test_one_group_is_layer_norm_over_all_but_the_batch(channel_axis, implementation):
    x = draw((3, 12, 7, 12), "float32", offset=100.0)
    y = jaxnorm.group_norm(x, num_groups=1, channel_axis=channel_axis, implementation=implementation)
    x = np.float64(x)
    deviation = x - x.mean((1, 2, 3), keepdims=True)
    want = deviation / np.sqrt((deviation**2).mean((1, 2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.float64(y), want, rtol=0, atol=tolerance.forward("float32", 1008, np.abs(want).max()))


@every_implementation
@every_layout
def test_a_permutation_of_groups_permutes_the_result(channel_axis, implementation):
    x, rng = draw((2, 12, 7, 12), "float32", offset=100.0), np.random.default_rng(0)
    order = (4 * rng.permutation(3)[:, None] + np.arange(4)).ravel()
    norm = functools.partial(jaxnorm.group_norm, group_size=4, channel_axis=channel_axis, implementation=implementation)
    got, want = norm(jnp.take(x, order, channel_axis)), jnp.take(norm(x), order, channel_axis)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * tolerance.forward("float32", 336, 5))


@every_layout
def test_a_permutation_within_groups_permutes_the_result(channel_axis):
    x, rng = draw((2, 12, 7, 12), "float32", offset=100.0), np.random.default_rng(0)
    order = np.concatenate([4 * group + rng.permutation(4) for group in range(3)])
    norm = functools.partial(jaxnorm.group_norm, group_size=4, channel_axis=channel_axis)
    got, want = norm(jnp.take(x, order, channel_axis)), jnp.take(norm(x), order, channel_axis)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * tolerance.forward("float32", 336, 5))


def test_a_group_is_an_instance_of_the_array_that_has_its_channels_as_positions():
    x = draw((2, 6, 5, 4), "float32")
    got = jaxnorm.group_norm(x, num_groups=3)
    want = jaxnorm.instance_norm(x.reshape(2, 3, 2, 5, 4)).reshape(x.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * tolerance.forward("float32", 40, 4))


# Transformations

SHAPE, GROUP = (2, 5, 6, 8), 4


def norm_of(implementation):
    return functools.partial(
        jaxnorm.group_norm, group_size=GROUP, channel_axis=-1, activation=jax.nn.silu, implementation=implementation
    )


def twin(x, gamma=None, beta=None):
    return oracle.twin(x, gamma, beta, channel_axes=(-1,), group_size=GROUP, activation="silu")


def energy(norm):
    return lambda *given: jnp.sum(jnp.sin(norm(*given)))


def gradient(norm):
    return jax.grad(energy(norm), (0, 1, 2))


def hessian_vector(norm):
    return lambda *given: jax.jvp(gradient(norm), given, given)[1]


def penalty(norm):
    return jax.grad(lambda *given: sum(jnp.sum(jnp.sin(g)) for g in gradient(norm)(*given)), (0, 1, 2))


def in_shard_map(norm):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(norm, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"))


# What each makes of the relative error of one call.
TRANSFORMATIONS = {
    "vmap": (jax.vmap, 3, 6),
    "vmap of vmap": (lambda norm: jax.vmap(jax.vmap(norm)), (3, 2), 6),
    "vmap of gradient": (lambda norm: jax.vmap(gradient(norm)), 3, 30),
    "gradient of vmap": (lambda norm: gradient(jax.vmap(norm)), 3, 30),
    "checkpoint": (lambda norm: gradient(jax.checkpoint(norm)), (), 30),
    "shard_map": (lambda norm: gradient(in_shard_map(norm)), (), 30),
    "Hessian-vector product": (hessian_vector, (), 300),
    "gradient penalty": (penalty, (), 300),
    "vmap of Hessian-vector product": (lambda norm: jax.vmap(hessian_vector(norm)), 2, 300),
}


@pytest.mark.slow
@every_implementation
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(name, implementation):
    transform, lead, factor = TRANSFORMATIONS[name]
    lead = lead if isinstance(lead, tuple) else (lead,)
    given = (
        draw((*lead, *SHAPE), "float32"),
        jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, (*lead, 8)), "float32"),
        draw((*lead, 8), "float32", 2),
    )
    got = jax.jit(transform(norm_of(implementation)))(*given)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        want = jax.jit(transform(twin))(*(jnp.asarray(value, "float64") for value in given))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        atol = factor * tolerance.arithmetic("float32", 30 * GROUP) * float(np.abs(w).max())
        np.testing.assert_allclose(np.float64(g), w, rtol=0, atol=atol)


def test_forward_mode_by_the_reference():
    x, dx = draw(SHAPE, "float32"), draw(SHAPE, "float32", 1)
    _, got = jax.jvp(norm_of("reference"), (x,), (dx,))
    with jax.enable_x64(True):
        _, want = jax.jvp(twin, *((jnp.asarray(value, "float64"),) for value in (x, dx)))
    atol = 6 * tolerance.arithmetic("float32", 30 * GROUP) * float(np.abs(want).max())
    np.testing.assert_allclose(np.float64(got), want, rtol=0, atol=atol)
    with pytest.raises(TypeError, match="forward mode"):
        jax.jvp(norm_of(None), (x,), (dx,))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "shape"), [("n, h, w, 8", (3, 5, 6, 8)), ("n, 8", (3, 8))])
def test_exports_with_symbolic_sizes(sizes, shape):
    def step(x):
        return jax.value_and_grad(energy(norm_of(None)))(x)

    described = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), jnp.float32)
    exported = export.deserialize(export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(described).serialize())
    x = draw(shape, "float32")
    for got, want in zip(jax.tree.leaves(exported.call(x)), jax.tree.leaves(step(x)), strict=True):
        bound = 60 * tolerance.arithmetic("float32", x.size) * max(1, float(jnp.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
def test_positions_spread_over_a_mapped_axis(with_mask):
    """By axis_name, whose shards are unlike."""
    x = draw((4, 2, 3, 6, 8), "float32") + 100 * jnp.arange(4.0).reshape(4, 1, 1, 1, 1)
    where = np.random.default_rng(0).random(x.shape) < 0.7
    where[..., :4] &= np.arange(4).reshape(4, 1, 1, 1, 1) != 0

    def run(x, where):
        options = {"group_size": GROUP, "channel_axis": -1, "axis_name": "shards"}
        return jaxnorm.group_norm(x, where=where if with_mask else None, **options)

    y = jax.vmap(run, axis_name="shards")(x, where)
    whole = functools.partial(np.concatenate, axis=1)
    options = {"channel_axes": (-1,), "group_size": GROUP, "where": whole(where) if with_mask else None}
    want, magnitude = oracle.instance_norm(whole(x), **options)
    np.testing.assert_allclose(whole(y), want, rtol=0, atol=tolerance.forward("float32", 72 * GROUP, magnitude))


def test_saved_for_the_backward_pass_is_x_and_little_else():
    x = draw((2, 16, 16, 32), "float32")
    _, pullback = jax.vjp(functools.partial(jaxnorm.group_norm, num_groups=8, channel_axis=-1), x)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(pullback))
    assert sizes[-1] == x.size
    assert sum(sizes[:-1]) <= 10 * 2 * 32


# Errors


@pytest.mark.parametrize(
    ("shape", "options", "exception", "parts"),
    [
        ((2, 6, 5), {}, ValueError, ["Either num_groups or group_size", "num_groups=None and group_size=None"]),
        ((2, 6, 5), {"num_groups": 2, "group_size": 3}, ValueError, ["and not both", "num_groups=2 and group_size=3"]),
        ((2, 6, 5), {"num_groups": 4}, ValueError, ["num_groups must divide the 6 channels", "one of [1, 2, 3, 6]"]),
        ((2, 6, 5), {"group_size": 4}, ValueError, ["group_size must divide the 6 channels", "(2, 6, 5)"]),
        ((2, 6, 5), {"num_groups": 0}, ValueError, ["num_groups must divide", "got num_groups=0"]),
        ((2, 6, 5), {"num_groups": -3}, ValueError, ["num_groups must divide", "got num_groups=-3"]),
        ((2, 6, 5), {"num_groups": 2.0}, TypeError, ["num_groups must be an integer", "float 2.0"]),
        ((2, 6, 5), {"num_groups": True}, TypeError, ["num_groups must be an integer", "bool True"]),
        ((6,), {"num_groups": 2}, ValueError, ["rank 2 or more", "got shape (6,)", "x[None]"]),
        ((2, 6, 5), {"num_groups": 2, "channel_axis": (1, 2)}, ValueError, ["along one axis", "(1, 2)", "x.reshape"]),
        ((2, 6, 5), {"num_groups": 2, "channel_axis": 0}, ValueError, ["channel_axis must not be 0"]),
        ((2, 6, 0), {"num_groups": 2}, ValueError, ["at least one spatial position"]),
        ((2, 6, 5), {"num_groups": 2, "gamma": jnp.ones(2)}, ValueError, ["gamma must have shape (6,)", "got (2,)"]),
        ((2, 6, 5), {"num_groups": 2, "implementation": "pallas"}, ValueError, ["it needs a CUDA GPU", "'xla'"]),
    ],
    ids=str,
)
def test_errors(shape, options, exception, parts):
    with pytest.raises(exception, match="(?s)" + ".*".join(map(re.escape, parts))):
        jaxnorm.group_norm(jnp.zeros(shape), **options)


def test_explain():
    x = jax.ShapeDtypeStruct((8, 64, 64, 256), "bfloat16")
    found = jaxnorm.explain(x, num_groups=32, channel_axis=-1, activation=jax.nn.silu, device="H100")
    assert (found.forward.implementation, found.backward.implementation) == ("xla", "xla")
    assert "unproven on this GPU" in str(found)
    kernel = jaxnorm.explain(x, num_groups=32, channel_axis=-1, device="H100", implementation="pallas")
    assert kernel.forward.tile.group_size == kernel.backward.tile.group_size == 8
    instance = jaxnorm.explain(x, channel_axis=-1, activation=jax.nn.silu, device="H100", implementation="xla")
    assert found.backward.bytes_moved == instance.backward.bytes_moved
    with pytest.raises(ValueError, match="group_size must divide"):
        jaxnorm.explain(x, group_size=3, channel_axis=-1)


@pytest.mark.parametrize(
    ("shape", "channel_axis", "dtype", "reason"),
    [
        ((8, 64, 64, 320), -1, "float32", "10 channels per group do not divide the 32 lanes of a block"),
        ((8, 64, 64, 2048), -1, "float32", "64 channels per group do not divide the 32 lanes of a block"),
        ((8, 64, 64, 96), -1, "bfloat16", "3 channels per group do not divide the 64 lanes of a block"),
        ((8, 256, 64, 64), 1, "float32", "the channels must be the last axis"),
    ],
)
def test_explain_says_which_groups_the_kernel_does_not_compute(shape, channel_axis, dtype, reason):
    x = jax.ShapeDtypeStruct(shape, dtype)
    found = jaxnorm.explain(x, num_groups=32, channel_axis=channel_axis, device="H100")
    assert found.forward.implementation == "xla"
    assert reason in found.forward.tile.reason
    assert reason in found.backward.tile.reason


def test_explain_on_the_command_line(capsys):
    assert main(["explain", "8x64x64x256", "--channels-last", "--groups", "32", "--device", "H100"]) == 0
    assert "unproven on this GPU" in capsys.readouterr().out
    assert main(["explain", "8x64x64x256", "--channels-last", "--groups", "30"]) == 2
    assert "num_groups must divide the 256 channels" in capsys.readouterr().err
