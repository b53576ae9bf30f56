"""Calls that nobody listed: random ones, each day others, against the same call of the float64 twin.

The header of the report has the seed; run a failure alone with --seed 20261130 -k 'case-17'.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from cases import some
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm

CASES = range(48)
LEARNED = {
    "prelu": lambda z, slope: jnp.where(z > 0, z, slope * z),
    "swish": lambda z, slope: z * jax.nn.sigmoid(slope * z),
    "scaled tanh": lambda z, slope: slope * jnp.tanh(z),
}
PLAIN = {"none": None, "relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": jax.nn.gelu, "tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A call: its arrays, and how it is made. The learned activations take their slope from the arrays."""

    arrays: dict[str, Any]
    channel_axis: int
    activation: str
    eps: float
    dtype: str
    positions: int
    group_size: int | None

    def of(self, norm: Callable[..., Any]) -> Callable[..., Any]:
        """arrays -> y."""

        def call(arrays: dict[str, Any]) -> Any:
            given = dict(arrays)
            slope = given.pop("slope", None)
            activation = PLAIN.get(self.activation)
            if self.activation in LEARNED:
                activation = lambda z: LEARNED[self.activation](z, slope)  # noqa: E731
            moments = (given.pop("mean"), given.pop("var")) if "mean" in given else None
            options = {"where": given.pop("where", None)}
            options |= {"moments": moments} if self.group_size is None else {"group_size": self.group_size}
            return norm(**given, eps=self.eps, channel_axis=self.channel_axis, activation=activation, **options)

        return call


def twin(
    x, gamma=None, beta=None, *, eps, channel_axis, activation, group_size=1, residual=None, where=None, moments=None
):
    """The formula, for JAX to differentiate in float64; independent of jaxnorm."""
    axes = oracle.spatial_axes(x.ndim, (channel_axis,))

    def average(terms, counts):
        sums, number = (jnp.sum(jnp.where(counts, v, 0), axes, keepdims=True) for v in (terms, jnp.ones_like(x)))
        return oracle.grouped(sums, (channel_axis,), group_size) / oracle.grouped(number, (channel_axis,), group_size)

    spread = functools.partial(oracle.spread, shape=x.shape, channel_axes=(channel_axis,))
    if moments is None:
        counts = jnp.ones(x.shape, bool) if where is None else where
        mean = average(x, counts)
        var = average((x - mean) ** 2, counts)
    else:
        mean, var = map(spread, moments)
    z = (x - mean) / jnp.sqrt(var + eps)
    z = z if gamma is None else z * spread(gamma)
    z = z if beta is None else z + spread(beta)
    z = z if residual is None else z + residual
    return z if activation is None else activation(z)


