"""Compiles for a TPU v5e that is not there, with the compiler in libtpu."""

import os

# Read when libtpu starts, which else asks the network what machine it is on.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["TPU_WORKER_ID"] = "0"

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Bytes of vector memory: an array that fits may never reach main memory.
VECTOR_MEMORY = 128 * 2**20


class TpuCompiler:
    """Compiles functions for one TPU."""

    def __init__(self):
        topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
        self.mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",), axis_types=(AxisType.Explicit,))

    def compile(self, function, *arguments):
        """The optimized module as text."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile().as_text()
