"""What the kernel needs to know of a GPU, and which GPU a computation is for, as far as tracing can tell."""

import dataclasses
import re
from typing import Any

import jax

# Of compute capability 8.0; of 9.0 and 10.x; of 8.6, 8.9 and 12.x.
_AMPERE_SHARED, _HOPPER_SHARED, _SMALL_SHARED = 163 * 1024, 227 * 1024, 99 * 1024
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
    "A100": Device((8, 0), 108, _AMPERE_SHARED),
    "A30": Device((8, 0), 56, _AMPERE_SHARED),
    "A10": Device((8, 6), 72, _SMALL_SHARED),
    "A40": Device((8, 6), 84, _SMALL_SHARED),
    "RTX A6000": Device((8, 6), 84, _SMALL_SHARED),
    "RTX 3080": Device((8, 6), 68, _SMALL_SHARED),
    "RTX 3090": Device((8, 6), 82, _SMALL_SHARED),
    "L4": Device((8, 9), 58, _SMALL_SHARED),
    "L40": Device((8, 9), 142, _SMALL_SHARED),
    "L40S": Device((8, 9), 142, _SMALL_SHARED),
    "RTX 4080": Device((8, 9), 76, _SMALL_SHARED),
    "RTX 4090": Device((8, 9), 128, _SMALL_SHARED),
    "RTX 4090 D": Device((8, 9), 114, _SMALL_SHARED),
    "RTX 6000 Ada": Device((8, 9), 142, _SMALL_SHARED),
    "H100": Device((9, 0), 132, _HOPPER_SHARED),
    "H100 PCIe": Device((9, 0), 114, _HOPPER_SHARED),
    "H200": Device((9, 0), 132, _HOPPER_SHARED),
    "GH200": Device((9, 0), 132, _HOPPER_SHARED),
    "B200": Device((10, 0), 148, _HOPPER_SHARED),
    "GB200": Device((10, 0), 148, _HOPPER_SHARED),
    "RTX 5080": Device((12, 0), 84, _SMALL_SHARED),
    "RTX 5090": Device((12, 0), 170, _SMALL_SHARED),
    "RTX PRO 6000": Device((12, 0), 188, _SMALL_SHARED),
}


def shared_memory_of(compute_capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one thread block can have, for devices the kernel runs on."""
    if compute_capability == (8, 0):
        return _AMPERE_SHARED
    return _HOPPER_SHARED if (9, 0) <= compute_capability < (12, 0) else _SMALL_SHARED


def interpreted() -> bool:
    """Whether Pallas plays a GPU here on a CPU: inside plgpu.force_gpu_interpret_mode."""
    from jax._src.config import pallas_tpu_interpret_mode_context_manager as mode

    return mode.value is not None


def target(x: jax.Array) -> Device | None:
    """The CUDA GPU that will compute with x, or None where it is another device or not known.

    In this order: the mesh of x, the device that x is on, JAX's default device. A mesh that is not there, as for
    compiling ahead of time, only knows the product name of its devices.
    """
    abstract = jax.typeof(x).sharding.mesh.abstract_device
    if abstract is not None:
        return named(abstract.device_kind) if abstract.platform == "gpu" else None
    return facts(current(x))


def current(x: Any) -> Any:
    """The device of JAX that x is on; the default one for what is on none, such as a jax.ShapeDtypeStruct."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return next(iter(x.devices()))
    device = jax.config.jax_default_device or jax.devices()[0]
    # The default device may be the name of a platform.
    return jax.devices(device)[0] if isinstance(device, str) else device


def facts(device: Any) -> Device | None:
    """What tiling needs to know of a device of JAX; None for what is not a CUDA GPU."""
    capability = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or capability is None:
        return None
    version = (int(capability[1]), int(capability[2]))
    return Device(version, device.core_count, shared_memory_of(version))


def named(name: str) -> Device | None:
    """The device of a product name such as "H100" or "NVIDIA H100 80GB HBM3", if it is a known one."""
    # Parts of a GPU, and the smaller ones of portable computers, which have fewer SMs than their names say.
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", name, re.IGNORECASE):
        return None
    matches = [known for known in DEVICES if re.search(rf"\b{re.escape(known)}\b", name, re.IGNORECASE)]
    return DEVICES[max(matches, key=len)] if matches else None
