"""What an activation is: an elementwise function, checked, comparable, with the scalars it closes over as arguments."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm.activations import comparable, positionwise, replay
from jaxnorm.arguments import Activation, shown, without_addresses


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An activation that was checked.

    Attributes:
      function: None, or elementwise in (z, *captures), on arrays that broadcast to the shape of z. It is hashable, and
        equals what does the same, whatever the values of the captures.
      captures: what the activation closes over, as scalars of the dtype it was prepared for.
    """

    function: Activation | None
    captures: tuple[jax.Array, ...] = ()


def prepare(activation: Any, dtype: Any, varying: Collection[Any] = ()) -> Prepared:
    """Checks an activation, and makes arguments of the arrays that it closes over.

    Args:
      activation: of jaxnorm.instance_norm.
      dtype: that it is given and must keep.
      varying: inside shard_map, the axes that what it is given varies over.

    Raises:
      TypeError: it is no function, or cannot be hashed.
      ValueError: it is not elementwise or does not keep the dtype, or it closes over an array that is not a scalar.
    """
    if activation is None:
        return Prepared(None)
    if not callable(activation):
        raise TypeError(
            f"activation must be None or an elementwise function: got {type(activation).__name__} {shown(activation)}. "
            "Pass the function itself, for example jax.nn.relu."
        )
    if not comparable.is_hashable(activation):
        raise TypeError(
            f"activation must be hashable, since it is static under jit: got {type(activation).__name__}. "
            "Wrap it in a function, or give its class a __hash__."
        )
    constant = _constant_key(activation)
    if constant is not None:
        return _prepare_once(_Comparable(activation, constant), jnp.dtype(dtype))
    return _prepare(activation, jnp.dtype(dtype), tuple(varying))


def _constant_key(activation: Activation) -> Hashable | None:
    """What tells a function of JAX, or a partial of one and numbers, from others; None for all that may change."""
    if isinstance(activation, functools.partial):
        arguments = (*activation.args, *activation.keywords.values())
        function = _constant_key(activation.func)
        if function is None or not all(isinstance(value, (bool, int, float, str, np.generic)) for value in arguments):
            return None
        return function, tuple(activation.keywords), tuple(map(comparable.constant_key, arguments))
    module, name = getattr(activation, "__module__", None) or "", getattr(activation, "__name__", "")
    is_of_jax = module.startswith("jax.") and getattr(sys.modules.get(module), name, None) is activation
    return activation if is_of_jax else None


@functools.lru_cache(maxsize=256)
def _prepare_once(comparable_activation: "_Comparable", dtype: Any) -> Prepared:
    prepared = _prepare(comparable_activation.activation, dtype, ())
    return prepared if prepared.captures else Prepared(comparable_activation)


def _prepare(activation: Activation, dtype: Any, varying: tuple[Any, ...]) -> Prepared:
    def trace(*shape: int) -> Any:
        return _trace(activation, shape, dtype, varying)

    on_scalar = trace()
    _check_positions(activation, on_scalar, trace)
    if any(map(_is_hoisted, on_scalar.consts)) and _closing_rule(activation, on_scalar) is None:
        return _hoisted(on_scalar, dtype)
    consts = tuple(map(comparable.constant_key, on_scalar.consts))
    return Prepared(_Comparable(activation, (comparable.key(on_scalar), consts)))


def _check_positions(activation: Activation, on_scalar: Any, trace: Callable[..., Any]) -> None:
    """Raises if what an activation does at a position depends on others, on their number or on where they are."""
    on_array = trace(*positionwise.POSITIONS)
    reason = positionwise.obstacle(on_array)
    if reason is None and positionwise.steps(on_array) != positionwise.steps(on_scalar):
        # A lax.cond on a scalar may well be a select on an array: two arrays decide.
        other = trace(*positionwise.POSITIONS, 107)
        if positionwise.steps(on_array) != positionwise.steps(other):
            reason = "the shape of the array decides what is computed"
    if reason is None:
        reason = positionwise.rule_obstacle(on_array)
    if reason is not None:
        raise ValueError(
            f"activation must be elementwise and keep shape and dtype: in {_name(activation)} {reason}. "
            "Apply it after the norm."
        )


def _trace(activation: Activation, shape: tuple[int, ...], dtype: Any, varying: tuple[Any, ...]) -> Any:
    """Traces an activation; raises if it does not keep the shape and the dtype."""
    rule = f"activation must be elementwise and keep shape and dtype: {_name(activation)}"
    what = f"{'an array' if shape else 'a scalar'} of {dtype.name}"

    def anew(z: jax.Array) -> jax.Array:
        # JAX remembers traces by the function: one that is new sees what the activation closes over now.
        return activation(lax.pcast(z, varying, to="varying") if varying else z)

    try:
        traced = jax.make_jaxpr(anew)(jax.ShapeDtypeStruct(shape, dtype))
    except Exception as error:
        cause = without_addresses(str(error).strip().partition("\n")[0])
        raise ValueError(
            f"{rule} failed on {what} ({cause}). Write it with functions of jax.numpy, or apply it after the norm."
        ) from error
    _check_captures(activation, traced)
    out = [(aval.shape, aval.dtype.name) for aval in traced.out_avals]
    if out != [(shape, dtype.name)]:
        became = f"shape {out[0][0]} and {out[0][1]}" if len(out) == 1 else f"{len(out)} results"
        raise ValueError(f"{rule} turned {what}, shape {shape}, into {became}. Apply it after the norm.")
    return traced


