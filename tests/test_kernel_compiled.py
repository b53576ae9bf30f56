"""The fused kernel through the real compilers, for GPUs that are not there: what it moves, holds and spills.

Nothing here runs on a GPU: bytes are counted on the compiled module, registers are the assembler's. `make test`
compiles for an H100 and an A100, with each pair of a kind of kernel, a dtype, a residual and an activation;
`make test-all` compiles for six GPUs, and more shapes.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import pytest
from activations import ACTIVATIONS, LOCAL_MEMORY
from cases import exhaustive, pairwise, some_cases

import jaxnorm
from jaxnorm.gpu.devices import DEVICES

pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the CUDA plugin and compiler")
pytestmark = [pytest.mark.slow, pytest.mark.kernel, pytest.mark.timeout(600)]

TESTS = pathlib.Path(__file__).parent
BOTH = ("float32", "bfloat16")


class Kind(NamedTuple):
    """How a kernel copies and synchronizes on a GPU, and a shape for which it does."""

    gpu: str
    copies: str
    synchronization: str
    layout: str
    shape: str


KINDS = [
    Kind("H100", "bulk", "alone", "last", "32x8x8x512"),
    Kind("H100", "bulk", "alone", "first", "8x256x32x32"),
    Kind("H100", "bulk", "cluster", "last", "8x64x64x256"),
    Kind("H100", "bulk", "group", "last", "1x512x512x64"),
    Kind("H100", "span", "alone", "first", "16x64x15x15"),
    Kind("A100", "plain", "alone", "last", "32x8x8x512"),
    Kind("A100", "plain", "group", "first", "1x8x512x512"),
    Kind("A100", "span", "alone", "first", "16x64x15x15"),
]


def calls(layout, *shapes, dtypes=BOTH):
    return [f"{layout}:{shape}:{dtype}:relu" for shape in shapes for dtype in dtypes]


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
    "last:2x16x16x16x256:float32:relu:residual",
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


@contextlib.contextmanager
def compiling(gpu, x64):
    """A function from a question to the answer of aot_report.py, in a process that lives as long as the context."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": str(int(x64)),
        # The assembler must report on each kernel.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # The matmuls around plain XLA's norm are not counted, and without Triton's compile in a quarter of the time.
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",
    }
    command = [sys.executable, str(TESTS / "aot_report.py"), gpu]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stderr=errors, **pipes) as process,
    ):

        def ask(*question):
            print(json.dumps(question), file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
                pytest.fail(f"the compiler of {gpu} died: {errors.read()[-3000:]}")
            found = json.loads(line)
            assert isinstance(found, list), found
            return found

        try:
            yield ask
        finally:
            process.kill()


@pytest.fixture(scope="session")
def ask():
    """ask(gpu, *question, x64=False) has the answer of one process per GPU, which serves all tests."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(gpu, x64):
            return stack.enter_context(compiling(gpu, x64))

        # The assembler reports on a kernel once, so the same question gets the answer that it got before.
        @functools.cache
        def ask(gpu, *question, x64=False):
            return start(gpu, x64)(*question)

        yield ask


def check_call(found):
    """One kernel per pass, nothing else x-sized, nothing spilled, and no more moved than must be."""
    layout, shape, dtype, _, *options = found["case"].split(":")
    _, *sizes = map(int, shape.split("x"))
    positions = math.prod(sizes) // (sizes[-1] if layout == "last" else sizes[0])
    assert found["calls"] == {"jaxnorm_forward": 1, "jaxnorm_backward": 1}, found
    assert found["mosaic"] == 2, found
    assert not found["others"], found
    assert set(found["kernels"]) == set(found["calls"]), found
    assert all(kernel["spilled"] == 0 for kernel in found["kernels"].values()), found
    bound = (WITH_RESIDUAL if "residual" in options else UNITS) + SMALL + 4 * VALUES / (positions * ITEMSIZE[dtype])
    assert found["units"] <= bound, found


@pytest.mark.parametrize(
    ("kind", "dtype", "residual", "activation"), pairwise(KINDS, BOTH, [False, True], ["relu", "gelu"])
)
def test_one_kernel_per_pass_that_moves_what_it_must(kind, dtype, residual, activation, ask):
    """instance_norm and its gradients, with each kind of kernel."""
    x = jax.ShapeDtypeStruct(tuple(map(int, kind.shape.split("x"))), dtype)
    axis = {"first": 1, "last": -1}[kind.layout]
    explained = jaxnorm.explain(x, channel_axis=axis, residual=residual, device=kind.gpu, implementation="pallas")
    for each in (explained.forward, explained.backward):
        assert (each.tile.copies, each.tile.synchronization) == (kind.copies, kind.synchronization)
    case = f"{kind.layout}:{kind.shape}:{dtype}:{activation}" + ":residual" * residual
    (found,) = ask(kind.gpu, "calls", "pallas", case)
    check_call(found)


@exhaustive
@pytest.mark.parametrize("gpu", CASES)
def test_all_gpus_and_shapes(gpu, ask):
    seen = []
    for case in CASES[gpu]:
        (found,) = ask(gpu, "calls", "pallas", case)
        check_call(found)
        seen.append(found["case"])
    assert seen == CASES[gpu]


# group_norm: 32 groups in feature maps of autoencoders, blocks that synchronize in global memory, larger groups.
GROUP_NORMS = [
    "last:8x64x64x256:float32:silu:8:residual",
    "last:8x64x64x256:bfloat16:silu:8",
    "last:2x64x64x128:float32:silu:4",
    "last:4x32x32x512:bfloat16:silu:16:residual",
    "last:1x512x512x128:bfloat16:silu:4",
    "last:4x32x32x1024:float32:silu:32",
]
CHOSEN_GROUP_NORMS = [("A100", GROUP_NORMS[0]), ("H100", GROUP_NORMS[3]), ("H100", GROUP_NORMS[4])]


@pytest.mark.parametrize(
    ("gpu", "case"),
    some_cases(itertools.product(["H100", "A100", "B200"], GROUP_NORMS), CHOSEN_GROUP_NORMS),
)
def test_group_norm_moves_what_it_must(gpu, case, ask):
    (found,) = ask(gpu, "calls", "pallas", case)
    check_call(found)
    assert found["units"] <= (WITH_RESIDUAL if case.endswith("residual") else UNITS) + SMALL, found


@pytest.mark.parametrize(
    ("gpu", "case"),
    [
        ("A100", "last:1x256x256x64:bfloat16:relu"),
        ("H100", "last:8x64x64x250:float32:relu"),
        *(pytest.param("A100", case, marks=exhaustive) for case in calls("last", "8x64x64x256")),
        pytest.param("A100", "last:1x256x256x64:float32:relu", marks=exhaustive),
        *(pytest.param("A100", case, marks=exhaustive) for case in calls("first", "8x256x64x64")),
        pytest.param("H100", "last:8x64x64x250:bfloat16:relu", marks=exhaustive),
        *(pytest.param("H100", case, marks=exhaustive) for case in calls("first", "1x8x1024x1024", "2x64x255x255")),
    ],
)
def test_plain_xla_where_the_kernel_has_not_run_on_a_gpu(gpu, case, ask):
    """No Mosaic, and the passes that xla.py promises: 3.2 units forward and 5.3 backward."""
    (found,) = ask(gpu, "calls", "None", case)
    assert found["mosaic"] == 0
    assert found["units"] <= 3.2 + 5.3, found


@pytest.mark.parametrize(
    ("gpu", "count"),
    [("H100", 2), *(pytest.param(gpu, 8, marks=exhaustive) for gpu in ("A100", "H100", "B200", "RTX 3090"))],
)
def test_plain_xla_in_a_block(gpu, count, ask):
    """Five passes, a sixteenth, and what is in float32: partial sums of 32 rows or more, values per instance."""
    answers = ask(gpu, "blocks", "20261129", str(count))
    assert len(answers) == count
    for found in answers:
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


VIEWS = [
    *("2x225x8", "1x1001x4", "2x70x64", "1x1x8", "3x1008x1"),
    *("1x2100x1", "18x200x1", "1000x16x1", "8x77x1", "1x40000x16"),
]
OF_VIEWS = ("float16", "float32:residual")
# Each view once, so that each of the two GPUs has both kinds of arrays.
CHOSEN_VIEWS = [(("H100", "A100")[i % 2], view, OF_VIEWS[i // 2 % 2]) for i, view in enumerate(VIEWS)]


@pytest.mark.parametrize(
    ("gpu", "view", "arrays"),
    some_cases(itertools.product(CASES, VIEWS, OF_VIEWS), CHOSEN_VIEWS),
)
def test_odd_views_compile(gpu, view, arrays, ask):
    """Ragged rows, few rows, rows of every width, small instances: what test_kernel_interpreted.py runs."""
    for found in ask(gpu, "views", view, arrays):
        if "reason" in found:
            few = view == "1x1x8"
            start = (view, found["dtype"]) in (("1x1001x4", "float16"), ("1x2100x1", "float16"))
            assert start or (few and DEVICES[gpu].compute_capability < (9, 0)), found
            assert ("multiples of 16 bytes" if start else "less than a thread block computes") in found["reason"]
            continue
        name = f"jaxnorm_{found['of']}"
        assert found["calls"][name] == 1, found
        assert found["kernels"][name]["spilled"] == 0, found
        assert found["shared_memory"] <= found["shared_memory_bound"], found


# Rows of 16 bytes that are contiguous, with ragged ends: unrolled and in loops, alone and in clusters.
@pytest.mark.parametrize(
    "case",
    [
        "2x100x8:bfloat16:relu",
        "3x900x1:float32:relu",
        *(
            pytest.param(case, marks=exhaustive)
            for case in (
                *("2x250x4:float32:relu", "2x1224x1:bfloat16:relu", "4x20004x1:float32:silu"),
                "3x9001x4:float32:relu",
            )
        ),
    ],
)
def test_stores_end_with_their_sample(case, ask):
    """A bulk store that is no tensor copy writes all its bytes, into the next sample too; the interpreter clips it."""
    for found in ask("H100", "ptx", case):
        assert found["ragged"], found
        assert found["copies"] == "bulk", found
        assert set(found["bulk_stores"]) == {found["box_bytes"], found["last_bytes"]}, found


@exhaustive
@pytest.mark.parametrize("case", ["2x225x8:float32:relu", "20x200x1:float16:relu"])
def test_swizzled_stores_are_tensor_copies(case, ask):
    """Which end where the rows or the lanes of the sample do."""
    for found in ask("H100", "ptx", case):
        assert found["ragged"], found
        assert not found["bulk_stores"], found


@pytest.mark.parametrize(
    "case",
    [
        "6x8x128:bfloat16:silu",
        *(
            pytest.param(case, marks=exhaustive)
            for case in ("6x8x128:float32:silu", "3x16x32:bfloat16:silu", "3x16x32:float32:silu")
        ),
    ],
)
def test_threads_that_hold_one_sum_agree(case, ask):
    """A block that sums one step: were the product of one thread fused with the sum, two would store two numbers."""
    for found in ask("H100", "ptx", case):
        assert not found["fused_sums"], found


@pytest.mark.parametrize(
    ("case", "copies", "most"),
    [
        # Forward and backward. With two around each store they would be 21 and 21, about 36 and 33, and 17 and 19.
        ("2x100x8:bfloat16:relu", "plain", {"forward": 7, "backward": 5}),
        pytest.param("1x40000x16:float32:relu", "plain", {"forward": 20, "backward": 18}, marks=exhaustive),
        ("8x77x1:float32:relu", "span", {"forward": 11, "backward": 9}),
    ],
)
def test_no_barriers_around_stores(case, copies, most, ask):
    """Those that remain are of sums across warps, of copies that come in other threads, and of groups that meet."""
    for found in ask("A100", "ptx", case):
        assert found["copies"] == copies, found
        assert found["barriers"] <= most[found["of"]], found


def test_every_primitive_of_an_activation_compiles(ask):
    """One kernel per pass has all activations, whose sum does not fit into registers."""
    answers = ask("H100", "activations", "all")
    assert [found["of"] for found in answers] == ["forward", "backward"]
    for found in answers:
        assert found["calls"][f"jaxnorm_{found['of']}"] == found["mosaic"] == 1, found
        assert not found["others"], found


@exhaustive
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_compiles(activation, ask):
    # The stack frame of a slow path.
    spilled = 64 if activation in LOCAL_MEMORY else 0
    answers = ask("H100", "activations", activation)
    assert [found["of"] for found in answers] == ["forward", "backward"]
    for found in answers:
        name = f"jaxnorm_{found['of']}"
        assert found["calls"][name] == found["mosaic"] == 1
        assert not found["others"], found
        assert found["kernels"][name]["spilled"] <= spilled, found


@pytest.mark.parametrize(
    "question",
    [
        ("calls", "pallas", "last:8x64x64x256:float32:relu"),
        ("views", "18x200x1", "float16:residual"),
        *(
            pytest.param(("calls", "pallas", case), marks=exhaustive)
            for case in ("last:8x64x64x256:bfloat16:relu", *calls("first", "1x64x256x256"), *SPANS[:1])
        ),
        pytest.param(("views", "18x200x1", "float16"), marks=exhaustive),
    ],
    ids=str,
)
def test_x64_compiles_to_the_same(question, ask):
    """Byte for byte and register for register: no index and no constant becomes wider."""
    wide, narrow = ask("H100", *question, x64=True), ask("H100", *question)
    assert all(found["kernels"] for found in wide)
    assert wide == narrow


# Forward and backward launches: vmap is one, a scan one in its loop.
FORWARD, BOTH_PASSES = [1, 0], [1, 1]
LAUNCHES = {
    "vmap": FORWARD,
    "vmap of x alone": FORWARD,
    "vmap of gamma alone": FORWARD,
    "vmap with a name": FORWARD,
    "vmap of vmap": FORWARD,
    "vmap of grad": BOTH_PASSES,
    "grad": BOTH_PASSES,
    # The gradient that is penalized; its derivative is that of the plain formula.
    "grad of grad": BOTH_PASSES,
    "checkpoint": BOTH_PASSES,
    "scan": BOTH_PASSES,
    "scan of checkpoint": BOTH_PASSES,
}
# A transformation of each kind, with the gradient where there is one.
CHOSEN_TRANSFORMATIONS = {
    ("H100", name) for name in ("vmap of vmap", "vmap of grad", "grad of grad", "scan of checkpoint")
}


@pytest.mark.parametrize(
    ("gpu", "name"),
    some_cases(itertools.product(["H100", "A100"], LAUNCHES), CHOSEN_TRANSFORMATIONS),
)
def test_transformations_launch_as_few_kernels(gpu, name, ask):
    (found,) = ask(gpu, "transformations", name)
    assert found["launches"] == LAUNCHES[name]


# What each of 8 H100s runs the kernel on. Groups synchronize in global memory, each on its device; where space is
# divided there is no kernel.
PARTS = {"batch": [2, 4096, 256], "batch and channels": [4, 4096, 64], "batch of large maps": [1, 512 * 512, 64]}
PARTS["batch and space"] = None
# Bytes of gamma's gradient on one device; and of the values of its instances, in float32.
BYTES = {"batch": 256 * 4, "batch and channels": 64 * 4, "batch of large maps": 64 * 4, "batch and space": 32 * 4}
CHOSEN_MESHES = [
    ("Explicit", "batch", "bfloat16"),
    ("Auto", "batch and channels", "float32"),
    ("Explicit", "batch and channels", "float32"),
    ("Auto", "batch and space", "bfloat16"),
]


@pytest.mark.parametrize(
    ("axes", "placement", "dtype"),
    some_cases(itertools.product(["Auto", "Explicit"], PARTS, BOTH), CHOSEN_MESHES),
)
def test_on_eight_gpus_every_one_runs_the_kernel_on_its_part(axes, placement, dtype, ask):
    """What travels is dgamma and dbeta, or sums per instance where space is divided."""
    (found,) = ask("H100", "mesh", axes, placement, dtype)
    part = PARTS[placement]
    assert found["views"] == ([[part]] * 2 if part else [[]] * 2), found
    # Explicit parameters are gathered again, as they came.
    gathered = (axes, placement) == ("Explicit", "batch and channels")
    assert {kind for kind, _ in found["sent"]} == {"all-reduce", *["all-gather"] * gathered}, found
    if part is None:
        assert all(size <= 4 * BYTES[placement] for _, size in found["sent"]), found
        assert found["units"] <= 3.2 + 5.3, found
    else:
        assert ["all-reduce", 2 * BYTES[placement]] in found["sent"], found
        assert found["units"] <= 5.05, found


def test_selfcheck_runs_another_stream_at_the_same_time(ask):
    """It is started before both kernels, and awaited after them."""
    assert ask("H100", "races") == [{"other_streams": 1, "kernels_meanwhile": 2}]
