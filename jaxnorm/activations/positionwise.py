"""Whether a traced function is elementwise: decided equation by equation, by what each does to positions.

What is not known to keep positions apart is an obstacle. The function is traced on an array of POSITIONS, whose sizes
nobody else is likely to use: an axis is one of the positions if it has one of these sizes. Other axes are the
function's own (the cases of jnp.select, the coefficients of a polynomial), and along them it may do what it likes.
Every value is one of three things:

    _SAME       it knows nothing of z; if it has axes of positions, it is the same along them
    _EACH       it has all axes of the positions, and at every position depends on z there alone
    _Mixed      anything else, and all that is made of it
"""

import dataclasses
import enum
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

# The types of jax.extend.core, which its stubs do not export.
Traced = Any  # ClosedJaxpr
_Jaxpr = Any
_Equation = Any

POSITIONS = (101, 103)
_SIZES = frozenset([*POSITIONS, math.prod(POSITIONS)])

# Position by position, operands of one shape or scalars.
_POINTWISE = frozenset(
    [
        *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e"),
        *("bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex", "conj"),
        *("convert_element_type", "cos", "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp"),
        *("exp2", "expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a", "igammac", "imag", "integer_pow"),
        *("is_finite", "le", "le_to", "lgamma", "log", "log1p", "log2", "logistic", "lt", "lt_to", "max", "min"),
        *("mul", "mulhi", "ne", "neg", "nextafter", "not", "one_minus_square", "or", "polygamma", "polynomial"),
        *("population_count", "pow", "random_gamma_grad", "real", "reduce_precision"),
        *("regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "shift_left"),
        *("shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan"),
        *("tanh", "xor", "zeta"),
    ]
)
# They change shapes or types; every element stays what it is.
_FORMAL = frozenset(
    [
        *("broadcast_in_dim", "copy", "copy_p", "expand_dims", "name", "optimization_barrier", "reshape", "squeeze"),
        *("transpose", "mesh_cast", "pcast", "pvary", "reshard", "sharding_constraint", "stop_gradient"),
    ]
)
_CALLS = frozenset(
    [
        *("jit", "pjit", "closed_call", "core_call", "core_closed_call", "custom_jvp_call", "custom_vjp_call"),
        *("custom_vjp_call_jaxpr", "checkpoint", "remat", "remat2"),
    ]
)


def _changed_by_slice(equation: _Equation) -> list[int]:
    shape, parameters = equation.invars[0].aval.shape, equation.params
    strides = parameters["strides"] or (1,) * len(shape)
    taken = zip(shape, parameters["start_indices"], parameters["limit_indices"], strides, strict=True)
    return [axis for axis, (size, start, stop, stride) in enumerate(taken) if (start, stop, stride) != (0, size, 1)]


def _named(*names: str) -> Callable[[_Equation], list[int]]:
    """The axes that a parameter of the equation names."""

    def axes(equation: _Equation) -> list[int]:
        found = next(equation.params[name] for name in names if name in equation.params)
        return [found] if isinstance(found, int) else list(found)

    return axes


# They combine or move what lies along these axes, and leave the others alone.
_ALONG_AXES: dict[str, Callable[[_Equation], list[int]]] = {
    **dict.fromkeys(("argmax", "argmin"), _named("axes")),
    **dict.fromkeys((f"reduce_{name}" for name in ("and", "max", "min", "or", "prod", "sum", "xor")), _named("axes")),
    **dict.fromkeys((f"cum{name}" for name in ("logsumexp", "max", "min", "prod", "sum")), _named("axis")),
    "concatenate": _named("dimension"),
    "rev": _named("dimensions"),
    "slice": _changed_by_slice,
    "sort": _named("dimension"),
    "split": _named("axis"),
    "stack": lambda _: [],
}


class _Kind(enum.Enum):
    SAME = enum.auto()
    EACH = enum.auto()


@dataclasses.dataclass(frozen=True)
class _Mixed:
    """Attributes: reason: in words; is_form: whether all that happened is a change of form, and worse may follow."""

    reason: str
    is_form: bool = False


_SAME, _EACH = _Kind.SAME, _Kind.EACH
_Value = _Kind | _Mixed


def obstacle(on_array: Traced) -> str | None:
    """Why a function is not known to be elementwise, in words, or None.

    Args:
      on_array: the function traced on an array of POSITIONS.
    """
    for result in _walk_closed(on_array, [_EACH]):
        if isinstance(result, _Mixed):
            return result.reason
    return None


def rule_obstacle(on_array: Traced) -> str | None:
    """Why a derivative rule in the function, of custom_jvp or custom_vjp, is not known to be elementwise, or None."""
    for equation in equations(on_array.jaxpr):
        derivative = _DERIVATIVES.get(equation.primitive.name)
        mixed = None if derivative is None else _join(*derivative(equation))
        if isinstance(mixed, _Mixed):
            return f"in a derivative rule {mixed.reason}"
    return None


def equations(jaxpr: _Jaxpr) -> Iterator[_Equation]:
    """Those of the jaxpr and of all in it."""
    for equation in jaxpr.eqns:
        yield equation
        inner = called(equation)
        for traced in _inner(equation) if inner is None else [inner]:
            yield from equations(traced.jaxpr)


def _kind(variable: Any) -> _Value:
    """Of an operand of an equation that was found to keep positions apart."""
    return _EACH if _has_positions(variable.aval.shape) else _SAME


def _jvp_rule(equation: _Equation) -> list[_Value]:
    """What the results of a rule of custom_jvp are."""
    kinds = [_kind(variable) for variable in equation.invars[equation.params["num_consts"] :]]
    rule, consts, _ = equation.params["jvp_jaxpr_fun"].call_wrapped(*[False] * len(kinds))
    return _walk(rule, [*map(_constant, consts), *kinds, *kinds])


def _vjp_rule(equation: _Equation) -> list[_Value]:
    """What the gradients of a custom_vjp are, with respect to operands with positions."""

    def function(*operands: Any) -> Any:
        return equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))

    def pullback(operands: Any, cotangents: Any) -> Any:
        gradients = zip(jax.vjp(function, *operands)[1](cotangents), equation.invars, strict=True)
        return [gradient for gradient, variable in gradients if _kind(variable) is _EACH]

    def types(variables: Any) -> list[Any]:
        return [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in variables]

    traced = jax.make_jaxpr(pullback)(types(equation.invars), types(equation.outvars))
    return _walk_closed(traced, [_kind(variable) for variable in (*equation.invars, *equation.outvars)])


