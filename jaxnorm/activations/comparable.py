"""Traced functions as keys: equal where they do the same, so that what was compiled for one serves the other."""

from collections.abc import Hashable
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # type: ignore[attr-defined]
from jax.extend.linear_util import WrappedFun


def key(traced: Any) -> Hashable:
    """What a ClosedJaxpr computes, but for the values that it closes over: of these only the types."""
    return _jaxpr_key(traced.jaxpr)


def _jaxpr_key(jaxpr: Any) -> Hashable:
    numbers: dict[Any, int] = {}

    def of(atom: Any) -> Hashable:
        if isinstance(atom, Literal):
            return "literal", constant_key(atom.val)
        return numbers.setdefault(atom, len(numbers))

    inputs = [(of(variable), _type_key(variable.aval)) for variable in (*jaxpr.constvars, *jaxpr.invars)]
    equations = [
        (
            equation.primitive.name,
            tuple(map(of, equation.invars)),
            tuple(
                (name, constant_key(value)) for name, value in sorted(equation.params.items()) if name not in _UNREAD
            ),
            tuple((of(variable), _type_key(variable.aval)) for variable in equation.outvars),
        )
        for equation in jaxpr.eqns
    ]
    return tuple(inputs), tuple(equations), tuple(map(of, jaxpr.outvars))


# What says how a call was written, not what it computes.
_UNREAD = frozenset(["ctx_mesh", "name", "debug", "out_trees"])
# What JAX does to a rule that takes its arguments as they are.
_FLATTENED = (["_flatten_jvp"], ["_flatten_fwd"], ["_flatten_bwd"])


def _type_key(aval: Any) -> Hashable:
    return aval.shape, aval.dtype


def constant_key(value: Any) -> Hashable:
    """A constant of the trace, or a parameter of an equation, by what it is."""
    key: Hashable
    match value:
        case ClosedJaxpr():
            key = _jaxpr_key(value.jaxpr), tuple(map(constant_key, value.consts))
        case Jaxpr():
            key = _jaxpr_key(value)
        case bool() | int() | float() | complex() | np.generic() | np.ndarray():
            # The type tells 1 from True, the bytes -0.0 from 0.0, and a NaN equals itself.
            array = np.asarray(value)
            key = type(value), array.dtype, array.shape, array.tobytes()
        case tuple() | list():
            key = type(value), tuple(map(constant_key, value))
        case WrappedFun():
            key = _rule_key(value)
        case _:
            key = value if is_hashable(value) else _Same(value)
    return key


def is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _rule_key(wrapped: Any) -> Hashable:
    """A derivative rule of custom_jvp or custom_vjp, which JAX wraps anew at every trace: by the function inside.

    A rule that was bound to arguments of its own, or is wrapped in a way that is not known, equals only itself.
    """
    inner = [cell.cell_contents for cell in _cells(wrapped.f) for cell in _cells(cell.cell_contents)]
    rules = [wrapped, *(value for value in inner if isinstance(value, WrappedFun))]
    known = [rule.f for rule in rules if [transform.__name__ for transform, _ in rule.transforms] in _FLATTENED]
    return known[0] if len(known) == 1 and is_hashable(known[0]) else _Same(wrapped)


def _cells(function: Any) -> tuple[Any, ...]:
    return getattr(function, "__closure__", None) or ()


class _Same:
    """Equal to the same object only."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
