"""A pass is one primitive until it is lowered; what computes it is chosen then."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerance
from jax import export

import jaxnorm
from jaxnorm.call import Call, Operands
from jaxnorm.dispatch import BACKWARD, FORWARD
from jaxnorm.gpu import devices
from jaxnorm.gpu.devices import DEVICES, Device, KernelKind
from jaxnorm.gpu.tile import NoTile, Tile

SHAPE = (4, 6, 5, 3)


def norm(x, gamma=None):
    return jaxnorm.instance_norm(x, gamma, channel_axis=-1, activation=jnp.tanh)


def step(x):
    return jax.grad(lambda x: jnp.sum(norm(x) ** 2))(x)


def lowered_for(platform):
    """The module that XLA gets, by the platform that it is lowered for alone."""
    return jax.jit(step).trace(jnp.ones(SHAPE)).lower(lowering_platforms=(platform,)).as_text()


def test_each_platform_gets_its_own_form():
    """Which is chosen when a program is lowered, out of one trace: tests/test_platforms.py has their numbers."""
    traced = jax.jit(step).trace(jnp.ones(SHAPE))
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    assert len(set(texts.values())) == 3
    # GPUs sum two terms as one complex number.
    assert [name for name, text in texts.items() if "stablehlo.complex" in text] == ["cuda"]


@pytest.mark.slow
def test_an_export_has_every_platform():
    exported = export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(jnp.ones(SHAPE))
    x = jax.random.normal(jax.random.key(0), SHAPE)
    again = export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda", "tpu")
    assert again.mlir_module().count("stablehlo.complex") == lowered_for("cuda").count("stablehlo.complex") > 0
    np.testing.assert_allclose(again.call(x), step(x), rtol=1e-5, atol=1e-6)


def test_equal_layers_are_lowered_once(monkeypatch):
    lowered = []

    def counted(platform, call, *arguments, one_pass, original):
        lowered.append(one_pass.name)
        return original(platform, call, *arguments)

    def network(x, gammas):
        for gamma in gammas:
            x = norm(x, gamma)
        return jnp.sum(x)

    for one_pass in (FORWARD, BACKWARD):
        by = functools.partial(counted, one_pass=one_pass, original=one_pass.in_plain_xla)
        monkeypatch.setattr(one_pass, "in_plain_xla", by)
    jax.jit(jax.grad(network)).lower(jnp.ones(SHAPE), jnp.ones((5, 3)))
    assert lowered == ["forward", "backward"]


@pytest.mark.slow
def test_statistics_of_what_is_not_mapped_are_computed_once():
    x, gammas = jax.random.normal(jax.random.key(0), SHAPE), jax.random.normal(jax.random.key(1), (8, SHAPE[-1]))
    mapped = jax.vmap(jax.tree_util.Partial(norm, x))
    for one, gamma in zip(mapped(gammas), gammas, strict=True):
        want, magnitude = oracle.instance_norm(x, gamma, channel_axes=(-1,), activation="tanh")
        # tanh makes nothing larger, and has a slope of at most 1.
        np.testing.assert_allclose(one, want, rtol=0, atol=tolerance.forward("float32", 30, max(1, magnitude)))
    reduced = [
        math.prod(map(int, shape.split("x")))
        for line in jax.jit(mapped).lower(gammas).as_text().splitlines()
        if "stablehlo.reduce" in line
        for shape in re.findall(r"tensor<([\dx]+)xf\d+>", line)
    ]
    assert 0 < max(reduced) <= x.size


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


# The kernel's tile, or why it has none.

VIEW = (8, 4096, 256)


def tiles(view=VIEW, dtype="float32", *, device="H100", residual=False, **options):
    """Of both passes, for a channels-last array of that view."""
    call = Call((2,), 1e-5, **{"implementation": "pallas"} | options)
    x = jax.ShapeDtypeStruct(view, dtype)
    per_instance = jax.ShapeDtypeStruct((view[0], view[2]), jnp.float32)
    operands = Operands(x, per_instance, per_instance, x if residual else None)
    return tuple(each.tile(call, operands, DEVICES.get(device, device)) for each in (FORWARD, BACKWARD))


def test_the_kernel_where_it_has_a_tile():
    assert all(isinstance(tile, Tile) for tile in tiles())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": None}, "no CUDA GPU"),
        ({"device": Device((7, 5), 40, 64 * 1024)}, "8.0 (Ampere) or newer: this is 7.5"),
        ({"dtype": "float64"}, "8 bytes"),
        ({"view": (8, 4096, 3)}, "multiples of 16 bytes"),
        ({"activation": jax.scipy.special.gammaln}, "lgamma"),
        ({"axis_name": "space"}, "on one device whole"),
    ],
    ids=["no GPU", "old GPU", "float64", "channels", "activation", "axis_name"],
)
def test_else_the_reason(changes, reason):
    for tile in tiles(**changes):
        assert isinstance(tile, NoTile)
        assert reason in tile.reason


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("view", [VIEW, (1, 512 * 512, 64)], ids=str)
def test_none_takes_only_what_is_proven(name, view, monkeypatch):
    """The kinds of the passes, one proven at a time: that one is taken, on that kind of GPU alone."""
    device, named = DEVICES[name], tiles(view, device=name)
    if any(isinstance(tile, NoTile) for tile in named):
        pytest.skip(f"does not fit: {named}")

    def taken(*kinds):
        monkeypatch.setattr(devices, "PROVEN", dict.fromkeys(kinds, "a report"))
        return tiles(view, device=name, implementation=None)

    nothing = (devices.NOT_PROVEN, devices.NOT_PROVEN)
    assert taken() == nothing
    for copies, kind in {(tile.copies, tile.synchronization) for tile in named}:
        assert taken(KernelKind((9, 9), copies, kind)) == nothing
        assert taken(KernelKind(device.compute_capability, copies, kind)) == tuple(
            tile if (tile.copies, tile.synchronization) == (copies, kind) else devices.NOT_PROVEN for tile in named
        )


def test_explain_and_the_call_know_what_is_proven(monkeypatch):
    x = jax.ShapeDtypeStruct((8, 64, 64, 256), jnp.float32)

    def passes():
        explanation = jaxnorm.explain(x, channel_axis=-1, device="H100")
        return [found.implementation for found in (explanation.forward, explanation.backward)]

    monkeypatch.setattr(devices, "PROVEN", {})
    assert passes() == ["xla"] * 2
    kinds = {KernelKind((9, 0), tile.copies, tile.synchronization): "a report" for tile in tiles()}
    monkeypatch.setattr(devices, "PROVEN", kinds)
    assert passes() == ["pallas"] * 2


def test_a_residual_is_resident_only_where_it_is_needed():
    """Without an activation, the gradients do not depend on the residual."""

    def arrays(activation):
        explanation = jaxnorm.explain(
            jax.ShapeDtypeStruct((8, 64, 64, 256), jnp.float32),
            channel_axis=-1,
            residual=True,
            activation=activation,
            implementation="pallas",
            device="H100",
        )
        return explanation.backward.tile.arrays

    assert (arrays(None), arrays(jax.nn.relu)) == (2, 3)


def test_what_is_not_proven_traces_no_activation(monkeypatch):
    monkeypatch.setattr(devices, "PROVEN", {})

    def never(z):
        raise AssertionError("traced")

    assert tiles(activation=never, implementation=None) == (devices.NOT_PROVEN, devices.NOT_PROVEN)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("H100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L40S", "L40S"),
        ("AMD Instinct MI300X", None),
    ],
)
def test_devices_by_name(name, known):
    assert devices.named(name) == DEVICES.get(known)


def test_facts_of_a_device():
    h100 = types.SimpleNamespace(
        platform="gpu", compute_capability="9.0", core_count=132, device_kind="NVIDIA H100 80GB HBM3"
    )
    assert devices.facts(h100) == DEVICES["H100"]
    assert devices.facts(types.SimpleNamespace(platform="gpu", compute_capability="gfx942", core_count=304)) is None
    assert devices.facts(types.SimpleNamespace(platform="cpu")) is None


@pytest.mark.slow
def test_importing_jaxnorm_does_not_import_mosaic(run_python):
    run_python(
        "import sys, jax, jaxnorm; jaxnorm.instance_norm(jax.numpy.ones((1, 2, 3))); "
        "assert 'jax.experimental.pallas.mosaic_gpu' not in sys.modules, 'imported'"
    )


@pytest.mark.slow
def test_importing_the_function_does_not_import_flax(run_python):
    run_python("import sys; sys.modules['flax'] = None; import jaxnorm; jaxnorm.instance_norm")