_DERIVATIVES = {"custom_jvp_call": _jvp_rule, "custom_vjp_call": _vjp_rule}


def _walk_closed(traced: Traced, inputs: Sequence[_Value]) -> list[_Value]:
    return _walk(traced.jaxpr, [*map(_constant, traced.consts), *inputs])


def _constant(value: Any) -> _Value:
    """A captured or literal value."""
    if not _has_positions(np.shape(value)):
        return _SAME
    if not isinstance(value, jax.core.Tracer):
        elements = np.asarray(value).reshape(-1)
        if elements.tobytes() == elements[:1].tobytes() * elements.size:
            return _SAME
    return _Mixed("an array of its own has a value per position")


def _walk(jaxpr: _Jaxpr, inputs: Sequence[_Value]) -> list[_Value]:
    """What the results are, given what the inputs are."""
    values: dict[Any, _Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))

    def read(atom: Any) -> _Value:
        return _constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        values.update(zip(equation.outvars, _apply(equation, list(map(read, equation.invars))), strict=True))
    return list(map(read, jaxpr.outvars))


def _apply(equation: _Equation, inputs: list[_Value]) -> list[_Value]:
    name = equation.primitive.name
    inner = called(equation)
    if inner is not None:
        return _walk_closed(inner, inputs)
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](equation, inputs)
    result = _result(equation, _join(*inputs))
    return [result] * len(equation.outvars)


def _result(equation: _Equation, operands: _Value) -> _Value:
    """What an equation makes of operands that are, taken together, of that kind."""
    name = equation.primitive.name
    if isinstance(operands, _Mixed):
        # The name of what mixes says more than that of the change of form before it.
        is_named = operands.is_form and name not in _POINTWISE and name not in _FORMAL
        return _Mixed(f"{name!r} mixes positions") if is_named else operands
    before, after = _shapes(equation.invars), _shapes(equation.outvars)
    if not any(map(_has_positions, (*before, *after))):
        return _SAME
    if not _keeps_positions(equation) or (operands is _EACH and not all(map(_has_all_positions, after))):
        does = "mixes positions" if operands is _EACH else "differs between positions"
        return _Mixed(f"{name!r} {does}", is_form=name in _FORMAL)
    return operands


def _keeps_positions(equation: _Equation) -> bool:
    """Whether every element of the results lies where the elements lie that it is made of."""
    name = equation.primitive.name
    before, after = _shapes(equation.invars), _shapes(equation.outvars)
    if name == "reshape":
        return _flat(before[0]) == _flat(after[0])
    if name == "bitcast_convert_type":
        return before == after
    if name in _ALONG_AXES:
        axes = _ALONG_AXES[name](equation)
        # Those that reduce have results of a lower rank, in which the axes are no more.
        whole = [shape for shape in (*before, *after) if len(shape) == len(before[0])]
        return not any(shape[axis] in _SIZES for shape in whole for axis in axes)
    return name in _POINTWISE or name in _FORMAL


def _shapes(variables: Iterable[Any]) -> list[tuple[int, ...]]:
    return [variable.aval.shape for variable in variables]


def _flat(shape: Iterable[int]) -> list[int]:
    """The shape with the positions as one axis and without axes of one element."""
    sizes = [size for size in shape if size != 1]
    for i, pair in enumerate(itertools.pairwise(sizes)):
        if pair == POSITIONS:
            return [*sizes[:i], math.prod(POSITIONS), *sizes[i + 2 :]]
    return sizes


def _has_positions(shape: Iterable[int]) -> bool:
    return any(size in _SIZES for size in shape)


