"""What the compiled code for a CPU reads and writes, so that it stays so; test_kernel_compiled.py has it for GPUs.

Counted in sizes of x on the optimized module, whatever the machine's mood, on shapes random.
"""

import dataclasses
import functools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import exhaustive

import jaxnorm
from benchmarks.hlo import moved_bytes, operations
from benchmarks.shapes import CHANNEL_AXIS, Shape, random_cases

SEED = 11
CASES = random_cases(SEED, 16)[::2]
# A single channel last, which is seldom drawn: XLA is quick to copy such arrays.
CASES += [
    dataclasses.replace(
        case, shape=Shape(case.shape.batch, (math.prod(case.shape.spatial),), 1), layout="channels-last"
    )
    for case in CASES[:3]
]

# Every pass reads its arrays once for all its sums, and adds up at least six rows at a time, whose sums are written and
# read again: two sums of a sixth, in float32.
SUMS = 2 * 2 / 6
# A sixteenth of x for the center; x for the sums; x read and y written.
FORWARD = 1 / 16 + 1 + 2
# That sixteenth is written in float32 and read again.
CENTER = 2 / 16
# Then x and dy for the sums; x and dy read and dx written.
STEP = FORWARD + 2 + 3
# The cotangent before the activation is kept, in float32: written, and read twice instead of dy, which is read where it
# is computed, together with x.
KEPT = 3
# Values per instance that are read and written in float32, and rows left over: the equivalent of so many rows of x. It
# is what the compiled step of (48, 26, 72) has, whose last two rows are a loop of their own in both passes.
SMALL = 44


def training_step(norm):
    """(x, gamma, beta, dy) -> (y, dx, dgamma, dbeta)."""

    def step(x, gamma, beta, dy):
        y, pullback = jax.vjp(norm, x, gamma, beta)
        return y, *pullback(dy)

    return step


def chosen(cases, name, positions):
    """The cases as parameters of a test; `make test` runs those at the positions."""
    return [
        pytest.param(case, id=name(case), marks=[] if i in positions else [exhaustive]) for i, case in enumerate(cases)
    ]


# Both layouts in both dtypes, the case that SMALL is for, and a single channel.
@pytest.mark.slow
@pytest.mark.parametrize(
    "case", chosen(CASES, lambda case: f"{case.layout}-{case.array}-{case.dtype}", (0, 2, 5, 15, 16))
)
def test_passes_over_memory(case):
    norm = functools.partial(
        jaxnorm.instance_norm,
        channel_axis=CHANNEL_AXIS[case.layout],
        activation=jax.nn.relu,
        implementation="xla",
    )

    x = jax.ShapeDtypeStruct(case.array, case.dtype)
    parameter = jax.ShapeDtypeStruct((case.shape.channels,), jnp.float32)
    unit = case.shape.size * x.dtype.itemsize
    # Sums and values per instance are float32, whatever x is.
    wider = 4 / x.dtype.itemsize
    # A batch of one channel first: XLA gives y and dx another layout, the same in memory, and copies them out of it.
    copies = 2 * (case.shape.channels == 1 and case.layout == "channels-first")
    per_instance = wider * SMALL * case.shape.batch * case.shape.channels / case.shape.size
    for function, arguments, units, passes, between in (
        (norm, (x, parameter, parameter), FORWARD + copies, 1, 0),
        (training_step(norm), (x, parameter, parameter, x), STEP + 2 * copies + KEPT * wider, 2, wider),
    ):
        compiled = jax.jit(function).lower(*arguments).compile()
        moved = moved_bytes(compiled.as_text()) / unit
        assert moved <= units + (CENTER + passes * SUMS) * wider + per_instance
        # Nothing else as large as x is written between.
        temporary = compiled.memory_analysis().temp_size_in_bytes / unit
        assert temporary <= between + wider / 3 + per_instance + copies / 2


def draw_deep(seed, count):
    """Shapes of two and three spatial axes, and their channel axes."""
    rng = random.Random(seed)

    def size(low, high):
        return round(2 ** rng.uniform(math.log2(low), math.log2(high)))

    def draw_one():
        spatial = [size(2, 47) for _ in range(rng.randint(2, 3))]
        batch, channels = size(2, 20), size(2, 30)
        return ((batch, channels, *spatial), 1) if rng.random() < 0.5 else ((batch, *spatial, channels), -1)

    return [draw_one() for _ in range(count)]


# Both layouts with two and with three spatial axes.
@pytest.mark.slow
@pytest.mark.parametrize("case", chosen(draw_deep(SEED, 12), str, (0, 1, 2, 10)))
def test_what_is_final_is_written_as_a_view(case):
    """y, dx, and what is kept of an expensive activation: in loops over short axes LLVM computes nothing in vectors."""
    shape, channel_axis = case
    norm = functools.partial(
        jaxnorm.instance_norm, channel_axis=channel_axis, activation=jax.nn.silu, implementation="xla"
    )

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    parameter = jax.ShapeDtypeStruct((shape[channel_axis],), jnp.float32)
    text = jax.jit(training_step(norm)).lower(x, parameter, parameter, x).compile().as_text()
    large = [operation.line for operation in operations(text) if operation.written == 4 * x.size]
    view = (shape[0] * shape[1], -1) if channel_axis == 1 else (shape[0], -1, shape[-1])
    sizes = ",".join(map(str, np.empty(shape, bool).reshape(view).shape))
    assert len(large) >= 3
    for line in large:
        assert f" = f32[{sizes}]" in line


@pytest.mark.slow
def test_an_expensive_activation_is_evaluated_once():
    """Not once for each sum and once for dx: the hyperbolic tangent of gelu, in a training step."""
    norm = functools.partial(jaxnorm.instance_norm, activation=jax.nn.gelu, implementation="xla")

    x, parameter = jax.ShapeDtypeStruct((8, 64, 16, 16), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.float32)
    assert jax.jit(training_step(norm)).lower(x, parameter, parameter, x).compile().as_text().count(" tanh(") == 1


@pytest.mark.slow
def test_the_gradient_of_a_separate_activation_is_computed_once():
    """Not in the sums and in dx: they would be loops too long for LLVM to compute them in vectors."""

    def norm(x, gamma, beta):
        return jnp.sin(jaxnorm.instance_norm(x, gamma, beta, implementation="xla"))

    x, parameter = jax.ShapeDtypeStruct((8, 64, 16, 16), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.float32)
    assert jax.jit(training_step(norm)).lower(x, parameter, parameter, x).compile().as_text().count(" cosine(") == 1


@pytest.mark.slow
def test_what_is_final_is_computed_once():
    """Not y and dx again in the copies that the gradient of a convolution's weights takes, in another order."""
    x, weights = jax.ShapeDtypeStruct((4, 48, 48, 16), jnp.float32), jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32)

    def convolve(x, weights):
        return jax.lax.conv_general_dilated(x, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loss(x, *weights):
        for each in weights:
            norm = jaxnorm.instance_norm(convolve(x, each), channel_axis=-1, activation=jax.nn.relu)
            x = convolve(norm, each)
        return jnp.sum(x)

    text = jax.jit(jax.grad(loss, argnums=(1, 2))).lower(x, weights, weights).compile().as_text()
    copies = [fused for fused in text.split("\n\n") if " transpose(" in fused and not fused.startswith("ENTRY")]
    assert copies
    assert not any(f" {operation}(" in fused for fused in copies for operation in ("multiply", "maximum"))
