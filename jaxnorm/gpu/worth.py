"""How many instructions the activation costs, estimated from its equations, without a compiler.

benchmarks/throughput.py counts them on the compiled kernel; docs/throughput.md compares both.
"""

from collections.abc import Callable
from typing import Any

from jaxnorm.gpu import elementwise

# Instructions of a thread per element, in float32 and where the hardware's own functions do; 1 for any other primitive.
_TRANSCENDENTAL = {
    "tanh": (14, 5),
    "exp": (6, 3),
    "exp2": (5, 2),
    "logistic": (14, 9),
    "div": (7, 5),
    "log": (12, 3),
    "log1p": (30, 14),
    "expm1": (30, 14),
    "erf": (32, 20),
    "erfc": (32, 20),
    "sin": (20, 3),
    "cos": (20, 3),
    "sqrt": (8, 6),
    "rsqrt": (5, 5),
    "integer_pow": (2, 2),
}
# Of a pass without its activation, in 4-byte and in narrower types.
_FORWARD, _BACKWARD = (8.0, 11.0), (12.0, 18.0)


def instructions(activation: Callable[..., Any] | None, captures: int, name: str, *, narrow: bool) -> float:
    """Of a thread per element of the kernel, for all sweeps; narrow: in bfloat16 or float16."""
    trace, base = (elementwise.trace, _FORWARD) if name == "forward" else (elementwise.trace_pullback, _BACKWARD)
    if activation is None:
        return base[narrow]
    names = elementwise.primitives(trace(activation, captures))
    return base[narrow] + sum(_TRANSCENDENTAL.get(primitive, (1, 1))[narrow] for primitive in names)
