"""Instance norm as two fused GPU kernels (Pallas, Mosaic GPU): Hopper and newer.

The same functions as in jaxnorm.xla, on the same canonical view, with a Tile that says how the work is cut. Each keeps
its part of an instance in shared memory, so that every x-sized array is read or written once:

    forward    reads x (and the residual), writes y
    backward   reads x, dy (and the residual), writes dx (and the residual's gradient)

This module imports Mosaic GPU: import it only where the kernel is wanted.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm.arguments import Activation
from jaxnorm.gpu import elementwise
from jaxnorm.gpu.block import Block, Ref, launch, values_from_kernel, values_to_kernel, values_type
from jaxnorm.gpu.tiling import Tile
from jaxnorm.xla import Gradients, Statistics

FORWARD_NAME = "jaxnorm_forward"
BACKWARD_NAME = "jaxnorm_backward"


def forward(
    x: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: Activation | None,
    tile: Tile,
) -> tuple[jax.Array, Statistics]:
    """As jaxnorm.xla.forward, for float16, bfloat16 and float32.

    Args:
      tile: of find_tile(x.shape, x.dtype.itemsize, 1, or 2 with a residual, device).
    """
    like_x, values = jax.ShapeDtypeStruct(tile.shape, x.dtype), (values_type(tile),) * 3
    y, statistics, _ = launch(
        functools.partial(
            _forward, tile=tile, eps=eps, activation=None if activation is None else elementwise.trace(activation)
        ),
        FORWARD_NAME,
        tile,
        [
            x.reshape(tile.shape),
            values_to_kernel(tile, gamma),
            values_to_kernel(tile, beta),
            None if residual is None else residual.reshape(tile.shape),
        ],
        (like_x, values, values_type(tile, tile.cluster, 3) if tile.cluster > 1 else None),
        x.dtype,
    )
    return y.reshape(x.shape), Statistics(*(values_from_kernel(tile, value, gamma.shape) for value in statistics))


def backward(
    x: jax.Array,
    statistics: Statistics,
    gamma: jax.Array,
    beta: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
    *,
    activation: Activation | None,
    tile: Tile,
) -> Gradients:
    """As jaxnorm.xla.backward, for float16, bfloat16 and float32.

    Args:
      tile: of find_tile(x.shape, x.dtype.itemsize, 2, or 3 with a residual, device).
    """
    like_x, values = jax.ShapeDtypeStruct(tile.shape, x.dtype), values_type(tile)
    dx, dgamma, dbeta, dresidual, _ = launch(
        functools.partial(
            _backward, tile=tile, pullback=None if activation is None else elementwise.trace_pullback(activation)
        ),
        BACKWARD_NAME,
        tile,
        [
            x.reshape(tile.shape),
            dy.reshape(tile.shape),
            tuple(values_to_kernel(tile, value) for value in statistics),
            values_to_kernel(tile, gamma),
            values_to_kernel(tile, beta),
            None if residual is None else residual.reshape(tile.shape),
        ],
        (
            like_x,
            values,
            values,
            None if residual is None else like_x,
            values_type(tile, tile.cluster, 2) if tile.cluster > 1 else None,
        ),
        x.dtype,
    )
    return Gradients(
        dx.reshape(x.shape),
        values_from_kernel(tile, dgamma, gamma.shape),
        values_from_kernel(tile, dbeta, gamma.shape),
        (),
        None if dresidual is None else dresidual.reshape(x.shape),
    )


def _forward(
    x: Ref,
    gamma: Ref,
    beta: Ref,
    residual: Ref | None,
    y: Ref,
    statistics: Any,
    partials: Ref | None,
    *,
    buffers: Any,
    loaded: Ref,
    met: Ref | None,
    tile: Tile,
    eps: float,
    activation: elementwise.Traced | None,
) -> None:
    block = Block(tile)
    block.load_boxes([x] if residual is None else [x, residual], buffers, loaded)
    held = buffers[0]
    center, delta, squares = _part_statistics(block, x, held, loaded)
    if tile.cluster > 1:
        center, delta, squares = _merge(block, block.exchange((center, delta, squares), partials, met))
    rstd = lax.rsqrt(squares / tile.positions + eps)

    @pl.when(block.rank == 0)
    def _() -> None:
        for ref, value in zip(statistics, (center, delta, rstd), strict=True):
            block.write_values(ref, value)

    center, delta = block.spread(center), block.spread(delta)
    scale, shift = block.spread(rstd * block.read_values(gamma)), block.spread(block.read_values(beta))

    def normalize(box: Any, row: Any, _: None) -> None:
        z = ((block.read(held, box, row) - center) - delta) * scale + shift
        if residual is not None:
            z = z + block.read(buffers[1], box, row)
        if activation is not None:
            z = elementwise.evaluate(activation, z)
        block.write(held, box, row, z)

    def store(box: Any) -> None:
        plgpu.commit_smem()
        block.store_box(held, y, box)

    block.sweep(normalize, after=store)
    plgpu.wait_smem_to_gmem(0)


def _part_statistics(block: Block, x: Ref, held: Ref, loaded: Ref) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Center, delta and the sum of squares around center + delta, over the positions that the block holds.

    The first pass is around one element of the instance: a constant instance then has exactly that for its center,
    and at a large offset the sum rounds less. The second is around the center of the first.
    """

    def wait(box: Any) -> None:
        plgpu.barrier_wait(loaded.at[box])

    all_first = block.tile.reduces == "lanes"
    if all_first:
        pl.loop(0, block.tile.boxes)(wait)
    first = block.first_values(x, held)
    around = block.spread(first)

    def add(box: Any, row: Any, total: jax.Array) -> jax.Array:
        return total + block.inside(block.read(held, box, row) - around, box, row)

    # At least 1: the last blocks of a cluster may hold nothing.
    count = jnp.maximum(block.count(block.rank), 1.0)
    center = first + block.total(block.sweep(add, block.zeros(), before=None if all_first else wait)) / count
    around = block.spread(center)

    def add_both(box: Any, row: Any, totals: Any) -> Any:
        deviation = block.inside(block.read(held, box, row) - around, box, row)
        return totals[0] + deviation, totals[1] + deviation * deviation

    total, squares = map(block.total, block.sweep(add_both, (block.zeros(), block.zeros())))
    delta = total / count
    return center, delta, jnp.maximum(squares - total * delta, 0.0)


