"""The checks of the public functions: every error states the rule, what was seen and the remedy."""

import itertools
import numbers
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

Activation = Callable[..., jax.Array]
Axes = int | Iterable[int]
AxisName = str | Sequence[str]
Implementation = Literal["pallas", "xla", "reference"]

_SHORT = reprlib.Repr(maxstring=80, maxother=80)
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_PER_POSITION = {
    "gamma": "For a scale per position multiply after the norm.",
    "beta": "For a shift per position pass it as residual, or add it after the norm.",
}


def is_array(value: Any) -> bool:
    """Whether it is an array of JAX, NumPy or the like, or describes one; a list or a number is not."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def as_array(name: str, value: ArrayLike) -> jax.Array:
    """The value as an array of JAX, unless it only describes an array."""
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{name} must be an array: got a jax.ShapeDtypeStruct, which has no numbers. For the shape of the result "
            "use jax.eval_shape; for what a call runs use jaxnorm.explain."
        )
    return jnp.asarray(value)


def type_name(value: Any) -> str:
    """The type of a value for a message, in words that users know: JAX's arrays are instances of private classes."""
    if isinstance(value, jax.core.Tracer):
        return "a traced jax.Array"
    return "a jax.Array" if isinstance(value, jax.Array) else type(value).__name__


def shown(value: Any) -> str:
    """Its repr for a message: cut where it is long, and without the addresses of objects."""
    return without_addresses(_SHORT.repr(value))


