"""Instance norm as two fused GPU kernels (Pallas, Mosaic GPU).

The same functions as in jaxnorm.xla, on the same canonical view, with a Tile that says how the work is cut. Each keeps
its part of an instance in shared memory, so that every x-sized array is read or written once:

    forward    reads x (and the residual), writes y
    backward   reads x, dy (and the residual), writes dx (and the residual's gradient)

This module imports Mosaic GPU: import it only where the kernel is wanted.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxnorm import scaling
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
from jaxnorm.xla import Gradients, Statistics

FORWARD_NAME = "jaxnorm_forward"
BACKWARD_NAME = "jaxnorm_backward"


def forward(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    captures: tuple[jax.Array, ...],
    residual: jax.Array | None,
    *,
    eps: float,
    activation: Callable[..., jax.Array] | None,
    tile: Tile,
) -> tuple[jax.Array, Statistics]:
    """As jaxnorm.xla.forward, for float16, bfloat16 and float32.

    Args:
      tile: of find_tile(x.shape, x.dtype.itemsize, 1, or 2 with a residual, device).
    """
    traced = None if activation is None else elementwise.trace(activation, len(captures))
    y, statistics, _ = launch(
        functools.partial(_forward, tile=tile, eps=eps, activation=traced),
        FORWARD_NAME,
        tile,
        (
            x.reshape(tile.shape),
            values_to_kernel(tile, gamma),
            values_to_kernel(tile, beta),
            tuple(values_to_kernel(tile, value) for value in captures),
            None if residual is None else residual.reshape(tile.shape),
        ),
        (jax.ShapeDtypeStruct(tile.shape, x.dtype), (values_type(tile),) * 3, partials_type(tile, 3)),
        x.dtype,
    )
    return y.reshape(x.shape), Statistics(*(values_from_kernel(tile, value, gamma.shape) for value in statistics))


def backward(
    x: jax.Array,
    statistics: Statistics,
    gamma: jax.Array,
    beta: jax.Array,
    captures: tuple[jax.Array, ...],
    residual: jax.Array | None,
    dy: jax.Array,
    *,
    activation: Callable[..., jax.Array] | None,
    tile: Tile,
) -> Gradients:
    """As jaxnorm.xla.backward, for float16, bfloat16 and float32.

    Args:
      tile: of find_tile(x.shape, x.dtype.itemsize, 2, or 3 with a residual, device).
    """
    traced = None if activation is None else elementwise.trace_pullback(activation, len(captures))
    like_x, sums = jax.ShapeDtypeStruct(tile.shape, x.dtype), 2 + len(captures)
    dx, dresidual, sums_of_terms, _ = launch(
        functools.partial(_backward, tile=tile, pullback=traced),
        BACKWARD_NAME,
        tile,
        (
            x.reshape(tile.shape),
            dy.reshape(tile.shape),
            tuple(values_to_kernel(tile, value) for value in statistics[:3]),
            values_to_kernel(tile, gamma),
            values_to_kernel(tile, beta),
            tuple(values_to_kernel(tile, value) for value in captures),
            None if residual is None else residual.reshape(tile.shape),
        ),
        (like_x, None if residual is None else like_x, (values_type(tile),) * sums, partials_type(tile, sums)),
        x.dtype,
    )
    dbeta, dgamma, *dcaptures = (values_from_kernel(tile, value, gamma.shape) for value in sums_of_terms)
    return Gradients(
        dx.reshape(x.shape),
        dgamma,
        dbeta,
        tuple(dcaptures),
        None if dresidual is None else dresidual.reshape(x.shape),
    )


def _forward(
    x: Ref,
    gamma: Ref,
    beta: Ref,
    captures: tuple[Ref, ...],
    residual: Ref | None,
    y: Ref,
    statistics: tuple[Ref, ...],
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
        captured_values = [block.read_values(value) for value in captures]
        first = block.load_first_boxes(x)
        scale = scaling.of(first)
        found = block.exchange(_part_moments(block, first, scale))
        center_value, scaled_delta, variance = synchronization.merged_moments(found, block.count, tile.positions, scale)
        scaled_delta = jnp.where(variance == jnp.inf, 0.0, scaled_delta)
        delta_value, rstd_value = scaling.undo(scaled_delta, variance, scale, eps)

        @pl.when(block.rank == 0)
        def _() -> None:
            for ref, value in zip(statistics, (center_value, delta_value, rstd_value), strict=True):
                block.write_values(ref, value)

        factor_value = rstd_value * gamma_value
        center, factor, shift = map(block.spread, (center_value, factor_value, beta_value - delta_value * factor_value))
        captured = [block.spread(value) for value in captured_values]
        substitutes = elementwise.APPROXIMATE if approximates(x.dtype) else {}

        def normalize(chunk: Chunk, _: None) -> None:
            z = (block.read(0, chunk) - center) * factor + shift
            if residual is not None:
                z = z + block.read(1, chunk)
            if activation is not None:
                z = elementwise.evaluate(activation, z, *captured, substitutes=substitutes)
            block.write(0, chunk, z)

        block.sweep(normalize, loaded=tile.boxes, write_back=True)

    sources = [x] if residual is None else [x, residual]
    for_each_instance(instance, tile, scratch, sources, [y], partials)


def _part_moments(block: Block, first: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The moments of the positions that the block works on: see synchronization.merged_moments.

    The center is the mean of the first boxes, at least 1/16 of all, summed while the others are loaded. Its sum is
    around one element of the instance: a constant instance then has exactly that for its center, and at a large offset
    the sum rounds less. One sweep around the center gives both sums.
    """
    spread_scale, first_boxes = block.spread(scale), block.tile.first_boxes

    def deviation(chunk: Chunk, around: jax.Array) -> jax.Array:
        # A product by a power of two and a difference, in one instruction and rounded once.
        return block.inside(block.read(0, chunk) * spread_scale - around, chunk)

    around_first = block.spread(first * scale)
    total = block.total(
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

    total, squares = map(block.total, block.sweep(add, (block.zeros(), block.zeros()), loaded=first_boxes))
    delta = total / jnp.maximum(block.count(block.rank), 1.0)
    around_mean = jnp.maximum(squares - total * delta, 0.0)
    # What overflowed stays infinite: see scaling.undo.
    return center, delta, jnp.where(squares == jnp.inf, squares, around_mean)


def _backward(
    x: Ref,
    dy: Ref,
    statistics: tuple[Ref, ...],
    gamma: Ref,
    beta: Ref,
    captures: tuple[Ref, ...],
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
        captured = [block.spread(block.read_values(value)) for value in captures]
        center, rstd, offset = map(block.spread, (center_value, rstd_value, delta_value * rstd_value))
        scale, shift = block.spread(gamma_value), block.spread(beta_value)

        substitutes = elementwise.APPROXIMATE_IN_DERIVATIVES if approximates(x.dtype) else {}

        def normalized(chunk: Chunk) -> jax.Array:
            return (block.read(0, chunk) - center) * rstd - offset

        def differentiate(chunk: Chunk, xhat: jax.Array) -> tuple[jax.Array, ...]:
            """dz and the terms of the gradients of what the activation captures."""
            dy = block.read(1, chunk)
            if pullback is None:
                return (dy,)
            z = xhat * scale + shift
            if residual is not None:
                z = z + block.read(2, chunk)
            return tuple(elementwise.evaluate_all(pullback, z, *captured, dy, substitutes=substitutes))

        def add(chunk: Chunk, totals: Any) -> Any:
            xhat = normalized(chunk)
            # Where nothing counts dy may be 0, but the derivative may be anything.
            dz, *dcaptures = (block.inside(term, chunk) for term in differentiate(chunk, xhat))
            if pullback is not None:
                block.keep(1, chunk, dz)
            return tuple(total + term for total, term in zip(totals, (dz, dz * xhat, *dcaptures), strict=True))

        found = block.sweep(add, (block.zeros(),) * len(sums), loaded=0)
        totals = synchronization.total(block.exchange(tuple(map(block.total, found))))

        @pl.when(block.rank == 0)
        def _() -> None:
            for ref, value in zip(sums, totals, strict=True):
                block.write_values(ref, value)

        # dx = factor * (dz - mean(dz) - xhat * mean(dz * xhat)), multiplied out: xhat = (x - center) * rstd - offset
        factor_value = gamma_value * rstd_value
        mean_dz, mean_dz_xhat = (factor_value * total / tile.positions for total in totals[:2])
        factor, slope = block.spread(factor_value), block.spread(mean_dz_xhat * rstd_value)
        base = block.spread(mean_dz - mean_dz_xhat * (delta_value * rstd_value))

        def finish(chunk: Chunk, _: None) -> None:
            dz = block.read(1, chunk) if block.keeps(chunk) else differentiate(chunk, normalized(chunk))[0]
            block.write(0, chunk, factor * dz - ((block.read(0, chunk) - center) * slope + base))
            if dresidual is not None:
                block.write(1, chunk, dz)

        block.sweep(finish, loaded=tile.boxes, write_back=True)

    sources = [x, dy] if residual is None else [x, dy, residual]
    targets = [dx] if dresidual is None else [dx, dresidual]
    for_each_instance(instance, tile, scratch, sources, targets, partials)
