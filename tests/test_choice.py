"""Which implementation a call takes, and what is said where the named one cannot run."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxnorm
from jaxnorm import choice
from jaxnorm.gpu import devices
from jaxnorm.gpu.devices import DEVICES, Device, KernelKind
from jaxnorm.gpu.tile import NoTile, Tile

VIEW = (8, 4096, 256)


def tiles(**changes):
    given = {"residual": False, "activation": None, "device": DEVICES["H100"], "implementation": "pallas"} | changes
    return choice.find_tiles(given.pop("shape", VIEW), given.pop("dtype", "float32"), **given)


def test_the_kernel_where_it_has_a_tile():
    assert all(isinstance(tile, Tile) for tile in tiles())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": None}, "not for one CUDA GPU"),
        ({"device": Device((7, 5), 40, 64 * 1024)}, "8.0 (Ampere) or newer: this is 7.5"),
        ({"dtype": "float64"}, "8 bytes"),
        ({"shape": (8, 4096, 3)}, "multiples of 16 bytes"),
        ({"activation": jax.scipy.special.gammaln}, "lgamma"),
        ({"activation": lambda z: lax.while_loop(lambda z: z < 1, lambda z: z + 1, z)}, "while"),
    ],
    ids=["no GPU", "old GPU", "float64", "channels", "activation", "activation without a pullback"],
)
def test_else_the_reason(changes, reason):
    for tile in tiles(**changes):
        assert isinstance(tile, NoTile)
        assert reason in tile.reason


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("shape", [VIEW, (512, 4096, 1), (1, 256 * 256, 64)], ids=str)
def test_by_itself_only_what_is_proven(name, shape, monkeypatch):
    """The ways of the passes, one proven at a time: that one is taken, on that kind of GPU alone."""
    device = DEVICES[name]
    by_name = tiles(device=device, shape=shape)
    assert all(isinstance(tile, Tile) for tile in by_name)
    monkeypatch.setattr(devices, "PROVEN", {})
    assert tiles(device=device, shape=shape, implementation=None) == (devices.NOT_PROVEN, devices.NOT_PROVEN)
    for copies, meeting in {(tile.copies, tile.synchronization) for tile in by_name}:
        monkeypatch.setattr(devices, "PROVEN", {KernelKind((9, 9), copies, meeting): "a report of another GPU"})
        assert tiles(device=device, shape=shape, implementation=None) == (devices.NOT_PROVEN, devices.NOT_PROVEN)
        monkeypatch.setattr(devices, "PROVEN", {KernelKind(device.compute_capability, copies, meeting): "a report"})
        assert tiles(device=device, shape=shape, implementation=None) == tuple(
            tile if (tile.copies, tile.synchronization) == (copies, meeting) else devices.NOT_PROVEN for tile in by_name
        )


def test_passes_decide_on_their_own(monkeypatch):
    """Clusters forward; backward a group is faster."""
    forward, backward = tiles(shape=(2, 128 * 128, 128))
    assert (forward.synchronization, backward.synchronization) == ("cluster", "group")
    monkeypatch.setattr(devices, "PROVEN", {KernelKind((9, 0), "bulk", "cluster"): "a report"})
    assert tiles(shape=(2, 128 * 128, 128), implementation=None) == (forward, devices.NOT_PROVEN)


def test_explain_and_the_call_know_what_is_proven(monkeypatch):
    x = jax.ShapeDtypeStruct((8, 64, 64, 256), jnp.float32)

    def passes():
        explanation = jaxnorm.explain(x, channel_axis=-1, device="H100")
        return [(found.implementation, found.tile) for found in (explanation.forward, explanation.backward)]

    monkeypatch.setattr(devices, "PROVEN", {})
    assert passes() == [("xla", devices.NOT_PROVEN)] * 2
    assert "implementation='pallas', or run python -m jaxnorm selfcheck" in str(passes()[0][1])
    ways = {KernelKind((9, 0), tile.copies, tile.synchronization): "a report" for tile in tiles(shape=(8, 4096, 256))}
    monkeypatch.setattr(devices, "PROVEN", ways)
    assert [name for name, _ in passes()] == ["pallas"] * 2


def test_a_residual_is_held_only_where_it_is_needed():
    plain, with_residual = tiles()[1], tiles(residual=True)[1]
    assert plain.arrays == with_residual.arrays == 2
    assert tiles(residual=True, activation=jax.nn.relu)[1].arrays == 3


LACKING = """
import sys, types
import jax
jax.config.update("jax_platforms", "cpu")
{break_it}
import jax.numpy as jnp
import jaxnorm
from jaxnorm import functional
from jaxnorm.gpu.devices import DEVICES

functional.target = lambda x: DEVICES["H100"]
x = jnp.ones((2, 64, 64, 32))
call = lambda x: jaxnorm.instance_norm(x, channel_axis=-1, activation=jax.nn.relu)
assert bool((jax.jit(call)(x) == 0).all())
jax.grad(lambda x: call(x).sum())(x)
explanation = jaxnorm.explain(x, channel_axis=-1, device="H100")
assert explanation.forward.implementation == explanation.backward.implementation == "xla"
try:
    jaxnorm.instance_norm(x, channel_axis=-1, implementation="pallas")