def without_addresses(text: str) -> str:
    """The text without the addresses of objects, <function f at 0x7f00aa>."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def check_input(x: Any, least_rank: int = 3) -> jax.Array:
    """Returns x as an array, after checking its type, dtype and rank."""
    if not is_array(x):
        raise TypeError(
            f"x must be an array of shape (N, C, *spatial): got {type_name(x)}. Convert it with jnp.asarray."
        )
    array = as_array("x", x)
    if array.dtype.name not in _DTYPES:
        remedy = "Convert it first, for example x.astype(jnp.float32)."
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            remedy = "Normalize x.real and x.imag on their own."
        raise TypeError(
            f"x must be one of {', '.join(_DTYPES)}: got {array.dtype.name} of shape {array.shape}. {remedy}"
        )
    return check_rank(array, least_rank)


def check_rank(x: jax.Array, least: int) -> jax.Array:
    """Returns x, which has at least the axes of the batch and the channels, and with 3 a spatial axis."""
    if x.ndim < least == 2:
        raise ValueError(
            f"x must have rank 2 or more, (N, C, *spatial) or (N, *spatial, C): got shape {x.shape}. "
            "Add a batch axis with x[None]."
        )
    if x.ndim < least:
        raise ValueError(
            "x must have rank 3 or more, (N, C, *spatial) or (N, *spatial, C), since the statistics are taken over "
            f"the spatial axes: got shape {x.shape}. For features without spatial axes use layer normalization."
        )
    return x


def check_channel_axes(shape: tuple[int, ...], channel_axis: Axes, name: str = "channel_axis") -> tuple[int, ...]:
    """Returns the channel axes as sorted non-negative integers. The name is what the caller calls them."""
    several = isinstance(channel_axis, Iterable) and getattr(channel_axis, "ndim", 1) > 0
    given: tuple[Any, ...] = tuple(channel_axis) if several else (channel_axis,)  # type: ignore[arg-type]
    rank = len(shape)
    seen = f"got {name}={shown(channel_axis)} for x of shape {shape}"
    usual = "Use 1 for (N, C, *spatial) and -1 for (N, *spatial, C)."
    for axis in given:
        if isinstance(axis, bool) or not isinstance(axis, numbers.Integral):
            raise TypeError(f"{name} must be an integer or a tuple of integers: {seen}. {usual}")
        if not -rank <= int(axis) < rank:
            raise ValueError(f"{name} must lie in [-{rank}, {rank}) for an input of rank {rank}: {seen}. {usual}")
    axes = sorted(int(axis) % rank for axis in given)
    if not axes:
        raise ValueError(f"{name} must name at least one axis: {seen}. {usual}")
    if 0 in axes:
        raise ValueError(
            f"{name} must not be 0, the batch axis: {seen}. Move the batch to axis 0, or add one with x[None]."
        )
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"{name} must not name an axis twice: {seen}, which means axes {tuple(axes)}. Name each axis once."
        )
    return tuple(axes)


def check_spatial(shape: tuple[int, ...], channel_axes: tuple[int, ...], least_axes: int = 1) -> None:
    """There must be a position to take the statistics over."""
    spatial = {axis: shape[axis] for axis in range(1, len(shape)) if axis not in channel_axes}
    if len(spatial) < least_axes:
        raise ValueError(
            "At least one axis must be neither batch nor channel, since the statistics are taken over the rest: "
            f"got channel axes {channel_axes} for x of shape {shape}. Leave a spatial axis out of channel_axis."
        )
    if 0 in spatial.values():
        raise ValueError(
            "An instance must have at least one spatial position, or it has no mean: "
            f"got x of shape {shape}, whose spatial axes {tuple(spatial)} have sizes {tuple(spatial.values())}. "
            "Drop the empty inputs before the norm."
        )


def check_parameter(name: str, value: Any, shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> Any:
    """gamma and beta: None, one value per channel, or one per sample and channel."""
    if value is None:
        return None
    if not is_array(value):
        raise TypeError(
            f"{name} must be None or an array with a value per channel: got {type_name(value)} {shown(value)}. "
            f"{_instead_of_an_array(value)}"
        )
    value = as_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point: got {value.dtype.name}. Convert it with .astype(jnp.float32).")
    channels = tuple(shape[axis] for axis in channel_axes)
    wanted = (channels, (shape[0], *channels))
    if value.shape not in wanted:
        message = (
            f"{name} must have shape {wanted[0]} (one per channel) or {wanted[1]} (one per sample and channel) "
            f"for x of shape {shape} with channel axes {channel_axes}: got {value.shape}."
        )
        # Ones around the channels, as where parameters are kept ready to broadcast.
        squeezed = [shape for shape in wanted if _without_ones(shape) == _without_ones(value.shape)]
        if squeezed:
            raise ValueError(f"{message} Convert it with .reshape({', '.join(map(str, squeezed[0]))}).")
        if value.ndim == len(shape) and name in _PER_POSITION:
            raise ValueError(f"{message} {_PER_POSITION[name]}")
        fits = [axis for axis in range(1, len(shape)) if value.shape in ((shape[axis],), (shape[0], shape[axis]))]
        if fits:
            message += f" It would fit channel_axis={' or '.join(map(str, fits))}: is x laid out as you think?"
        raise ValueError(message)
    return value


def _instead_of_an_array(value: Any) -> str:
    """The remedy where a parameter is not an array."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "Convert it with jnp.asarray."
    if isinstance(value, (float, np.floating)) and 0 < value <= 0.01:
        return f"Did you mean eps={value}?"
    return "Make one, for example with jnp.full; the number added to the variance is passed as eps=."


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def check_groups(num_groups: Any, group_size: Any, shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> int:
    """Returns how many channels form a group."""
    if len(channel_axes) != 1:
        raise ValueError(
            f"Groups are neighbors along one axis of channels: got channel axes {channel_axes} for x of shape {shape}. "
            "Merge them with x.reshape."
        )
    channels = shape[channel_axes[0]]
    given = {
        name: value for name, value in (("num_groups", num_groups), ("group_size", group_size)) if value is not None
    }
    if len(given) != 1:
        raise ValueError(
            "Either num_groups or group_size must be given, and not both: got "
            f"num_groups={shown(num_groups)} and group_size={shown(group_size)}. Many networks have num_groups=32."
        )
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer: got {type_name(value)} {shown(value)}.")
    if value < 1 or channels % int(value):
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        raise ValueError(
            f"{name} must divide the {channels} channels of x: got {name}={value} for x of shape {shape} with channel "
            f"axis {channel_axes[0]}. It would divide them as one of {shown(divisors)}. Is x laid out as you think?"
        )
    return channels // int(value) if name == "num_groups" else int(value)


def check_residual(residual: Any, x: jax.Array) -> Any:
    """The residual is added to the normalized x position by position, without broadcasting."""
    if residual is None:
        return None
    if not is_array(residual):
        raise TypeError(
            f"residual must be None or an array like x: got {type_name(residual)} {shown(residual)}. "
            "Convert it with jnp.asarray, or make one with jnp.full_like(x, value)."
        )
    residual = as_array("residual", residual)
    if (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual must have the shape and dtype of x, {x.shape} {x.dtype.name}: got {residual.shape} "
            f"{residual.dtype.name}. "
            "Broadcast or cast it first, for example jnp.broadcast_to(residual, x.shape).astype(x.dtype)."
        )
    return residual


def check_eps(eps: Any, dtype: DTypeLike, name: str = "eps", least: float | None = None) -> float:
    """eps is a Python number, static under jit, and must not vanish in the dtype of the statistics.

    Args:
      least: the least that is large enough for so many positions; None is the smallest normal number.
    """
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(
            f"{name} must be a Python number, since it is static under jit: got {type_name(eps)}. "
            "Pass a float such as 1e-5, not an array."
        )
    least = float(jnp.finfo(dtype).tiny) if least is None else least
    value: Any = eps
    if not least <= value <= float(jnp.finfo(dtype).max):
        raise ValueError(
            f"{name} must be a finite number > 0: got {shown(eps)}. The statistics are computed in "
            f"{jnp.dtype(dtype).name}, in which {least:.3g} is the least that does not vanish beside the squares of so "
            "many numbers. The usual values are 1e-5 and 1e-6."
        )
    return float(eps)


def check_where(where: Any, shape: tuple[int, ...], name: str = "where") -> jax.Array | None:
    """The mask of counted positions."""
    if where is None:
        return None
    if not is_array(where) or where.dtype != jnp.bool_:
        got = f"an array of {where.dtype}" if is_array(where) else f"a Python {type(where).__name__}"
        raise TypeError(
            f"{name} must be a bool array, True at the positions that count: got {got}. "
            f"Compare first, for example {name}=weights > 0."
        )
    mask = as_array(name, where)
    try:
        fits = jnp.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must be broadcastable to the shape of x, {shape}: got {mask.shape}. "
            f"{_how_to_broadcast(name, mask.shape, shape)}"
        )
    return mask


