"""Which activations are fused with the norm, and which are applied after it.

    1. JAX's own pointwise functions, and partials of one with Python numbers as keywords: fused.
    2. Any other function: fused if x is being traced by jit, and the function's own trace consists of pointwise
       primitives and closes over numbers only.
    3. Everything else is computed by JAX after the norm, as activation(norm(x)).

The result is the same up to rounding; what is fused moves less memory. So a primitive that is unknown here costs speed
and nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal, jaxpr_as_fun

from jaxnorm.arguments import Activation

# JAX's own pointwise functions of one array, compared by identity.
_NAMES = {
    jax.nn: (
        *("celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh", "identity", "leaky_relu"),
        *("log_sigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "sparse_plus"),
        *("sparse_sigmoid", "squareplus", "swish"),
    ),
    jnp: ("abs", "arctan", "arcsinh", "cos", "exp", "expm1", "log1p", "negative", "sin", "sqrt", "square", "tanh"),
    lax: ("abs", "cos", "erf", "exp", "expm1", "log1p", "logistic", "neg", "sin", "sqrt", "square", "tanh"),
}
FUNCTIONS = frozenset(
    getattr(module, name) for module, names in _NAMES.items() for name in names if hasattr(module, name)
)

# Primitives whose result at a position depends on their operands at that position alone.
_POINTWISE = frozenset(
    [
        *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e"),
        *(
            "bessel_i1e",
            "bitcast_convert_type",
            "cbrt",
            "ceil",
            "clamp",
            "convert_element_type",
            "copy",
            "copy_p",
            "cos",
            "cosh",
            "digamma",
        ),
        *("div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
        *("is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg"),
        *("nextafter", "not", "one_minus_square", "or", "polynomial", "pow", "reduce_precision", "rem", "round"),
        *("rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
    ]
)
# They spread scalars, or say where arrays are: functions of scalars have no other use for them.
_FORMAL = frozenset(["broadcast_in_dim", "mesh_cast", "pcast", "pvary", "reshard", "sharding_constraint"])

_Jaxpr = Any  # jax.extend.core.Jaxpr, closed or not, whose stubs are not exported.


class Resolved(NamedTuple):
    """An activation as one of two functions, or none.

    Attributes:
      fused: a pointwise function that the norm applies, hashable, on arrays of any shape.
      after: a function to apply to the result of the norm.
      why_after: why it is not fused, in words.
    """

    fused: Activation | None = None
    after: Activation | None = None
    why_after: str | None = None


def resolve(activation: Activation | None, x: jax.Array, dtype: jax.typing.DTypeLike) -> Resolved:
    """Decides how an activation of the result of a norm of x is computed.

    Args:
      activation: None, or any function that keeps the shape of its input.
      x: the input of the norm.
      dtype: that the activation is given.
    """
    if activation is None:
        return Resolved()
    known = _known(activation)
    if known is not None:
        return Resolved(fused=known)
    if not is_staged(x):
        return Resolved(after=activation, why_after="a function of yours is fused inside jax.jit only")
    return _resolve_by_trace(activation, x, dtype)


def is_known(activation: Activation) -> bool:
    """Whether it is one of JAX's own functions that are fused everywhere, or a partial of one."""
    return _known(activation) is not None


def is_staged(x: jax.Array) -> bool:
    """Whether jit, or another transformation that stages a program, is tracing x.

    Even a constant is a tracer then, unlike in a gradient that is computed at once.
    """
    return isinstance(x, jax.core.Tracer) and isinstance(lax.iota(jnp.int32, 1), jax.core.Tracer)


def _known(activation: Activation) -> Activation | None:
    """A function of FUNCTIONS, or what equals a partial of one; else None."""
    if isinstance(activation, functools.partial):
        keywords = activation.keywords.items()
        are_numbers = all(isinstance(value, (bool, int, float, np.generic)) for _, value in keywords)
        if activation.args or not are_numbers or not _is_function(activation.func):
            return None
        return _Partial(activation.func, tuple((name, repr(value)) for name, value in keywords), activation)
    return activation if _is_function(activation) else None


def _is_function(activation: Any) -> bool:
    try:
        return activation in FUNCTIONS
    except TypeError:  # what cannot be hashed is not among them
        return False


