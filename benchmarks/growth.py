"""How the cost grows with the positions R of an instance, the channels K and the batch B, odd sizes among them.

    python -m benchmarks.growth

Time per element, compared with Flax's default, and the bytes that the compiled code reads and writes, in sizes of x.
Both should be flat. A cliff is a size whose time per element is more than 1.5 times that of the next smaller or the
next larger one. The time of a very small call is subtracted first, and sizes that take less than three times as long
as that call are not judged. All sizes of a sweep take turns and are compared round by round.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax

from benchmarks import report
from benchmarks.contenders import BASELINE, JAXNORM, WRAP, arguments, call, norm_of
from benchmarks.hlo import moved_bytes
from benchmarks.shapes import PASSES, Case, Layout, Shape
from benchmarks.turns import Spread, device_turn, ratios, take_turns, wall_turn


class Sweep(NamedTuple):
    """One size grows, the others stay."""

    layout: Layout
    sizes: tuple[int, ...]
    shape: Callable[[int], Shape]


# Powers of two and their neighbors, sides of 15 (225), and numbers without small factors. A batch of eight makes small
# sizes long enough to time. Arrays stay below 32 MiB: glibc's malloc gets larger ones from the system at every call,
# which is a step in the time of whatever is called.
_POSITIONS = (64, 225, 256, 500, 512, 1001, 1024, 2048, 4095, 4096, 4097, 10000)
_CHANNELS = (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 48, 64, 65, 100, 127, 128)
SWEEPS = {
    "R, channels-last": Sweep("channels-last", _POSITIONS, lambda positions: Shape(8, (positions,), 64)),
    "R, channels-first": Sweep("channels-first", _POSITIONS, lambda positions: Shape(8, (positions,), 64)),
    "K": Sweep("channels-last", _CHANNELS, lambda channels: Shape(8, (4096,), channels)),
    "B": Sweep("channels-last", (1, 2, 3, 4, 7, 8, 16, 32, 33), lambda batch: Shape(batch, (1024,), 64)),
}
QUICK = Sweep("channels-last", (32, 64), lambda positions: Shape(2, (positions,), 8))
CONTENDERS = (JAXNORM, BASELINE)
CLIFF = 1.5
# A size is judged if it takes this many times as long as the smallest call.
_LONG_ENOUGH = 3
# As large as it must be for XLA to hand it to its threads, as all the others are.
_SMALLEST = Shape(1, (16,), 64)


@dataclasses.dataclass(frozen=True)
class Point:
    """One contender at one size.

    Attributes:
      seconds: per call.
      nanoseconds: per element, after the smallest call is subtracted.
      is_judged: whether it takes long enough to be a cliff.
      steepness: nanoseconds in multiples of the cheaper judged neighbor; None if there is none.
      moved: bytes that the compiled code reads and writes, in sizes of x.
    """

    sweep: str
    size: int
    pass_name: str
    contender: str
    seconds: Spread
    nanoseconds: Spread
    is_judged: bool
    steepness: Spread | None
    moved: float

    @property
    def is_cliff(self) -> bool:
        return self.steepness is not None and self.steepness.median > CLIFF


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="what grows (default: all)")
    parser.add_argument("--seconds", type=float, default=20, help="for the rounds of a sweep and pass (default 20)")
    chosen = parser.parse_args(argv)
    sweeps = {"quick": QUICK} if chosen.quick else {name: SWEEPS[name] for name in chosen.sweeps}
    cases = [(name, pass_name) for name in sweeps for pass_name in PASSES]
    points = [
        point
        for name, pass_name in report.progress(cases, "timing")
        for point in measure(name, sweeps[name], pass_name, 0 if chosen.quick else chosen.seconds)
    ]
    report.publish(chosen, "How the cost grows", tables(points), report.machine(), points)


def measure(name: str, sweep: Sweep, pass_name: str, seconds: float) -> list[Point]:
    """The points of a sweep, by contender and size."""
    make_turn = wall_turn if jax.default_backend() == "cpu" else device_turn
    shapes = {0: _SMALLEST} | {size: sweep.shape(size) for size in sweep.sizes}
    cases = {size: Case(name, shape, sweep.layout, "float32", pass_name) for size, shape in shapes.items()}
    turns = {(n, size): make_turn(call(n, case, arguments(case))) for n in CONTENDERS for size, case in cases.items()}
    taken = take_turns(turns, seconds)
    points = []
    for contender in CONTENDERS:
        floor = taken[contender, 0]
        cost = {size: _nanoseconds(taken[contender, size], floor, shapes[size]) for size in sweep.sizes}
        enough = _LONG_ENOUGH * statistics.median(floor)
        judged = [size for size in sweep.sizes if statistics.median(taken[contender, size]) > enough]
        points += [
            Point(
                sweep=name,
                size=size,
                pass_name=pass_name,
                contender=contender,
                seconds=Spread.of(taken[contender, size]),
                nanoseconds=Spread.of(cost[size]),
                is_judged=size in judged,
                steepness=steepness(size, judged, cost),
                moved=moved(contender, cases[size]),
            )
            for size in sweep.sizes
        ]
    return points


def moved(name: str, case: Case) -> float:
    """Bytes that the compiled function reads and writes, caches ignored, in sizes of x."""
    given = jax.eval_shape(lambda: arguments(case))
    compiled = jax.jit(WRAP[case.pass_name](norm_of(name, case))).lower(*given).compile()
    return moved_bytes(compiled.as_text()) / (given[0].size * given[0].dtype.itemsize)


def steepness(size: int, judged: list[int], cost: dict[int, list[float]]) -> Spread | None:
    """Its cost in multiples of that of the cheaper neighbor."""
    sizes = list(cost)
    i = sizes.index(size)
    neighbors = [other for other in sizes[max(0, i - 1) : i + 2] if other in judged and other != size]
    if size not in judged or not neighbors:
        return None
    return max((ratios(cost[size], cost[other]) for other in neighbors), key=lambda spread: spread.median)


def tables(points: list[Point]) -> list[str]:
    """The range of each line, and the cliffs."""
    rows = []
    for kind in dict.fromkeys((p.sweep, p.pass_name, p.contender) for p in points):
        line = [p for p in points if (p.sweep, p.pass_name, p.contender) == kind]
        rows.append(
            [*kind, _range([p.nanoseconds.median for p in line if p.is_judged]), _range([p.moved for p in line])]
        )
    cliffs = [[f"{p.sweep} = {p.size}", p.pass_name, p.contender, p.steepness.format()] for p in points if p.is_cliff]
    return [
        "float32 with ReLU. Lowest to highest: time per element, and bytes that the compiled code reads and writes, in "
        "sizes of x.",
        report.table(["grows", "pass", "contender", "ns per element", "moved"], rows),
        f"## Cliffs\n\nTime per element in multiples of the cheaper neighbor, where it is more than {CLIFF}.",
        report.table(["size", "pass", "contender", "steepness"], cliffs) if cliffs else "None.",
    ]


def _nanoseconds(taken: list[float], floor: list[float], shape: Shape) -> list[float]:
    """Per element, in each round."""
    return [1e9 * (seconds - least) / shape.size for seconds, least in zip(taken, floor, strict=True)]


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "too short"


if __name__ == "__main__":
    main()
