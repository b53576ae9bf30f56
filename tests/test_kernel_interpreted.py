"""The fused kernel in the GPU interpreter: no races, and its numbers against float64.

What the interpreter cannot see is in test_kernel_compiled.py: whether it compiles, registers, bytes moved.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import each_value, exhaustive, pairwise
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm import pallas_kernel
from jaxnorm.gpu.devices import DEVICES, Device
from jaxnorm.gpu.tile import bulk_tile, find_tile, fits, plain_tile, span_tile

pytestmark = [pytest.mark.slow, pytest.mark.kernel, pytest.mark.timeout(180)]

# float32 rows of 32 bytes for channels-last; channels-first in rows of 64 bytes, and small instances.
LAST, FIRST, SMALL, SPAN = (2, 225, 8), (3, 1008, 1), (18, 196, 1), (8, 77, 1)


@pytest.fixture(scope="module", autouse=True)
def _quickly_compiled():
    """The programs of the interpreter take longer to optimize than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiles(view, dtype, residual, how="bulk", parts=None):
    """The forward and the backward tile.

    Args:
      view, dtype, residual: of the call.
      how: "bulk" or "plain" copies, or a function of the number of arrays.
      parts: blocks that share an instance; None is the choice for an H100 or A100.
    """
    itemsize = jnp.dtype(dtype).itemsize
    numbers = [arrays + residual for arrays in (1, 2)]
    if callable(how):
        return [how(arrays) for arrays in numbers]
    if parts is None:
        device = DEVICES[{"bulk": "H100", "plain": "A100"}[how]]
        return [find_tile(view, itemsize, arrays, device) for arrays in numbers]
    batch, positions, lanes = view
    reduces, shape = "rows", view
    if lanes == 1:
        lanes = 4 if positions % 8 else 8
        reduces, shape = "both", (batch, positions // lanes, lanes)
    make = {"bulk": bulk_tile, "plain": plain_tile}[how]
    return [make(reduces, shape, lanes, parts, itemsize, arrays) for arrays in numbers]


def run(function, *arguments):
    """The function in the interpreter, which must have seen no race."""
    parameters = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")
    try:
        with plgpu.force_gpu_interpret_mode(parameters):
            results = jax.block_until_ready(function(*arguments))
        assert not interpret_pallas_call.get_races().races_found
    finally:
        interpret_pallas_call.gpu_callbacks.reset_gpu_interpret_mode_state()
    return results


@functools.partial(jax.jit, static_argnames=("eps", "activation", "tile"))
def forward(*given, **options):
    """Compiled once for a view, however many tests look at it."""
    return pallas_kernel.forward(*given, **options)


@functools.partial(jax.jit, static_argnames=("activation", "tile"))
def backward(*given, **options):
    return pallas_kernel.backward(*given, **options)


def data(view, dtype, *, residual=False, offset=0.0, seed=0):
    """x, gamma, beta, residual, dy."""
    rng = np.random.default_rng(seed)
    draw = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    values = (view[0], 1, view[2])
    x = jnp.asarray(rng.standard_normal(view) + offset, dtype)
    gamma, beta = 1 + draw(values, jnp.float32) / 4, draw(values, jnp.float32)
    return x, gamma, beta, draw(view, dtype) if residual else None, draw(view, dtype)


def forward_and_backward(arguments, activation="none", eps=1e-5, how="bulk", parts=None):
    """y, the moments and the gradients."""
    x, gamma, beta, residual, dy = arguments
    function = oracle.ACTIVATIONS[activation].jax
    forward_tile, backward_tile = tiles(x.shape, x.dtype, residual is not None, how, parts)

    first = functools.partial(forward, eps=eps, activation=function, tile=forward_tile)
    second = functools.partial(backward, activation=function, tile=backward_tile)
    y, moments = run(first, x, gamma, beta, residual)
    return y, moments, run(second, x, moments, gamma, beta, residual, dy)


def check(arguments, activation="none", **options):
    """Everything against float64, within the tolerances that the dtypes imply."""
    x, gamma, beta, residual, dy = arguments
    dtype, positions = x.dtype.name, x.shape[1]
    y, moments, gradients = forward_and_backward(arguments, activation, **options)
    _, variance = oracle.moments(x, (2,))
    np.testing.assert_allclose(moments.variance, variance, rtol=2 * tolerance.arithmetic(dtype, positions))
    given = {"channel_axes": (2,), "activation": activation}
    y64, magnitude = oracle.instance_norm(x, gamma[:, 0], beta[:, 0], residual=residual, **given)
    np.testing.assert_allclose(np.float64(y), y64, rtol=0, atol=tolerance.forward(dtype, positions, magnitude))

    added = jnp.zeros_like(x) if residual is None else residual
    want = oracle.gradients(dy, x, gamma[:, 0], beta[:, 0], added, **given)
    xhat, _ = oracle.instance_norm(x, channel_axes=(2,))
    dz = want["residual"]
    scale = float(np.max(np.abs(gamma) / np.sqrt(oracle.moments(x, (2,))[1] + 1e-5)))
    sizes = {"scale": scale, "dz": float(np.abs(dz).max()), "xhat": float(np.abs(xhat).max())}
    bound = tolerance.input_gradient(dtype, positions, want["x"], **sizes, keeps_dz=activation != "none")
    np.testing.assert_allclose(np.float64(gradients.x), want["x"], rtol=0, atol=bound)
    for name, terms in (("gamma", dz * xhat), ("beta", dz)):
        bound = tolerance.parameter_gradient(dtype, "float32", positions, float(np.abs(terms).sum(1).max()))
        np.testing.assert_allclose(getattr(gradients, name)[:, 0], want[name], rtol=0, atol=bound)
    if residual is None:
        assert gradients.residual is None
    else:
        bound = (2 * tolerance.arithmetic(dtype, positions) + tolerance.unit(dtype)) * float(np.abs(dz).max())
        np.testing.assert_allclose(np.float64(gradients.residual), dz, rtol=0, atol=bound * (1 + magnitude))


@pytest.mark.parametrize(
    ("view", "dtype", "residual"),
    pairwise([LAST, FIRST, SMALL], ["float32", "bfloat16", "float16"], [False, True]),
)
def test_layouts_and_dtypes(view, dtype, residual):
    if view == SMALL and dtype != "float32":
        view = (18, 200, 1)  # 196 positions of 2 bytes are not a multiple of 16 bytes
    check(data(view, dtype, residual=residual), "relu" if residual else "none")


@pytest.mark.parametrize(
    ("view", "cluster"),
    [
        ((1, 1001, 8), 2),
        ((1, 2100, 1), 4),
        *(pytest.param((1, 1001, 8), cluster, marks=exhaustive) for cluster in (1, 4, 8)),
        *(pytest.param((1, 2100, 1), cluster, marks=exhaustive) for cluster in (1, 2, 8)),
    ],
)
def test_clusters_and_ragged_rows(view, cluster):
    check(data(view, "float32", offset=3.0), "silu", parts=cluster)


def _whole(copies, meeting, parts, view, itemsize):
    """The tiles of instances that are held whole, by the number of arrays."""
    *_, lanes = view
    reduces, shape = ("rows", view) if lanes > 1 else ("both", (view[0], view[1] // 8, 8))
    if copies == "plain":
        return lambda arrays: plain_tile(reduces, shape, shape[2], parts, itemsize, arrays)
    return lambda arrays: bulk_tile(reduces, shape, shape[2], parts, itemsize, arrays, meeting)


WAYS = [
    *(("bulk", meeting) for meeting in ("alone", "cluster", "group")),
    *(("plain", meeting) for meeting in ("alone", "group")),
    ("span", "alone"),
]


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=exhaustive) for seed in (2, 3))])
@pytest.mark.parametrize(("copies", "meeting"), WAYS)
def test_every_way_to_copy_and_to_meet(copies, meeting, seed):
    """On shapes that chance chooses. A group is a cluster here, of any size."""
    rng = np.random.default_rng([seed, WAYS.index((copies, meeting))])
    dtype = rng.choice(["float32", "bfloat16"])
    itemsize, activation, residual = jnp.dtype(dtype).itemsize, rng.choice(["none", "silu"]), bool(rng.integers(2))
    parts = {"alone": 1, "cluster": int(rng.choice([2, 4])), "group": int(rng.integers(2, 5))}[meeting]
    batch, positions = int(rng.integers(1, 3)), int(rng.integers(200, 500)) * parts
    if copies == "span":
        view = (8 * batch, positions, 1)
        how = functools.partial(span_tile, 8 * batch, positions, itemsize)
    else:
        view = (batch, positions, 32 // itemsize) if rng.integers(2) else (batch, 8 * positions, 1)
        how = _whole(copies, meeting, parts, view, itemsize)
    tile = how(1 + residual)
    print(f"seed {seed}: {view} {dtype} {activation} residual={residual}\n{tile}")
    assert (tile.copies, tile.synchronization) == (copies, meeting)
    check(data(view, dtype, residual=residual, offset=rng.normal()), activation, how=how)


@pytest.mark.parametrize(
    ("view", "parts", "dtype"),
    [((1, 4600, 1), 9, "bfloat16"), pytest.param((1, 349, 32), 11, "float32", marks=exhaustive)],
)
def test_more_parts_than_a_cluster_has(view, parts, dtype):
    """They are merged as rows of a chunk, or its positions; the last ones of both are nobody's."""
    how = _whole("bulk", "group", parts, view, jnp.dtype(dtype).itemsize)
    assert how(1).blocks_per_instance == parts
    check(data(view, dtype, residual=True, offset=3.0), "silu", how=how)


@exhaustive
def test_a_group_where_a_cluster_would_do():
    """Clusters of 8 would leave SMs of this GPU idle."""
    view, device = (3, 5001, 8), Device((9, 0), 20, 40 * 1024)
    assert fits(bulk_tile("rows", view, 8, 8, 4, 1), device)
    tile = find_tile(view, 4, 1, device)
    assert (tile.synchronization, tile.blocks_per_instance) == ("group", 10)
    check(data(view, "float32", offset=-2.0), "gelu", how=lambda arrays: find_tile(view, 4, arrays, device))


@pytest.mark.parametrize(
    "view",
    [(1, 1001, 4), (2, 3, 32), pytest.param((2, 70, 64), marks=exhaustive), pytest.param((1, 1, 8), marks=exhaustive)],
)
def test_rows_of_every_width(view):
    """16 bytes, 128 bytes, fewer rows than an instruction covers, a single one."""
    check(data(view, "float32"))


@pytest.mark.parametrize("cluster", [4, pytest.param(8, marks=exhaustive)])
def test_blocks_of_a_cluster_that_hold_nothing(cluster):
    view = (1, 130, 8)
    tile, _ = tiles(view, "float32", False, parts=cluster)
    assert (cluster - 1) * tile.block_rows >= view[1]
    check(data(view, "float32", offset=-5.0), parts=cluster)


@exhaustive
@pytest.mark.parametrize("activation", [name for name in oracle.ACTIVATIONS if name not in ("none", "relu")])
def test_activations(activation):
    check(data((1, 100, 8), "float32", residual=True), activation)


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize(
    ("view", "cluster"),
    [
        ((1, 4096, 4), 2),
        ((4, 200, 1), None),
        pytest.param((1, 4096, 4), 1, marks=exhaustive),
        pytest.param((2, 4096, 1), 2, marks=exhaustive),
    ],
)
def test_offsets(view, cluster, offset):
    """The bounds of test_offsets.py."""
    x, _, _, _, dy = data(view, "float32", offset=offset)
    ones = jnp.ones((view[0], 1, view[2]), jnp.float32)
    y, _, gradients = forward_and_backward((x, ones, 0 * ones, None, dy), parts=cluster)
    y64, _ = oracle.instance_norm(x, channel_axes=(2,))
    np.testing.assert_allclose(y, y64, rtol=0, atol=3e-6)
    dx64 = oracle.gradients(dy, x, channel_axes=(2,))["x"]
    np.testing.assert_allclose(gradients.x, dx64, rtol=0, atol=1e-5 * np.abs(dx64).max())


def test_the_first_element_is_an_outlier():
    """It is what the first sums are around: were it the center, the squares would lose all but a few digits."""
    x, gamma, beta, residual, dy = data((1, 4096, 4), "float32")
    check((x.at[:, 0].set(1e3), gamma, beta, residual, dy), parts=2)


@pytest.mark.parametrize(
    ("view", "cluster"),
    [
        (LAST, 2),
        (SPAN, None),
        *(pytest.param(*case, marks=exhaustive) for case in ((LAST, None), (FIRST, None), (FIRST, 2), (SMALL, None))),
    ],
)
def test_constant_instances(view, cluster):
    """Exactly beta, whatever the constant; finite gradients."""
    _, gamma, beta, _, dy = data(view, "float32")
    constants = 0.1 + 1e3 * jnp.arange(gamma.size, dtype=jnp.float32).reshape(gamma.shape)
    x = jnp.broadcast_to(constants, view)
    y, moments, gradients = forward_and_backward((x, gamma, beta, None, dy), "gelu", parts=cluster)
    np.testing.assert_array_equal(moments.center + moments.delta, constants)
    np.testing.assert_allclose(y, np.broadcast_to(jax.nn.gelu(beta), view), rtol=1e-6, atol=1e-7)
    assert all(np.isfinite(g).all() for g in gradients if g is not None)
    y, _, _ = forward_and_backward((x, gamma, beta, None, dy), parts=cluster)
    np.testing.assert_array_equal(y, np.broadcast_to(beta, view))


@pytest.mark.parametrize(("view", "bad"), each_value([LAST, FIRST, SMALL, SPAN], [np.nan, np.inf]))
def test_nan_stays_in_its_instance(view, bad):
    x, gamma, beta, _, dy = data(view, "float32")
    clean = forward_and_backward((x, gamma, beta, None, dy))
    spoilt = forward_and_backward((x.at[1, 5, 0].set(bad), gamma, beta, None, dy))
    others = np.ones((view[0], 1, view[2]), bool)
    others[1, 0, 0] = False
    assert np.isnan(spoilt[0][1, :, 0]).all()
    for got, want in zip(jax.tree.leaves(spoilt), jax.tree.leaves(clean), strict=True):
        everywhere = np.broadcast_to(others, got.shape)
        np.testing.assert_array_equal(np.asarray(got)[everywhere], np.asarray(want)[everywhere])


@pytest.fixture
def x64_in_all_threads():
    """The thread blocks of a cluster are threads, which jax.enable_x64 of this one does not reach."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    # Without optimizations XLA computed one of 3600 elements of a gradient with an error of 1e-4 here.
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize(
    ("view", "cluster"),
    [(LAST, 2), *(pytest.param(*case, marks=exhaustive) for case in ((LAST, 1), (FIRST, 1), (FIRST, 2)))],
)
@pytest.mark.usefixtures("x64_in_all_threads")
def test_with_x64(view, cluster):
    """Python numbers are 64 bits wide then; the kernel's own are not."""
    check(data(view, "float32", residual=True, offset=3.0), "exact_gelu", parts=cluster)


@exhaustive
@pytest.mark.parametrize("view", [LAST, FIRST, SMALL], ids=["last", "first", "small"])
def test_without_the_store_of_newer_jax(view, monkeypatch):
    """Before 0.12 Mosaic GPU stores by assignment."""
    monkeypatch.delattr(plgpu, "store", raising=False)
    # What was traced with the store must not be taken here, nor what is traced without it elsewhere.
    jax.clear_caches()
    check(data(view, "float32", residual=True), "relu")
    jax.clear_caches()


@pytest.mark.parametrize(
    ("view", "cluster"),
    [(LAST, None), (SMALL, None), (SPAN, None), (LAST, 2), pytest.param(FIRST, None, marks=exhaustive)],
)
def test_huge_numbers(view, cluster):
    """Squares beyond float32: right all the same, or beta where even the unit of the first element does not help."""
    x, gamma, beta, _, dy = data(view, "float32", offset=3.0)
    sizes = jnp.resize(jnp.array([1e15, 1e20, 1e30], jnp.float32), gamma.shape)
    x = (x * sizes).at[0, :, 0].set(1e20)
    x = x.at[-1, 0, -1].set(0.0).at[-1, 1:, -1].mul(1e25 / sizes[-1, 0, -1])
    y, moments, gradients = forward_and_backward((x, gamma, beta, None, dy), parts=cluster)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves((y, moments[:3], gradients)))
    with np.errstate(over="ignore"):
        variance = np.float32(oracle.moments(x, (2,))[1])
    assert np.isinf(variance).any()
    rtol = 2 * tolerance.arithmetic("float32", view[1])
    np.testing.assert_allclose(moments.variance, variance, rtol=rtol)
    y64, magnitude = oracle.instance_norm(x, gamma[:, 0], beta[:, 0], channel_axes=(2,))
    y64[-1, :, -1] = beta[-1, 0, -1]
    np.testing.assert_allclose(y, y64, rtol=0, atol=tolerance.forward("float32", view[1], magnitude))
    xhat, magnitude = oracle.instance_norm(x, channel_axes=(2,))
    xhat[-1, :, -1] = 0
    bound = tolerance.parameter_gradient("float32", "float32", view[1], float(np.abs(dy * xhat).sum(1).max()))
    np.testing.assert_allclose(gradients.gamma[:, 0], (dy * xhat).sum(1), rtol=0, atol=bound)


