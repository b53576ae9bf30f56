"""Activations for the kernel, no two the same: the oracle's, more of jax.nn, one for each further primitive."""

import jax
import jax.numpy as jnp
import oracle

_OF_JAX_NN = [
    "celu",
    "elu",
    "hard_swish",
    "hard_tanh",
    "log_sigmoid",
    "mish",
    "relu6",
    "selu",
    "sigmoid",
    "softplus",
    "sparse_plus",
    "squareplus",
]

ACTIVATIONS = {
    **{name: activation.jax for name, activation in oracle.ACTIVATIONS.items() if activation.jax is not None},
    **{name: getattr(jax.nn, name) for name in _OF_JAX_NN},
    "and": lambda z: jnp.where((z < 1) & (z > -1), z, 0.0),
    "cast": lambda z: z.astype(jnp.bfloat16).astype(jnp.float32),
    "checkpoint": jax.checkpoint(lambda z: jnp.sin(jnp.tanh(z))),
    "cos": jnp.cos,
    "erf": jax.lax.erf,
    "exp2": lambda z: jnp.exp2(-jnp.abs(z)),
    "integer_pow": lambda z: z**3 / 100,
    "is_finite": lambda z: jnp.where(jnp.isfinite(z), z, 0.0),
    "log2": lambda z: jnp.log2(1 + z * z),
    "not": lambda z: jnp.where(~(z > 1), z, 0.0),
    "or": lambda z: jnp.where((z > 1) | (z < -1), z, 0.0),
    "rsqrt": lambda z: z * jax.lax.rsqrt(1 + z * z),
    "sign": lambda z: z * jnp.sign(z),
    "steps": lambda z: z * (z > 0) + (z >= 1).astype(jnp.int32) * 1.5,
    "stop_gradient": lambda z: z * jax.lax.stop_gradient(jnp.tanh(z)),
    "xor": lambda z: jnp.where((z > 1) ^ (z < -1), z, 0.0),
}

# Their argument reduction has a path through local memory, for huge arguments; nothing is spilled.
LOCAL_MEMORY = {"cos", "checkpoint"}
