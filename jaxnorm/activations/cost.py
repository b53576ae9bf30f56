"""Whether an activation takes long to evaluate, from its equations."""

from collections.abc import Callable
from typing import Any

import jax

from jaxnorm.activations.positionwise import called, equations

# A few instructions of a CPU each. What is not here is a series, a loop or unknown.
_CHEAP = frozenset(
    [
        *("abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "convert_element_type", "copy", "copy_p", "div"),
        *("eq", "ge", "gt", "integer_pow", "is_finite", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or"),
        *("pvary", "reduce_precision", "reshape", "round", "select_n", "sign", "square", "squeeze", "stop_gradient"),
        *("sub", "xor"),
    ]
)


def is_dear(activation: Callable[..., Any] | None, dtype: Any, captures: int) -> bool:
    """Whether it contains more than arithmetic and comparisons, such as an exponential function."""
    if activation is None:
        return False
    scalar = jax.ShapeDtypeStruct((), dtype)
    traced = jax.make_jaxpr(activation)(scalar, *[scalar] * captures)
    return any(e.primitive.name not in _CHEAP and called(e) is None for e in equations(traced.jaxpr))
