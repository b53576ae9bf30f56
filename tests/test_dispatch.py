"""A pass is one primitive until it is lowered; what computes it is chosen then."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxnorm
from jaxnorm import platforms

SHAPE = (4, 6, 5, 3)


def norm(x, gamma=None):
    return jaxnorm.instance_norm(x, gamma, channel_axis=-1, activation=jnp.tanh)


def step(x):
    return jax.grad(lambda x: jnp.sum(norm(x) ** 2))(x)


@pytest.fixture
def used(monkeypatch):
    """The platforms whose sums were traced."""
    seen = []
    for name in ("Cpu", "Gpu", "Generic", "Divided"):
        kind = getattr(platforms, name)

        def spy(self, terms, *arrays, original=kind.sum, name=name):
            seen.append(name)
            return original(self, terms, *arrays)

        monkeypatch.setattr(kind, "sum", spy)
    return seen


def test_one_platform_is_traced_when_it_is_lowered(used):
    # A new function, which JAX has not lowered before.
    program = jax.jit(lambda x: step(x)).trace(jnp.ones(SHAPE))
    assert used == []
    program.lower(lowering_platforms=("cuda",))
    assert set(used) == {"Gpu"}


def test_an_export_has_every_platform(used):
    exported = export.export(jax.jit(lambda x: step(x)), platforms=("cpu", "cuda", "tpu"))(jnp.ones(SHAPE))
    assert set(used) == {"Cpu", "Gpu", "Generic"}
    x = jax.random.normal(jax.random.key(0), SHAPE)
    again = export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(x), step(x), rtol=1e-5, atol=1e-6)


def test_symbolic_sizes_are_computed_on_the_array_itself(used):
    shape = export.symbolic_shape("n, h, w, 3")
    exported = export.export(jax.jit(lambda x: step(x)))(jax.ShapeDtypeStruct(shape, jnp.float32))
    assert set(used) == {"Divided", "Generic"}  # Divided inherits its sums
    x = jax.random.normal(jax.random.key(0), SHAPE)
    np.testing.assert_allclose(exported.call(x), step(x), rtol=1e-5, atol=1e-6)


def test_equal_layers_are_lowered_once(used):
    def network(x, gammas):
        for gamma in gammas:
            x = norm(x, gamma)
        return jnp.sum(x)

    jax.jit(jax.grad(network)).lower(jnp.ones(SHAPE), jnp.ones((5, 3)))
    # The center and both sums forward, and the two sums backward.
    assert len(used) == 3


def test_without_jit():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    with jax.disable_jit():
        y = norm(x)
    np.testing.assert_allclose(y, norm(x), rtol=1e-5, atol=1e-6)


def test_statistics_of_what_is_not_mapped_are_computed_once():
    x, gammas = jax.random.normal(jax.random.key(0), SHAPE), jax.random.normal(jax.random.key(1), (8, SHAPE[-1]))
    mapped = jax.vmap(jax.tree_util.Partial(norm, x))
    for one, gamma in zip(mapped(gammas), gammas, strict=True):
        np.testing.assert_allclose(one, norm(x, gamma), rtol=1e-5, atol=1e-6)
    reduced = [
        math.prod(map(int, shape.split("x")))
        for line in jax.jit(mapped).lower(gammas).as_text().splitlines()
        if "stablehlo.reduce" in line
        for shape in re.findall(r"tensor<([\dx]+)xf\d+>", line)
    ]
    assert 0 < max(reduced) <= x.size


ONE_OF_MANY = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count={devices}"
import jax, jax.numpy as jnp, jaxnorm
assert jax.device_count() == {devices}

def step(x, gamma):
    loss = lambda x, gamma: jnp.sum(jaxnorm.instance_norm(x, gamma, activation=jax.nn.gelu) ** 2)
    return jax.grad(loss, (0, 1))(x, gamma)

lowered = jax.jit(step).lower(jnp.ones((4, 64, 48, 48)), jnp.ones(64))
print(lowered.as_text())
print(lowered.compile().as_text().partition("\\n")[2])
"""


def test_one_device_of_many_computes_as_one_alone(run_python):
    """The same program, lowered and compiled; but XLA divides loops over as many threads as there are devices."""
    alone, of_eight = (run_python(ONE_OF_MANY.format(devices=devices)) for devices in (1, 8))
    partitions = re.compile(r'"outer_dimension_partitions":\[[^\]]*\]')
    assert partitions.sub("", of_eight) == partitions.sub("", alone)


def test_on_a_cpu_none_takes_xla_and_pallas_says_why_not():
    x = jnp.ones((2, 8, 8, 32))
    assert "mosaic" not in jax.jit(lambda x: jaxnorm.instance_norm(x, channel_axis=-1)).lower(x).as_text()
    for call in (jaxnorm.instance_norm, jax.jit(jaxnorm.instance_norm, static_argnames="implementation")):
        with pytest.raises(ValueError, match=r"needs a CUDA GPU: this computation runs on cpu\. .*'xla'"):
            call(x, implementation="pallas")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"where": jnp.ones((6, 5, 3), bool)}, "no masks"),
        ({"moments": (jnp.zeros(3), jnp.ones(3))}, "leave nothing to reduce"),
    ],
)
def test_what_the_kernel_does_not_compute_on_any_gpu(options, reason):
    with pytest.raises(ValueError, match=reason):
        jaxnorm.instance_norm(jnp.ones(SHAPE), channel_axis=-1, implementation="pallas", **options)


def test_importing_jaxnorm_does_not_import_mosaic(run_python):
    run_python(
        "import sys, jax, jaxnorm; jaxnorm.instance_norm(jax.numpy.ones((1, 2, 3))); "
        "assert 'jax.experimental.pallas.mosaic_gpu' not in sys.modules, 'imported'"
    )


def test_importing_the_function_does_not_import_flax(run_python):
    run_python("import sys; sys.modules['flax'] = None; import jaxnorm; jaxnorm.instance_norm")
