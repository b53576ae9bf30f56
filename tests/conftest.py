"""Strictness that users do not get: mixed ranks and mixed dtypes are errors here."""

import os

# Read when JAX starts: the GPU interpreter runs the thread blocks of a cluster as threads that wait for each other.
os.environ.setdefault("PJRT_NPROC", "16")

import datetime
import gc
import hashlib
import itertools
import subprocess
import sys

import jax
import pytest

# What JAX traces and lowers is millions of objects that live on: to look for garbage among them after every 700 new
# ones, as Python does by itself, takes a fifteenth of the time.
gc.set_threshold(100_000, 20, 100)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked exhaustive too")
    parser.addoption("--draw", type=int, metavar="N", help="run N random tests of every file")
    today = int(datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))
    parser.addoption("--seed", type=int, default=today, help="of random calls and of --draw; default: today's date")


def pytest_configure(config):
    """What was compiled before is taken from pytest's cache, which `--cache-clear` empties; also by other processes."""
    if hasattr(config, "cache"):
        options = {
            "jax_compilation_cache_dir": str(config.cache.mkdir("compiled")),
            # The many small operations too.
            "jax_persistent_cache_min_compile_time_secs": 0,
        }
        for name, value in options.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)


def pytest_report_header(config):
    draw, seed = config.getoption("draw"), config.getoption("seed")
    return f"jax {jax.__version__}, --seed {seed}" + (f", {draw} random tests of every file" if draw else "")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Sorts long tests first, so no worker ends with one; draws from what markers and keywords selected."""
    if not config.getoption("all"):
        keep(config, items, lambda item: not item.get_closest_marker("exhaustive"))
    items.sort(key=time_limit, reverse=True)
    draw_some(config, items)


def time_limit(item):
    """The seconds that a test may take; 0 for a test that has the limit of all."""
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker else 0


def draw_some(config, items):
    """Keeps N random tests of every file if the command line says --draw N."""
    draw, seed = config.getoption("draw"), config.getoption("seed")
    if not draw:
        return

    def rank(item):
        # The rank depends on the test and the seed alone, so it is the same in all processes.
        return hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest()

    files = itertools.groupby(sorted(items, key=lambda item: str(item.path)), lambda item: item.path)
    drawn = {item.nodeid for _, found in files for item in sorted(found, key=rank)[:draw]}
    keep(config, items, lambda item: item.nodeid in drawn)


def keep(config, items, is_kept):
    """Deselects all other tests."""
    config.hook.pytest_deselected(items=[item for item in items if not is_kept(item)])
    items[:] = [item for item in items if is_kept(item)]


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
def seed(request):
    """The seed of random calls: a new one each day, which the header of the report has."""
    return request.config.getoption("seed")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def interpreter():
    """GPU kernels run on the CPU, and must have run without a race."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # The programs of the interpreter take longer to optimize than to run.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")):
            yield
        # get_races raises where no kernel ran.
        assert not interpret_pallas_call.get_races().races_found
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        interpret_pallas_call.gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.fixture
def run_python():
    """Runs a program in a fresh interpreter, which must succeed; returns what it printed."""

    def run(program):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