def _how_to_broadcast(name: str, given: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The remedy for a mask that does not fit x."""
    if len(given) >= len(shape):
        return "Every axis must have the size that x has there, or size 1."
    # The leading axes as an example, unless the sizes fit others.
    places = [*itertools.combinations(range(len(shape)), len(given))]
    fitting = [place for place in places if all(g in (1, shape[axis]) for g, axis in zip(given, place, strict=True))]
    taken = fitting[0] if fitting else places[0]
    index = ", ".join(":" if axis in taken else "None" for axis in range(len(shape)))
    return f"Add axes of size 1, such as {name}[{index}]."


def check_moments(moments: Any, shape: tuple[int, ...], channel_axes: tuple[int, ...], where: Any) -> Any:
    """Statistics that are given: None, or a mean and a variance with the shapes that gamma can have."""
    if moments is None:
        return None
    if not isinstance(moments, (tuple, list)) or len(moments) != 2:
        got = f"{len(moments)} values" if isinstance(moments, (tuple, list)) else type_name(moments)
        raise TypeError(
            f"moments must be None or a pair (mean, var), as jaxnorm.instance_moments returns it: got {got}."
        )
    if where is not None:
        raise ValueError(
            "where says which positions count for the statistics, and moments are statistics that are given: got both. "
            "Pass where to jaxnorm.instance_moments, and its result as moments."
        )
    names = ("the mean of moments", "the variance of moments")
    mean, variance = (
        check_parameter(name, value, shape, channel_axes) for name, value in zip(names, moments, strict=True)
    )
    if mean is None or variance is None:
        raise TypeError("moments must be a pair of arrays (mean, var): got None in it. Pass moments=None for x's own.")
    _check_variance(moments[1])
    return mean, variance


def _check_variance(variance: Any) -> None:
    """A variance is not negative. What is traced cannot be checked, and neither can parts that other hosts hold."""
    if isinstance(variance, jax.Array):
        if isinstance(variance, jax.core.Tracer) or not variance.is_fully_addressable:
            return
        variance = jax.device_get(variance)
    smallest = float(np.min(variance, initial=0))
    if smallest < 0:
        raise ValueError(
            f"the variance of moments must not be negative, or y is NaN: got {smallest:.3g} in it. It is the variance "
            "and neither its logarithm nor a scale; if rounding made it negative, pass jnp.maximum(var, 0)."
        )


def check_activation(activation: Any) -> None:
    """None or a function; what it computes is another question."""
    if activation is None or (callable(activation) and not is_array(activation)):
        return
    if is_array(activation):
        raise TypeError(
            "activation must be None or a function: got an array: pass the function, not its result, such as "
            "activation=jax.nn.relu."
        )
    raise TypeError(
        f"activation must be None or a function: got {type_name(activation)} {shown(activation)}. "
        "Pass the function itself, for example jax.nn.relu."
    )


def check_activated(y: Any, z: jax.Array) -> jax.Array:
    """What an activation made of z: an array of the same shape."""
    if not is_array(y) or y.shape != z.shape:
        got = f"shape {y.shape}" if is_array(y) else type_name(y)
        raise ValueError(
            f"activation must return an array of the shape of its input, {z.shape}: got {got}. Apply it after the norm."
        )
    return jnp.asarray(y)


def as_names(axis_name: AxisName | None) -> tuple[str, ...]:
    """None, a name or several as a tuple."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def check_axis_name(axis_name: Any, axis_index_groups: Any) -> None:
    """Names, not positions: JAX would take a number for an axis of the array."""
    names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    if any(isinstance(name, numbers.Integral) for name in names):
        raise TypeError(
            f"axis_name must be the name, or names, of a mapped axis of shard_map, pmap or vmap: got "
            f"{shown(axis_name)}. The axes of x that are reduced follow from channel_axis."
        )
    if axis_index_groups is not None and axis_name is None:
        raise ValueError(
            f"axis_index_groups needs axis_name, the mapped axis it divides: got {shown(axis_index_groups)} "
            "without one."
        )


def check_implementation(implementation: Any) -> None:
    """None chooses; a name insists."""
    if implementation is not None and implementation not in get_args(Implementation):
        names = ", ".join(repr(name) for name in get_args(Implementation))
        raise ValueError(f"implementation must be None or one of {names}: got {shown(implementation)}.")
