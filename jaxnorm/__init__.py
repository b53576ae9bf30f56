"""jaxnorm: instance normalization for JAX, right at any offset, fused with its activation and residual."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxnorm.explain import explain
from jaxnorm.functional import instance_moments, instance_norm
from jaxnorm.version import __version__

if TYPE_CHECKING:
    from jaxnorm import nnx
    from jaxnorm.flax_module import InstanceNorm, InstanceNorm2D


__all__ = ["InstanceNorm", "InstanceNorm2D", "__version__", "explain", "instance_moments", "instance_norm", "nnx"]


def __getattr__(name: str) -> Any:
    # The layers need Flax, the functions do not: it is imported when a layer is first asked for.
    if name in ("InstanceNorm", "InstanceNorm2D"):
        return getattr(importlib.import_module("jaxnorm.flax_module"), name)
    if name == "nnx":
        return importlib.import_module("jaxnorm.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
