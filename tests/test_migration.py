"""What the page on migrating promises: checkpoints of other layers load, and give the same numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from flax import nnx, serialization

import jaxnorm

SHAPES = [(2, 9, 7, 5), (1, 33, 4), (3, 4, 5, 6, 8)]


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), tree)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_checkpoints_of_group_norm_with_one_channel_per_group_load(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    theirs, ours = nn.GroupNorm(num_groups=None, group_size=1), jaxnorm.InstanceNorm()
    variables = random_like(theirs.init(jax.random.key(0), x), seed=1)

    target = ours.init(jax.random.key(1), x)
    loaded = serialization.from_bytes(target, serialization.to_bytes(variables))

    np.testing.assert_allclose(ours.apply(loaded, x), theirs.apply(variables, x), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_state_of_nnx_group_norm_loads(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    theirs = nnx.GroupNorm(shape[-1], num_groups=None, group_size=1, rngs=nnx.Rngs(0))
    ours = jaxnorm.nnx.InstanceNorm(shape[-1], rngs=nnx.Rngs(1))
    nnx.update(theirs, random_like(nnx.state(theirs, nnx.Param), seed=1))

    nnx.update(ours, nnx.state(theirs, nnx.Param))

    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)


def test_scale_and_shift_of_a_time_embedding_go_into_the_call():
    """The row of diffusers' blocks: silu(norm(x) * (1 + scale) + shift), with weight and bias inside the norm."""
    rng = np.random.default_rng(2)
    x, weight, bias, scale, shift = (
        np.float32(rng.standard_normal(shape)) for shape in [(2, 8, 5, 7), (8,), (8,), (2, 8), (2, 8)]
    )
    gamma, beta = weight * (1 + scale), bias * (1 + scale) + shift

    y = jaxnorm.group_norm(x, gamma, beta, 1e-6, num_groups=2, activation=jax.nn.silu)

    normalized, _ = oracle.instance_norm(x, weight, bias, 1e-6, group_size=4)
    z = normalized * (1 + np.float64(scale)[:, :, None, None]) + shift[:, :, None, None]
    _, magnitude = oracle.instance_norm(x, gamma, beta, 1e-6, group_size=4)
    bound = tolerance.forward("float32", 4 * 5 * 7, magnitude)
    np.testing.assert_allclose(y, z / (1 + np.exp(-z)), rtol=0, atol=bound)
