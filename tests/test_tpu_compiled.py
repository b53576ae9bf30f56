"""What XLA makes of the norm for a TPU that is not there: bytes counted on the compiled module, nothing is run."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from cases import exhaustive

pytest.importorskip("libtpu", reason="needs the TPU compiler")
pytestmark = [exhaustive, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = pathlib.Path(__file__).parents[1]
# Random cases beyond vector memory, in units that the norm adds.
PROGRAM = """
import json
from benchmarks import aot_tpu, traffic
compiler = aot_tpu.TpuCompiler()
for case in traffic.tpu_cases(20261124, 4):
    added = traffic.added(compiler, traffic.TPU_NORMS, case)
    print(json.dumps({"case": str(case)} | {name: moved for name, (moved, _) in added.items()}))
"""


def test_a_block_moves_less_than_with_the_stable_variance_of_flax():
    """One reading of x less, for a sixteenth: Flax reads x for the mean, then for the variance."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 4
    for block in found:
        assert block["jaxnorm, plain XLA"] <= block["Flax, stable"] - 0.9, block
