"""On 8 virtual CPU devices: numbers, gradients, and what travels between the devices."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mesh_report
import pytest
from cases import exhaustive, some

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])


def reports(cases):
    """A process of its own: the number of devices is fixed when JAX starts."""
    done = subprocess.run(
        [sys.executable, TESTS / "mesh_report.py", *map(" | ".join, cases)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(301)
@pytest.mark.parametrize("part", range(3))
def test_every_placement_of_today(part, seed):
    cases = sorted(mesh_report.of_today([*mesh_report.STYLES, mesh_report.AS_ON_GPUS], seed))
    # Those with the rule for GPUs are in a process of their own.
    others = [case for case in cases if case[0] != mesh_report.AS_ON_GPUS]
    with_rule = [case for case in cases if case[0] == mesh_report.AS_ON_GPUS]
    check_placements((others[::2], others[1::2], with_rule)[part])


@exhaustive
@pytest.mark.parametrize("style", [*mesh_report.STYLES, mesh_report.AS_ON_GPUS])
def test_every_placement(style):
    check_placements([(style, placement) for placement in mesh_report.style(style)[1]])


def check_placements(cases):
    found = reports(cases)
    assert len(found) == len(cases)
    for report in found:
        name = report["placement"]
        assert max(report["errors"].values()) <= 1, (name, report["errors"])
        assert report["stays"], name
        sent = [(kind, size) for kind, size in report["sent"] if [kind, size] not in report["sent_without_a_norm"]]
        # Groups of which each device has a part are summed from the gathered numbers of their channels.
        gathers = {"all-gather"} if "groups" in name or "group," in name else set()
        assert {kind for kind, _ in sent} <= {"all-reduce"} | gathers, (name, sent)
        # At most six values per instance at once, which XLA combines where two mesh axes divide an instance; the sums
        # that stand for the results of an uneven call besides.
        assert all(size <= 6 * report["per_instance_bytes"] + 64 for _, size in sent), (name, sent)


VMAP = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from benchmarks.hlo import collectives
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxnorm
from mesh_report import divide_as_on_gpus

norm = functools.partial(jaxnorm.instance_norm, channel_axis=-1, activation=jax.nn.silu)
energy = lambda norm: lambda *given: jnp.sum(jnp.sin(norm(*given)))
x, gamma = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((4, 2, 8, 6, 8), (4, 8))))
transformations = {
    "vmap": lambda norm, **names: jax.vmap(norm, **names),
    "vmap of grad": lambda norm, **names: jax.vmap(jax.grad(energy(norm), (0, 1)), **names),
    "grad of vmap": lambda norm, **names: jax.grad(energy(jax.vmap(norm, **names)), (0, 1)),
}
want = {name: jax.jit(transform(norm))(x, gamma) for name, transform in transformations.items()}

divide_as_on_gpus()
mesh = jax.make_mesh((2, 4), ("styles", "space"), axis_types=(AxisType.Auto,) * 2)
place = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))
xs, gammas = place(x, "styles", None, "space"), place(gamma, "styles")
for i, (name, transform) in enumerate(transformations.items()):
    options = [{}, {"axis_name": "v"}, {"spmd_axis_name": "styles"}]
    for names in options if EVERY_PAIR else [options[i]]:
        compiled = jax.jit(transform(norm, **names)).lower(xs, gammas).compile()
        for got, wanted in zip(jax.tree.leaves(compiled(xs, gammas)), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))
        sent = collectives(compiled.as_text())
        # At most four values for each of the 2 * 2 * 8 instances of a style's devices.
        assert sent and all(kind == "all-reduce" and size <= 4 * 2 * 2 * 8 * 4 for kind, size in sent), (name, sent)
print("done")
"""


CUT_GROUPS = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxnorm, tolerance

norm = functools.partial(jaxnorm.group_norm, group_size=4, channel_axis=-1, activation=jax.nn.silu)
energy = lambda *given: jnp.sum(jnp.sin(norm(*given)))
transformations = {
    "Hessian-vector product": lambda *given: jax.jvp(jax.grad(energy, (0, 1)), given, given)[1],
    "gradient penalty": jax.grad(lambda *given: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(energy, (0, 1))(*given)), 0),
    "vmap": lambda x, gamma: jax.vmap(norm)(jnp.stack([x, -x]), jnp.stack([gamma, gamma])),
    "vmap of what is not mapped": lambda x, gamma: jax.vmap(norm, (None, 0))(x, jnp.stack([gamma, -gamma])),
}
x, gamma = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, 5, 6, 8), (2, 8))))
bound = 300 * tolerance.arithmetic("float32", 120)
for i, (name, transformed) in enumerate(transformations.items()):
    want = jax.tree.leaves(jax.jit(transformed)(x, gamma))
    options = [(AxisType.Auto,) * 2, (AxisType.Explicit,) * 2]
    for kinds in options if EVERY_PAIR else [options[i % 2]]:
        mesh = jax.make_mesh((2, 4), ("data", "channels"), axis_types=kinds)
        with jax.set_mesh(mesh):
            divided = jax.device_put(x, NamedSharding(mesh, P("data", None, None, "channels")))
            got = jax.tree.leaves(jax.jit(transformed)(divided, jax.device_put(gamma, NamedSharding(mesh, P()))))
        for value, wanted in zip(got, want, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=0, atol=bound * float(jnp.abs(wanted).max()))
print("done")
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(VMAP, id="vmap over a divided axis", marks=exhaustive),
        pytest.param(CUT_GROUPS, id="groups that are cut", marks=exhaustive),
    ],
)
@pytest.mark.parametrize("every_pair", some([False, True], False), ids=["each value", "every pair"])
def test_transformations(program, every_pair, run_python, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    assert run_python(f"EVERY_PAIR = {every_pair}\n{program}").strip() == "done"


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
