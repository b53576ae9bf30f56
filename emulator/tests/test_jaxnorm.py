"""jaxnorm's kernels, compiled for GPUs that are not there, executed and compared with float64."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the CUDA plugin and compiler")
if jax.version.__version_info__ < (0, 12):
    pytest.skip("emulator/mosaic.py reads what JAX 0.12 compiles", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.kernel, pytest.mark.timeout(600)]

ROOT = pathlib.Path(__file__).parent.parent.parent


def execute(gpu, calls, program="-m emulator"):
    options = ["--gpu", gpu, "--count", str(calls), "--seed", "7"]
    command = [sys.executable, *(["-m", "emulator"] if program == "-m emulator" else ["-c", program]), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("gpu", "calls"), [("H100", 6), ("A100", 3)])
def test_kernels_are_right(gpu, calls):
    """What went wrong once and random calls, forward and backward. One architecture per process."""
    done = execute(gpu, calls)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    # So that calls for which jaxnorm has no kernel do not pass unnoticed.
    assert re.search(rf"^{gpu}: {2 * calls} kernels, 2 adversaries each, .*: all right$", done.stdout, re.MULTILINE)


# A box with a ragged end is stored whole, as in version 0.2: a copy of contiguous rows is not clipped.
OLD_STORES = """
import sys
from emulator.__main__ import main
from jaxnorm.gpu import copies
from jax.experimental.pallas import mosaic_gpu as plgpu

def write_back(self, box):
    plgpu.commit_smem()
    self._store_box(box)

copies.Bulk.write_back = write_back
sys.exit(main())
"""


def test_the_stores_of_version_0_2_are_found_to_be_wrong():
    done = execute("H100", 2, OLD_STORES)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "2 calls are WRONG" in done.stdout, done.stdout
