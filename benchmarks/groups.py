"""Time of activation(group_norm(x) + residual), forward and training step, compared with Flax's GroupNorm.

    python -m benchmarks.groups --seeds 1 2    # 60 random shapes of each seed

Groups have 1 to 64 channels, and arrays are channels-last, as Flax's layer wants them. The rest is as in
benchmarks.compare.
"""

import argparse
import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from benchmarks import report, turns
from benchmarks.contenders import BASELINE, JAXNORM, STABLE, WRAP, Norm, arguments, waiting
from benchmarks.shapes import ACTIVATIONS, DTYPES, EPSILON, PASSES, Case, Shape
from benchmarks.turns import Spread
from jaxnorm import group_norm

OTHERS = (BASELINE, STABLE)
WORST = 5


@dataclasses.dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
      seconds: per call, of each contender.
      speed: how many times as fast jaxnorm is as each other contender.
    """

    case: Case
    group_size: int
    seconds: dict[str, Spread]
    speed: dict[str, Spread]

    def __str__(self) -> str:
        return f"{self.case}, groups of {self.group_size}"


def random_groups(seed: int, count: int) -> list[tuple[Case, int]]:
    """Random arrays of 2e4 to 4e6 elements with their group sizes, forward and in a training step.

    Sizes are uniform in their logarithms: 1 to 64 channels per group, 1 to 64 groups, up to 1024 channels, 1 to 32
    samples, 1 to 3 spatial axes of 2 to 256. Each activation occurs equally often; one case in four has a residual.
    """
    rng = random.Random(seed)

    def size(low: int, high: int) -> int:
        return int(low * ((high + 1) / low) ** rng.random())

    found: list[tuple[Shape, int, str]] = []
    while len(found) < count:
        group_size, spatial = size(1, 64), tuple(size(2, 256) for _ in range(rng.randint(1, 3)))
        shape = Shape(size(1, 32), spatial, group_size * size(1, 64))
        if shape.channels <= 1024 and 2e4 <= shape.size <= 4e6:
            found.append((shape, group_size, rng.choice(DTYPES)))
    return [
        (
            Case(
                "random",
                shape,
                "channels-last",
                dtype,
                pass_name,
                ACTIVATIONS[i % len(ACTIVATIONS)],
                residual=i % 4 == 3,
                seed=seed,
            ),
            group_size,
        )
        for i, (shape, group_size, dtype) in enumerate(found)
        for pass_name in PASSES
    ]


def norms(case: Case, group_size: int) -> dict[str, Norm]:
    """activation(norm(x) + residual) of each contender, as its users write it."""
    activation = getattr(jax.nn, case.activation)

    def fused(x: jax.Array, gamma: jax.Array, beta: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        options: dict[str, Any] = {"group_size": group_size, "channel_axis": -1, "activation": activation}
        return group_norm(x, gamma, beta, EPSILON, residual=residual, **options)

    def flax(use_fast_variance: bool) -> Norm:
        layer = nn.GroupNorm(None, group_size, epsilon=EPSILON, dtype=case.dtype, use_fast_variance=use_fast_variance)

        def norm(x: jax.Array, gamma: jax.Array, beta: jax.Array, *residual: jax.Array) -> jax.Array:
            return activation(sum(residual, layer.apply({"params": {"scale": gamma, "bias": beta}}, x)))

        return norm

    return {JAXNORM: fused, BASELINE: flax(use_fast_variance=True), STABLE: flax(use_fast_variance=False)}


def measure(case: Case, group_size: int, seconds: float) -> Result:
    """Compiles all contenders, then lets them take turns for so many seconds."""
    given = arguments(case)

    def call(norm: Norm) -> Callable[[], Any]:
        return waiting(jax.jit(WRAP[case.pass_name](norm)), *given)

    taken = turns.take_turns({name: turns.wall_turn(call(n)) for name, n in norms(case, group_size).items()}, seconds)
    return Result(
        case,
        group_size,
        {name: Spread.of(values) for name, values in taken.items()},
        {name: turns.ratios(taken[name], taken[JAXNORM]) for name in OTHERS},
    )


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", help="of random shapes (default: a new one, which is printed)")
    parser.add_argument("--count", type=int, default=60, help="random shapes of each seed (default 60)")
    parser.add_argument("--seconds", type=float, default=0.4, help="for the rounds of a case (default 0.4)")
    chosen: argparse.Namespace = parser.parse_args(argv)
    seeds = chosen.seeds or [random.SystemRandom().randrange(10**6)]
    seconds = 0 if chosen.quick else chosen.seconds
    cases = [case for seed in seeds for case in random_groups(seed, 2 if chosen.quick else chosen.count)]
    results = [measure(*case, seconds) for case in report.progress(cases, "timing")]
    slowest = {id(r): r for pass_name in PASSES for name in OTHERS for r in _slowest(results, pass_name, name)}
    again = {
        key: measure(r.case, r.group_size, 5 * seconds)
        for key, r in report.progress(list(slowest.items()), "timing again")
    }
    parts = [
        f"Seeds {', '.join(map(str, seeds))}, channels-last. How many times as fast jaxnorm is: above 1 it is faster. "
        "Means are geometric (lowest to highest). The slowest are measured twice, since the lowest of many noisy "
        "numbers is lower than the truth.",
        *(part for pass_name in PASSES for part in _tables(results, again, pass_name)),
    ]
    title = "Group norm and activation compared with Flax"
    report.publish(chosen, title, parts, report.machine(), {"cases": results, "again": list(again.values())})


def _slowest(results: list[Result], pass_name: str, name: str) -> list[Result]:
    found = [r for r in results if r.case.pass_name == pass_name]
    return sorted(found, key=lambda r: r.speed[name].median)[:WORST]


def _tables(results: list[Result], again: dict[int, Result], pass_name: str) -> list[str]:
    found = [r for r in results if r.case.pass_name == pass_name]
    groups = {"all": found}
    groups |= {dtype: [r for r in found if r.case.dtype == dtype] for dtype in DTYPES}
    for low in (1, 2, 8, 32):
        high = {1: 1, 2: 7, 8: 31, 32: 64}[low]
        groups[f"groups of {low} to {high}"] = [r for r in found if low <= r.group_size <= high]
    rows = [
        [
            label,
            str(len(chosen)),
            *(turns.mean_and_range([r.speed[name].median for r in chosen]) for name in OTHERS),
        ]
        for label, chosen in groups.items()
    ]
    parts = [f"## {pass_name}", report.table(["", "cases", *(f"than {name}" for name in OTHERS)], rows)]
    for name in OTHERS:
        lines = [
            [
                str(r),
                f"{math.prod(r.case.array):.1e}",
                *(f"{r.seconds[who].median * 1e3:.3g}" for who in (JAXNORM, name)),
                *(measured.speed[name].format() for measured in (r, again[id(r)])),
            ]
            for r in _slowest(results, pass_name, name)
        ]
        parts += [
            f"The slowest compared with {name}, and the same measured again for longer:",
            report.table(["", "elements", "jaxnorm, ms", f"{name}, ms", "speed", "again"], lines),
        ]
    return parts


if __name__ == "__main__":
    main()
