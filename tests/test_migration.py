"""What the page on migrating promises: checkpoints of other layers load, and give the same numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
