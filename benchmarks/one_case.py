"""Runs the kernel once, forward and backward, for compute-sanitizer and ncu.

python -m benchmarks.one_case [SHAPE [DTYPE]]

SHAPE is channels-last. By default two samples of 1089 x 8 numbers, in a cluster of two thread blocks with a ragged end.
"""

import functools
import sys

import jax
import jax.numpy as jnp

import jaxnorm

shape = tuple(map(int, (sys.argv[1] if len(sys.argv) > 1 else "2x33x33x8").split("x")))
dtype = sys.argv[2] if len(sys.argv) > 2 else "float32"
norm = functools.partial(
    jaxnorm.instance_norm, channel_axis=-1, activation=jax.nn.relu, implementation="pallas", eps=1e-5
)
x = jax.random.normal(jax.random.key(0), shape, dtype)
print(jaxnorm.explain(x, channel_axis=-1, activation=jax.nn.relu, implementation="pallas"))
y, pullback = jax.vjp(norm, x)
print(jax.block_until_ready((y, pullback(jnp.ones_like(y))))[0].dtype, "done")
