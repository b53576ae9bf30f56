"""Strictness that users do not get: mixed ranks and mixed dtypes are errors here."""

import os

# Read when JAX starts: the GPU interpreter runs the thread blocks of a cluster as threads that wait for each other.
os.environ.setdefault("PJRT_NPROC", "16")

import subprocess
import sys

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def strict_dtypes():
    """For tests of jaxnorm alone: Flax itself mixes dtypes."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def interpreter():
    """GPU kernels run on the CPU, and must have run without a race."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu as plgpu

    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")):
            yield
        # get_races raises where no kernel ran.
        assert not interpret_pallas_call.get_races().races_found
    finally:
        interpret_pallas_call.gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.fixture
def run_python():
    """Runs a program in a fresh interpreter, which must succeed; returns what it printed."""

    def run(program):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
