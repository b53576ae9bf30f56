"""Instance and group norm as two fused GPU kernels (Pallas, Mosaic GPU).

The same functions as in jaxnorm.xla, on the same canonical view, with a Tile that says how the work is cut. Each keeps
its part of an instance in shared memory, so that every x-sized array is read or written once:

    forward    reads x (and the residual), writes y
    backward   reads x, dy (and the residual), writes dx (and the residual's gradient)

This module imports Mosaic GPU: import it only where the kernel is wanted.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxnorm import numerics
from jaxnorm.call import Gradients, Statistics
from jaxnorm.gpu import elementwise, synchronization
from jaxnorm.gpu.block import (
    Block,
    approximates,
    for_each_instance,
    launch,
    partials_type,
    values_from_kernel,
    values_to_kernel,
    values_type,
)
from jaxnorm.gpu.copies import Chunk, Ref
from jaxnorm.gpu.tile import Tile

FORWARD_NAME = "jaxnorm_forward"
BACKWARD_NAME = "jaxnorm_backward"


class Moments(NamedTuple):
    """What the forward pass finds of each instance, (B, 1, K) in float32.

    Attributes:
      center, delta: the mean is center + delta.
      rstd: 1 / sqrt(variance + eps).
      variance: biased; infinite where it overflows.
    """

    center: jax.Array
    delta: jax.Array
    rstd: jax.Array
    variance: jax.Array


def forward(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: Callable[..., jax.Array] | None,
    tile: Tile,
) -> tuple[jax.Array, Moments]:
    """y, and the moments of x, which is in float16, bfloat16 or float32.

    Args:
      x, residual: (B, R, K); residual may be None.
      gamma, beta: (B, 1, K) in float32.
      eps: added to the variance.
      activation: a function of z that jaxnorm.gpu.elementwise covers, or None.
      tile: of find_tile(x.shape, x.dtype.itemsize, 1, or 2 with a residual, device).
    """
    traced = None if activation is None else elementwise.trace(activation)
    y, moments, _ = launch(
        functools.partial(_forward, tile=tile, eps=eps, activation=traced),
        FORWARD_NAME,
        tile,
        (
            x.reshape(tile.shape),
            values_to_kernel(tile, gamma),
            values_to_kernel(tile, beta),
            None if residual is None else residual.reshape(tile.shape),
        ),
        (jax.ShapeDtypeStruct(tile.shape, x.dtype), (values_type(tile),) * 4, partials_type(tile, 3)),
        x.dtype,
    )
    return y.reshape(x.shape), Moments(*(values_from_kernel(tile, value, gamma.shape) for value in moments))


def backward(
    x: jax.Array,
    statistics: Statistics,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
    *,
    activation: Callable[..., jax.Array] | None,
    tile: Tile,
) -> Gradients:
    """The gradients of forward for the cotangent dy of y.

    Args:
      x, gamma, beta, residual, activation: of forward; residual may be None where there is no activation.
      statistics: has the center, delta and rstd of forward.
      dy: like x.
      tile: of find_tile(x.shape, x.dtype.itemsize, 2, or 3 with a residual, device).
    """
    traced = None if activation is None else elementwise.trace_pullback(activation)
    like_x = jax.ShapeDtypeStruct(tile.shape, x.dtype)
    dx, dresidual, sums, _ = launch(
        functools.partial(_backward, tile=tile, pullback=traced),
        BACKWARD_NAME,
        tile,
        (
            x.reshape(tile.shape),
            dy.reshape(tile.shape),
            tuple(values_to_kernel(tile, value) for value in (statistics.center, statistics.delta, statistics.rstd)),
            values_to_kernel(tile, gamma),
            values_to_kernel(tile, beta),
            None if residual is None else residual.reshape(tile.shape),
        ),
        (like_x, None if residual is None else like_x, (values_type(tile),) * 2, partials_type(tile, 2)),
        x.dtype,
    )
    dbeta, dgamma = (values_from_kernel(tile, value, gamma.shape) for value in sums)
    return Gradients(dx.reshape(x.shape), dgamma, dbeta, None if dresidual is None else dresidual.reshape(x.shape))


def _forward(
    x: Ref,
    gamma: Ref,
    beta: Ref,
    residual: Ref | None,
    y: Ref,
    moments: tuple[Ref, ...],
    partials: Ref | None,
    *,
    scratch: Any,
    tile: Tile,
    eps: float,
    activation: elementwise.Traced | None,
) -> None:
    def instance(block: Block) -> None:
        # Loaded while x is on its way.
        gamma_value, beta_value = block.read_values(gamma), block.read_values(beta)
        first = block.load_first_boxes(x)
        scale = numerics.overflow_scale(first, tile.positions)
        found = block.exchange(_part_moments(block, first, scale))
        center_value, scaled_delta, variance = synchronization.merged_moments(found, block.count, tile.positions, scale)
        scaled_delta = jnp.where(variance == jnp.inf, 0.0, scaled_delta)
        delta_value, rstd_value, variance_value = numerics.unscaled(scaled_delta, variance, scale, eps)

        @pl.when(block.rank == 0)
        def _() -> None:
            for ref, value in zip(moments, (center_value, delta_value, rstd_value, variance_value), strict=True):
                block.write_values(ref, value)

        factor_value = rstd_value * gamma_value
        center, factor, shift = map(block.spread, (center_value, factor_value, beta_value - delta_value * factor_value))
        substitutes = elementwise.APPROXIMATE if approximates(x.dtype) else {}

        def normalize(chunk: Chunk, _: None) -> None:
            z = (block.read(0, chunk) - center) * factor + shift
            if residual is not None:
                z = z + block.read(1, chunk)
            if activation is not None:
                z = elementwise.evaluate(activation, z, substitutes=substitutes)
            block.write(0, chunk, z)

        block.sweep(normalize, loaded=tile.boxes, write_back=True)

    sources = [x] if residual is None else [x, residual]
    for_each_instance(instance, tile, scratch, sources, [y], partials)


def _part_moments(block: Block, first: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The moments of the positions that the block works on: see synchronization.merged_moments.

    The center is the mean of the first boxes, at least 1/16 of all, summed while the others are loaded. Its sum is
    around one element of the instance: a constant instance then has exactly that for its center, and at a large offset
    the sum rounds less. One sweep around the center gives both sums. A group of channels is one instance.
    """
    spread_scale, first_boxes = block.spread(scale), block.tile.first_boxes

    def deviation(chunk: Chunk, around: jax.Array) -> jax.Array:
        # A product by a power of two and a difference, in one instruction and rounded once.
        return block.inside(block.read(0, chunk) * spread_scale - around, chunk)

    around_first = block.spread(first * scale)
    total = block.instance_total(
        block.sweep(
            lambda chunk, total: total + deviation(chunk, around_first),
            block.zeros(),
            loaded=first_boxes,
            boxes=first_boxes,
        )
    )
    # Divided by 1 at least: the last blocks of an instance may have nothing.
    center = first + total / jnp.maximum(block.first_count(), 1.0) / scale
    around_center = block.spread(center * scale)

    def add(chunk: Chunk, totals: Any) -> Any:
        own = deviation(chunk, around_center)
        return totals[0] + own, totals[1] + own * own

    total, squares = map(block.instance_total, block.sweep(add, (block.zeros(), block.zeros()), loaded=first_boxes))
    delta = total / jnp.maximum(block.count(block.rank), 1.0)
    around_mean = jnp.maximum(squares - total * delta, 0.0)
    # What overflowed stays infinite: see numerics.unscaled.
    return center, delta, jnp.where(squares == jnp.inf, squares, around_mean)


