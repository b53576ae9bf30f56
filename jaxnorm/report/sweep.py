"""Times of the kernel with other tiles than the chosen ones: what the ranking of jaxnorm.gpu.tile is judged by."""

import dataclasses
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm import pallas_kernel
from jaxnorm.gpu.cost import instructions
from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.tile import CLUSTERS, NoTile, Tile, bulk_tile, find_tile
from jaxnorm.report import stopwatch
from jaxnorm.xla import Statistics

_ROW_BYTES = (128, 64, 32)
_ARRAYS = {"forward": 1, "backward": 2}


def tiles(view: tuple[int, int, int], itemsize: int, device: Device) -> list[tuple[str, Tile, bool]]:
    """(pass, tile, whether it is the chosen one) for all widths of rows and sizes of clusters that fit; channels-last.

    Devices without bulk copies have the chosen ones alone.
    """
    found = []
    for name, arrays in _ARRAYS.items():
        issued = instructions(jax.nn.relu, name, narrow=itemsize < 4)
        chosen = find_tile(view, itemsize, arrays, device, issued)
        others = [
            bulk_tile("rows", view, row_bytes // itemsize, blocks, itemsize, arrays)
            for row_bytes in _ROW_BYTES
            for blocks in CLUSTERS
            if view[2] % (row_bytes // itemsize) == 0 and device.has_bulk_copies
        ]
        taken = [] if isinstance(chosen, NoTile) else [chosen]
        fitting = [tile for tile in others if tile.shared_memory <= device.shared_memory and tile not in taken]
        found += [(name, tile, tile in taken) for tile in taken + fitting]
    return found


def time_tile(pass_name: str, tile: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Seconds per call of the kernel alone, with that tile, and the share of a copy. Runs in a process of its own."""
    chosen = Tile(**tile | {"shape": tuple(tile["shape"])})
    buffers = stopwatch.make_buffers(chosen.shape, dtype)
    batch, _, lanes = chosen.shape
    value = jnp.ones((batch, 1, lanes))
    known = Statistics(0 * value, 0 * value, value)

    def forward(x: jax.Array) -> Any:
        relu = jax.nn.relu
        return pallas_kernel.forward(x, value, 0 * value, None, eps=1e-6, activation=relu, tile=chosen)[0]

    def backward(x: jax.Array) -> Any:
        relu, beta = jax.nn.relu, 0 * value
        return pallas_kernel.backward(x, known, value, beta, None, x, activation=relu, tile=chosen).x

    function = {"forward": forward, "backward": backward}[pass_name]
    taken = stopwatch.measure({"copy": stopwatch.over(jnp.negative), "tile": stopwatch.over(function)}, buffers)
    copied, seconds = (statistics.median(each.seconds for each in taken[name]) for name in ("copy", "tile"))
    size = math.prod(chosen.shape) * jnp.dtype(dtype).itemsize
    units = stopwatch.UNITS[pass_name]
    return {
        "seconds": seconds / len(buffers),
        "bytes per second": units * size * len(buffers) / seconds,
        "share of copy": units / 2 * copied / seconds,
        "clock": "host" if taken["tile"][0].kernels is None else "device",
    }


def as_json(tile: Tile) -> dict[str, Any]:
    """The inverse of what time_tile makes of it."""
    return dataclasses.asdict(tile)


def described(tile: Tile) -> str:
    of = f"of {tile.blocks_per_instance}"
    how = {"alone": "alone", "cluster": f"clusters {of}", "group": f"groups {of}"}[tile.synchronization]
    return f"rows of {tile.row_bytes} bytes, {how}, {tile.boxes} boxes of {tile.rows} rows, {tile.copies}"
