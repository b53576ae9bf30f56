"""A pass stands in the program as one primitive until it is lowered, and is traced then, for one platform."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxnorm
from jaxnorm import xla

SHAPE = (4, 6, 5, 3)


@pytest.fixture
def traced(monkeypatch):
    """The platforms for which a pass is traced, in a process that has traced none."""
    seen = []

    def spied(function):
        def spy(*arguments, positions, **options):
            seen.append(positions.platform)
            return function(*arguments, positions=positions, **options)

        return spy

    jax.clear_caches()
    for name in ("forward", "backward"):
        monkeypatch.setattr(xla, name, spied(getattr(xla, name)))
    yield seen
    jax.clear_caches()


def norm(x, gamma=None):
    return jaxnorm.instance_norm(x, gamma, channel_axis=-1, activation=jnp.tanh)


def step(x):
    return jax.grad(lambda x: jnp.sum(norm(x) ** 2))(x)


def test_one_platform_is_traced(traced):
    program = jax.jit(step).trace(jnp.ones(SHAPE))
    assert traced == []
    program.lower(lowering_platforms=("cuda",))
    assert traced == ["gpu", "gpu"]


def test_export_holds_every_platform(traced):
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(jax.jit(step), platforms=platforms)(jnp.ones(SHAPE))
    assert sorted(set(traced)) == ["cpu", "gpu", "tpu"]
    x = jax.random.normal(jax.random.key(0), SHAPE)
    again = export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(x), step(x), rtol=1e-5, atol=1e-6)


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