def _name(activation: Any) -> str:
    """As its author calls it."""
    if isinstance(activation, functools.partial):
        return f"a partial of {_name(activation.func)}"
    return getattr(activation, "__qualname__", None) or type(activation).__qualname__


def _check_captures(activation: Activation, traced: Any) -> None:
    for value in traced.consts:
        if not isinstance(value, jax.Array):
            continue
        got = f"{_name(activation)} closes over {jax.typeof(value)}"
        if isinstance(value, jax.core.Tracer) and value.shape:
            raise ValueError(
                f"What an activation closes over must be scalars: {got}. Take the scalars out of it before, or apply "
                "the activation after the norm."
            )
        if not value.shape and not _is_real(value.dtype):
            raise ValueError(
                f"What an activation closes over must be real numbers: {got}. Compute with it outside, and make "
                "a module of Flax outside too, or apply the activation after the norm."
            )


def _closing_rule(activation: Activation, traced: Any) -> str | None:
    """The name of a function with a derivative rule that closes over an array, in an activation that does; or None.

    A rule has no derivative with respect to that array, so it must not become an argument: a constant stays one.
    """
    for equation in positionwise.equations(traced.jaxpr):
        if equation.primitive.name in ("custom_jvp_call", "custom_vjp_call") and equation.params["num_consts"]:
            name: str = equation.params["call_jaxpr"].debug_info.func_name
            if any(isinstance(value, jax.core.Tracer) for value in traced.consts):
                raise ValueError(
                    "A function with a derivative rule of its own must be given what is traced as an argument: in "
                    f"{_name(activation)}, {name!r} closes over an array. Pass it to {name!r}."
                )
            return name
    return None


def _is_real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _is_hoisted(constant: Any) -> bool:
    """Whether a constant of the trace becomes an argument."""
    return isinstance(constant, jax.Array) and not constant.shape


def _hoisted(traced: Any, dtype: Any) -> Prepared:
    """What was traced, as a function of what it closes over."""
    consts = tuple(None if _is_hoisted(constant) else constant for constant in traced.consts)
    values = list(filter(_is_hoisted, traced.consts))
    captures = tuple(digit for value in values for digit in _digits(value, dtype))
    key = (comparable.key(traced), tuple(map(comparable.constant_key, consts)))
    return Prepared(_Hoisted(traced.jaxpr, consts, tuple(value.dtype for value in values), key), captures)


@dataclasses.dataclass(frozen=True)
class _Comparable:
    """An activation that equals another one that does the same."""

    activation: Activation = dataclasses.field(compare=False)
    key: Hashable

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.activation(z)


@dataclasses.dataclass(frozen=True)
class _Hoisted:
    """A traced activation as a function of what it closed over.

    Attributes:
      jaxpr: of the activation on a scalar. Without its constants: a function that JAX keeps must not keep tracers.
      consts: those constants, None for those that became arguments.
      dtypes: what these were.
      key: what it does.
    """

    jaxpr: Any = dataclasses.field(compare=False)
    consts: tuple[Any, ...] = dataclasses.field(compare=False)
    dtypes: tuple[Any, ...] = dataclasses.field(compare=False)
    key: Hashable

    def __call__(self, z: jax.Array, *captures: jax.Array) -> jax.Array:
        y: jax.Array = jnp.vectorize(self._on_scalars)(z, *captures)
        return y

    def _on_scalars(self, z: jax.Array, *captures: jax.Array) -> jax.Array:
        digits = iter(captures)
        values = iter([_number([next(digits) for _ in range(_count(dtype))], dtype) for dtype in self.dtypes])
        consts = [next(values) if constant is None else constant for constant in self.consts]
        y: jax.Array
        (y,) = replay.replay(self.jaxpr, consts, z)
        return y


# A captured number travels in the dtype of the statistics, as gamma and beta do. An integer goes as digits of 16 bits,
# each of which any of these dtypes holds exactly.


def _count(dtype: Any) -> int:
    """Of digits."""
    return max(1, dtype.itemsize // 2) if jnp.issubdtype(dtype, jnp.integer) else 1


def _digits(value: jax.Array, dtype: Any) -> list[jax.Array]:
    count = _count(value.dtype)
    if count == 1:
        return [value.astype(dtype)]
    return [((value >> 16 * i) & 0xFFFF).astype(dtype) for i in range(count)]


def _number(digits: list[jax.Array], dtype: Any) -> jax.Array:
    lowest, *higher = (digit.astype(dtype) for digit in digits)
    for i, digit in enumerate(higher, 1):
        lowest = lowest + digit * dtype.type(1 << 16 * i)
    return lowest
