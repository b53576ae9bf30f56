"""How long it takes to evaluate something at a position, from its equations."""

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
# From so many on, the pullback takes longer than writing and reading what it gives; with 15, in half precision, loops
# over rows are too long for LLVM to compute them in vectors.
_FEW = 8


def is_dear(activation: Callable[..., Any] | None, dtype: Any, captures: int) -> bool:
    """Whether it contains more than arithmetic and comparisons, such as an exponential function, or many of those."""
    if activation is None:
        return False
    scalar = jax.ShapeDtypeStruct((), dtype)
    needed = steps(jax.make_jaxpr(activation)(scalar, *[scalar] * captures))
    return len(needed) > _FEW or not _CHEAP.issuperset(needed)


def steps(traced: Any) -> list[str]:
    """The primitives of a closed jaxpr and of all that it calls."""
    return [equation.primitive.name for equation in equations(traced.jaxpr) if called(equation) is None]
