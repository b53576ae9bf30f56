"""Group norm in the kernel, interpreted: its numbers against float64. What it moves is in test_kernel_compiled.py.

How it copies and synchronizes is that of instance norm. What differs are the sums over the lanes of a group, so the
cases are few.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import each_value
from checked_call import check, draw

import jaxnorm
from jaxnorm.call import Call, Operands
from jaxnorm.dispatch import BACKWARD, FORWARD
from jaxnorm.gpu.devices import DEVICES, Device

pytestmark = [pytest.mark.slow, pytest.mark.kernel, pytest.mark.timeout(300)]

GROUP_SIZES = [4, 8, 16, 32]
# Bytes of a row of 32 bytes or more in all its positions: enough for two to eight blocks to share them.
SHARED_BYTES = 76 * 1024
# A compute capability, and SMs.
KINDS = {"alone": ((9, 0), 132), "cluster": ((9, 0), 132), "group": ((8, 0), 6)}


def gpu(kind, x, activation, **options):
    """One with so little shared memory, but for "alone", that blocks share the instances of x in that way."""
    call = {"channel_axis": -1, "activation": oracle.ACTIVATIONS[activation].jax, "implementation": "pallas"}
    for size in range(128, 8, -4):
        device = Device(*KINDS[kind], size * 1024)
        with mock.patch.dict(DEVICES, {"H100": device}):
            found = jaxnorm.explain(x, **options | call, device="H100")
        if {getattr(each.tile, "synchronization", None) for each in (found.forward, found.backward)} == {kind}:
            return device
    raise AssertionError(f"no GPU computes {x} in that way")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("group_size", "kind", "dtype", "residual", "activation"),
    each_value(GROUP_SIZES, list(KINDS), ["float32", "bfloat16"], [False, True], ["none", "silu"]),
)
def test_against_float64(group_size, kind, dtype, residual, activation):
    """Forward and all gradients, of blocks alone, in clusters and in groups."""
    itemsize = jnp.dtype(dtype).itemsize
    channels = max(group_size, 32 // itemsize)
    rows = 9 if kind == "alone" else SHARED_BYTES // (5 * channels * itemsize)
    shape = (2 if kind == "alone" else 1, rows, 5, channels)
    options = {"group_size": group_size, "residual": residual, "activation": activation}
    with mock.patch.dict(DEVICES, {"H100": gpu(kind, jax.ShapeDtypeStruct(shape, dtype), **options)}):
        check("pallas", dtype, shape, (-1,), gamma="each", beta="each", **options)


@pytest.mark.usefixtures("interpreter")
def test_each_pass_takes_the_statistics_of_plain_xla():
    """Which pass the kernel computes is decided for each, so that its statistics have the same meaning."""
    shape, size = (2, 5, 9, 16), 8
    x, dy = draw(shape, "float32", offset=3.0), draw(shape, "float32", 1)
    # Channels far from each other: only the kernel has one center for the whole group.
    x = jnp.asarray(np.asarray(x) + 5 * np.arange(16, dtype=np.float32))
    gamma, beta = draw((2, 16), "float32", 2), draw((2, 16), "float32", 3)
    operands = Operands(x, gamma, beta)
    calls = [
        Call((3,), 1e-5, jax.nn.silu, implementation=name, group_size=size, device=DEVICES["H100"])
        for name in ("pallas", "xla")
    ]
    (_, kernel), (_, plain) = (FORWARD.bind(call, operands) for call in calls)
    np.testing.assert_allclose(kernel.center + kernel.delta, plain.center + plain.delta, rtol=1e-6)
    for name in ("rstd", "variance", "counted"):
        np.testing.assert_allclose(getattr(kernel, name), getattr(plain, name), rtol=1e-5)
    want, _, _, _ = BACKWARD.bind(calls[1], operands, plain, dy)
    for call, statistics in ((calls[0], plain), (calls[1], kernel)):
        dx, _, _, _ = BACKWARD.bind(call, operands, statistics, dy)
        np.testing.assert_allclose(dx, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


@pytest.mark.usefixtures("interpreter")
def test_each_group_is_its_own():
    """Next to each other: a constant, numbers far from zero, huge ones, and one that is not finite."""
    x = np.array(draw((1, 20, 20, 16), "float32"))
    x[..., :4], x[..., 4:8], x[..., 8:12], x[0, 5, 5, 13] = 0.1, x[..., 4:8] + 1e6, x[..., 8:12] * 1e25, np.nan
    # Deviations are scaled where the mean of the first position is large.
    x[0, 0, 0, 8:12] = 1e25
    beta = jnp.maximum(4 - jnp.arange(16, dtype=jnp.float32), 0)
    y = jaxnorm.group_norm(x, beta=beta, group_size=4, channel_axis=-1, implementation="pallas")
    want, _ = oracle.instance_norm(x, channel_axes=(-1,), group_size=4)
    np.testing.assert_array_equal(y[..., :4], np.broadcast_to(beta[:4], y[..., :4].shape))
    # The bound of test_offsets.py.
    np.testing.assert_allclose(y[..., 4:12], want[..., 4:12], rtol=0, atol=3e-6)
    assert np.isnan(y[..., 12:]).all()
