"""A traced function on other values than it was traced on: of other shapes by vmap, and inside another mesh.

A trace remembers how its values lay on a mesh, inside which jit they were and over which axes of shard_map they
varied. Here it is done again by what the values are now.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Literal

from jaxnorm.activations.positionwise import Open, called, inner_counts
from jaxnorm.placement import vary_together

# They say where a value is, and how it varies over devices.
_PLACES = frozenset(["mesh_cast", "pcast", "pvary", "reshard", "sharding_constraint"])


def replay(jaxpr: Any, consts: Sequence[Any], *arguments: Any) -> list[Any]:
    """What the jaxpr computes of these constants and arguments.

    Args:
      jaxpr: that positionwise knows, traced on scalars.
    """
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = list(map(read, equation.invars))
        values.update(zip(equation.outvars, _apply(equation, inputs), strict=True))
    return list(map(read, jaxpr.outvars))


def _apply(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    primitive, parameters = equation.primitive, equation.params
    if primitive.name in _PLACES:
        return inputs
    # Operations on values of a known type do not make one vary as another does; functions of jax.numpy do.
    inputs = list(vary_together(*map(_array, inputs)))
    if primitive.name in _SPECIAL:
        return _SPECIAL[primitive.name](parameters, inputs)
    inner = called(equation)
    if inner is not None and primitive.name != "custom_vjp_call":
        return replay(inner.jaxpr, inner.consts, *inputs)
    results = primitive.bind(*inputs, **primitive.get_bind_params(parameters))
    return results if primitive.multiple_results else [results]


def _array(value: Any) -> jax.Array:
    return value if isinstance(value, jax.Array) else jax.numpy.asarray(value)


def _function(traced: Any) -> Callable[..., tuple[Any, ...]]:
    """Of values that vary together, to results that do."""

    def function(*arguments: Any) -> tuple[Any, ...]:
        results = replay(traced.jaxpr, traced.consts, *arguments)
        return tuple(vary_together(*map(_array, results), *arguments)[: len(results)])

    return function


def _checkpoint(parameters: dict[str, Any], inputs: list[Any]) -> Sequence[Any]:
    function = functools.partial(replay, parameters["jaxpr"], ())
    kept = {name: parameters[name] for name in ("policy", "prevent_cse")}
    results: Sequence[Any] = jax.checkpoint(function, **kept)(*inputs)
    return results


def _custom_jvp(parameters: dict[str, Any], inputs: list[Any]) -> Sequence[Any]:
    traced = parameters["call_jaxpr"]
    function = jax.custom_jvp(_function(traced if hasattr(traced, "consts") else Open(traced)))

    mesh = getattr(traced, "jaxpr", traced).outvars[0].aval.sharding.mesh

    def rule(primals: Any, tangents: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        # JAX traces the rule now, but for the types of then.
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr, consts, is_zero = parameters["jvp_jaxpr_fun"].call_wrapped(*[False] * len(primals))
        # What the rule made for itself lies on the mesh that it was traced in.
        consts = [value if isinstance(value, jax.core.Tracer) else np.asarray(value) for value in consts]
        results = replay(jaxpr, consts, *primals, *vary_together(*primals, *tangents)[len(primals) :])
        values, nonzero = results[: len(is_zero)], iter(results[len(is_zero) :])
        zeros = map(jax.numpy.zeros_like, values)
        moved = [next(nonzero) if not nothing else zero for nothing, zero in zip(is_zero, zeros, strict=True)]
        together = tuple(vary_together(*values, *moved))
        return together[: len(values)], together[len(values) :]

    function.defjvp(rule)
    results: Sequence[Any] = function(*inputs)
    return results


def _cond(parameters: dict[str, Any], inputs: list[Any]) -> Sequence[Any]:
    results: Sequence[Any] = lax.switch(inputs[0], list(map(_function, parameters["branches"])), *inputs[1:])
    return results


def _while(parameters: dict[str, Any], inputs: list[Any]) -> Sequence[Any]:
    count = parameters["cond_nconsts"]
    carried = count + parameters["body_nconsts"]
    condition = functools.partial(_function(parameters["cond_jaxpr"]), *inputs[:count])
    body = functools.partial(_function(parameters["body_jaxpr"]), *inputs[count:carried])
    results: Sequence[Any] = lax.while_loop(
        lambda carry: condition(*carry)[0], lambda carry: body(*carry), tuple(inputs[carried:])
    )
    return results


def _scan(parameters: dict[str, Any], inputs: list[Any]) -> Sequence[Any]:
    consts, carried = inner_counts(parameters)
    body = functools.partial(_function(parameters["jaxpr"]), *inputs[:consts])

    def step(carry: tuple[Any, ...], pieces: tuple[Any, ...]) -> tuple[Any, Any]:
        results = body(*carry, *pieces)
        return results[:carried], results[carried:]

    last, stacked = lax.scan(
        step,
        tuple(inputs[consts : consts + carried]),
        tuple(inputs[consts + carried :]),
        length=parameters["length"],
        reverse=parameters["reverse"],
        unroll=parameters["unroll"],
    )
    return [*last, *stacked]


_SPECIAL: dict[str, Callable[[dict[str, Any], list[Any]], Sequence[Any]]] = {
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
    "custom_jvp_call": _custom_jvp,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
