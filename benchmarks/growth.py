"""How the cost grows with the positions R of an instance, the channels K and the batch B, odd sizes among them.

    python -m benchmarks.growth
    python -m benchmarks.growth --h100

Time per element, beside Flax's default, and the bytes that the compiled code reads and writes, in sizes of x. Both
should be flat. A cliff is a size whose time per element is more than 1.5 times that of the next smaller or the next
larger one. The time of a very small call was taken off before, and sizes that take less than three times as long as
that call are not judged. All sizes of a sweep take turns, and are compared round by round.
"""

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

# Both are read when JAX starts: what is compiled for an H100 is not run, and without autotuning needs no GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

try:
    import jax

    from benchmarks import plot
    from benchmarks.aot import Compiler
    from benchmarks.contenders import BASELINE, WRAP, Norm, call, contenders
    from benchmarks.hlo import moved_bytes
    from benchmarks.report import add_output_options, describe, machine, progress, publish, table
    from benchmarks.shapes import PASSES, Case, Layout, Shape
    from benchmarks.turns import Spread, Turn, device_turn, ratios, take_turns, wall_turn
except ModuleNotFoundError as error:
    sys.exit(f"growth: {error.name} is not installed. Install what the benchmark needs: pip install 'jaxnorm[bench]'")

CLIFF = 1.5
CONTENDERS = ("jaxnorm", BASELINE)
# So many times the smallest call must a size take, to be judged.
_LONG_ENOUGH = 3
# As large as it must be for XLA to hand it to its threads, as all the others are.
_SMALLEST = Shape(1, (16,), 64)


class Sweep(NamedTuple):
    """One size grows, the others stay."""

    layout: Layout
    sizes: tuple[int, ...]
    shape: Callable[[int], Shape]


# Powers of two and their neighbors, sides of 15 (225), and numbers without small factors. A batch of eight makes small
# sizes long enough to time. Arrays stay below 32 MiB: larger ones glibc's malloc gets from the system at every call,
# which is a step in the time of whatever is called.
_POSITIONS = (64, 225, 256, 500, 512, 1001, 1024, 2048, 4095, 4096, 4097, 10000)
_CHANNELS = (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 48, 64, 65, 100, 127, 128)
SWEEPS = {
    "R, channels-last": Sweep("channels-last", _POSITIONS, lambda positions: Shape(8, (positions,), 64)),
    "R, channels-first": Sweep("channels-first", _POSITIONS, lambda positions: Shape(8, (positions,), 64)),
    "K": Sweep("channels-last", _CHANNELS, lambda channels: Shape(8, (4096,), channels)),
    "B": Sweep("channels-last", (1, 2, 3, 4, 7, 8, 16, 32, 33), lambda batch: Shape(batch, (1024,), 64)),
}


@dataclass(frozen=True)
class Point:
    """One contender at one size.

    Attributes:
      array: the shape of x.
      seconds: per call.
      nanoseconds: per element, the smallest call taken off.
      is_judged: whether it takes long enough to be a cliff.
      steepness: nanoseconds in multiples of the cheaper of its neighbours that are judged; None if there is none.
      moved: bytes that the compiled code reads and writes, in sizes of x.
      moved_on_h100: the same of the code for an H100, if that was asked for.
    """

    sweep: str
    size: int
    pass_name: str
    contender: str
    array: tuple[int, ...]
    seconds: Spread
    nanoseconds: Spread
    is_judged: bool
    steepness: Spread | None
    moved: float
    moved_on_h100: float | None

    @property
    def is_cliff(self) -> bool:
        return self.steepness is not None and self.steepness.median > CLIFF


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="what grows (default: all)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of a sweep and pass (default 20)")
    parser.add_argument("--h100", action="store_true", help="count on code compiled for an H100 too (the aot extra)")
    add_output_options(parser)
    chosen = parser.parse_args(argv)
    compiler = Compiler("H100") if chosen.h100 else None
    cases = [(sweep, pass_name) for sweep in chosen.sweeps for pass_name in PASSES]
    points = [point for case in progress(cases, "timing") for point in measure(*case, chosen.seconds, compiler)]
    facts = machine()
    publish(chosen, report(points, facts), {"machine": facts, "points": points})
    if chosen.plot:
        plot.draw_growth(points, chosen.plot, describe(facts))


