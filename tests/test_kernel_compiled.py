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

from jaxnorm.gpu.devices import DEVICES

pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the CUDA plugin and compiler")
pytestmark = [pytest.mark.slow, pytest.mark.kernel, pytest.mark.timeout(600)]

TESTS = pathlib.Path(__file__).parent
BOTH = ("float32", "bfloat16")


def calls(layout, *shapes, dtypes=BOTH):
    return [f"{layout}:{shape}:{dtype}" for shape in shapes for dtype in dtypes]


# What Hopper and newer hold in a block or a cluster.
HELD = [
    *calls("last", "8x64x64x256", "2x128x128x128", "4x32x32x512", "16x16x16x512", "32x8x8x512"),
    *calls("last", "2x32x32x32x128", "2x16x16x16x256", "2x8x8x8x320"),
    *calls("first", "8x256x64x64", "1x64x256x256"),
    *calls("first", "32x64x28x28", "16x512x14x14", dtypes=["float32"]),
    *(f"{case}:residual" for case in calls("last", "8x64x64x256", "2x16x16x16x256") + calls("first", "8x256x64x64")),
]
# What all SMs together hold; and channels-first rows that start anywhere.
LARGE = [
    *calls("last", "1x256x256x64", "1x512x512x64", "2x64x64x64x32"),
    *calls("last", "2x640x480x32", dtypes=["bfloat16"]),
    *calls("first", "4x32x512x512", dtypes=["bfloat16"]),
    *calls("first", "1x8x1024x1024", dtypes=["float32"]),
]
SPANS = calls("first", "16x64x15x15", "8x32x7x7x7")
BEFORE_HOPPER = [
    *calls("last", "8x64x64x256", "2x128x128x128", "4x32x32x512"),
    *calls("first", "8x256x64x64", dtypes=["float32"]),
    "last:2x16x16x16x256:float32:residual",
    *SPANS,
]
CASES = {
    "H100": [*HELD, *LARGE, *SPANS],
    "B200": [*HELD[:6], *LARGE[:5], *SPANS[:1]],
    "RTX 5090": [*HELD[:3], *SPANS[:1]],
    "A100": [*BEFORE_HOPPER, *calls("last", "1x256x256x64", "1x512x512x64")],
    "L40S": [*BEFORE_HOPPER, *calls("last", "1x256x256x64", dtypes=["float32"])],
    "RTX 3090": [*BEFORE_HOPPER, *calls("last", "1x256x256x64", dtypes=["bfloat16"])],
}
# x-sized arrays that both passes read and write, without and with a residual, and 0.05 each for all that is small.
UNITS, WITH_RESIDUAL, SMALL = 5, 8, 0.1
# float32 values per instance that a pass reads and writes besides: forward writes gamma and beta per instance, reads
# them and writes three statistics; backward reads these five, writes two gradients and sums them over the batch.
VALUES = 7 + 9
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