@dataclasses.dataclass(frozen=True)
class _Partial:
    """A partial that equals others of the same function and numbers. The repr tells 1 from True and -0.0 from 0.0."""

    function: Activation
    keywords: tuple[tuple[str, str], ...]
    partial: Activation = dataclasses.field(compare=False)

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.partial(z)


def _resolve_by_trace(activation: Activation, x: jax.Array, dtype: jax.typing.DTypeLike) -> Resolved:
    """Fuses a function whose trace shows that it is pointwise.

    We trace it, with its derivative, on a scalar and on an array of the shape of x. It must do the same to both, so
    that neither the shape nor the size of an array decides what it computes.
    """
    scalar, array = _like(x, (), dtype), _like(x, x.shape, dtype)
    try:
        traced = _trace(activation, scalar)
        steps, steps_of_array = (list(_steps(_trace(_with_pullback(activation), z, z))) for z in (scalar, array))
    except _NotPointwiseError as reason:
        return Resolved(after=activation, why_after=str(reason))
    except Exception as error:  # It may be anything: the function is run as it is, and raises its own errors there.
        return Resolved(after=activation, why_after=f"tracing it on a scalar raises {type(error).__name__}")
    if steps != steps_of_array or [aval.shape for aval in traced.out_avals] != [()]:
        return Resolved(after=activation, why_after="what it computes depends on the shape of its input")
    return Resolved(fused=_Traced(traced))


class _Traced:
    """A function of a scalar, by its trace, on arrays of any shape. It holds the trace, and not the function."""

    def __init__(self, traced: _Jaxpr) -> None:
        self._traced = traced

    def __call__(self, z: jax.Array) -> jax.Array:
        function: Callable[[jax.Array], list[jax.Array]] = jaxpr_as_fun(self._traced)
        for _ in z.shape:
            function = jax.vmap(function)
        (y,) = function(z)
        return y.astype(z.dtype)


class _NotPointwiseError(Exception):
    """The reason, in words."""


def _like(x: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """The type of an array of that shape which varies over the axes of shard_map that x varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _trace(function: Callable[..., Any], *types: Any) -> _Jaxpr:
    def anew(*arguments: Any) -> Any:
        # JAX remembers traces by the function, and what this one closes over may have changed.
        return function(*arguments)

    return jax.make_jaxpr(anew)(*types)


def _with_pullback(activation: Activation) -> Callable[[Any, Any], Any]:
    """The function and its derivative: custom derivative rules are part of what must be pointwise."""

    def both(z: jax.Array, dy: jax.Array) -> Any:
        y, pullback = jax.vjp(activation, z)
        return y, pullback(dy.astype(y.dtype))

    return both


def _steps(closed: _Jaxpr, operands: Sequence[str] = ()) -> Iterator[Any]:
    """The operations of a trace, one by one; raises _NotPointwiseError at what is not pointwise.

    Args:
      closed: the trace.
      operands: for each input the number that it is, as text; "" where it is no known number.
    """
    for value in closed.consts:
        if isinstance(value, jax.core.Tracer):
            raise _NotPointwiseError("it closes over a value that is being traced, such as a learned slope")
        if np.shape(value):
            raise _NotPointwiseError(f"it closes over an array of shape {np.shape(value)}")
    numbers = dict(zip(closed.jaxpr.invars, operands, strict=False))
    for equation in closed.jaxpr.eqns:
        name, inner = equation.primitive.name, _called(equation)
        inputs = [repr(atom.val) if isinstance(atom, Literal) else numbers.get(atom, "") for atom in equation.invars]
        if inner is not None:
            yield from _steps(inner, inputs)
        elif name in _FORMAL:
            numbers[equation.outvars[0]] = inputs[0]
        elif name in _POINTWISE:
            yield (
                name,
                sorted(item for item in equation.params.items() if isinstance(item[1], (bool, int, float))),
                inputs,
            )
        else:
            raise _NotPointwiseError(f"{name!r} is not known to be pointwise")


def _called(equation: Any) -> _Jaxpr | None:
    """The trace of a function that an equation calls, such as one with a jit of its own."""
    if equation.primitive.name not in ("jit", "pjit", "closed_call", "custom_jvp_call", "checkpoint", "remat2"):
        return None
    inner = next((equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params), None)
    return inner if hasattr(inner, "consts") else None
