"""Compiles for a TPU v5e that is not there, with the compiler in libtpu."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Bytes of vector memory: an array that fits may never reach main memory.
VECTOR_MEMORY = 128 * 2**20
# Read when libtpu starts, which would otherwise ask the network what machine it is on.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


class TpuCompiler:
    """Compiles functions for one TPU. JAX must run on the CPU (JAX_PLATFORMS=cpu), or it looks for a TPU."""

    def __init__(self) -> None:
        os.environ.update(_ENVIRONMENT)
        topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
        self.mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",), axis_types=(AxisType.Explicit,))

    def lower(self, function: Callable[..., Any], *arguments: Any) -> jax.stages.Lowered:
        sharding = NamedSharding(self.mesh, PartitionSpec())
        arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