def measure(sweep: str, pass_name: str, seconds: float, compiler: Compiler | None) -> list[Point]:
    """The points of a sweep, by contender and size."""
    layout, sizes = SWEEPS[sweep].layout, SWEEPS[sweep].sizes
    shapes = {size: SWEEPS[sweep].shape(size) for size in sizes}
    case = Case(sweep, _SMALLEST, layout, "float32", pass_name)
    norms = {name: contenders(case, "cpu")[name] for name in CONTENDERS}
    turns = {(name, size): _turn(replace(case, shape=shapes[size]), norms[name]) for name in norms for size in sizes}
    smallest = {(name, 0): _turn(case, norms[name]) for name in norms}
    taken = take_turns(turns | smallest, seconds)
    points = []
    for name, norm in norms.items():
        floor = taken[name, 0]
        cost = {size: _per_element(taken[name, size], floor, shapes[size].size) for size in sizes}
        judged = [
            size for size in sizes if statistics.median(taken[name, size]) > _LONG_ENOUGH * statistics.median(floor)
        ]
        for size in sizes:
            array = shapes[size].array(layout)
            count = functools.partial(moved, WRAP[pass_name](norm), array, shapes[size].channels)
            points.append(
                Point(
                    sweep=sweep,
                    size=size,
                    pass_name=pass_name,
                    contender=name,
                    array=array,
                    seconds=Spread.of(taken[name, size]),
                    nanoseconds=Spread.of(cost[size]),
                    is_judged=size in judged,
                    steepness=steepness(size, judged, cost),
                    moved=count(lambda function, *given: jax.jit(function).lower(*given)),
                    moved_on_h100=None if compiler is None else count(compiler.lower),
                )
            )
    return points


def moved(function: Callable[..., Any], array: tuple[int, ...], channels: int, lower: Callable[..., Any]) -> float:
    """Bytes that the compiled function reads and writes, caches ignored, in sizes of x."""
    x, value = jax.ShapeDtypeStruct(array, "float32"), jax.ShapeDtypeStruct((channels,), "float32")
    return moved_bytes(lower(function, x, value, value, x).compile().as_text()) / (x.size * x.dtype.itemsize)


def _turn(case: Case, norm: Norm) -> Turn:
    make_turn = wall_turn if jax.default_backend() == "cpu" else device_turn
    return make_turn(call(case, norm))


def _per_element(taken: list[float], floor: list[float], elements: int) -> list[float]:
    """Nanoseconds, in each round."""
    return [1e9 * (seconds - least) / elements for seconds, least in zip(taken, floor, strict=True)]


def steepness(size: int, judged: list[int], cost: dict[int, list[float]]) -> Spread | None:
    """Beside the cheaper neighbour."""
    sizes = list(cost)
    i = sizes.index(size)
    neighbours = [other for other in sizes[max(0, i - 1) : i + 2] if other in judged and other != size]
    if size not in judged or not neighbours:
        return None
    return max((ratios(cost[size], cost[other]) for other in neighbours), key=lambda spread: spread.median)


def report(points: list[Point], facts: dict[str, Any]) -> str:
    """What each line spans, and the cliffs."""
    with_h100 = points[0].moved_on_h100 is not None
    header = ["grows", "pass", "", "ns per element", "moved", *(["moved on an H100"] if with_h100 else [])]
    rows = []
    for kind in dict.fromkeys((p.sweep, p.pass_name, p.contender) for p in points):
        line = [p for p in points if (p.sweep, p.pass_name, p.contender) == kind]
        rows.append([*kind, _span([p.nanoseconds.median for p in line if p.is_judged]), _span([p.moved for p in line])])
        if with_h100:
            rows[-1].append(_span([p.moved_on_h100 for p in line]))
    found = [[f"{p.sweep} = {p.size}", p.pass_name, p.contender, str(p.steepness)] for p in points if p.is_cliff]
    parts = [
        "# How the cost grows",
        f"{describe(facts)}. float32.",
        "Lowest to highest: time per element, and bytes that the compiled code reads and writes, in sizes of x.",
        table(header, rows),
        f"## Cliffs\n\nTime per element in multiples of the cheaper neighbour, where it is more than {CLIFF}.",
        table(["size", "pass", "", "steepness"], found) if found else "None.",
    ]
    if with_h100:
        jumps = [
            [f"{p.sweep} = {p.size}", p.pass_name, p.contender, f"{p.moved_on_h100:.1f} instead of {least:.1f}"]
            for p, least in jumps_on_h100(points)
        ]
        parts += [
            f"Sizes of x moved on an H100, where they are more than {CLIFF} times those of a neighbour.",
            table(["size", "pass", "", "moved"], jumps) if jumps else "None.",
        ]
    return "\n\n".join(parts)


def jumps_on_h100(points: list[Point]) -> list[tuple[Point, float]]:
    """The points whose code moves much more than a neighbour's, and what the neighbour's moves."""
    found = []
    for before, point, after in zip([None, *points], points, [*points[1:], None], strict=False):
        line = (point.sweep, point.pass_name, point.contender)
        least = min(
            p.moved_on_h100 for p in (before, point, after) if p and (p.sweep, p.pass_name, p.contender) == line
        )
        if point.moved_on_h100 > CLIFF * least:
            found.append((point, least))
    return found


def _span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "too short"


if __name__ == "__main__":
    main()
