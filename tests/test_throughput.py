"""What the throughput benchmark counts: on a listing whose answer is known, and on the kernel for an H100."""

import json
import subprocess
import sys

import pytest
from cases import exhaustive

from benchmarks import machine_code

# The most warp instructions per 32 elements in the loops of the kernel, forward and backward.
MOST = {
    ("float32", "relu"): (4.5, 15),
    ("float32", "gelu"): (28, 45),
    ("bfloat16", "relu"): (11, 21),
    ("bfloat16", "gelu"): (19, 43),
}
# Of an SM of an H100: registers, and bytes of shared memory, of which every thread block takes 1 KB more.
REGISTERS, SHARED_MEMORY, THREADS = 64 * 1024, 228 * 1024, 128


@exhaustive
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_loops_of_the_kernel_are_short(tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the CUDA plugin and compiler")
    figures = tmp_path / "figures.json"
    options = ["--gpus", "H100", "--shapes", "1", "--activations", "relu", "gelu", "--json", str(figures)]
    subprocess.run([sys.executable, "-m", "benchmarks.throughput", *options], check=True, capture_output=True)
    rows = json.loads(figures.read_text())["results"]
    assert len(rows) == 2 * len(MOST)
    for row in rows:
        most = MOST[row["case"]["dtype"], row["case"]["activation"]]
        assert row["loops"], row
        assert sum(row["loops"]) <= most[row["pass_name"] == "backward"], row
        assert row["spilled"] == 0, row
        # No barriers protect stores, so a thread must not touch what another one loads.
        assert row["stores_elsewhere"] == 0, row
        # Two thread blocks fit into an SM: one loads while the other computes.
        assert 2 * THREADS * row["registers"] <= REGISTERS, row
        assert 2 * (row["shared_memory"] + 1024) <= SHARED_MEMORY, row


# A loop with a spinning wait before it, within a loop over boxes; after the exit is the slow path of the wait.
LISTING = """
.text.some_kernel_mosaic_gpu_kernel:
   -:-:1:Y:04        /*0000*/                   S2R R0, SR_TID.X
.L_x_1:
 1&2:-:2:Y:02        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7+URZ], R8
   2:-:-:Y:05        /*0020*/              @!P0 BRA `(.L_x_0)
.L_x_3:
   -:-:3:-:01        /*0030*/                   LDS.128 R4, [R4+UR32]
   3:-:-:Y:04        /*0040*/                   FADD R1, R4, R1
   -:2:-:Y:01        /*0050*/               @P1 STS.64 [R4], R0
   -:-:-:Y:05        /*0060*/               @P0 BRA `(.L_x_3)
   -:-:-:Y:05        /*0070*/               @P2 BRA `(.L_x_1)
   -:-:-:Y:05        /*0080*/                   EXIT
.L_x_0:
   -:-:2:Y:02        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7+URZ], R8
   2:-:-:Y:05        /*00a0*/              @!P0 BRA `(.L_x_0)
   -:-:-:Y:05        /*00b0*/                   BRA `(.L_x_3)
"""


def test_the_innermost_loop_over_shared_memory_is_found():
    (loops,) = machine_code.loops_of(LISTING).values()
    (loop,) = loops
    assert [text.split()[0] for text in loop.instructions] == ["LDS.128", "FADD", "STS.64", "BRA"]
    assert loop.bytes_loaded == 16
    assert loop.stores_elsewhere == 1


def test_a_store_to_where_the_loop_loads_from_is_not_elsewhere():
    (loops,) = machine_code.loops_of(LISTING.replace("STS.64 [R4]", "STS.64 [R4+UR32]")).values()
    assert loops[0].stores_elsewhere == 0
