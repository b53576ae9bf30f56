"""The linen and the NNX layers as objects of one kind, ours or Flax's, so one suite runs over all of them."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import tolerance
from flax import nnx

import jaxnorm

# A scale and a bias that are not 1 and 0.
RANDOM = {"scale_init": nn.initializers.normal(1.0), "bias_init": nn.initializers.normal(1.0)}


class Linen:
    """A linen layer with its variables."""

    prelu, name = nn.PReLU, "InstanceNorm"
    # What every layer of this kind is given, and how many channels of SHAPE share their statistics then.
    needed, group_size = {}, 1

    def __init__(self, shape, *, flax=False, **options):
        options = self.needed | options
        make = getattr(nn if flax else jaxnorm, self.name)
        self.module = make(**RANDOM | options)
        outside = {name: value for name, value in options.items() if name not in ("axis_name", "axis_index_groups")}
        call = {"use_running_average": True} if options.get("track_running_stats") else {}
        # Where no axis is mapped, as most users do it.
        to_init = make(**RANDOM | outside)
        self.variables = jax.jit(functools.partial(to_init.init, **call))(
            jax.random.key(7), jnp.zeros(shape, "float32")
        )

    def __call__(self, x, **inputs):
        y, changed = self.module.apply(self.variables, x, mutable=["batch_stats"], **inputs)
        self.variables = {**self.variables, **changed}
        return y

    def functional(self):
        """(function of the parameters, x and so on; parameters)."""
        return self.module.apply, self.variables

    def training(self):
        """(function of the state, x and so on that gives y and the new averages; state)."""

        def run(variables, x, **inputs):
            inputs = {"use_running_average": False, **inputs}
            y, changed = self.module.apply(variables, x, mutable=["batch_stats"], **inputs)
            return y, changed["batch_stats"]

        return run, self.variables

    @property
    def parameters(self):
        return self.variables.get("params", {})

    @property
    def running(self):
        return self.variables["batch_stats"]["mean"], self.variables["batch_stats"]["var"]


class NNX:
    """An NNX layer."""

    prelu, name = nnx.PReLU, "InstanceNorm"
    needed, group_size = {}, 1

    def __init__(self, shape, *, flax=False, **options):
        options = self.needed | options
        axes = {axis % len(shape) for axis in np.atleast_1d(options.get("feature_axes", -1))}
        channels = math.prod(shape[axis] for axis in axes)
        make = getattr(nnx if flax else jaxnorm.nnx, self.name)
        self.module = make(channels, **RANDOM | options, rngs=nnx.Rngs(7))

    def __call__(self, x, **inputs):
        return self.module(x, **inputs)

    def functional(self):
        graph, state = nnx.split(self.module)
        return (lambda state, x, **inputs: nnx.merge(graph, state)(x, **inputs)), state

    def training(self):
        graph, state = nnx.split(self.module)

        def run(state, x, **inputs):
            layer = nnx.merge(graph, state)
            y = layer(x, **{"use_running_average": False, **inputs})
            return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

        return run, state

    @property
    def parameters(self):
        return parameters_of(self.module)

    @property
    def running(self):
        return self.module.mean[...], self.module.var[...]


class LinenGroups(Linen):
    """A linen layer of group norm."""

    name, needed, group_size = "GroupNorm", {"num_groups": 3}, 4


class NNXGroups(NNX):
    """An NNX layer of group norm."""

    name, needed, group_size = "GroupNorm", {"num_groups": 3}, 4


# Of all kinds of layers.
SHAPE = (2, 5, 6, 12)
INSTANCES, GROUPS = [Linen, NNX], [LinenGroups, NNXGroups]
KINDS = [Linen, NNX, LinenGroups, NNXGroups]


def parameters_of(module):
    """The scale and the bias of an NNX layer, those that it has."""
    named = {"scale": module.scale, "bias": module.bias}
    return {name: value[...] for name, value in named.items() if value is not None}


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(1 + 2 * np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_is_the_formula(y, parameters, x, channel_axes=(-1,), eps=1e-6, **options):
    """y of a layer with these parameters against float64."""
    sizes = [x.shape[axis] for axis in sorted(axis % x.ndim for axis in channel_axes)]
    gamma, beta = (parameters.get(name) for name in ("scale", "bias"))
    gamma, beta = (None if value is None else np.asarray(value).reshape(sizes) for value in (gamma, beta))
    exact, magnitude = oracle.instance_norm(x, gamma, beta, eps, channel_axes=channel_axes, **options)
    positions = math.prod(x.shape[axis] for axis in oracle.spatial_axes(x.ndim, channel_axes))
    positions *= options.get("group_size", 1)
    bound = tolerance.forward(y.dtype.name, positions, magnitude)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0, atol=bound)


def assert_equal_trees(ours, theirs):
    """The same names, shapes, dtypes and values."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_close_trees(ours, theirs, size, positions):
    """Results and gradients of <w, y> in float64, for x with so many numbers and instances of so many positions.

    |w| <= 1 and |xhat| <= sqrt(M), so no sum here has more than size terms or terms beyond sqrt(M), up to the scale,
    the activation and 1/std, a factor below 10. Both sides round, and once more to the dtype of a parameter.
    """
    bound = 2 * tolerance.arithmetic("float64", positions) * 10 * size * np.sqrt(positions)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2 * tolerance.unit(a.dtype), atol=bound)


def result_and_gradients(function, *arguments):
    """y and the gradients of <w, y> by all arguments; w is at most 1 and of one sign, so that no gradient cancels."""

    @jax.jit
    def run(*arguments):
        y, pullback = jax.vjp(function, *arguments)
        return y, pullback(jnp.asarray(weights(y.shape), y.dtype))

    return run(*arguments)


def weights(shape):
    """The w of result_and_gradients, rounded to float32."""
    return np.float64(np.random.default_rng(8).uniform(0.5, 1, shape).astype(np.float32))


def flax_s(kind, shape, **options):
    """Flax's layer with the two-pass variance, the one that is right."""
    return kind(shape, flax=True, use_fast_variance=False, **options)


def assert_same_as_flax(kind, shape, positions, options, **inputs):
    """The same results and gradients by x and the parameters, which are the same."""
    x = normal(*shape, dtype="float64")
    # Flax's NNX layer takes masks of bool alone.
    theirs = {name: value.astype(bool) for name, value in inputs.items()}
    results = []
    for layer, given in ((kind(shape, **options), inputs), (flax_s(kind, shape, **options), theirs)):
        function, parameters = layer.functional()
        results.append(result_and_gradients(functools.partial(function, **given), parameters, x))
    assert_close_trees(*results, x.size, positions)


def assert_same_dtypes(kind, x_dtype, dtype, param_dtypes, seed):
    """The same output dtype, whatever the parameters are; one random choice of them."""
    rng = np.random.default_rng(seed)
    options = {"param_dtype": str(rng.choice(param_dtypes)), "dtype": dtype}
    options |= {"use_scale": bool(rng.random() < 0.7), "use_bias": bool(rng.random() < 0.7)}
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    results = []
    for flax in (False, True):
        make = functools.partial(kind, SHAPE, flax=flax, **options)
        results.append(jax.eval_shape(lambda x, make=make: make()(x), x))
    assert (results[0].shape, results[0].dtype) == (results[1].shape, results[1].dtype), options
