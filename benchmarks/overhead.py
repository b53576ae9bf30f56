"""What a small call costs beside its arithmetic: tracing and compiling it the first time, and dispatch after that.

    python -m benchmarks.overhead

Contenders take turns. Before every first call JAX forgets all that it traced and compiled.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import report
from benchmarks.contenders import WRAP, arguments, contenders, norm_of, waiting
from benchmarks.shapes import Case, Shape
from benchmarks.turns import Spread, take_turns, wall_turn

SMALL = Case("small", Shape(1, (8, 8), 16), "channels-last", "float32")
STAGES = ("trace", "lower", "compile", "run", "first call")

# Seconds of each kind of call, by contender.
Seconds = dict[str, dict[str, Spread]]


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="first calls of each contender, at least 2 (default 9)")
    chosen = parser.parse_args(argv)
    rounds = 2 if chosen.quick else max(chosen.rounds, 2)
    results = {name: measure(wrap, 0 if chosen.quick else 2, rounds) for name, wrap in WRAP.items()}
    parts = [f"x is {SMALL.array}, float32. Milliseconds: median (quartiles)."]
    for pass_name, kinds in results.items():
        names = list(next(iter(kinds.values())))
        rows = [[kind, *(values[name].format(".3g", 1e3) for name in names)] for kind, values in kinds.items()]
        parts += [f"## {pass_name.capitalize()}", report.table(["", *names], rows)]
    report.publish(chosen, "Overhead of a small call", parts, report.machine(), results)


def measure(wrap: Callable[..., Any], seconds: float, rounds: int) -> Seconds:
    """Calls that are cached, then first calls."""
    functions = {name: wrap(norm_of(name, SMALL)) for name in contenders(SMALL, jax.default_backend())}
    given = arguments(SMALL)
    calls = {
        "next call under jit": {name: waiting(jax.jit(function), *given) for name, function in functions.items()},
        "next call without jit": {name: waiting(function, *given) for name, function in functions.items()},
    }
    cached = {
        kind: take_turns({name: wall_turn(call) for name, call in of_kind.items()}, seconds)
        for kind, of_kind in calls.items()
    }
    first = {stage: {name: [] for name in functions} for stage in STAGES}
    # The first round is not kept: what is imported or set up once per process falls into it.
    for round_number in report.progress(range(rounds + 1), "first calls"):
        for name, function in functions.items():
            for stage, taken in first_call(function, given).items():
                first[stage][name] += [taken] * (round_number > 0)
    return {kind: {n: Spread.of(taken) for n, taken in by.items()} for kind, by in (cached | first).items()}


def first_call(function: Callable[..., Any], given: tuple[jax.Array, ...]) -> dict[str, float]:
    """Seconds of each stage."""
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(function).trace(*given)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    jax.block_until_ready(compiled(*given))
    times.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return dict(zip(STAGES, [*seconds, sum(seconds)], strict=True))


if __name__ == "__main__":
    main()
