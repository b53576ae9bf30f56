"""What the kernel needs to know of a GPU, and which GPU a computation is for, as far as tracing can tell."""

import dataclasses
import re
from typing import Any

import jax

_HOPPER_SHARED = 227 * 1024  # per thread block, also of data center Blackwell
_SMALL_BLACKWELL_SHARED = 99 * 1024  # compute capability 12.x
_GPCS = {132: (18, 18, 18, 16, 16, 16, 16, 14), 148: (20, 20, 18, 18, 18, 18, 18, 18)}
# Per microsecond, by major compute capability.
_BYTES_PER_SM = {8: 17e3, 9: 23e3, 10: 48e3, 12: 10e3}


@dataclasses.dataclass(frozen=True)
class Device:
    """What tiling needs to know of a GPU.

    Attributes:
      compute_capability: (major, minor).
      sm_count: streaming multiprocessors.
      shared_memory: bytes that one thread block can have.
    """

    compute_capability: tuple[int, int]
    sm_count: int
    shared_memory: int

    @property
    def gpcs(self) -> tuple[int, ...]:
        """SMs of each graphics processing cluster; a thread block cluster has to fit into one.

        Counts differ between chips of one product. An H100 is seen to hold 15 clusters of 8; the others are guessed.
        """
        whole, rest = divmod(self.sm_count, 16)
        return _GPCS.get(self.sm_count, (16,) * whole + (rest,) * (rest > 0))

    @property
    def bandwidth(self) -> float:
        """Bytes per microsecond that a large copy moves: nine tenths of the data sheet, from what an SM has of it."""
        return self.sm_count * _BYTES_PER_SM.get(self.compute_capability[0], 10e3)

    def resident(self, cluster: int, per_sm: int) -> int:
        """Clusters of so many thread blocks that run at once, with so many blocks on each SM."""
        return max(1, sum(sms * per_sm // cluster for sms in self.gpcs))


DEVICES = {
    "A100": Device((8, 0), 108, 163 * 1024),
    "L4": Device((8, 9), 58, 99 * 1024),
    "L40S": Device((8, 9), 142, 99 * 1024),
    "H100": Device((9, 0), 132, _HOPPER_SHARED),
    "H200": Device((9, 0), 132, _HOPPER_SHARED),
    "GH200": Device((9, 0), 132, _HOPPER_SHARED),
    "B200": Device((10, 0), 148, _HOPPER_SHARED),
    "GB200": Device((10, 0), 148, _HOPPER_SHARED),
    "RTX 5090": Device((12, 0), 170, _SMALL_BLACKWELL_SHARED),
    "RTX PRO 6000": Device((12, 0), 188, _SMALL_BLACKWELL_SHARED),
}


def shared_memory_of(compute_capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one thread block can have, for devices the kernel runs on."""
    return _SMALL_BLACKWELL_SHARED if compute_capability >= (12, 0) else _HOPPER_SHARED


def target(x: jax.Array) -> Device | None:
    """The CUDA GPU that will compute with x, or None where it is another device or not known.

    In this order: the mesh of x, the device that x is on, JAX's default device. A mesh that is not there, as for
    compiling ahead of time, only knows the product name of its devices.
    """
    abstract = jax.typeof(x).sharding.mesh.abstract_device
    if abstract is not None:
        return named(abstract.device_kind) if abstract.platform == "gpu" else None
    if isinstance(x, jax.core.Tracer):
        device = jax.config.jax_default_device or jax.devices()[0]
        # The default device may be the name of a platform.
        return facts(jax.devices(device)[0] if isinstance(device, str) else device)
    return facts(next(iter(x.devices())))


def facts(device: Any) -> Device | None:
    """What tiling needs to know of a device of JAX; None for what is not a CUDA GPU."""
    capability = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or capability is None:
        return None
    version = (int(capability[1]), int(capability[2]))
    return Device(version, device.core_count, shared_memory_of(version))


def named(name: str) -> Device | None:
    """The device of a product name such as "H100" or "NVIDIA H100 80GB HBM3", if it is a known one."""
    matches = [known for known in DEVICES if re.search(rf"\b{re.escape(known)}\b", name, re.IGNORECASE)]
    return DEVICES[max(matches, key=len)] if matches else None
