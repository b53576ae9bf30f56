"""What users import, see and type-check, and what it needs."""

import importlib

from mypy import api

import jaxnorm

USE = """
import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm
from jaxnorm import nnx, report

x = np.zeros((2, 3, 8, 8), np.float32)
values = np.ones(3, np.float32)
mask = np.ones((2, 1, 8, 8), np.bool_)
moments: tuple[jax.Array, jax.Array] = jaxnorm.instance_moments(x, where=mask)
y: jax.Array = jaxnorm.instance_norm(x, values, values, residual=x, activation=jax.nn.relu, where=mask)
y = jaxnorm.instance_norm(jnp.asarray(x), moments[0], residual=y, moments=moments)
y = jaxnorm.instance_norm(x, moments=(values, values))
y = jaxnorm.group_norm(x, values, values, num_groups=3, residual=x, activation=jax.nn.silu, where=mask)
groups = jaxnorm.GroupNorm(num_groups=3), jaxnorm.nnx.GroupNorm
layer = jaxnorm.InstanceNorm(activation=jax.nn.relu)
variables = layer.init(jax.random.key(0), x)
explanation: report.Explanation = jaxnorm.explain(x, residual=x, activation=jnp.tanh, implementation="xla")
explanation = jaxnorm.explain(jax.ShapeDtypeStruct((2, 3, 8), jnp.bfloat16), residual=True, device="H100")
passes: list[report.Pass] = [explanation.forward, explanation.backward]
tiles: list[report.Tile | report.NoTile] = [each.tile for each in passes]
print(y, variables, tiles, nnx.InstanceNorm)
"""
WRONG = """
import jaxnorm

jaxnorm.instance_norm([[[1.0, 2.0]]])
"""


def test_a_strict_type_check_takes_numpy_arrays_and_sees_what_is_wrong(tmp_path):
    """With what mypy knows of the packages since `make lint`."""
    programs = {"use": USE, "wrong": WRONG}
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(program)
    out, error, status = api.run(["--strict", *(str(tmp_path / f"{name}.py") for name in programs)])
    found = [line for line in out.splitlines() if "error:" in line]
    assert status == 1, out + error
    assert all("wrong.py" in line for line in found), out
    assert any("arg-type" in line for line in found), out


def test_dir_lists_the_public_names():
    assert sorted(dir(jaxnorm)) == sorted(jaxnorm.__all__)
    assert all(hasattr(jaxnorm, name) for name in dir(jaxnorm))


def test_submodules_can_be_imported():
    for name in ("explanation", "nnx", "gpu.devices", "functional"):
        assert importlib.import_module(f"jaxnorm.{name}").__name__ == f"jaxnorm.{name}"


def test_only_selfcheck_needs_rich(run_python):
    run_python(
        "import sys; sys.modules['rich'] = None; import jaxnorm; from jaxnorm.__main__ import main\n"
        "assert main(['explain', '2x8x8x32', '--channels-last']) == 0"
    )
