"""What selfcheck runs, in order: entries with a job each."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxnorm.gpu.devices import DEVICES, Device
from jaxnorm.gpu.tile import NoTile, Tile
from jaxnorm.layout import Layout
from jaxnorm.report import cases, sweep
from jaxnorm.report.cases import Case, Size, Wanted
from jaxnorm.report.process import Job

# Seconds that a process may take: it imports and compiles in a few, but a machine may be busy. What is timed is
# compiled for every buffer.
_LIMIT, _LIMIT_OF_TIMES = 90.0, 240.0
# Elements of x, and thread blocks: on a GPU about as many as it runs at once, or more.
_ON_GPU, _RACING = Size((2**16, 2**22), (1, 2**20)), Size((2**14, 2**19), (8, 2**20))
# Interpreted thread blocks are threads of Python.
_INTERPRETED = Size((2**9, 2**14), (1, 8))
_INTERPRETED_PARTS = 2


class Entry(NamedTuple):
    """A row of the report to be.

    Attributes:
      stage: "numbers", "races", "times" or "sweep".
      row: what is known beforehand.
      job: that finds the rest; None where no case was found.
    """

    stage: str
    row: dict[str, Any]
    job: Job | None


def on_gpu(seed: int, quick: bool, device: Device) -> list[Entry]:
    """Two minutes or ten, about."""
    rng = np.random.default_rng(seed)
    wanted = cases.ways(device)
    entries = _each(rng, wanted, 1 if quick else 4, device, _ON_GPU, "numbers", function="check:numbers")
    entries += [
        _entry("numbers", case, "check:numbers") for case in cases.draw_networks(rng, 1 if quick else 4, device)
    ]
    entries += [_entry("numbers", case, "check:numbers") for case in cases.draw_ends(rng, 3 if quick else 6, device)]
    repeats = 1000 if quick else 3000
    racing = [way for way in wanted if way.synchronization != "alone"] if quick else wanted
    entries += _each(rng, racing, 1, device, _RACING, "races", function="races:races", repeats=repeats)
    return entries + _times(rng, 1 if quick else 5) + ([] if quick else _sweep(rng, device))


def without_gpu(seed: int) -> list[Entry]:
    """Interpreted, as if for an H100 and an A100 in turns: what a minute allows."""
    rng, entries = np.random.default_rng(seed), []
    for name in ("H100", "A100") * 3:
        wanted = [way for way in cases.ways(DEVICES[name]) if way.parts is None or way.parts <= _INTERPRETED_PARTS]
        options = {"function": "check:numbers", "interpreted": True}
        entries += _each(rng, wanted, 1, DEVICES[name], _INTERPRETED, "numbers", **options)
    return entries


def _each(
    rng: np.random.Generator,
    wanted: list[Wanted],
    count: int,
    device: Device,
    size: Size,
    stage: str,
    **options: Any,
) -> list[Entry]:
    drawn = cases.draw_each(rng, wanted, count, device, size)
    return [_entry(stage, case, way=way, **options) for way, case in drawn]


def _entry(stage: str, case: Case | None, function: str, way: Wanted | None = None, **options: Any) -> Entry:
    if case is None:
        return Entry(
            stage, {"case": "", "way": str(way), "ways": [], "reason": "no shape was found that takes this way"}, None
        )
    by_kernel = case.implementation == "pallas"
    tiles = [tile for tile in case.tiles if by_kernel and not isinstance(tile, NoTile)]
    row = {
        "case": str(case),
        "ways": [(tile.copies, tile.synchronization) for tile in tiles],
        "way": " / ".join(dict.fromkeys(map(_way, tiles))) or case.implementation,
        "tiles": [str(tile) for tile in tiles],
    }
    return Entry(stage, row, _job(function, case=dataclasses.asdict(case), **options))


def _way(tile: Tile) -> str:
    blocks = tile.blocks_per_instance
    return str(Wanted(tile.copies, tile.synchronization, blocks if blocks > 1 else None))


def _times(rng: np.random.Generator, count: int) -> list[Entry]:
    """ReLU and gelu in turns; float32 and bfloat16."""
    entries = []
    for i, name in enumerate(rng.choice(list(cases.NETWORKS), count, replace=False)):
        shape, axis = cases.NETWORKS[name]
        dtype, activation = str(rng.choice(["float32", "bfloat16"])), ("relu", "gelu")[i % 2]
        row = {"case": f"{name} {'x'.join(map(str, shape))} {dtype}", "activation": activation}
        call = {"name": row["case"], "shape": shape, "axis": axis, "dtype": dtype, "activation": activation}
        job = _job("plan:time", _LIMIT_OF_TIMES, **call)
        entries.append(Entry("times", row, job))
    return entries


def time(name: str, shape: list[int], axis: int, dtype: str, activation: str) -> dict[str, Any]:
    """Runs in a process of its own."""
    from jaxnorm.report import stopwatch

    return {"times": stopwatch.compare([(name, tuple(shape), axis, dtype)], activation)}


def _sweep(rng: np.random.Generator, device: Device, shapes: int = 3, most: int = 8) -> list[Entry]:
    """The chosen tile of each pass, and others that chance picks."""
    entries = []
    channels_last = {name: shape for name, (shape, axis) in cases.NETWORKS.items() if axis == -1}
    for name in rng.choice(list(channels_last), shapes, replace=False):
        shape = channels_last[name]
        dtype = str(rng.choice(["float32", "bfloat16"]))
        batch, rows, lanes = Layout(shape, (len(shape) - 1,)).view_shape
        found = sweep.tiles((batch, rows, lanes), jnp.dtype(dtype).itemsize, device)
        chosen = [each for each in found if each[2]]
        others = [found[i] for i in rng.permutation(len(found)) if not found[i][2]]
        for pass_name, tile, is_chosen in chosen + others[: most - len(chosen)]:
            row = {"case": f"{name} {dtype}", "pass": pass_name, "tile": sweep.described(tile), "chosen": is_chosen}
            job = _job("sweep:time_tile", _LIMIT_OF_TIMES, pass_name=pass_name, tile=sweep.as_json(tile), dtype=dtype)
            entries.append(Entry("sweep", row, job))
    return entries


def _job(function: str, limit: float = _LIMIT, **arguments: Any) -> Job:
    return Job(f"jaxnorm.report.{function}", arguments, limit)