def draw(case: int, rng: np.random.Generator, has_groups: bool) -> Drawn:
    dtype = str(rng.choice(["float32", "float32", "bfloat16", "float16"]))
    batch, channels = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 5, 8, 16, 33]))
    group_size = int(rng.choice([1, 2, 3, 8])) if has_groups else None
    channels *= group_size or 1
    axes = int(rng.integers(1, 4))
    # The last axis has at least 8 positions.
    spatial = (*(int(n) for n in rng.integers(2, 9 - axes, axes - 1)), int(rng.integers(8, 40 // axes)))
    channel_axis = int(rng.choice([1, -1]))
    shape = (batch, channels, *spatial) if channel_axis == 1 else (batch, *spatial, channels)
    per = {"shared": (channels,), "per sample": (batch, channels)}
    some = lambda p=0.5: bool(rng.random() < p)  # noqa: E731
    form = lambda: per[str(rng.choice(list(per)))]  # noqa: E731
    array = lambda shape, dtype="float32": jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    offset = float(rng.choice([0.0, 1.0, 30.0])) if dtype != "float32" else float(rng.choice([0.0, 3.0, 1e3]))
    arrays: dict[str, Any] = {"x": jnp.asarray(offset + 2 * rng.standard_normal(shape), dtype)}
    if some(0.7):
        arrays["gamma"] = 1 + array(form()) / 4
    if some(0.7):
        arrays["beta"] = array(form())
    if some(0.4):
        arrays["residual"] = array(shape, dtype)
    kind = ("plain", "where", "plain" if has_groups else "moments")[case % 3]
    if kind == "where":
        arrays["where"] = draw_mask(rng, shape, channel_axis)
    if kind == "moments":
        shape_of_moments = form()
        arrays |= {"mean": offset + array(shape_of_moments), "var": 1 + jnp.square(array(shape_of_moments))}
    activation = str(rng.choice([*PLAIN, *LEARNED]))
    if activation in LEARNED:
        arrays["slope"] = jnp.float32(rng.uniform(0.1, 0.9))
    positions = int(np.prod(spatial)) * (group_size or 1)
    return Drawn(arrays, channel_axis, activation, float(rng.choice([1e-5, 1e-3])), dtype, positions, group_size)


def draw_mask(rng: np.random.Generator, shape: tuple[int, ...], channel_axis: int) -> Any:
    """Of size 1 along some axes; at least 4 positions of every instance count."""
    batch, channels, *spatial = np.moveaxis(np.empty(shape), channel_axis, 1).shape
    repeated = [1 if rng.random() < 0.3 else size for size in spatial[:-1]]
    size = (int(rng.choice([1, batch])), int(rng.choice([1, channels])), *repeated, spatial[-1])
    mask = rng.random(size) < 0.7
    mask[..., :4] = True
    mask = np.moveaxis(mask, 1, channel_axis)
    # Broadcasting fills up from the left.
    return jnp.asarray(mask[0] if mask.shape[0] == 1 and rng.random() < 0.5 else mask)


def energy(call):
    return lambda arrays: jnp.sum(jnp.sin(call(arrays).astype(jnp.promote_types(arrays["x"].dtype, jnp.float32))))


def in_float(arrays, function):
    """function of the arrays that can be differentiated, the mask kept apart."""
    fixed = {name: value for name, value in arrays.items() if name == "where"}
    moving = {name: value for name, value in arrays.items() if name != "where"}
    return lambda moved: function(moved | fixed), moving


def gradient(call):
    def differentiated(arrays):
        function, moving = in_float(arrays, energy(call))
        return jax.grad(function)(moving)

    return differentiated


def hessian_vector(call):
    """Forward over reverse, along the arrays themselves."""

    def product(arrays):
        function, moving = in_float(arrays, energy(call))
        return jax.jvp(jax.grad(function), (moving,), (moving,))[1]

    return product


def twice(call):
    """Reverse over reverse: a gradient penalty."""

    def penalty(arrays):
        function, moving = in_float(
            arrays, lambda arrays: sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradient(call)(arrays)))
        )
        return jax.grad(function)(moving)

    return penalty


def mapped(call):
    """vmap over two of everything but the parameters per channel."""
    shared = ("gamma", "beta", "slope")

    def over_two(arrays):
        axes = {name: None if name in shared else 0 for name in arrays}
        two = {name: v if name in shared else jnp.stack([v, v[::-1]]) for name, v in arrays.items()}
        return jax.vmap(call, (axes,))(two)

    return over_two


def checkpointed(call):
    return jax.checkpoint(call)


def divided(call):
    """In shard_map over a mesh of one device, where types say what varies."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def over_batch(arrays):
        batch = arrays["x"].shape[0]
        # Not those per channel, nor a mask that is shared.
        specs = {n: P("data") if v.ndim > 1 and v.shape[0] == batch else P() for n, v in arrays.items()}
        return jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=P("data"))(arrays)

    return over_batch


# What a transformation makes of the relative error of one call, as in test_transformations.
ORDERS = {"y": (lambda call: call, 6), "gradient": (gradient, 30), "hvp": (hessian_vector, 300), "twice": (twice, 300)}
WRAPPERS = {"": lambda call: call, "vmap": mapped, "checkpoint": checkpointed, "shard_map": divided}


@pytest.mark.slow
@pytest.mark.parametrize("norm", [jaxnorm.instance_norm, jaxnorm.group_norm], ids=["instance", "group"])
@pytest.mark.parametrize("case", some(CASES, *CASES[:8]), ids=lambda case: f"case-{case}")
def test_a_random_call(case, norm, seed):
    rng = np.random.default_rng((seed, case))
    drawn = draw(case, rng, norm is jaxnorm.group_norm)
    # Each day has all orders and all wrappers, in other combinations.
    order, wrapper = list(ORDERS)[case % 4], list(WRAPPERS)[(case + case // 4 + seed) % 4]
    transform, factor = ORDERS[order]
    if order != "y" and drawn.dtype != "float32":
        # Half precision is rounded again at every step of the twin's derivative.
        transform, factor = ORDERS[order := "gradient"]
    name = rng.choice(["xla", "reference", None]) if order != "y" else rng.choice(["xla", None])

    def transformed(norm):
        return transform(WRAPPERS[wrapper](drawn.of(norm)))

    with jax.numpy_dtype_promotion("standard"):
        got = jax.jit(transformed(functools.partial(norm, implementation=name)))(drawn.arrays)
        with jax.enable_x64(True):
            exact = {n: v if n == "where" else jnp.asarray(v, jnp.float64) for n, v in drawn.arrays.items()}
            want = jax.jit(transformed(twin))(exact)
    offset = float(np.abs(np.float64(drawn.arrays["x"])).max()) if order in ("hvp", "twice") else 1.0
    for path, exact_value in jax.tree_util.tree_leaves_with_path(want):
        value = functools.reduce(lambda tree, key: tree[key.key], path, got)
        relative = tolerance.arithmetic(drawn.dtype, drawn.positions) + 3 * tolerance.unit(drawn.dtype)
        # Differences of sums: what cancels in one result stands in the others, or is as large as one term.
        largest = max(1.0, *(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want)))
        atol = factor * relative * (largest if order != "y" else max(1.0, float(np.abs(exact_value).max()))) * offset
        described = f"{order} {wrapper} by {name}: {drawn}"
        np.testing.assert_allclose(np.float64(value), exact_value, rtol=0, atol=atol, err_msg=described)
