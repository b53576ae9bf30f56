"""jaxnorm: instance and group normalization for JAX, accurate at any offset, fused with its activation and residual."""

import importlib
import re
from typing import TYPE_CHECKING, Any

from jaxnorm.explanation import explain
from jaxnorm.functional import group_norm, instance_moments, instance_norm
from jaxnorm.version import __version__

if TYPE_CHECKING:
    from jaxnorm import nnx
    from jaxnorm.flax_module import GroupNorm, InstanceNorm, InstanceNorm2D


__all__ = [
    "GroupNorm",
    "InstanceNorm",
    "InstanceNorm2D",
    "__version__",
    "explain",
    "group_norm",
    "instance_moments",
    "instance_norm",
    "nnx",
]


def __getattr__(name: str) -> Any:
    # The layers need Flax, the functions do not: it is imported when a layer is first asked for.
    if name in ("GroupNorm", "InstanceNorm", "InstanceNorm2D", "nnx"):
        _import_flax()
        if name == "nnx":
            return importlib.import_module("jaxnorm.nnx")
        return getattr(importlib.import_module("jaxnorm.flax_module"), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    if re.fullmatch("InstanceNorm[123][dD]", name):
        message += ": use InstanceNorm: any rank"
    raise AttributeError(message)


def _import_flax() -> None:
    """Imports Flax before any module of ours that needs it.

    The modules of Flax import each other in a circle. Two threads that enter it at different places, one by
    jaxnorm.flax_module and one by jaxnorm.nnx, would wait for each other; now they enter at the same one.
    """
    try:
        importlib.import_module("flax.nnx")
    except ModuleNotFoundError as error:
        if error.name != "flax":
            raise
        raise ModuleNotFoundError(
            "The layers need Flax: pip install flax. The functions work without it.", name="flax"
        ) from error


def __dir__() -> list[str]:
    return __all__
