"""Time of norm and activation beside Flax on shapes that chance picks, forward and training step.

    python benchmarks/random_shapes.py --seeds 7 8 9

Every shape is as likely as its logarithms: ranks 3 to 5, both layouts, batches of 1 to 128, 1 to 512 channels, sides of
2 to 256, and 2e4 to 4e6 elements, in float32 or bfloat16, with one of three activations. jaxnorm and Flax's default
layer take turns; a speed is the ratio of their median times, larger is faster than Flax.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

try:
    import jax
    from contenders import BASELINE, contenders, forward, step
    from layers import ACTIVATIONS
    from report import add_output_options, describe, machine, progress, publish, table
    from shapes import Layout, Shape
    from turns import Spread, geometric_mean, take_turns, wall_turn
except ModuleNotFoundError as error:
    sys.exit(
        f"random_shapes: {error.name} is not installed. Install what the benchmark needs: pip install 'jaxnorm[bench]'"
    )

PASSES = {"forward": forward, "step": step}
_ELEMENTS = (2e4, 4e6)
# Below, a call is mostly dispatch and threads.
_SMALL = 1e5
_WORST = 10


@dataclass(frozen=True)
class Case:
    """An array, and the name of one of ACTIVATIONS."""

    shape: Shape
    layout: Layout
    dtype: str
    activation: str

    @property
    def array(self) -> tuple[int, ...]:
        return self.shape.array(self.layout)


@dataclass(frozen=True)
class Result:
    """Seconds per call, median and quartiles, of one case in one pass."""

    seed: int
    case: Case
    pass_name: str
    jaxnorm: Spread
    flax: Spread

    @property
    def speed(self) -> float:
        """In multiples of Flax's."""
        return self.flax.median / self.jaxnorm.median


def main(argv: list[str] | None = None) -> None:
    """Draws, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="of the draws (default: another one in every run; it is printed)"
    )
    parser.add_argument("--count", type=int, default=60, help="shapes of each seed (default 60)")
    parser.add_argument("--seconds", type=float, default=0.4, help="for the rounds of a shape and pass (default 0.4)")
    add_output_options(parser, plot=False)
    chosen = parser.parse_args(argv)
    seeds = chosen.seeds or [random.SystemRandom().randrange(10**6)]
    cases = [(seed, case) for seed in seeds for case in draw(seed, chosen.count)]
    results = [measure(*case, name, chosen.seconds) for case in progress(cases, "timing") for name in PASSES]
    facts = machine()
    publish(chosen, report(results, facts), {"machine": facts, "results": results})


def draw(seed: int, count: int) -> list[Case]:
    """Log-uniform, within the bounds above. With each activation as many."""
    rng = random.Random(seed)

    def size(low: int, high: int) -> int:
        # Rounded down from one more, so that both ends are as likely as their share of the logarithms.
        return int(low * ((high + 1) / low) ** rng.random())

    arrays: list[tuple[Shape, Layout, str]] = []
    while len(arrays) < count:
        shape = Shape(size(1, 128), tuple(size(2, 256) for _ in range(rng.randint(1, 3))), size(1, 512))
        array = (shape, rng.choice(get_args(Layout)), rng.choice(("float32", "bfloat16")))
        if _ELEMENTS[0] <= shape.size <= _ELEMENTS[1]:
            arrays.append(array)
    return [Case(*array, activation) for array, activation in zip(arrays, itertools.cycle(ACTIVATIONS), strict=False)]


def measure(seed: int, case: Case, pass_name: str, seconds: float) -> Result:
    """Compiles both, then lets them take turns for so many seconds."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(key, case.array, case.dtype) for key in keys[:2])
    noise = [0.1 * jax.random.normal(key, case.shape.channels) for key in keys[2:]]
    norms = contenders(case.layout, jax.default_backend(), ACTIVATIONS[case.activation])
    turns = {
        name: wall_turn(jax.jit(PASSES[pass_name](norms[name])), x, 1 + noise[0], noise[1], dy)
        for name in ("jaxnorm", BASELINE)
    }
    taken = take_turns(turns, seconds)
    return Result(seed, case, pass_name, Spread.of(taken["jaxnorm"]), Spread.of(taken[BASELINE]))


def report(results: list[Result], facts: dict[str, Any]) -> str:
    """Means of each seed, then the worst of all in each pass."""
    seeds = list(dict.fromkeys(r.seed for r in results))
    parts = [
        "# Norm and activation beside Flax on shapes that chance picked",
        f"{describe(facts)}. {len(results) // len(PASSES) // len(seeds)} shapes of each seed. Speed in multiples of "
        "Flax's default layer: the ratio of the median times of turns taken in one process. Larger is faster.",
        _summary(results, "seed", lambda r: str(r.seed)),
        _summary(results, "activation", lambda r: r.case.activation),
    ]
    for name in PASSES:
        worst = sorted((r for r in results if r.pass_name == name), key=lambda r: r.speed)[: _WORST * len(seeds)]
        parts += [
            f"## The slowest of {name}",
            table(["", "seed", "elements", "speed", "jaxnorm, ms", "Flax, ms"], [_line(r) for r in worst]),
        ]
    return "\n\n".join(parts)


def _summary(results: list[Result], what: str, group: Callable[[Result], str]) -> str:
    def row(pass_name: str, name: str) -> list[str]:
        found = [r for r in results if (r.pass_name, group(r)) == (pass_name, name)]
        small, large = (
            [r.speed for r in found if (r.case.shape.size < _SMALL) == is_small] for is_small in (True, False)
        )
        lowest = [f"{min(speeds):.2f}" if speeds else "" for speeds in (large, small)]
        return [pass_name, name, f"{geometric_mean([r.speed for r in found]):.2f}", *lowest]

    names = dict.fromkeys(map(group, results))
    header = ["", what, "geometric mean", f"lowest from {_SMALL:.0e} elements", "lowest below"]
    return table(header, [row(pass_name, name) for pass_name in PASSES for name in names])


def _line(r: Result) -> list[Any]:
    name = f"{r.case.layout} {r.case.array} {r.case.dtype} {r.case.activation}"
    return [
        name,
        str(r.seed),
        str(r.case.shape.size),
        f"{r.speed:.2f}",
        f"{r.jaxnorm.median * 1e3:.3g}",
        f"{r.flax.median * 1e3:.3g}",
    ]


if __name__ == "__main__":
    main()