def _backward(
    x: Ref,
    dy: Ref,
    statistics: tuple[Ref, ...],
    gamma: Ref,
    beta: Ref,
    residual: Ref | None,
    dx: Ref,
    dresidual: Ref | None,
    sums: tuple[Ref, ...],
    partials: Ref | None,
    *,
    scratch: Any,
    tile: Tile,
    pullback: elementwise.Traced | None,
) -> None:
    def instance(block: Block) -> None:
        center_value, delta_value, rstd_value = map(block.read_values, statistics)
        gamma_value, beta_value = block.read_values(gamma), block.read_values(beta)
        center, rstd, offset = map(block.spread, (center_value, rstd_value, delta_value * rstd_value))
        scale, shift = block.spread(gamma_value), block.spread(beta_value)

        substitutes = elementwise.APPROXIMATE_IN_DERIVATIVES if approximates(x.dtype) else {}

        def normalized(chunk: Chunk) -> jax.Array:
            return (block.read(0, chunk) - center) * rstd - offset

        def differentiate(chunk: Chunk, xhat: jax.Array) -> jax.Array:
            """dz"""
            dy = block.read(1, chunk)
            if pullback is None:
                return dy
            z = xhat * scale + shift
            if residual is not None:
                z = z + block.read(2, chunk)
            return elementwise.evaluate(pullback, z, dy, substitutes=substitutes)

        def add(chunk: Chunk, totals: Any) -> Any:
            xhat = normalized(chunk)
            # Where nothing counts dy may be 0, but the derivative may be anything.
            dz = block.inside(differentiate(chunk, xhat), chunk)
            if pullback is not None:
                block.keep(1, chunk, dz)
            return totals[0] + dz, totals[1] + dz * xhat

        found = block.sweep(add, (block.zeros(), block.zeros()), loaded=0)
        totals = synchronization.total(block.exchange(tuple(map(block.total, found))))

        @pl.when(block.rank == 0)
        def _() -> None:
            for ref, value in zip(sums, totals, strict=True):
                block.write_values(ref, value)

        # dx = factor * (dz - mean(dz) - xhat * mean(dz * xhat)), multiplied out: xhat = (x - center) * rstd - offset
        # The channels of a group have gammas of their own, which the means contain, and the same rstd.
        factor_value = gamma_value * rstd_value
        mean_dz, mean_dz_xhat = (block.group_sum(factor_value * total) / tile.positions for total in totals)
        factor, slope = block.spread(factor_value), block.spread(mean_dz_xhat * rstd_value)
        base = block.spread(mean_dz - mean_dz_xhat * (delta_value * rstd_value))

        def finish(chunk: Chunk, _: None) -> None:
            dz = block.read(1, chunk) if block.keeps(chunk) else differentiate(chunk, normalized(chunk))
            block.write(0, chunk, factor * dz - ((block.read(0, chunk) - center) * slope + base))
            if dresidual is not None:
                block.write(1, chunk, dz)

        block.sweep(finish, loaded=tile.boxes, write_back=True)

    sources = [x, dy] if residual is None else [x, dy, residual]
    targets = [dx] if dresidual is None else [dx, dresidual]
    for_each_instance(instance, tile, scratch, sources, targets, partials)
