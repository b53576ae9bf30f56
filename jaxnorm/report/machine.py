"""What selfcheck runs on. Runs in a process of its own, since a GPU that one process uses is not free for another."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax

import jaxnorm
from jaxnorm.gpu.devices import facts
from jaxnorm.report.driver import Driver, DriverError, kernel_version

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_CLUSTERS = (1, 2, 4, 8)


def describe() -> dict[str, Any]:
    """The facts; "gpu" is None where there is no CUDA GPU, else what jaxnorm.gpu.devices knows of it."""
    device = jax.devices()[0]
    gpu = facts(device)
    found: dict[str, Any] = {
        "device": device.device_kind,
        "gpu": None if gpu is None else dataclasses.asdict(gpu),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jaxnorm": jaxnorm.__version__,
        "kernel": _fingerprint(),
    }
    found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found if gpu is None else found | _of_driver(gpu.compute_capability, gpu.shared_memory)


def _of_driver(compute_capability: tuple[int, int], shared_memory: int) -> dict[str, Any]:
    """Its version, and how many clusters of each size run at once, with one thread block on each SM, with two, four."""
    try:
        driver = Driver()
        found: dict[str, Any] = {"driver": kernel_version(), "cuda of the driver": driver.cuda_version()}
        if compute_capability >= (9, 0):
            found["clusters that fit"] = {
                f"{size} x {shared // 1024} KiB": driver.clusters_that_fit(size, shared)
                for shared in (shared_memory, shared_memory // 2 - 1024, shared_memory // 4 - 1024)
                for size in _CLUSTERS
            }
    except DriverError as error:
        return {"driver": kernel_version(), "clusters that fit": str(error)}
    return found


def _fingerprint() -> str:
    """Of the kernel's source: a report speaks of that one."""
    package = Path(jaxnorm.__file__).parent
    sources = [package / "pallas_kernel.py", *sorted((package / "gpu").glob("*.py"))]
    # What is proven by a report must not change what the report speaks of.
    text = b"".join(path.read_bytes() for path in sources if path.name != "devices.py")
    return hashlib.sha256(text).hexdigest()[:12]
