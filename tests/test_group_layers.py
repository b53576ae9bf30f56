"""What group norm's layers have beyond those of instance norm: tests/test_layers.py has what all layers share."""

import functools
import re

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import some
from flax import nnx
from layers import (
    RANDOM,
    SHAPE,
    LinenGroups,
    NNXGroups,
    assert_close_trees,
    assert_equal_trees,
    assert_is_the_formula,
    assert_same_as_flax,
    normal,
)

import jaxnorm

POSITIONS = 30 * 4
x64 = pytest.mark.usefixtures("x64")
every_kind = pytest.mark.parametrize("kind", [LinenGroups, NNXGroups])


# The same layer as Flax's


@x64
@every_kind
@pytest.mark.slow
@pytest.mark.parametrize("case", some(range(12), 0, 1))
def test_a_random_layer(kind, case, seed):
    """Parameters, results and gradients."""
    rng = np.random.default_rng((seed, case))
    group_size, groups = int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 2, 5]))
    rank = int(rng.integers(2, 6))
    shape = (int(rng.integers(1, 4)), *map(int, rng.integers(1, 7, rank - 2)), group_size * groups)
    options = {"num_groups": groups} if rng.random() < 0.5 else {"num_groups": None, "group_size": group_size}
    options |= {name: bool(rng.random() < 0.7) for name in ("use_scale", "use_bias")}
    options |= {"epsilon": float(rng.choice([1e-6, 1e-2]))} if rng.random() < 0.5 else {}
    options |= {"param_dtype": "float64"} if rng.random() < 0.3 else {}
    if rng.random() < 0.3:
        axes = [*range(1, rank - 1), -1]
        options["reduction_axes"] = nnx.List(axes) if kind is NNXGroups else axes
    inputs = {}
    if rng.random() < 0.5:
        # Flax wants the channels of a mask.
        inputs["mask"] = rng.random((*(int(rng.choice([1, size])) for size in shape[:-1]), shape[-1])) < 0.7
        inputs["mask"][..., :: max(group_size // 2, 1)] = True
    ours, theirs = (kind(shape, flax=flax, **options) for flax in (False, True))
    assert_equal_trees(ours.parameters, theirs.parameters)
    positions = group_size * int(np.prod(shape[1:-1]))
    # Where few positions lie close together, 1 / sqrt(var + eps) is large.
    assert_same_as_flax(kind, shape, 1e3 * positions, options, **inputs)


def test_same_arguments_and_defaults():
    ours, theirs = jaxnorm.GroupNorm(), nn.GroupNorm()
    for name in nn.GroupNorm.__dataclass_fields__.keys() - {"parent", "name"}:
        assert getattr(ours, name) == getattr(theirs, name) or callable(getattr(ours, name)), name
    names = [list(module.__dataclass_fields__) for module in (jaxnorm.GroupNorm, nn.GroupNorm)]
    common = [[name for name in own if name in names[1]] for own in names]
    assert common[0] == common[1]
    ours, theirs = (vars(module.GroupNorm(64, rngs=nnx.Rngs(0))) for module in (jaxnorm.nnx, nnx))
    assert set(ours) - set(theirs) == {"activation", "implementation"}
    plain = {name for name, value in theirs.items() if isinstance(value, (int, float, bool, type(None)))}
    assert {name: ours[name] for name in plain} == {name: theirs[name] for name in plain}


@every_kind
def test_without_positions(kind):
    """(N, C), which instance norm does not take."""
    x, residual, mask = normal(3, 12) + 100, normal(3, 12, seed=1), np.random.default_rng(1).random((3, 12)) > 0.4
    mask[..., ::4] = True
    layer = kind((3, 12), activation=jax.nn.silu)
    y = layer(x, residual=residual, mask=mask)
    options = {"group_size": 4, "activation": "silu", "residual": residual, "where": mask}
    assert_is_the_formula(y, layer.parameters, x, **options)


# In networks


class Block(nn.Module):
    """A ResNet block of an autoencoder; Flax names the layers after their class, which is the same for both."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(8, (3, 3))(nn.silu(self.norm(num_groups=4, use_fast_variance=False, **RANDOM)(x)))
        y = nn.Conv(8, (3, 3))(nn.silu(self.norm(num_groups=2, use_fast_variance=False)(y)))
        return x + y


@pytest.mark.slow
@x64
@pytest.mark.parametrize("direction", some(["from Flax", "to Flax"], "from Flax"))
def test_checkpoints_move_both_ways(direction):
    source, target = Block(nn.GroupNorm), Block(jaxnorm.GroupNorm)
    if direction == "to Flax":
        source, target = target, source
    x = normal(2, 5, 6, 8, dtype="float64")
    variables = jax.jit(source.init)(jax.random.key(0), x)
    assert {"GroupNorm_0", "GroupNorm_1"} < variables["params"].keys()
    checkpoint = flax.serialization.to_bytes(variables)
    loaded = flax.serialization.from_bytes(jax.eval_shape(target.init, jax.random.key(1), x), checkpoint)
    assert_equal_trees(loaded, variables)
    assert flax.serialization.to_bytes(loaded) == checkpoint
    # The second layer multiplies what the first one rounds, with each of 72 weights.
    applied = jax.jit(target.apply)(loaded, x), jax.jit(source.apply)(variables, x)
    assert_close_trees(*applied, 72, positions=120)


@pytest.mark.slow
@x64
def test_state_of_nnx_layers_moves_both_ways():
    x = normal(*SHAPE, dtype="float64")
    make = [functools.partial(module.GroupNorm, 12, 3, use_fast_variance=False) for module in (nnx, jaxnorm.nnx)]
    for source, target in (make, make[::-1]):
        theirs, ours = source(**RANDOM, rngs=nnx.Rngs(1)), target(rngs=nnx.Rngs(2))
        nnx.update(ours, nnx.state(theirs))
        assert_close_trees(ours(x), theirs(x), x.size, POSITIONS)


def test_the_class_of_a_flax_layer_can_be_replaced():
    x = normal(*SHAPE) + 1e4
    layer = nnx.GroupNorm(12, 3, rngs=nnx.Rngs(0))
    layer.__class__ = jaxnorm.nnx.GroupNorm
    assert_is_the_formula(layer(x), {}, x, group_size=4)


# Errors


def first_call(kind, options, x, inputs):
    """The first call of a layer for 12 channels: of a linen one its initialization."""
    if kind is NNXGroups:
        jaxnorm.nnx.GroupNorm(12, **options, rngs=nnx.Rngs(0))(x, **inputs)
    else:
        jaxnorm.GroupNorm(**options).init(jax.random.key(0), x, **inputs)


@every_kind
@pytest.mark.parametrize(
    ("options", "inputs", "parts"),
    [
        ({"num_groups": 3, "group_size": 4}, {}, ["Either .*num_groups.* or .*group_size.* should be specified"]),
        ({"num_groups": None}, {}, ["Either .*num_groups.* or .*group_size.* should be specified"]),
        ({}, {}, ["divide", "12"]),
        ({"num_groups": 5}, {}, ["divide", "12"]),
        ({"num_groups": 0}, {}, ["divide", "12"]),
        ({"num_groups": None, "group_size": 5}, {}, ["multiple of the|divide the"]),
        ({"num_groups": 3, "reduction_axes": (2, -1)}, {}, ["all axes but the batch, (1, 2, 3)", "x.reshape(-1, "]),
        (
            {"num_groups": 3, "reduction_axes": -1},
            {},
            ["all axes but the batch", "got -1 for x of shape (2, 5, 6, 12)"],
        ),
        ({"num_groups": 3, "reduction_axes": (0, 1, 2, 3)}, {}, ["all axes but the batch"]),
        ({"num_groups": 3, "reduction_axes": (1, 2, 3, 7)}, {}, ["all axes but the batch"]),
        ({"num_groups": 3, "epsilon": 0.0}, {}, ["epsilon must be a finite number > 0"]),
        ({"num_groups": 3}, {"residual": jnp.zeros((2, 5, 6, 1))}, ["residual must have the shape"]),
        ({"num_groups": 3}, {"mask": jnp.zeros((2, 5, 6, 5))}, ["mask must be broadcastable"]),
        ({"num_groups": 3, "axis_index_groups": ((0,),)}, {}, ["axis_index_groups needs axis_name"]),
    ],
    ids=str,
)
def test_errors(kind, options, inputs, parts):
    escaped = (part if "|" in part or ".*" in part else re.escape(part) for part in parts)
    with pytest.raises(ValueError, match="(?s)" + ".*".join(escaped)):
        first_call(kind, options, normal(*SHAPE), inputs)


@every_kind
@pytest.mark.parametrize("shape", [(), (12,)], ids=str)
def test_a_batch_is_needed(kind, shape):
    with pytest.raises(
        ValueError, match=re.escape(f"rank 2 or more, (N, C, *spatial) or (N, *spatial, C): got shape {shape}")
    ):
        first_call(kind, {"num_groups": 3}, normal(*shape), {})


def test_num_features_are_the_channels():
    layer = jaxnorm.nnx.GroupNorm(12, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"got num_features=12 for x of shape .*num_features=6"):
        layer(normal(2, 5, 6))
    layer.scale = nnx.Param(jnp.ones(6))
    with pytest.raises(ValueError, match="scale must have shape"):
        layer(normal(*SHAPE))


@every_kind
def test_the_formula_of_groups_of_one_is_that_of_instance_norm(kind):
    x = normal(*SHAPE)
    layer = kind(SHAPE, num_groups=12, activation=oracle.ACTIVATIONS["gelu"].jax)
    assert_is_the_formula(layer(x), layer.parameters, x, activation="gelu")