except ValueError as error:
    print(error)
print(explanation.backward.tile.reason)
"""
BROKEN = "from jax.experimental.pallas import mosaic_gpu as plgpu; "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        ("sys.modules['jax.experimental.pallas.mosaic_gpu'] = None", "ModuleNotFoundError"),
        ("import jax.experimental.mosaic.gpu.utils as utils; del utils.inline_ptx", "ImportError: cannot import name"),
        (
            "class Failing:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'jax.experimental.pallas.mosaic_gpu': raise OSError('no such library')\n"
            "sys.meta_path.insert(0, Failing())",
            "OSError: no such library",
        ),
        (BROKEN + "del plgpu.copy_gmem_to_smem", "AttributeError: module"),
        (BROKEN + "plgpu.CompilerParams = lambda: None", "TypeError"),
        (BROKEN + "del plgpu.Layout", "AttributeError"),
    ],
    ids=["no module", "no name", "not an ImportError", "no function", "no keyword", "no class"],
)
def test_a_jax_that_lacks_something_still_has_xla(break_it, reason, run_python):
    """None falls back and explain says why; so does the refusal of "pallas"."""
    refusal, explanation = run_python(LACKING.format(break_it=break_it)).splitlines()
    assert f"JAX {jax.__version__} does not trace it" in explanation
    assert reason in explanation
    assert explanation in refusal


@pytest.mark.parametrize("context", [jax.ensure_compile_time_eval, jax.check_tracer_leaks, jax.disable_jit])
def test_the_answer_does_not_depend_on_who_asks_first(context):
    choice._lacking.cache_clear()
    with context():
        assert all(isinstance(tile, Tile) for tile in tiles())


def test_on_a_cpu_none_takes_xla_and_pallas_says_why_not():
    x = jnp.ones((2, 8, 8, 32))
    assert "mosaic" not in jax.jit(lambda x: jaxnorm.instance_norm(x, channel_axis=-1)).lower(x).as_text()
    with pytest.raises(ValueError, match=r"needs a CUDA GPU, or a CPU inside force_gpu_interpret_mode.*'xla'"):
        jaxnorm.instance_norm(x, channel_axis=-1, implementation="pallas")


def test_importing_jaxnorm_does_not_import_mosaic(run_python):
    run_python(
        "import sys, jax, jaxnorm; jaxnorm.instance_norm(jax.numpy.ones((1, 2, 3))); "
        "assert 'jax.experimental.pallas.mosaic_gpu' not in sys.modules, 'imported'"
    )


def test_importing_the_function_does_not_import_flax(run_python):
    run_python("import sys; sys.modules['flax'] = None; import jaxnorm; jaxnorm.instance_norm")


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
    h100 = types.SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)
    # The bandwidth is that of a known product, and otherwise estimated.
    assert devices.facts(h100) == dataclasses.replace(DEVICES["H100"], bandwidth=None)
    h100.device_kind = "NVIDIA H100 80GB HBM3"
    assert devices.facts(h100) == DEVICES["H100"]
    h100.device_kind = "NVIDIA A100-SXM4-40GB"
    assert devices.facts(h100).bandwidth == 1555
    assert devices.facts(types.SimpleNamespace(platform="gpu", compute_capability="gfx942", core_count=304)) is None
    assert devices.facts(types.SimpleNamespace(platform="cpu")) is None
    assert devices.target(jnp.ones(3)) is None


SPREAD = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxnorm.placement import is_split_by_jit

seen = {}
note = lambda name: lambda x: (seen.__setitem__(name, is_split_by_jit(x)), x)[1]
mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
x = jnp.ones((4, 4))
seen["one device"] = is_split_by_jit(x)
seen["two devices"] = is_split_by_jit(jax.device_put(x, NamedSharding(mesh, P("i"))))
jax.jit(note("jit"))(x)
jax.jit(jax.shard_map(note("shard_map"), mesh=mesh, in_specs=P("i"), out_specs=P("i")))(x)
print(seen)
"""


def test_what_jit_may_split(run_python):
    assert run_python(SPREAD).strip() == str(
        {"one device": False, "two devices": True, "jit": True, "shard_map": False}
    )


def test_what_is_not_proven_traces_no_activation(monkeypatch):
    monkeypatch.setattr(devices, "PROVEN", {})

    def never(z):
        raise AssertionError("traced")

    assert tiles(activation=never, implementation=None) == (devices.NOT_PROVEN, devices.NOT_PROVEN)


@pytest.mark.parametrize("name", DEVICES)
def test_bandwidth_without_a_table_is_of_the_right_order(name):
    """The rule for GPUs that no table names; the named ones that it misses by more are why there is a table."""
    known = DEVICES[name].bytes_per_microsecond
    rule = dataclasses.replace(DEVICES[name], bandwidth=None).bytes_per_microsecond
    assert 0.6 <= rule / known <= 1.6