def reports(*arguments, script="aot_report.py", **environment):
    """What the script prints."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, str(TESTS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("gpu", CASES)
def test_one_kernel_per_pass_that_moves_what_it_must(gpu):
    """instance_norm and its gradients: nothing else x-sized, nothing spilled, and no more moved than must be."""
    seen = []
    for found in reports(gpu, "calls", "pallas", *CASES[gpu]):
        seen.append(found["case"])
        layout, shape, dtype, *residual = found["case"].split(":")
        _, *sizes = map(int, shape.split("x"))
        positions = math.prod(sizes) // (sizes[-1] if layout == "last" else sizes[0])
        assert found["calls"] == {"jaxnorm_forward": 1, "jaxnorm_backward": 1}, found
        assert found["mosaic"] == 2, found
        assert not found["others"], found
        assert all(kernel["spilled"] == 0 for kernel in found["kernels"].values()), found
        bound = (WITH_RESIDUAL if residual else UNITS) + SMALL + 4 * VALUES / (positions * ITEMSIZE[dtype])
        assert found["units"] <= bound, found
    assert seen == CASES[gpu]


@pytest.mark.parametrize(
    ("gpu", "cases"),
    [
        ("A100", [*calls("last", "8x64x64x256", "1x256x256x64"), *calls("first", "8x256x64x64")]),
        ("H100", [*calls("last", "8x64x64x250"), *calls("first", "1x8x1024x1024", "2x64x255x255")]),
    ],
)
def test_plain_xla_where_there_is_no_tile_or_it_has_not_run_on_a_gpu(gpu, cases):
    """No Mosaic, and the passes that xla.py promises: 3.2 units forward and 5.3 backward."""
    for found in reports(gpu, "calls", "None", *cases):
        assert found["mosaic"] == 0
        assert found["units"] <= 3.2 + 5.3, found


@pytest.mark.parametrize("gpu", ["A100", "H100", "B200", "RTX 3090"])
def test_plain_xla_in_a_block(gpu):
    """Five passes, a sixteenth, and what is in float32: partial sums of 32 rows or more, values per instance."""
    # The matmuls are not counted, and without Triton's take a quarter of the time to compile.
    for found in reports(gpu, "blocks", "20261129", "8", XLA_FLAGS="--xla_gpu_enable_triton_gemm=false"):
        size, itemsize = math.prod(found["shape"]), ITEMSIZE[found["dtype"]]
        positions = size // found["shape"][0] // found["shape"][found["channel_axis"]]
        # 8.06 and four times 8 bytes for 32 rows.
        bound = 8.3 if itemsize == 4 else 8.6
        if positions < 2000:
            bound += 4 * VALUES / (positions * itemsize)
        if size < 2**20:
            # XLA holds it cheaper to fill the chip with what feeds a reduction, by way of memory.
            bound = max(bound, 10.6)
        if gpu == "B200" and found["activation"] == "gelu" and itemsize == 2:
            # There it holds writing z in float32 cheaper than computing it again, forward.
            bound += 4
        assert found["units"] <= bound, found


@pytest.mark.parametrize("gpu", CASES)
def test_odd_views_compile(gpu):
    """Ragged rows, few rows, rows of every width, small instances: what test_kernel_interpreted.py runs."""
    views = "2x225x8,1x1001x4,2x70x64,1x1x8,3x1008x1,1x2100x1,18x200x1,1000x16x1,8x77x1,1x40000x16"
    for found in reports(gpu, "views", views, "float16", "float32:residual"):
        if "reason" in found:
            view, dtype = found["view"], found["dtype"]
            few = view == [1, 1, 8]
            start = (view, dtype) in (([1, 1001, 4], "float16"), ([1, 2100, 1], "float16"))
            assert start or (few and DEVICES[gpu].compute_capability < (9, 0)), found
            assert ("multiples of 16 bytes" if start else "less than a thread block computes") in found["reason"]
            continue
        assert found["calls"][f"jaxnorm_{found['of']}"] == 1, found
        assert all(kernel["spilled"] == 0 for kernel in found["kernels"].values()), found
        assert found["shared_memory"] <= found["shared_memory_bound"], found


# Rows of 16 bytes that are contiguous, with ragged ends: unrolled and in loops, alone and in clusters.
CONTIGUOUS = [
    *("2x250x4:float32:relu", "2x100x8:bfloat16:relu", "3x900x1:float32:relu", "2x1224x1:bfloat16:relu"),
    *("4x20004x1:float32:silu", "3x9001x4:float32:relu"),
]


def test_stores_end_with_their_sample():
    """A bulk store that is no tensor copy writes all its bytes, into the next sample too; the interpreter clips it."""
    for found in reports("H100", *CONTIGUOUS, script="ptx_report.py"):
        assert found["ragged"], found
        assert found["copies"] == "bulk", found
        assert set(found["bulk_stores"]) == {found["box_bytes"], found["last_bytes"]}, found


def test_swizzled_stores_are_tensor_copies():
    """Which end where the rows or the lanes of the sample do."""
    for found in reports("H100", "2x225x8:float32:relu", "20x200x1:float16:relu", script="ptx_report.py"):
        assert found["ragged"], found
        assert not found["bulk_stores"], found


def test_threads_that_hold_one_sum_agree():
    """A block that sums one step: were the product of one thread fused with the sum, two would store two numbers."""
    cases = [f"{view}:{dtype}:silu" for view in ("6x8x128", "3x16x32") for dtype in ("bfloat16", "float32")]
    for found in reports("H100", *cases, script="ptx_report.py"):
        assert not found["fused_sums"], found


# Forward and backward. With two around each store they would be 21 and 21, about 36 and 33, and 17 and 19.
BARRIERS = {
    "2x100x8:bfloat16:relu": ("plain", 7, 5),
    "1x40000x16:float32:relu": ("plain", 20, 18),
    "8x77x1:float32:relu": ("span", 11, 9),
}


def test_no_barriers_around_stores():
    """Those that remain are of sums across warps, of copies that come in other threads, and of groups that meet."""
    for found in reports("A100", *BARRIERS, script="ptx_report.py"):
        copies, forward, backward = BARRIERS[found["case"]]
        assert found["copies"] == copies, found
        assert found["barriers"] <= {"forward": forward, "backward": backward}[found["of"]], found


def test_every_activation_compiles():
    seen = set()
    for found in reports("H100", "activations"):
        # The stack frame of a slow path.
        spilled = 64 if found["activation"] in LOCAL_MEMORY else 0
        assert found["calls"] == {name: int(name.endswith(found["of"])) for name in found["calls"]}, found
        assert found["mosaic"] == 1
        assert not found["others"], found
        assert all(kernel["spilled"] <= spilled for kernel in found["kernels"].values()), found
        seen.add(found["activation"])
    assert seen == set(ACTIVATIONS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("calls", "pallas", *calls("last", "8x64x64x256"), *calls("first", "1x64x256x256"), *SPANS[:1]),
        ("views", "18x200x1", "float16", "float16:residual"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_x64_compiles_to_the_same(arguments):
    """Byte for byte and register for register: no index and no constant becomes wider."""
    assert reports("H100", *arguments, JAX_ENABLE_X64="1") == reports("H100", *arguments, JAX_ENABLE_X64="0")


@pytest.mark.parametrize("gpu", ["H100", "A100"])
def test_transformations_launch_as_few_kernels(gpu):
    """Forward and backward launches: vmap is one, a scan one in its loop."""
    forward, both = [1, 0], [1, 1]
    assert {found["transformation"]: found["launches"] for found in reports(gpu, "transformations")} == {
        "vmap": forward,
        "vmap of x alone": forward,
        "vmap of gamma alone": forward,
        "vmap with a name": forward,
        "vmap of vmap": forward,
        "vmap of grad": both,
        "grad": both,
        # The gradient that is penalized; its derivative is that of the plain formula.
        "grad of grad": both,
        "checkpoint": both,
        "scan": both,
        "scan of checkpoint": both,
    }


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_on_eight_gpus_every_one_runs_the_kernel_on_its_part(axes):
    """Compiled for 8 H100s: what travels is dgamma and dbeta, or sums per instance where space is divided."""
    views = {"batch": [[2, 4096, 256]], "batch and channels": [[4, 4096, 64]], "batch and space": []}
    # Groups that meet in global memory, each on its device.
    views["batch of large maps"] = [[1, 512 * 512, 64]]
    # Bytes of gamma's gradient on one device; and of the values of its instances, in float32.
    parameter = {"batch": 256 * 4, "batch and channels": 64 * 4, "batch and space": 32 * 4}
    parameter["batch of large maps"] = 64 * 4
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
