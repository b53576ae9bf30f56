"""What selfcheck runs, in order: entries with a job each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxnorm.gpu.devices import DEVICES, Device
from jaxnorm.gpu.tile import Tile
from jaxnorm.selfcheck import cases, numbers, races, times
from jaxnorm.selfcheck.cases import Case, Kind, Size
from jaxnorm.selfcheck.process import Job

# Seconds that a process may take: a few for imports and compilation, and more on a busy machine. What is timed is
# compiled for every buffer.
_LIMIT, _LIMIT_OF_TIMES = 90.0, 240.0
# On a GPU cases have about as many thread blocks as it runs at once, or more.
_ON_GPU, _RACING = Size((2**16, 2**22), (1, 2**20)), Size((2**14, 2**19), (8, 2**20))
# Interpreted thread blocks are threads of Python, so there are few.
_INTERPRETED = Size((2**9, 2**16), (1, 8))
_IN_INTERPRETER = {
    "H100": [Kind("bulk", "alone"), Kind("bulk", "cluster", 2), Kind("span", "alone")],
    "A100": [Kind("plain", "alone"), Kind("plain", "group")],
}


class Entry(NamedTuple):
    """A row of the report to be.

    Attributes:
      stage: "numbers", "races" or "times".
      row: what is known beforehand.
      job: that finds the rest; None if no case was found.
    """

    stage: str
    row: dict[str, Any]
    job: Job | None


def on_gpu(seed: int, quick: bool, device: Device) -> list[Entry]:
    """About two minutes of cases, or ten."""
    rng = np.random.default_rng(seed)
    wanted = cases.kinds(device)
    drawn = cases.draw_kinds(rng, wanted, 1 if quick else 4, device, _ON_GPU)
    entries = [_entry("numbers", case, kind) for kind, case in drawn]
    networks = [cases.NETWORKS[name] for name in rng.choice(list(cases.NETWORKS), 1 if quick else 4, replace=False)]
    listed = cases.ENDS[: 3 if quick else None] + [(*network, str(rng.choice(cases.DTYPES))) for network in networks]
    entries += [_entry("numbers", case) for case in cases.draw_listed(rng, listed, device)]
    entries += [_entry("numbers", case) for case in cases.draw_plain(rng, 2 if quick else 6, "xla")]
    racing = [kind for kind in wanted if kind.synchronization != "alone"] if quick else wanted
    drawn = cases.draw_kinds(rng, racing, 1, device, _RACING)
    entries += [_entry("races", case, kind, repeats=1000 if quick else 3000) for kind, case in drawn]
    return entries + _times(rng, 1 if quick else 5)


def without_gpu(seed: int) -> list[Entry]:
    """About a minute of cases: what implementation=None takes, and the kernel interpreted as on an H100 and an A100."""
    rng = np.random.default_rng(seed)
    entries = [_entry("numbers", case) for case in cases.draw_plain(rng, 6, None)]
    for name, wanted in 2 * list(_IN_INTERPRETER.items()):
        drawn = cases.draw_kinds(rng, wanted, 1, DEVICES[name], _INTERPRETED)
        entries += [_entry("numbers", case, kind, interpreted=True) for kind, case in drawn]
    return entries


def _entry(stage: str, case: Case | None, wanted: Kind | None = None, **options: Any) -> Entry:
    if case is None:
        return Entry(
            stage, {"case": "", "kind": str(wanted), "kinds": [], "reason": "found no shape of this kind"}, None
        )
    by_kernel = case.implementation == "pallas"
    tiles = [tile for tile in case.tiles if isinstance(tile, Tile)] if by_kernel else []
    found = [cases.kind_of(tile) for tile in tiles]
    row = {
        "case": str(case),
        "kind": " / ".join(dict.fromkeys(map(str, found))) or case.implementation or "default",
        "kinds": [[kind.copies, kind.synchronization] for kind in found],
        "tiles": [str(tile) for tile in tiles],
    }
    function: Callable[..., dict[str, Any]] = numbers.numbers if stage == "numbers" else races.races
    return Entry(stage, row, Job(function, {"case": case} | options, _LIMIT))


def _times(rng: np.random.Generator, count: int) -> list[Entry]:
    """ReLU and gelu in turns, in float32 or bfloat16."""
    entries = []
    for i, network in enumerate(rng.choice(list(cases.NETWORKS), count, replace=False)):
        shape, axis = cases.NETWORKS[network]
        dtype, activation = str(rng.choice(["float32", "bfloat16"])), ("relu", "gelu")[i % 2]
        name = f"{network} {'x'.join(map(str, shape))} {dtype} {activation}"
        call = {"name": name, "shape": shape, "channel_axis": axis, "dtype": dtype, "activation": activation}
        job = Job(times.times, call, _LIMIT_OF_TIMES)
        entries.append(Entry("times", {"case": name}, job))
    return entries
