"""Compiles for GPUs that are not there, with their real compilers.

A process can compile for one architecture: the compiler refuses a second, newer one.
"""

import contextlib
import math
import os
import re
import tempfile
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Gpu(NamedTuple):
    """Numbers of the data sheet, in bytes, and bytes per second."""

    name: str
    capability: str
    cores: int
    bandwidth: float
    l2: int
    shared_per_core: int
    shared_per_block: int


GPUS = {
    "A100": Gpu("NVIDIA A100-SXM4-80GB", "major: 8", 108, 2.039e12, 41943040, 167936, 166912),
    "RTX 3090": Gpu("NVIDIA GeForce RTX 3090", "major: 8 minor: 6", 82, 0.936e12, 6291456, 102400, 101376),
    "L40S": Gpu("NVIDIA L40S", "major: 8 minor: 9", 142, 0.864e12, 100663296, 102400, 101376),
    "H100": Gpu("NVIDIA H100 80GB HBM3", "major: 9", 132, 3.35232e12, 52428800, 233472, 232448),
    "B200": Gpu("NVIDIA B200", "major: 10", 148, 8e12, 132000000, 233472, 232448),
    "RTX 5090": Gpu(
        "NVIDIA GeForce RTX 5090",
        "major: 12 feature_extension: ACCELERATED_FEATURES",
        170,
        1.792e12,
        100663296,
        102400,
        101376,
    ),
}


def _target_config(gpu: Gpu) -> str:
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_per_core}
          shared_memory_per_block_optin: {gpu.shared_per_block}
          core_count: {gpu.cores} fpus_per_core: 128 clock_rate_ghz: 1.98
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.l2} device_memory_size: 84929347584
          cuda_compute_capability {{ {gpu.capability} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
        device_description_str: "{gpu.name}"
    """


class Compiler:
    """Compiles functions for one GPU of that name, or for a mesh of such GPUs in one machine.

    Args:
      name: a key of GPUS.
      axes: {name: size} of the mesh.
      axis_type: of all axes.
    """

    def __init__(self, name, axes=None, axis_type=AxisType.Explicit):
        axes = axes or {"device": 1}
        topology = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{math.prod(axes.values())}", target_config=_target_config(GPUS[name])
        )
        self.device = topology.devices[0]
        devices = np.array(topology.devices).reshape(tuple(axes.values()))
        self.mesh = jax.sharding.Mesh(devices, tuple(axes), axis_types=(axis_type,) * len(axes))

    def array(self, shape, dtype, *spec):
        """An argument of that shape, sharded over the mesh by the partition spec."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec(*spec)))

    def lower(self, function, *arguments):
        arguments = jax.tree.map(lambda a: a if a.sharding else self.array(a.shape, a.dtype), arguments)
        # Mosaic GPU takes the architecture from the default device.
        with jax.default_device(self.device), jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))

    def compile(self, function, *arguments):
        """The optimized module as text, and what the assembler reported of each Mosaic kernel.

        The assembler runs once per kernel and process, so a kernel that was compiled before has no report.
        """
        with assembler_output() as output:
            text = self.lower(function, *arguments).compile().as_text()
        return text, _kernels(output())

    def listing(self, function, *arguments):
        """What the assembler reported of each Mosaic kernel, and the machine code of all of them as one text."""
        with assembler_output(code=True) as output:
            self.lower(function, *arguments).compile()
        return _kernels(output()), output()


@contextlib.contextmanager
def shared_memory():
    """Collects the bytes of shared memory per thread block of each Mosaic kernel that is lowered in this context."""
    from jax.experimental.mosaic.gpu import core

    asked, size_of = [], core._smem_tree_size

    def record(buffers):
        asked.append(size_of(buffers))
        return asked[-1]

    with mock.patch.object(core, "_smem_tree_size", record):
        yield asked


@contextlib.contextmanager
def assembler_output(*, code=False):
    """Collects what ptxas prints for Mosaic kernels, from C++; with code, also the listings of nvdisasm."""
    saved, switches = [os.dup(1), os.dup(2)], ["MOSAIC_GPU_DUMP_PTXAS", *["MOSAIC_GPU_DUMP_SASS_CTRL"] * code]
    os.environ.update(dict.fromkeys(switches, "1"))
    collected = ""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: collected
        finally:
            for switch in switches:
                del os.environ[switch]
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            file.seek(0)
            collected = file.read().decode(errors="replace")


def _kernels(output):
    """{name: {"registers", "spilled"}} from the assembler's report."""
    kernels = {}
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, output, re.DOTALL):
        kernels[name.removesuffix("_mosaic_gpu_kernel")] = {
            "registers": int(registers),
            "spilled": int(stack) + int(stores) + int(loads),
        }
    return kernels