def _has_all_positions(shape: Iterable[int]) -> bool:
    found = sorted(size for size in shape if size in _SIZES)
    return found in (sorted(POSITIONS), [math.prod(POSITIONS)])


def called(equation: _Equation) -> Traced | None:
    """What a call calls, closed; None if it is none."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = next(equation.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in equation.params)
    return inner if hasattr(inner, "consts") else Open(inner)


@dataclasses.dataclass(frozen=True)
class Open:
    """A jaxpr without constants, in the place of a closed one."""

    jaxpr: _Jaxpr
    consts: tuple[()] = ()


def _cond(equation: _Equation, inputs: list[_Value]) -> list[_Value]:
    index, *operands = inputs
    results = [_walk_closed(branch, operands) for branch in equation.params["branches"]]
    return _decided_by("cond", index, [_join(*each) for each in zip(*results, strict=True)])


def _while(equation: _Equation, inputs: list[_Value]) -> list[_Value]:
    parameters = equation.params
    count = parameters["cond_nconsts"]
    carried = count + parameters["body_nconsts"]
    carry = _fixpoint(
        lambda carry: _walk_closed(parameters["body_jaxpr"], [*inputs[count:carried], *carry]), inputs[carried:]
    )
    (condition,) = _walk_closed(parameters["cond_jaxpr"], [*inputs[:count], *carry])
    return _decided_by("while", condition, carry)


def _scan(equation: _Equation, inputs: list[_Value]) -> list[_Value]:
    consts, carried = inner_counts(equation.params)
    scanned = consts + carried
    pieces = inputs[scanned:]
    for i, shape in enumerate(_shapes(equation.invars[scanned:])):
        if shape[0] in _SIZES:
            pieces[i] = _Mixed("'scan' goes from position to position")
    stacked: list[_Value] = []

    def step(carry: list[_Value]) -> list[_Value]:
        results = _walk_closed(equation.params["jaxpr"], [*inputs[:consts], *carry, *pieces])
        stacked[:] = results[carried:]
        return results[:carried]

    carry = _fixpoint(step, inputs[consts:scanned])
    return [*carry, *stacked]


def inner_counts(parameters: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constant, and how many are carried."""
    if "num_consts" in parameters:
        return parameters["num_consts"], parameters["num_carry"]
    consts, carry, _ = parameters["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def _fixpoint(step: Callable[[list[_Value]], list[_Value]], carry: list[_Value]) -> list[_Value]:
    while (joined := [_join(*pair) for pair in zip(carry, step(carry), strict=True)]) != carry:
        carry = joined
    return carry


def _join(*values: _Value) -> _Value:
    """What is made of these, position by position, or is one of them."""
    mixed = next((value for value in values if isinstance(value, _Mixed)), None)
    return mixed or (_EACH if _EACH in values else _SAME)


def _decided_by(name: str, predicate: _Value, results: list[_Value]) -> list[_Value]:
    """The results of control flow: a predicate decides for all positions at once."""
    if predicate is _SAME:
        return results
    reason = predicate.reason if isinstance(predicate, _Mixed) else f"the predicate of {name!r} depends on z"
    return [_Mixed(reason)] * len(results)


_CONTROL_FLOW = {"cond": _cond, "while": _while, "scan": _scan}


def steps(traced: Traced) -> list[Any]:
    """What is done, without the shapes it is done to: the same for arrays of any shape."""
    steps: list[Any] = []
    _add_steps(steps, traced, [None] * len(traced.jaxpr.invars))
    return steps


def _add_steps(steps: list[Any], traced: Traced, operands: Sequence[Any]) -> list[Any]:
    """Adds the steps of a jaxpr; operands and results are numbers where they are known, else None."""
    jaxpr = traced.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(_number, traced.consts), *operands), strict=True))

    def read(atom: Any) -> Any:
        return _number(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, list(map(read, equation.invars))
        results = [None] * len(equation.outvars)
        call = called(equation)
        if call is not None:
            results = _add_steps(steps, call, inputs)
        elif name in _FORMAL:
            results = inputs
        else:
            steps.append((name, inputs, _numbers_in(equation.params)))
            for inner in _inner(equation):
                _add_steps(steps, inner, [None] * len(inner.jaxpr.invars))
        values.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _number(value: Any) -> Any:
    """A constant that is one number, comparable (NaN too); None for what is known only when it runs."""
    if not isinstance(value, (bool, int, float, complex, np.generic, np.ndarray)) or np.size(value) == 0:
        return None
    first = np.asarray(value).reshape(-1)[:1]
    return first.dtype.name, first.tobytes()


def _numbers_in(parameters: dict[str, Any]) -> list[Any]:
    """Numbers that an equation has for parameters, other than the names of axes."""
    kept = {name: value for name, value in parameters.items() if name not in ("axis", "dimension")}
    return [(name, value) for name, value in sorted(kept.items()) if isinstance(value, (bool, int, float, str))]


def _inner(equation: _Equation) -> list[Traced]:
    inner = [equation.params[name] for name in ("cond_jaxpr", "body_jaxpr", "jaxpr") if name in equation.params]
    return [*inner, *equation.params.get("branches", ())]
