"""What the kernel needs to know of a GPU, which GPU a computation is for, and on which GPUs the kernel is proven."""

import contextlib
import dataclasses
import re
from typing import Any, NamedTuple

import jax

from jaxnorm.gpu.tile import CopyKind, NoTile, SynchronizationKind, Tile

# SMs of each graphics processing cluster (GPC), by the SMs of the whole GPU. Counts differ between chips of one
# product: an H100 was seen to fit 15 clusters of 8, which these give; the counts of a B200 are guessed.
_GPCS = {132: (18, 18, 18, 16, 16, 16, 16, 14), 148: (20, 20, 18, 18, 18, 18, 18, 18)}
# GB/s for each SM, where no table names the GPU: what the named ones with HBM have, and most of those without.
_BANDWIDTH_PER_SM = {(8, 0): 19, (9, 0): 25, (10, 0): 54}
_BANDWIDTH_PER_SM_WITHOUT_HBM = 8
# A large copy moves nine tenths of what the data sheet says.
_SHARE_OF_DATA_SHEET = 0.9


@dataclasses.dataclass(frozen=True)
class Device:
    """The facts of a GPU.

    Attributes:
      compute_capability: (major, minor).
      sm_count: streaming multiprocessors.
      shared_memory: bytes that one thread block can have.
      bandwidth: GB/s of its memory, of the data sheet; None where it is not known.
    """

    compute_capability: tuple[int, int]
    sm_count: int
    shared_memory: int
    bandwidth: float | None = None

    @property
    def has_bulk_copies(self) -> bool:
        """Whether it has bulk copies (the TMA unit) and clusters of thread blocks: both came with Hopper."""
        return self.compute_capability >= (9, 0)

    @property
    def gpcs(self) -> tuple[int, ...]:
        """SMs of each graphics processing cluster; a cluster of thread blocks must fit into one."""
        whole, rest = divmod(self.sm_count, 16)
        return _GPCS.get(self.sm_count, (16,) * whole + (rest,) * (rest > 0))

    @property
    def bytes_per_microsecond(self) -> float:
        """What a large copy moves."""
        per_sm = _BANDWIDTH_PER_SM.get(self.compute_capability, _BANDWIDTH_PER_SM_WITHOUT_HBM)
        return 1e3 * _SHARE_OF_DATA_SHEET * (self.bandwidth or per_sm * self.sm_count)

    def resident(self, cluster: int, per_sm: int) -> int:
        """Clusters of that many thread blocks that run at once, with that many blocks on each SM."""
        return max(1, sum(sms * per_sm // cluster for sms in self.gpcs))


def shared_memory_of(compute_capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one thread block can have, on GPUs that the kernel runs on."""
    if compute_capability == (8, 0):
        return 163 * 1024
    return 227 * 1024 if (9, 0) <= compute_capability < (12, 0) else 99 * 1024


# Compute capability, SMs and GB/s, of the data sheets. JAX names a GPU by its product name, in which the longest of
# these names that occurs counts. "A100" has 80 GB; of the kinds of a GH200 the slower one is taken.
_DATA_SHEETS = {
    "A100": ((8, 0), 108, 2039),
    "A100-SXM4-40GB": ((8, 0), 108, 1555),
    "A100-PCIE-40GB": ((8, 0), 108, 1555),
    "A30": ((8, 0), 56, 933),
    "A10": ((8, 6), 72, 600),
    "A40": ((8, 6), 84, 696),
    "RTX A6000": ((8, 6), 84, 768),
    "RTX 3080": ((8, 6), 68, 760),
    "RTX 3090": ((8, 6), 82, 936),
    "L4": ((8, 9), 58, 300),
    "L40": ((8, 9), 142, 864),
    "L40S": ((8, 9), 142, 864),
    "RTX 4080": ((8, 9), 76, 717),
    "RTX 4090": ((8, 9), 128, 1008),
    "RTX 4090 D": ((8, 9), 114, 1008),
    "RTX 6000 Ada": ((8, 9), 142, 960),
    "H100": ((9, 0), 132, 3350),
    "H100 PCIe": ((9, 0), 114, 2000),
    "H200": ((9, 0), 132, 4800),
    "GH200": ((9, 0), 132, 4000),
    "B200": ((10, 0), 148, 8000),
    "GB200": ((10, 0), 148, 8000),
    "RTX 5080": ((12, 0), 84, 960),
    "RTX 5090": ((12, 0), 170, 1792),
    "RTX PRO 6000": ((12, 0), 188, 1792),
}
DEVICES = {
    name: Device(capability, sms, shared_memory_of(capability), bandwidth)
    for name, (capability, sms, bandwidth) in _DATA_SHEETS.items()
}


def interpreted() -> bool:
    """Whether Pallas' interpreter emulates a GPU here, inside plgpu.force_gpu_interpret_mode."""
    with contextlib.suppress(ImportError):
        from jax._src.config import pallas_tpu_interpret_mode_context_manager as mode

        return mode.value is not None
    # Without that name the kernel cannot be interpreted, and all else works.
    return False


def current(x: Any) -> Any:
    """The device of JAX that x is on; the default device for what is on none, such as a jax.ShapeDtypeStruct."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return next(iter(x.devices()))
    device = jax.config.jax_default_device or jax.devices()[0]
    # The default device may be the name of a platform.
    return jax.devices(device)[0] if isinstance(device, str) else device


def facts(device: Any) -> Device | None:
    """The facts of a device of JAX; None for what is not a CUDA GPU."""
    found = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or found is None:
        return None
    capability = (int(found[1]), int(found[2]))
    known = named(getattr(device, "device_kind", ""))
    bandwidth = known.bandwidth if known is not None else None
    return Device(capability, device.core_count, shared_memory_of(capability), bandwidth)


def named(name: str) -> Device | None:
    """The GPU of a product name such as "H100" or "NVIDIA H100 80GB HBM3", if it is a known one."""
    # Parts of a GPU, and the smaller ones of portable computers, have fewer SMs than their names say.
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", name, re.IGNORECASE):
        return None
    matches = [known for known in DEVICES if re.search(rf"\b{re.escape(known)}\b", name, re.IGNORECASE)]
    return DEVICES[max(matches, key=len)] if matches else None


class KernelKind(NamedTuple):
    """How a tile works on a kind of GPU: this is proven, or not."""

    compute_capability: tuple[int, int]
    copies: CopyKind
    synchronization: SynchronizationKind


# The report of selfcheck, in benchmarks/results/, that proves each kind; implementation=None takes these alone. A wrong
# barrier hangs a GPU or spoils a number in a million, which neither an interpreter nor a compiler sees. docs/gpu.md
# says how to add an entry.
PROVEN: dict[KernelKind, str] = {}

NOT_PROVEN = NoTile("not used by default: unproven on this GPU. Pass implementation='pallas' to try it.")


def is_any_proven(device: Device) -> bool:
    """Whether some kernel is proven on that kind of GPU."""
    return any(kind.compute_capability == device.compute_capability for kind in PROVEN)


def if_proven(tile: Tile | NoTile, device: Device) -> Tile | NoTile:
    """The tile where its kernel is proven, otherwise the reason why None does not take it."""
    if isinstance(tile, NoTile) or KernelKind(device.compute_capability, tile.copies, tile.synchronization) in PROVEN:
        return tile
    return NOT_PROVEN
