"""Instance norm in plain JAX, tuned for what XLA makes of it: any device, any shape.

Works on the canonical view (B, R, K), with one instance per (b, k):

    channels-last  (N, *spatial, C): B = N,     R = spatial positions, K = C
    channels-first (N, C, *spatial): B = N * C, R = spatial positions, K = 1

Per-instance values (gamma, beta, captures, the statistics) are (B, K), in the dtype of the statistics. A CPU computes
without an axis of size one (layout.CpuLayout).

The positions of an instance may be spread over devices in two ways. Over a mapped axis (axis_name), every device works
on its own view, and only sums of size (B, K) travel. By jit over a mesh nobody knows here which axes are split:
then the arrays stay N-d (Positions.split_by_jit), and are neither merged nor sliced along an axis, which would move
them between devices; XLA adds the same small sums.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import scaling, sums
from jaxnorm.activations.cost import is_dear
from jaxnorm.arguments import Activation

# Elements up to which XLA for CPU computes a loop of few steps in one thread, and one of more steps in several, which
# take longer to wake than the loop.
ONE_THREAD = 2**15


class Statistics(NamedTuple):
    """What the backward pass needs to know of an instance, each (B, K): mean = center + delta.

    With a mask, counted is the number of positions that count.
    """

    center: jax.Array
    delta: jax.Array
    rstd: jax.Array
    counted: jax.Array | None = None


class Gradients(NamedTuple):
    """dgamma, dbeta and those of captures are per instance; residual is None where there was none to differentiate."""

    x: jax.Array
    gamma: jax.Array
    beta: jax.Array
    captures: tuple[jax.Array, ...]
    residual: jax.Array | None


def forward(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    captures: tuple[jax.Array, ...],
    residual: jax.Array | None,
    where: jax.Array | None,
    center: jax.Array | None,
    *,
    eps: float,
    activation: Activation | None,
    corner: jax.Array,
    positions: sums.Positions,
) -> tuple[jax.Array, Statistics]:
    """Normalizes, scales, shifts, adds the residual and applies the activation.

    Args:
      x: (B, R, K), float16, bfloat16, float32 or float64.
      gamma, beta: (B, K), in the dtype of the statistics (at least float32).
      captures: what the activation takes besides, each like gamma.
      residual: None or like x.
      where: None, or bool and broadcastable to x: the positions that count for the statistics.
      center: None, or what is subtracted from x, like gamma, where the statistics are given.
      eps: added to the variance.
      activation: None or an elementwise function of z and the captures.
      corner: the view of sums.corner_of x.
      positions: those of an instance.

    Returns:
      y like x, and the statistics.
    """
    if center is None:
        statistics = _statistics(x, where, corner, gamma.dtype, eps, positions)
    else:
        statistics = Statistics(center, jnp.zeros_like(center), jnp.ones_like(center))
    z = _on_line(_deviation(x, statistics, positions), statistics, gamma, beta, positions)
    if residual is not None:
        z = z + residual.astype(z.dtype)
    if activation is not None:
        z = activation(z, *map(positions.spread, captures))
    return z.astype(x.dtype), statistics


def backward(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    captures: tuple[jax.Array, ...],
    residual: jax.Array | None,
    where: jax.Array | None,
    center: jax.Array | None,
    statistics: Statistics,
    dy: jax.Array,
    *,
    activation: Activation | None,
    positions: sums.Positions,
) -> Gradients:
    """The gradients of forward, for the cotangent dy of y.

    With xhat = (x - mean) * rstd and dz the cotangent before the activation (Ioffe, Szegedy 2015, per instance):

        dbeta = sum dz        dgamma = sum dz * xhat        dx = gamma * rstd * (dz - (dbeta + xhat * dgamma) / R)

    The fraction is what reaches x through its statistics: it is not there where they are given, and only at the
    positions that count where there is a mask, R being their number.

    Args:
      x, gamma, beta, captures, where, center: as in forward.
      residual: as in forward where the activation needs it, else None.
      statistics: of forward.
      dy: like x.
      activation, positions: as in forward.

    Returns:
      Gradients, x-sized ones in the dtype of x, per-instance ones in the dtype of the statistics. Over a mapped axis
      the per-instance ones are the terms of this device: their sum over the axis is left to the transpose of gamma,
      beta and the captures.
    """

    if positions.platform == "gpu":
        # Else XLA may write what both passes compute of x, such as the mask of a relu, in the forward pass. A TPU fuses
        # the passes with the matmuls beside them, which a barrier would hinder.
        x, statistics = lax.optimization_barrier((x, statistics))

    def deviation_of(x: jax.Array, statistics: Statistics) -> jax.Array:
        deviation = _deviation(x, statistics, positions)
        # What does not count and is not finite has no part in any gradient; and what counts is finite, or all
        # statistics of its instance are NaN.
        return jnp.where(jnp.isfinite(x), deviation, 0) if has_mask else deviation

    def cotangents_of(statistics: Statistics, *arrays: Any) -> tuple[jax.Array, ...]:
        """Those of z and of the captures at each position."""
        x, dy, residual = arrays
        dz = dy.astype(statistics.center.dtype)
        dcaptures: list[jax.Array] = []
        if activation is not None:
            z = _on_line(_deviation(x, statistics, positions), statistics, gamma, beta, positions)
            if residual is not None:
                z = z + residual.astype(z.dtype)
            # As large as z, so that their cotangents are not summed here.
            of_positions = [jnp.broadcast_to(positions.spread(value), z.shape) for value in captures]
            dz, *dcaptures = jax.vjp(activation, z, *of_positions)[1](dz)
        if has_mask:
            is_finite = jnp.isfinite(x)
            dz, *dcaptures = (jnp.where(is_finite, value, 0) for value in (dz, *dcaptures))
        return dz, *dcaptures

    def terms(*arrays: Any) -> tuple[jax.Array, ...]:
        dz, *dcaptures = arrays[1:] if is_kept else cotangents_of(statistics, *arrays)
        deviation = deviation_of(arrays[0], statistics)
        xhat = (deviation - positions.spread(statistics.delta)) * positions.spread(statistics.rstd)
        return dz, dz * xhat, *dcaptures

    has_mask, is_cpu, arrays = where is not None, positions.platform == "cpu", (x, dy, residual)
    is_kept = is_cpu and _is_kept(activation, x, gamma.dtype, len(captures))
    if is_kept:
        arrays = (x, *lax.optimization_barrier(cotangents_of(statistics, *arrays)))
    elif is_cpu:
        # Else XLA computes what dy is made of, such as the pullback of an activation of the user's, in each pass too.
        arrays = (x, lax.optimization_barrier(dy), residual)
    totals = sums.over_positions(terms, arrays, positions)
    # The barrier keeps two passes two. What they share XLA may write to memory, such as the mask of a relu, so that it
    # is computed again; and the sums it may fuse into the second pass, or into the sum over the batch that follows.
    again, totals = lax.optimization_barrier((statistics, totals))
    deviation = deviation_of(x, again)
    dz, *_ = arrays[1:] if is_kept else cotangents_of(again, *arrays)
    dbeta, dgamma, *dcaptures = totals
    factor = again.rstd * gamma
    dx = positions.spread(factor) * dz
    if center is None:
        share = factor / (positions.count(x) if again.counted is None else again.counted)
        mean_dz, mean_dz_xhat = (share * total for total in positions.add_up((dbeta, dgamma)))
        through_statistics = _on_line(deviation, again, mean_dz_xhat, mean_dz, positions)
        dx = dx - (through_statistics if where is None else jnp.where(where, through_statistics, 0))
    dresidual = None if residual is None else dz.astype(residual.dtype)
    return Gradients(dx.astype(x.dtype), dgamma, dbeta, tuple(dcaptures), dresidual)


def _is_kept(activation: Activation | None, x: jax.Array, dtype: jax.typing.DTypeLike, captures: int) -> bool:
    """Whether a CPU writes the cotangent before the activation to memory, and does not evaluate it for the sums and dx.

    Twice, which takes longer than memory does where the activation is dear, and more threads where the array is small.
    """
    is_small = activation is not None and isinstance(x.size, int) and x.size <= ONE_THREAD
    return is_small or is_dear(activation, dtype, captures)


def _deviation(x: jax.Array, statistics: Statistics, positions: sums.Positions) -> jax.Array:
    """Exact or nearly so at any offset of the data; x - mean is not, since the mean is rounded."""
    return x.astype(statistics.center.dtype) - positions.spread(statistics.center)


def _on_line(
    deviation: jax.Array,
    statistics: Statistics,
    gamma: jax.Array | float,
    beta: jax.Array | float,
    positions: sums.Positions,
) -> jax.Array:
    """xhat * gamma + beta = deviation * factor + shift, a multiply-add per position.

    Little cancels between the two, since delta is at most 4 standard deviations (sums.provisional_center).
    """
    factor = statistics.rstd * gamma
    shift = beta - statistics.delta * factor
    return deviation * positions.spread(factor) + positions.spread(shift)


def _statistics(
    x: jax.Array,
    where: jax.Array | None,
    corner: jax.Array,
    dtype: jax.typing.DTypeLike,
    eps: float,
    positions: sums.Positions,
) -> Statistics:
    """Mean and variance from one pass around a provisional center."""
    count: Any
    if where is None:
        center, count = sums.provisional_center(corner, dtype, positions), positions.count(x)
    else:
        center, count = sums.masked_center(x, where, dtype, positions)
    # Divided by how many they are before they are added: the sum of large numbers would overflow. Squares that vanish,
    # of deviations below 2^-63 of their number n, are nothing beside an eps of n^2 * 2^-102: 2e-19 for a million.
    scale = scaling.of(center, ordinary=1 / positions.count(x))
    # Materialized, so that the pass below reads them and does not compute them again.
    center, scale = lax.optimization_barrier((center, scale))

    def terms(x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        deviation = (x.astype(dtype) - positions.spread(center)) * positions.spread(scale)
        if where is not None:
            deviation = jnp.where(where, deviation, 0)
        return deviation, jnp.square(deviation)

    mask = None if where is None else jnp.broadcast_to(where, x.shape)
    total, squares = positions.add_up(sums.over_positions(terms, (x, mask), positions))
    delta = total / count
    # Where the squares overflow the variance is infinite (see scaling.undo), also where that of delta does. It is not
    # negative, since delta is at most 4 standard deviations (sums.provisional_center).
    variance = squares / count - jnp.minimum(jnp.square(delta), jnp.finfo(dtype).max)
    delta, rstd = scaling.undo(delta, variance, scale, eps)
    if positions.platform == "cpu":
        # Else XLA computes the root again at every position.
        delta, rstd = lax.optimization_barrier((delta, rstd))
    return Statistics(center, delta, rstd, None if where is None else jnp.broadcast_to(count, center.shape))
