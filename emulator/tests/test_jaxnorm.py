"""jaxnorm's kernels, compiled for GPUs that are not there, executed and compared with float64."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the CUDA plugin and compiler")
pytestmark = [pytest.mark.slow, pytest.mark.kernel, pytest.mark.timeout(600)]

ROOT = pathlib.Path(__file__).parent.parent.parent


# Issue: rows of 16 bytes run over the end of a sample, and replicated lanes store different values.
@pytest.mark.parametrize(
    ("gpu", "calls"), [pytest.param("H100", 6, marks=pytest.mark.xfail(strict=True, reason="two faults")), ("A100", 3)]
)
def test_kernels_are_right(gpu, calls):
    """What went wrong once and random calls, forward and backward. One architecture per process."""
    command = [sys.executable, "-m", "emulator", "--gpu", gpu, "--count", str(calls), "--seed", "7"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    # So that calls for which jaxnorm has no kernel do not pass unnoticed.
    assert re.search(rf"^{gpu}: {2 * calls} kernels, 2 adversaries each, .*: all right$", done.stdout, re.MULTILINE)
