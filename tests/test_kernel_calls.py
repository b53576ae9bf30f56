"""The kernel through instance_norm, in the GPU interpreter: numbers, derivatives, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from checked_call import check, draw
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

import jaxnorm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("interpreter")]

norm = functools.partial(jaxnorm.instance_norm, channel_axis=-1, implementation="pallas")


@pytest.fixture
def interpreter():
    """GPU kernels run on the CPU, and must have run without a race."""
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")):
            yield
        # get_races raises where no kernel ran.
        assert not interpret_pallas_call.get_races().races_found
    finally:
        interpret_pallas_call.gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("dtype", "shape", "axes"),
    [
        ("float32", (2, 9, 25, 8), (-1,)),
        ("bfloat16", (2, 6, 5, 4, 16), (-1,)),
        ("float16", (2, 225, 8), (-1,)),
        ("float32", (2, 3, 24, 22), (1,)),
        ("bfloat16", (4, 3, 16, 16), (1,)),
        ("float32", (2, 3, 20, 8), (1, 3)),
    ],
    ids=str,
)
def test_against_float64(dtype, shape, axes):
    check("pallas", dtype, shape, axes, gamma="each", residual=True, activation="silu")


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_residual_and_activation(residual, activation):
    check("pallas", "float32", (1, 10, 10, 8), (-1,), residual=residual, activation=activation)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_offsets(offset):
    x = draw((1, 40, 40, 8), "float32", offset=offset)
    y, pullback = jax.vjp(norm, x)
    dy = draw(x.shape, "float32", 1)
    np.testing.assert_allclose(y, oracle.instance_norm(x, channel_axes=(-1,))[0], rtol=0, atol=3e-6)
    dx = oracle.gradients(dy, x, channel_axes=(-1,))["x"]
    np.testing.assert_allclose(pullback(dy)[0], dx, rtol=0, atol=1e-5 * np.abs(dx).max())


def test_gradient_penalty():
    x, gamma = draw((2, 6, 6, 8), "float32"), draw((8,), "float32", 1)

    def penalty(normalize, x, gamma):
        def critic(x):
            return jnp.sum(jnp.sin(normalize(x, gamma)))

        return jnp.sum(jax.grad(critic)(x) ** 2)

    got = jax.grad(functools.partial(penalty, functools.partial(norm, activation=jax.nn.silu)), (0, 1))(x, gamma)
    with jax.enable_x64(True):
        twin = functools.partial(oracle.twin, channel_axes=(-1,), activation="silu")
        given = (jnp.asarray(x, jnp.float64), jnp.asarray(gamma, jnp.float64))
        want = jax.grad(functools.partial(penalty, twin), (0, 1))(*given)
    for g, w in zip(got, want, strict=True):
        # The error of the norm, amplified by the condition of two further derivatives.
        np.testing.assert_allclose(
            g, w, rtol=0, atol=100 * tolerance.arithmetic("float32", 36) * float(np.abs(w).max())
        )


def test_vmap():
    x, gamma = draw((3, 2, 5, 5, 8), "float32"), draw((3, 8), "float32", 1)
    got = jax.vmap(norm)(x, gamma)
    for i in range(3):
        want, magnitude = oracle.instance_norm(x[i], gamma[i], channel_axes=(-1,))
        np.testing.assert_allclose(got[i], want, rtol=0, atol=tolerance.forward("float32", 25, magnitude))


def test_a_call_without_a_tile_says_why():
    with pytest.raises(ValueError, match=r"'pallas' cannot run here: bulk copies need rows.*'xla'"):
        norm(jnp.ones((1, 4, 4, 3)))
    # The fixture wants a kernel to have run.
    norm(jnp.ones((1, 4, 4, 8)))
