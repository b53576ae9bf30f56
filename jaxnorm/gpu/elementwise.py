"""Activations inside the GPU kernel: traced once outside it, evaluated equation by equation inside it.

Mosaic GPU has rules for many elementwise primitives of JAX, not for all, and not for every form in which tracing a
derivative puts them. So the activation, or its pullback, is traced on a scalar: all shapes in the trace are then (),
and what the kernel evaluates is the same equations on its own arrays, with a small table of substitutes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

# The types of jax.extend.core, which its stubs do not export.
Traced = Any  # ClosedJaxpr
_Equation = Any  # JaxprEqn
_Jaxpr = Any

# Bound as they are.
_PLAIN = frozenset(
    [
        *("abs", "add", "and", "bitcast_convert_type", "clamp", "convert_element_type", "cos", "div", "eq", "exp"),
        *("exp2", "ge", "gt", "le", "log", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "or", "rsqrt"),
        *("select_n", "sign", "sin", "sqrt", "square", "sub", "tanh", "xor"),
    ]
)
# They change shapes, of which a scalar has only one, or shardings, which a kernel does not have.
_IDENTITIES = frozenset(
    [
        *("broadcast_in_dim", "copy", "copy_p", "optimization_barrier", "reshape", "squeeze", "stop_gradient"),
        *("mesh_cast", "pcast", "pvary", "reshard", "sharding_constraint"),
    ]
)


def _expm1(x: jax.Array) -> jax.Array:
    # exp(x) - 1 cancels near 0; there expm1(x) = 2 t / (1 - t) with t = tanh(x / 2), which does not.
    t = jnp.tanh(0.5 * x)
    return jnp.where(jnp.abs(x) < 0.5, 2 * t / (1 - t), jnp.exp(x) - 1)


def _log1p(x: jax.Array) -> jax.Array:
    # What 1 + x rounds away from x, dividing by (1 + x) - 1 puts back (Goldberg 1991, theorem 4).
    u = 1 + x
    corrected = jnp.log(u) * (x / jnp.where(u == 1, 1.0, u - 1))
    return jnp.where(u == 1, x, jnp.where(jnp.abs(x) < 1, corrected, jnp.log(u)))


# Least squares at Chebyshev nodes, in float64; in float32 erf is then good to 2e-7 of itself and erfc to 1e-7 of 1
# and 1e-6 of itself.
# erf(x) / x for x^2 in [0, 1], in powers of x^2.
_ERF_NEAR = (1.12837917, -0.376126269, 0.112835975, -0.0268543288, 0.00518931194, -8.01885499e-4, 7.88249711e-5)
# exp(x^2) erfc(x) / t for x in [1, 10], in powers of t = 1 / (1 + x / 2).
_ERFC_FAR = (0.2820976, 0.28205663, 0.24681376, 0.17948447, 0.059096873, 0.08544733, -0.22877651, 0.0943702)


def _near_and_far(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """erf(x), for |x| < 1, and erfc(|x|), for |x| >= 1."""
    size = jnp.abs(x)
    t = 1 / (1 + 0.5 * size)
    return x * _polynomial(_ERF_NEAR, x * x), t * jnp.exp(-(x * x)) * _polynomial(_ERFC_FAR, t)


def _erf(x: jax.Array) -> jax.Array:
    near, far = _near_and_far(x)
    return jnp.where(jnp.abs(x) < 1, near, jnp.where(x < 0, far - 1, 1 - far))


def _erfc(x: jax.Array) -> jax.Array:
    near, far = _near_and_far(x)
    return jnp.where(jnp.abs(x) < 1, 1 - near, jnp.where(x < 0, 2 - far, far))


# erfc(x) exp(x^2) / t in powers of t = 1 / (1 + p x), good to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26).
_ERFC_P, _ERFC_SHORT = 0.3275911, (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _short_erf(x: jax.Array) -> jax.Array:
    t = 1 / (1 + _ERFC_P * jnp.abs(x))
    far = 1 - t * _polynomial(_ERFC_SHORT, t) * jnp.exp(-(x * x))
    return jnp.where(x < 0, -far, far)


def _tanh_of_exp(x: jax.Array) -> jax.Array:
    return 1 - 2 / (1 + jnp.exp(2 * x))


def _polynomial(coefficients: Sequence[Any], x: Any) -> Any:
    *lower, highest = coefficients
    return functools.reduce(lambda value, coefficient: value * x + coefficient, reversed(lower), highest + 0 * x)


def _integer_pow(x: jax.Array, exponent: int) -> jax.Array:
    """By squaring."""
    power = jnp.ones_like(x)
    for digit in f"{abs(exponent):b}":
        power = power * power * x if digit == "1" else power * power
    return power if exponent >= 0 else 1 / power


# For results in bfloat16, with the hardware's own functions (see jaxnorm.gpu.block.approximates): good to 2^-22 of 1.
APPROXIMATE: Mapping[str, Callable[..., jax.Array]] = MappingProxyType(
    {"erf": _short_erf, "erfc": lambda x: 1 - _short_erf(x)}
)
# The hardware's tanh is good to 2^-11, which leaves little of 1 - tanh(x)^2 where that is small.
APPROXIMATE_IN_DERIVATIVES = MappingProxyType({**APPROXIMATE, "tanh": _tanh_of_exp})

_Substitutes = dict[str, Callable[..., jax.Array]]
_SUBSTITUTES: _Substitutes = {
    "add_any": jnp.add,
    "erf": _erf,
    "erfc": _erfc,
    "expm1": _expm1,
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "log1p": _log1p,
    # ~x asks for registers of 4 bits when x is bool.
    "not": lambda x: x ^ jnp.full_like(x, True if x.dtype == jnp.bool_ else -1),
    "one_minus_square": lambda x: 1 - x * x,
    "polynomial": lambda x, *coefficients: _polynomial(coefficients, x),
}


_COVERED = _PLAIN | _IDENTITIES | _SUBSTITUTES.keys() | {"integer_pow"}


def trace(activation: Callable[[jax.Array], jax.Array]) -> Traced:
    """z -> activation(z) on float32 scalars."""
    return jax.make_jaxpr(activation)(_SCALAR)


def trace_pullback(activation: Callable[[jax.Array], jax.Array]) -> Traced:
    """(z, dy) -> dz on float32 scalars."""

    def pullback(z: jax.Array, dy: jax.Array) -> jax.Array:
        dz: jax.Array
        (dz,) = jax.vjp(activation, z)[1](dy)
        return dz

    return jax.make_jaxpr(pullback)(_SCALAR, _SCALAR)


_SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def first_uncovered(activation: Callable[[jax.Array], jax.Array] | None) -> str | None:
    """The name of the first primitive of the activation or its pullback that the kernel cannot evaluate, or None."""
    if activation is None:
        return None
    # The pullback is traced only if the activation is covered: a loop is not, and may have no pullback.
    traces = (trace_one(activation) for trace_one in (trace, trace_pullback))
    return next((name for traced in traces for name in _uncovered(traced.jaxpr)), None)


def primitives(traced: Traced) -> Iterator[str]:
    """The names of what the traced function computes: one for each equation that is not an identity."""
    return _names(traced.jaxpr)


def evaluate(
    traced: Traced, *arguments: jax.Array, substitutes: Mapping[str, Callable[..., jax.Array]] = MappingProxyType({})
) -> jax.Array:
    """The result of the traced function, inside a kernel, in the shape of the first argument.

    Args:
      traced: of trace or trace_pullback.
      arguments: arrays of the shape of the first, or scalars.
      substitutes: for further primitives: APPROXIMATE or APPROXIMATE_IN_DERIVATIVES.
    """
    (result,) = _evaluate(traced.jaxpr, traced.consts, arguments, _SUBSTITUTES | dict(substitutes))
    full: jax.Array = _full(result, arguments[0].shape)
    return full


def _uncovered(jaxpr: _Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        inner = _inner(equation)
        name = equation.primitive.name
        if inner is not None:
            yield from _uncovered(inner[0])
        elif name not in _COVERED and not _is_identity(equation):
            yield name
        else:
            # Under jax_enable_x64: what is computed in 64 bits would be computed in 32. Constants may be wide.
            wide = next((out.aval.dtype.name for out in equation.outvars if out.aval.dtype.itemsize > 4), None)
            if wide is not None:
                yield f"{name} to {wide}"


def _names(jaxpr: _Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        inner = _inner(equation)
        if inner is not None:
            yield from _names(inner[0])
        elif not _is_identity(equation):
            yield equation.primitive.name


def _is_identity(equation: _Equation) -> bool:
    # Inside shard_map JAX ends the pullback of a product with a sum over no axes.
    sums_nothing = equation.primitive.name == "reduce_sum" and not equation.params["axes"]
    return sums_nothing or equation.primitive.name in _IDENTITIES


def _inner(equation: _Equation) -> tuple[_Jaxpr, Any] | None:
    """What a call (jit, custom_jvp, checkpoint) calls, with its constants."""
    if equation.primitive.name in ("while", "cond", "scan"):
        return None
    called = next((equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params), None)
    if called is None:
        return None
    return getattr(called, "jaxpr", called), getattr(called, "consts", ())


def _evaluate(jaxpr: _Jaxpr, consts: Any, arguments: Any, substitutes: _Substitutes) -> list[Any]:
    values: dict[Any, Any] = dict(
        zip((*jaxpr.constvars, *jaxpr.invars), (*map(_scalar, consts), *arguments), strict=True)
    )

    def read(atom: Any) -> Any:
        return _scalar(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = _inner(equation)
        if inner is not None:
            outputs = _evaluate(*inner, inputs, substitutes)
        else:
            outputs = [_apply(equation, inputs, substitutes)]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: _Equation, inputs: list[Any], substitutes: _Substitutes) -> Any:
    name = equation.primitive.name
    if _is_identity(equation):
        return inputs[0]
    # Primitives, unlike the functions of jax.numpy, do not broadcast.
    shape = jnp.broadcast_shapes(*map(np.shape, inputs))
    inputs = [_full(value, shape) for value in inputs]
    if name == "integer_pow":
        return _integer_pow(inputs[0], equation.params["y"])
    if name in substitutes:
        return substitutes[name](*inputs)
    # The kernel's functions have one accuracy, that of the CUDA math library.
    parameters = equation.params | ({"accuracy": None} if "accuracy" in equation.params else {})
    return equation.primitive.bind(*inputs, **parameters)


def _scalar(value: Any) -> Any:
    """A constant of the trace as a NumPy scalar, which a kernel takes for a literal."""
    return np.asarray(value)[()]


def _full(value: Any, shape: tuple[int, ...]) -> Any:
    return value if np.shape(value) == shape else lax.broadcast_in_dim(value, shape, ())
