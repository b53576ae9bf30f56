"""What selfcheck runs on. Runs in a process of its own, since a GPU that one process uses is not free for another."""

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax.extend.backend import get_backend

import jaxnorm
from jaxnorm.gpu.devices import facts


def describe() -> dict[str, Any]:
    """The facts; "gpu" is None if there is no CUDA GPU, otherwise what jaxnorm.gpu.devices knows of it."""
    device = jax.devices()[0]
    gpu = facts(device)
    found: dict[str, Any] = {
        "outcome": "done",
        "device": device.device_kind,
        "gpu": gpu,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jaxnorm": jaxnorm.__version__,
        "kernel": _fingerprint(),
    }
    found |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return found if gpu is None else found | {"cuda": get_backend().platform_version, "driver": _driver()}


def _driver() -> str | None:
    """The version of the GPU's driver, from the program that comes with it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _fingerprint() -> str:
    """A hash of the kernel's source, since a report is about this source."""
    package = Path(jaxnorm.__file__).parent
    # A GPU that is added to the facts, or to what is proven, does not change the kernel.
    sources = [
        package / "pallas_kernel.py",
        *sorted(set((package / "gpu").glob("*.py")) - {package / "gpu/devices.py"}),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
