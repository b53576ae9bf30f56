"""On 8 virtual CPU devices: numbers, gradients, and what travels between the devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])


def reports(style):
    """A process of its own: the number of devices is fixed when JAX starts."""
    done = subprocess.run(
        [sys.executable, TESTS / "mesh_report.py", style],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "placements"),
    [
        ("auto", 17),
        ("auto, with the rule of the kernel", 17),
        ("explicit", 12),
        ("explicit data, auto space", 10),
        ("shard_map", 12),
        ("shard_map, check_vma=False", 4),
        ("shard_map over data alone", 10),
    ],
)
def test_every_placement(style, placements):
    found = reports(style)
    assert len(found) == placements
    for report in found:
        name = report["placement"]
        assert max(report["errors"].values()) <= 1, (name, report["errors"])
        assert report["stays"], name
        sent = [(kind, size) for kind, size in report["sent"] if [kind, size] not in report["sent_without_a_norm"]]
        assert {kind for kind, _ in sent} <= {"all-reduce"}, (name, sent)
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
import as_if_proven, jaxnorm
from jaxnorm import functional
from jaxnorm.gpu.devices import DEVICES

norm = functools.partial(jaxnorm.instance_norm, channel_axis=-1, activation=jax.nn.silu)
energy = lambda norm: lambda *given: jnp.sum(jnp.sin(norm(*given)))
x, gamma = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((4, 2, 8, 6, 8), (4, 8))))
transformations = {
    "vmap": lambda norm, **names: jax.vmap(norm, **names),
    "vmap of grad": lambda norm, **names: jax.vmap(jax.grad(energy(norm), (0, 1)), **names),
    "grad of vmap": lambda norm, **names: jax.grad(energy(jax.vmap(norm, **names)), (0, 1)),
}
want = {name: jax.jit(transform(norm))(x, gamma) for name, transform in transformations.items()}

# XLA asks jaxnorm how to divide, as for GPUs; on the CPU the kernel's place is taken by the plain form.
functional.target = lambda x: DEVICES["H100"]
as_if_proven.assume()
mesh = jax.make_mesh((2, 4), ("styles", "space"), axis_types=(AxisType.Auto,) * 2)
place = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))
xs, gammas = place(x, "styles", None, "space"), place(gamma, "styles")
for name, transform in transformations.items():
    for names in ({}, {"axis_name": "v"}, {"spmd_axis_name": "styles"}):
        compiled = jax.jit(transform(norm, **names)).lower(xs, gammas).compile()
        for got, wanted in zip(jax.tree.leaves(compiled(xs, gammas)), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))
        sent = collectives(compiled.as_text())
        # At most four values for each of the 2 * 2 * 8 instances of a style's devices.
        assert sent and all(kind == "all-reduce" and size <= 4 * 2 * 2 * 8 * 4 for kind, size in sent), (name, sent)
print("done")
"""


@pytest.mark.slow
def test_vmap_over_a_divided_axis(run_python, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    assert run_python(VMAP).strip() == "done"
