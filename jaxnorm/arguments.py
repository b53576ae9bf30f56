"""The checks of the public functions: every error states the rule, what was seen and the remedy."""

import numbers
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Activation = Callable[..., jax.Array]
Axes = int | Iterable[int]
AxisName = str | Sequence[str]
Implementation = Literal["pallas", "xla", "reference"]

_SHORT = reprlib.Repr(maxstring=80, maxother=80)
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def is_array(value: Any) -> bool:
    """Whether it is an array of JAX, NumPy or the like, or describes one; a list or a number is not."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def shown(value: Any) -> str:
    """Its repr for a message: cut where it is long, and without the addresses of objects."""
    return without_addresses(_SHORT.repr(value))


def without_addresses(text: str) -> str:
    """The text without the addresses of objects, <function f at 0x7f00aa>."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def check_input(x: Any) -> jax.Array:
    """Returns x as an array, after checking its type, dtype and rank."""
    if not is_array(x):
        raise TypeError(
            f"x must be an array of shape (N, C, *spatial): got {type(x).__name__}. Convert it with jnp.asarray."
        )
    array: jax.Array = jnp.asarray(x)
    if array.dtype.name not in _DTYPES:
        remedy = "Convert it first, for example x.astype(jnp.float32)."
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            remedy = "Normalize x.real and x.imag on their own."
        raise TypeError(
            f"x must be one of {', '.join(_DTYPES)}: got {array.dtype.name} of shape {array.shape}. {remedy}"
        )
    if array.ndim < 3:
        raise ValueError(
            "x must have rank 3 or more, (N, C, *spatial) or (N, *spatial, C), since the statistics are taken over "
            f"the spatial axes: got shape {array.shape}. For features without spatial axes use layer normalization."
        )
    return array


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
            "The channel axes cannot include the leading dimension as this is assumed to be the batch axis: "
            f"{seen}. Move the batch to axis 0, or add one with x[None]."
        )
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"{name} must not name an axis twice: {seen}, which means axes {tuple(axes)}. Name each axis once."
        )
    return tuple(axes)


def check_spatial(shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> None:
    """There must be a position to take the statistics over."""
    spatial = {axis: shape[axis] for axis in range(1, len(shape)) if axis not in channel_axes}
    if not spatial:
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
        remedy = "Make one, for example with jnp.full; the number added to the variance is passed as eps=."
        if isinstance(value, Sequence) and not isinstance(value, str):
            remedy = "Convert it with jnp.asarray."
        raise TypeError(
            f"{name} must be None or an array with a value per channel: got {type(value).__name__} {shown(value)}. "
            f"{remedy}"
        )
    value = jnp.asarray(value)
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
        fits = [axis for axis in range(1, len(shape)) if value.shape in ((shape[axis],), (shape[0], shape[axis]))]
        if fits:
            message += f" It would fit channel_axis={' or '.join(map(str, fits))}: is x laid out as you think?"
        raise ValueError(message)
    return value


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def check_residual(residual: Any, x: jax.Array) -> Any:
    """The residual is added to the normalized x position by position, without broadcasting."""
    if residual is None:
        return None
    if not is_array(residual):
        raise TypeError(
            f"residual must be None or an array like x: got {type(residual).__name__} {shown(residual)}. "
            "Convert it with jnp.asarray, or make one with jnp.full_like(x, value)."
        )
    residual = jnp.asarray(residual)
    if (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual must have the shape and dtype of x, {x.shape} {x.dtype.name}: got {residual.shape} "
            f"{residual.dtype.name}. "
            "Broadcast or cast it first, for example jnp.broadcast_to(residual, x.shape).astype(x.dtype)."
        )
    return residual


def check_eps(eps: Any, dtype: Any, name: str = "eps") -> float:
    """eps is a Python number, static under jit, and must not vanish in the dtype of the statistics."""
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(
            f"{name} must be a Python number, since it is static under jit: got {type(eps).__name__}. "
            "Pass a float such as 1e-5, not an array."
        )
    smallest = float(jnp.finfo(dtype).tiny)
    value: Any = eps
    if not smallest <= value <= float(jnp.finfo(dtype).max):
        raise ValueError(
            f"{name} must be a finite number > 0: got {shown(eps)}. The statistics are computed in "
            f"{jnp.dtype(dtype).name}, whose smallest normal number, {smallest:.3g}, is the least that can be added. "
            "The usual values are 1e-5 and 1e-6."
        )
    return float(eps)


def check_where(where: Any, shape: tuple[int, ...], name: str = "where") -> jax.Array | None:
    """The mask of counted positions."""
    if where is None:
        return None
    if not hasattr(where, "shape") or getattr(where, "dtype", None) != jnp.bool_:
        got = f"an array of {where.dtype}" if hasattr(where, "dtype") else f"a Python {type(where).__name__}"
        raise TypeError(
            f"{name} must be a bool array, True at the positions that count: got {got}. "
            f"Compare first, for example {name}=weights > 0."
        )
    try:
        fits = jnp.broadcast_shapes(where.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must be broadcastable to the shape of x, {shape}: got {where.shape}. "
            "Give it the axes of x, or the last ones, of size 1 where it is to be repeated."
        )
    return jnp.asarray(where)


def check_moments(moments: Any, shape: tuple[int, ...], channel_axes: tuple[int, ...], where: Any) -> Any:
    """Statistics that are given: None, or a mean and a variance with the shapes that gamma can have."""
    if moments is None:
        return None
    if not isinstance(moments, (tuple, list)) or len(moments) != 2:
        got = f"{len(moments)} values" if isinstance(moments, (tuple, list)) else type(moments).__name__
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
    return mean, variance


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


def check_activation(activation: Any) -> None:
    """None, or a function."""
    if activation is not None and not callable(activation):
        got = "an array: pass the function, not its result" if is_array(activation) else shown(activation)
        raise TypeError(
            f"activation must be None or a function of one array: got {got}. Pass a function such as jax.nn.relu."
        )


def check_implementation(implementation: Any) -> None:
    """None chooses; a name insists."""
    if implementation is not None and implementation not in get_args(Implementation):
        names = ", ".join(repr(name) for name in get_args(Implementation))
        raise ValueError(f"implementation must be None or one of {names}: got {shown(implementation)}.")
