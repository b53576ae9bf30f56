"""The kernel through instance_norm, in the GPU interpreter: numbers and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import exhaustive
from checked_call import check, draw
from jax.ad_checkpoint import print_saved_residuals
from jax.experimental.pallas import mosaic_gpu as plgpu

import jaxnorm

pytestmark = [pytest.mark.slow, pytest.mark.kernel, pytest.mark.timeout(300)]

norm = functools.partial(jaxnorm.instance_norm, channel_axis=-1, implementation="pallas")


@pytest.mark.parametrize(
    ("dtype", "shape", "axes"),
    [
        pytest.param("float32", (2, 9, 25, 8), (-1,), marks=exhaustive),
        ("bfloat16", (2, 6, 5, 4, 16), (-1,)),
        pytest.param("float16", (2, 225, 8), (-1,), marks=exhaustive),
        pytest.param("float32", (2, 3, 24, 22), (1,), marks=exhaustive),
        ("float16", (4, 3, 16, 16), (1,)),
        ("float32", (2, 3, 20, 8), (1, 3)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("interpreter")
def test_against_float64(dtype, shape, axes):
    check("pallas", dtype, shape, axes, gamma="each", residual=True, activation="silu")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("residual", "activation"),
    [
        (False, "none"),
        pytest.param(False, "relu", marks=exhaustive),
        pytest.param(True, "none", marks=exhaustive),
        pytest.param(True, "relu", marks=exhaustive),
    ],
)
def test_residual_and_activation(residual, activation):
    check("pallas", "float32", (1, 10, 10, 8), (-1,), residual=residual, activation=activation)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("offset", [pytest.param(1e4, marks=exhaustive), 1e6])
def test_offsets(offset):
    x = draw((1, 40, 40, 8), "float32", offset=offset)
    y, pullback = jax.vjp(norm, x)
    dy = draw(x.shape, "float32", 1)
    np.testing.assert_allclose(y, oracle.instance_norm(x, channel_axes=(-1,))[0], rtol=0, atol=3e-6)
    dx = oracle.gradients(dy, x, channel_axes=(-1,))["x"]
    np.testing.assert_allclose(pullback(dy)[0], dx, rtol=0, atol=1e-5 * np.abs(dx).max())


def test_a_call_without_a_tile_says_why():
    reason = r"'pallas' cannot run here: rows must start at multiples.*'xla'"
    with plgpu.force_gpu_interpret_mode(), pytest.raises(ValueError, match=reason):
        norm(jnp.ones((1, 4, 4, 3), jnp.float32))


@pytest.mark.parametrize("activation", [None, jax.nn.gelu])
def test_only_x_is_saved(capsys, activation):
    x, residual = draw((2, 4, 4, 8), "float32"), draw((2, 4, 4, 8), "float32", 1)

    def saved(*given):
        with plgpu.force_gpu_interpret_mode():
            print_saved_residuals(lambda x, residual=None: norm(x, residual=residual, activation=activation), *given)
        return [line for line in capsys.readouterr().out.splitlines() if "[2,4,4,8]" in line]

    assert saved(x) == ["f32[2,4,4,8] from the argument x"]
    # The gradients depend on the residual only where an activation does.
    both = ["f32[2,4,4,8] from the argument residual"] if activation else []
    assert sorted(saved(x, residual)) == [*both, "f32[2,4,4,8] from the argument x"]
