"""The fused kernel through the real compilers, for GPUs that are not there: what it moves, holds and spills.

Nothing here runs on a GPU: bytes are counted on the compiled module, registers are the assembler's.
"""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from activations import ACTIVATIONS, LOCAL_MEMORY
from kernel_cases import BOTH, CASES

pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the CUDA plugin and compiler")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TESTS = pathlib.Path(__file__).parent
GPUS = ["H100", "B200"]
# Too large for its cluster beyond a forward pass without residual.
ONLY_FORWARD = "1x256x256x64"
# x-sized arrays that a pass reads and writes, by (pass, residual), and 0.05 for all that is small.
UNITS = {("forward", False): 2, ("backward", False): 3, ("forward", True): 3, ("backward", True): 5}
SMALL = 0.05
# float32 values per instance that a pass reads and writes besides: forward writes gamma and beta per instance, reads
# them and writes three statistics; backward reads these five, writes two gradients and sums them over the batch.
VALUES = {"forward": 7, "backward": 9}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


def reports(*arguments, x64=False):
    """What aot_report.py prints."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS.parent / "benchmarks")))
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": str(x64)}
    command = [sys.executable, str(TESTS / "aot_report.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found, passes, positions, spilled=0):
    """One kernel per pass, nothing else x-sized, nothing spilled, and no more moved than must be."""
    for name in ("forward", "backward"):
        assert found["calls"][f"jaxnorm_{name}"] == (name in passes), found
    assert found["mosaic"] == len(passes), found
    assert not found["others"], found
    assert all(kernel["spilled"] <= spilled for kernel in found["kernels"].values()), found
    bound = sum(
        UNITS[name, found["residual"]] + SMALL + 4 * VALUES[name] / (positions * ITEMSIZE[found["dtype"]])
        for name in passes
    )
    assert found["units"] <= bound, found


@pytest.mark.parametrize(("shape", "channels", "dtypes"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
@pytest.mark.parametrize("gpu", GPUS)
def test_one_kernel_per_pass_that_moves_what_it_must(gpu, shape, channels, dtypes):
    """instance_norm and its gradients."""
    _, *rest = map(int, shape.split("x"))
    positions = math.prod(rest) // (rest[-1] if channels == "last" else rest[0])
    seen = []
    for found in reports(gpu, "calls", channels, shape, *dtypes):
        seen.append((found["of"], found["residual"]))
        if shape != ONLY_FORWARD:
            check(found, ["forward"] if found["of"] == "forward" else ["forward", "backward"], positions)
        elif not found["residual"]:
            assert found["calls"] == {"jaxnorm_forward": 1, "jaxnorm_backward": 0}
        else:
            assert found["mosaic"] == 0
    assert sorted(seen) == sorted(
        [("forward", False), ("gradient", False), ("forward", True), ("gradient", True)] * len(dtypes)
    )


@pytest.mark.parametrize(
    ("gpu", "shape", "channels"),
    [
        ("A100", "8x64x64x256", "last"),
        ("A100", "2x128x128x128", "last"),
        ("A100", "1x256x256x64", "last"),
        ("A100", "2x32x32x32x128", "last"),
        ("A100", "8x256x64x64", "first"),
        ("A100", "1x64x256x256", "first"),
        ("H100", "8x64x64x250", "last"),  # rows that bulk copies cannot start at
        ("H100", "2x64x255x255", "first"),
        ("H100", "1x8x1024x1024", "first"),  # too large for a cluster
    ],
)
def test_plain_xla_where_there_is_no_tile(gpu, shape, channels):
    """No Mosaic, and the passes that xla.py promises: 3.2 units forward; the gradient needs no y, so 1.2 and 5.3."""
    for found in reports(gpu, "calls", channels, shape, "float32", "bfloat16"):
        assert found["mosaic"] == 0
        if found["residual"]:
            continue
        assert found["units"] <= {"forward": 3.2, "gradient": 1.2 + 5.3}[found["of"]], found


@pytest.mark.parametrize("gpu", [*GPUS, "RTX 5090"])
def test_odd_views_compile(gpu):
    """Ragged rows, few rows, rows of every width, small instances: what test_kernel_interpreted.py runs."""
    for view in ("2x225x8", "1x1001x4", "2x70x64", "1x1x8", "3x1008x1", "1x2100x1", "18x200x1", "1000x16x1"):
        for found in reports(gpu, "views", view, "float16", "float32"):
            if "reason" in found:
                assert (found["view"], found["dtype"]) in (([1, 1001, 4], "float16"), ([1, 2100, 1], "float16"))
                assert "multiples of 16 bytes" in found["reason"]
                continue
            assert found["calls"][f"jaxnorm_{found['of']}"] == 1, found
            assert all(kernel["spilled"] == 0 for kernel in found["kernels"].values()), found
            assert found["shared_memory"] <= found["shared_memory_bound"], found


def test_every_activation_compiles():
    seen = set()
    for found in reports("H100", "activations"):
        # The stack frame of a slow path.
        spilled = 64 if found["activation"] in LOCAL_MEMORY else 0
        check(found, [found["of"]], found["view"][1], spilled)
        seen.add(found["activation"])
    assert seen == set(ACTIVATIONS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("calls", "last", "8x64x64x256", *BOTH),
        ("calls", "first", "1x64x256x256", *BOTH),
        ("views", "18x200x1", "float16"),
    ],
    ids=lambda arguments: "-".join(arguments[:3]),
)
def test_x64_compiles_to_the_same(arguments):
    """Byte for byte and register for register: no index and no constant becomes wider."""
    assert reports("H100", *arguments, x64=True) == reports("H100", *arguments)


def test_transformations_launch_as_few_kernels():
    """Forward and backward launches: vmap is one, a scan one in its loop."""
    forward, both = [1, 0], [1, 1]
    assert {found["transformation"]: found["launches"] for found in reports("H100", "transformations")} == {
        "vmap": forward,
        "vmap of x alone": forward,
        "vmap of gamma alone": forward,
        "vmap with a name": forward,
        "vmap of vmap": forward,
        "vmap of grad": both,
        "grad": both,
        # The gradient that is penalized, and once more for the part of its derivative that passes through y.
        "grad of grad": [1, 2],
        "checkpoint": both,
        "scan": both,
        "scan of checkpoint": both,
    }


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_on_eight_gpus_every_one_runs_the_kernel_on_its_part(axes):
    """Compiled for 8 H100s: what travels is dgamma and dbeta, or sums per instance where space is divided."""
    views = {"batch": [[2, 4096, 256]], "batch and channels": [[4, 4096, 64]], "batch and space": []}
    # Bytes of gamma's gradient on one device; and of the values of its instances, in float32.
    parameter = {"batch": 256 * 4, "batch and channels": 64 * 4, "batch and space": 32 * 4}
    for found in reports("H100", "mesh", axes):
        name = found["placement"]
        assert found["views"] == [views[name]] * 2, found
        # Explicit parameters are gathered again, as they came.
        kinds = {"all-reduce", "all-gather"} if (axes, name) == ("Explicit", "batch and channels") else {"all-reduce"}
        assert {kind for kind, _ in found["sent"]} == kinds, found
        if name == "batch and space":
            assert all(size <= 4 * parameter[name] for _, size in found["sent"]), found
            assert found["units"] <= 3.2 + 5.3, found
        else:
            assert ["all-reduce", 2 * parameter[name]] in found["sent"], found
            assert found["units"] <= 5.05, found
