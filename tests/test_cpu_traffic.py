"""What the compiled code for a CPU reads and writes, so that it stays so; test_kernel_compiled.py has it for GPUs.

Counted in sizes of x on the optimized module, whatever the machine's mood.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from hlo import moved_bytes

import jaxnorm

# A sixteenth of x for the center, read and written as a slice and read again; x for each of two sums; a sixteenth
# written and read again for each; then x read and y written.
FORWARD = 3 / 16 + 2 + 4 / 16 + 2
# Besides: x and dy for each of two sums, a sixteenth each; x and dy read and dx written.
STEP = FORWARD + 4 + 4 / 16 + 3
# Values per instance, remaining rows.
SMALL = 0.15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [
        ((1, 64, 64, 128), -1),
        ((2, 32, 32, 32, 32), -1),
        ((32, 28, 28, 16), -1),
        ((1, 128, 64, 64), 1),
        ((2, 16, 33, 31), 1),  # rows that are no multiple of the parts
    ],
    ids=str,
)
def test_passes_over_memory(shape, channel_axis, dtype):
    norm = functools.partial(
        jaxnorm.instance_norm, channel_axis=channel_axis, activation=jax.nn.relu, implementation="xla"
    )

    def step(x, gamma, beta, dy):
        y, pullback = jax.vjp(norm, x, gamma, beta)
        return y, *pullback(dy)

    x = jax.ShapeDtypeStruct(shape, dtype)
    parameter = jax.ShapeDtypeStruct((shape[channel_axis],), jnp.float32)
    unit = math.prod(shape) * x.dtype.itemsize
    # Partial sums are float32, whatever x is.
    wider = 4 / x.dtype.itemsize
    for function, arguments, units, sums in (
        (norm, (x, parameter, parameter), FORWARD, 4),
        (step, (x, parameter, parameter, x), STEP, 8),
    ):
        compiled = jax.jit(function).lower(*arguments).compile()
        assert moved_bytes(compiled.as_text()) / unit <= units + (wider - 1) * sums / 16 + SMALL
        # Nothing as large as x is written between.
        assert compiled.memory_analysis().temp_size_in_bytes / unit <= 4 / 16 * wider
