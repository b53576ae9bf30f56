"""What a selfcheck report proves: the ways that may stand in jaxnorm.gpu.devices."""

from typing import Any

from jaxnorm.gpu.devices import KernelKind

EDITION = 2
ALL_RIGHT = "all right"


def verdict(report: dict[str, Any]) -> str:
    """ALL_RIGHT, or how many rows of numbers and races are not and in which way."""
    rows = report["numbers"] + report["races"]
    outcomes = [row["outcome"] for row in rows]
    others = sorted(set(outcomes) - {"right"})
    if rows and not others:
        return ALL_RIGHT
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in others) or "nothing was run"


def ways_proven(report: dict[str, Any]) -> set[KernelKind]:
    """The ways that a whole report on a GPU found right, in numbers and in races; none if any row is not right."""
    gpu = report["machine"]["gpu"]
    if report["selfcheck"] != EDITION or report["quick"] or gpu is None or verdict(report) != ALL_RIGHT:
        return set()
    capability = tuple(gpu["compute_capability"])
    by_stage = ({_way(capability, row) for row in report[stage]} for stage in ("numbers", "races"))
    numbers, races = by_stage
    return {way for way in numbers & races if way is not None}


def _way(capability: Any, row: dict[str, Any]) -> KernelKind | None:
    """Of both passes; None for plain XLA, and where the passes differ."""
    ways = {tuple(way) for way in row["ways"]}
    return KernelKind(capability, *ways.pop()) if len(ways) == 1 else None