def _merge(block: Block, parts: list[tuple[jax.Array, ...]]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The statistics of an instance from those of its parts, around the center of the first (Chan et al. 1983)."""
    center = parts[0][0]
    counts = [block.count(rank) for rank in range(block.tile.cluster)]
    means = [(own - center) + delta for own, delta, _ in parts]
    delta = _sum(n * mean for n, mean in zip(counts, means, strict=True)) / block.tile.positions
    squares = _sum(
        own + n * jnp.square(mean - delta) for n, mean, (_, _, own) in zip(counts, means, parts, strict=True)
    )
    return center, delta, squares


def _backward(
    x: Ref,
    dy: Ref,
    statistics: Any,
    gamma: Ref,
    beta: Ref,
    residual: Ref | None,
    dx: Ref,
    dgamma: Ref,
    dbeta: Ref,
    dresidual: Ref | None,
    partials: Ref | None,
    *,
    buffers: Any,
    loaded: Ref,
    met: Ref | None,
    tile: Tile,
    pullback: elementwise.Traced | None,
) -> None:
    block = Block(tile)
    block.load_boxes([x, dy] if residual is None else [x, dy, residual], buffers, loaded)
    held_x, held_dy = buffers[:2]
    center_value, delta_value, rstd_value = map(block.read_values, statistics)
    gamma_value = block.read_values(gamma)
    center, delta, rstd = map(block.spread, (center_value, delta_value, rstd_value))
    scale, shift = block.spread(gamma_value), block.spread(block.read_values(beta))

    def differentiate(box: Any, row: Any) -> tuple[jax.Array, jax.Array]:
        """dz and xhat of a chunk."""
        xhat = ((block.read(held_x, box, row) - center) - delta) * rstd
        dz = block.read(held_dy, box, row)
        if pullback is not None:
            z = xhat * scale + shift
            if residual is not None:
                z = z + block.read(buffers[2], box, row)
            dz = elementwise.evaluate(pullback, z, dz)
        # Beyond the end dy is 0, but the derivative there may be anything.
        return block.inside(dz, box, row), xhat

    def add(box: Any, row: Any, totals: Any) -> Any:
        dz, xhat = differentiate(box, row)
        return totals[0] + dz, totals[1] + dz * xhat

    def wait(box: Any) -> None:
        plgpu.barrier_wait(loaded.at[box])

    sums = tuple(map(block.total, block.sweep(add, (block.zeros(), block.zeros()), before=wait)))
    if tile.cluster > 1:
        parts = block.exchange(sums, partials, met)
        sums = tuple(map(_sum, zip(*parts, strict=True)))

    @pl.when(block.rank == 0)
    def _() -> None:
        block.write_values(dbeta, sums[0])
        block.write_values(dgamma, sums[1])

    mean_dz, mean_dz_xhat = (block.spread(total / tile.positions) for total in sums)
    factor = block.spread(gamma_value * rstd_value)

    def finish(box: Any, row: Any, _: None) -> None:
        dz, xhat = differentiate(box, row)
        block.write(held_x, box, row, factor * (dz - (mean_dz + xhat * mean_dz_xhat)))
        if residual is not None:
            block.write(held_dy, box, row, dz)

    def store(box: Any) -> None:
        plgpu.commit_smem()
        block.store_box(held_x, dx, box)
        if dresidual is not None:
            block.store_box(held_dy, dresidual, box)

    block.sweep(finish, after=store)
    plgpu.wait_smem_to_gmem(0)


def _sum(values: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, values)
