"""Which GPU a computation is for, as far as can be told while it is traced."""

import re
from typing import Any

import jax

from jaxnorm.arguments import AxisName, as_names
from jaxnorm.tiling import DEVICES, Device, shared_memory_of


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


def is_split_by_jit(x: jax.Array) -> bool:
    """Whether jit may split x over several devices.

    Inside shard_map x is the part of one device. While plain jit traces, shardings cannot be seen: then several
    devices count as a yes.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.empty:
        return mesh.size > 1 and not mesh.are_all_axes_manual
    return jax.device_count() > 1 if isinstance(x, jax.core.Tracer) else len(x.devices()) > 1


def is_explicit(x: jax.Array) -> bool:
    """Whether the type of x says how it is split over the devices of a mesh, or over some of its axes."""
    sharding = jax.typeof(x).sharding
    is_split = sharding.mesh.size > 1 or any(part is not None for part in sharding.spec)
    return bool(sharding.mesh.explicit_axes) and is_split


def is_partly_manual(x: jax.Array) -> bool:
    """Whether x is inside shard_map over some axes of a mesh, and jit may split it over the others."""
    mesh = jax.typeof(x).sharding.mesh
    return bool(mesh.manual_axes) and not mesh.are_all_axes_manual


def is_manual(x: jax.Array, axis_name: AxisName | None) -> bool:
    """Whether x is inside shard_map over the named axes, all of them."""
    return set(as_names(axis_name)) <= set(jax.typeof(x).sharding.mesh.manual_axes)


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