def test_an_activation_with_a_steep_derivative_beyond_the_end():
    """The rows beyond a ragged end are zeros, far from the data: their derivative must not get into the sums."""
    x, gamma, beta, _, dy = data((1, 225, 8), "float32", offset=1e6)
    _, _, gradients = forward_and_backward((x, gamma, beta, None, dy), "gelu")
    assert all(np.isfinite(g).all() for g in gradients if g is not None)


def test_without_its_barrier_the_exchange_races(monkeypatch):
    """The detector sees what it is there for."""
    monkeypatch.setattr(plgpu, "barrier_arrive", lambda barrier: None)
    x, gamma, beta, _, _ = data((1, 1024, 8), "float32")
    tile, _ = tiles(x.shape, x.dtype, False, parts=2)
    waiting = plgpu.barrier_wait
    monkeypatch.setattr(
        plgpu, "barrier_wait", lambda barrier: None if "cluster_barrier" in str(barrier) else waiting(barrier)
    )

    @jax.jit
    def without_barrier(x, gamma, beta):
        return pallas_kernel.forward(x, gamma, beta, None, eps=1e-5, activation=None, tile=tile)

    # JAX before 0.12 notes the race, and raises nothing.
    with pytest.raises((jax.errors.JaxRuntimeError, AssertionError), match=r"RACE DETECTED|races_found"):
        run(without_barrier, x, gamma, beta)
