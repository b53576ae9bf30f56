"""What a small call costs beside its arithmetic: tracing and compiling it the first time, and dispatch after that.

    python -m benchmarks.overhead

Contenders take turns; each figure is a median over rounds with its quartiles. Before every first call JAX forgets all
that it traced and compiled.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

try:
    import jax

    from benchmarks.contenders import Norm, arguments, contenders, forward, step
    from benchmarks.report import add_output_options, describe, machine, progress, publish, table
    from benchmarks.shapes import Case, Shape
    from benchmarks.turns import Spread, take_turns, wall_turn
except ModuleNotFoundError as error:
    sys.exit(f"overhead: {error.name} is not installed. Install what the benchmark needs: pip install 'jaxnorm[bench]'")

SMALL = Case("small", Shape(1, (8, 8), 16), "channels-last", "float32")
STAGES = ("trace", "lower", "compile", "run", "first call")
CACHED = ("cached call under jit", "cached call without jit")


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_at_least_two, default=9, help="first calls per contender (default 9)")
    add_output_options(parser, plot=False)
    chosen = parser.parse_args(argv)
    norms = contenders(SMALL, jax.default_backend())
    results = {
        wrap.__name__: cached_calls(norms, wrap) | first_calls(norms, wrap, chosen.rounds) for wrap in (forward, step)
    }
    facts = machine()
    publish(chosen, report(results, facts), {"machine": facts, "shape": SMALL, "results": results})


def cached_calls(norms: dict[str, Norm], wrap: Callable[[Norm], Any]) -> dict[str, dict[str, Spread]]:
    """Seconds per call of each contender: {CACHED: {contender: seconds}}."""
    given = arguments(SMALL)
    functions = {CACHED[0]: lambda norm: jax.jit(wrap(norm)), CACHED[1]: wrap}
    return {
        kind: {
            name: Spread.of(taken)
            for name, taken in take_turns({n: wall_turn(_waiting(make(f), given)) for n, f in norms.items()}, 2).items()
        }
        for kind, make in functions.items()
    }


def _waiting(function: Callable[..., Any], given: tuple[jax.Array, ...]) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*given))


def first_calls(norms: dict[str, Norm], wrap: Callable[[Norm], Any], rounds: int) -> dict[str, dict[str, Spread]]:
    """Seconds of each stage of each contender: {STAGES: {contender: seconds}}."""
    given = arguments(SMALL)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in norms}
    # The first round is not kept: what is imported or set up once per process falls into it.
    for round_number in progress(range(rounds + 1), f"first calls, {wrap.__name__}"):
        for name, norm in norms.items():
            stages = first_call(wrap(norm), given)
            if round_number:
                taken[name].append(stages)
    return {
        stage: {name: Spread.of([one[stage] for one in stages]) for name, stages in taken.items()} for stage in STAGES
    }


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


def report(results: dict[str, dict[str, dict[str, Spread]]], facts: dict[str, Any]) -> str:
    """A Markdown table per pass."""

    def cell(value: Spread) -> str:
        return f"{value.median * 1e3:.3g} ({value.low * 1e3:.3g} to {value.high * 1e3:.3g})"

    parts = [
        "# Overhead of a small call",
        f"{describe(facts)}. x is {SMALL.array('channels-last')}, float32. Milliseconds: median (quartiles).",
    ]
    for pass_name, kinds in results.items():
        names = list(next(iter(kinds.values())))
        rows = [[kind, *(cell(values[name]) for name in names)] for kind, values in kinds.items()]
        parts += [f"## {pass_name.capitalize()}", table(["", *names], rows)]
    return "\n\n".join(parts)


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 2: got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
