"""Time of activation(norm(x) + residual), forward and training step, compared with other libraries.

    python -m benchmarks.compare                                # the listed shapes, with ReLU, without a residual
    python -m benchmarks.compare --seeds 1 2 3                  # 60 random shapes of each seed
    python -m benchmarks.compare --seeds 1 2 3 --against PATH   # also another copy of jaxnorm, in the folder PATH

Contenders take turns, and are compared round by round: a ratio is the median over the rounds of the ratio within a
round. With --against both copies of jaxnorm run in a process of their own. One contender is a copy of x, which shows
how close a pass comes to the limit of memory: forward must read x and write y; a training step must read x and write
y, and then read x and dy and write dx.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

try:
    import jax
    import jax.numpy as jnp

    from benchmarks import report, turns
    from benchmarks.contenders import BASELINE, arguments, call, contenders
    from benchmarks.shapes import DTYPES, LAYOUTS, PASSES, SHAPES, TINY, Case, listed, random_cases
    from benchmarks.turns import Spread, Turn
    from benchmarks.worker import ROOT, Worker, WorkerError, jaxnorm_worker, torch_worker
except ModuleNotFoundError as error:
    sys.exit(f"compare: {error.name} is not installed. Install what the benchmark needs: pip install 'jaxnorm[bench]'")

# Arrays of the size of x that a pass must read and write.
UNITS = {"forward": 2, "step": 5}
TITLES = {"forward": "Forward", "step": "Training step (y and all gradients)"}
AGAINST, TORCH = "the other jaxnorm", "PyTorch"
WORST = 5


@dataclasses.dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
      rounds: that all contenders took part in.
      seconds: per call, of each contender.
      speed: how many times as fast jaxnorm is as each other contender.
      share_of_copy: the bytes per second that jaxnorm must move, as a share of those of a copy;
        None where no copy took part.
    """

    case: Case
    rounds: int
    seconds: dict[str, Spread]
    speed: dict[str, Spread]
    share_of_copy: float | None


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = _parser()
    chosen = parser.parse_args(argv)
    if (chosen.torch_python or chosen.against) and jax.default_backend() != "cpu":
        parser.error("--torch-python and --against work on a CPU only; set JAX_PLATFORMS=cpu, or leave them out")
    if chosen.seeds is None:
        cases = listed(chosen.shapes, chosen.layouts, chosen.dtypes)
        only, seconds = None, 1.5
    else:
        seeds = chosen.seeds or [random.SystemRandom().randrange(10**6)]
        cases = [case for seed in seeds for case in random_cases(seed, chosen.count)]
        only, seconds = (BASELINE,), 0.4
    seconds = seconds if chosen.seconds is None else chosen.seconds
    facts = report.machine()
    try:
        with _workers(chosen) as workers:
            facts["versions"] |= {name: worker.hello["version"] for name, worker in workers.items()}
            results = [measure(case, seconds, workers, only) for case in report.progress(cases, "timing")]
            again = {
                result.case: measure(result.case, 5 * seconds, workers, only)
                for result in report.progress(_suspects(results) if chosen.seeds is not None else [], "timing again")
            }
    except WorkerError as error:
        parser.error(str(error))
    report.publish(
        chosen, text(results, again, facts), {"machine": facts, "results": results, "again": list(again.values())}
    )
    if chosen.plot:
        draw(results, chosen.plot)


@contextlib.contextmanager
def _workers(chosen: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """The contenders that need a process of their own."""
    with contextlib.ExitStack() as stack:
        workers = {}

        def add(name: str, option: str, start: Callable[[], Worker]) -> None:
            try:
                workers[name] = start()
            except WorkerError as error:
                raise WorkerError(f"{option}: {error}") from error
            stack.callback(workers[name].close)

        if chosen.against:
            add("jaxnorm", "--against", lambda: jaxnorm_worker(ROOT))
            add(AGAINST, "--against", lambda: jaxnorm_worker(chosen.against))
        if chosen.torch_python:
            add(TORCH, "--torch-python", lambda: torch_worker(chosen.torch_python))
        yield workers


def measure(case: Case, seconds: float, workers: dict[str, Worker], only: tuple[str, ...] | None = None) -> Result:
    """Compiles all contenders, then lets them take turns for so many seconds.

    Args:
      only: the other libraries that take part, without the copy; None is all.
    """
    taken = turns.take_turns(_turns(case, workers, only), seconds)
    copy, ours = taken.pop("copy", None), taken["jaxnorm"]
    return Result(
        case=case,
        rounds=len(ours),
        seconds={name: Spread.of(values) for name, values in taken.items()},
        speed={name: turns.ratios(values, ours) for name, values in taken.items() if name != "jaxnorm"},
        share_of_copy=copy and UNITS[case.pass_name] / 2 * turns.ratios(copy, ours).median,
    )


def _turns(case: Case, workers: dict[str, Worker], only: tuple[str, ...] | None) -> dict[str, Turn]:
    platform = jax.default_backend()
    make_turn = turns.wall_turn if platform == "cpu" else turns.device_turn
    calls = {name: call(case, norm) for name, norm in contenders(case, platform).items() if name not in workers}
    if only is None:
        x, copy = arguments(case)[0], jax.jit(jnp.negative)
        calls["copy"] = lambda: jax.block_until_ready(copy(x))
    else:
        calls = {name: one for name, one in calls.items() if name in ("jaxnorm", *only)}
    return {name: worker.turn(case) for name, worker in workers.items()} | {n: make_turn(c) for n, c in calls.items()}


def _suspects(results: list[Result]) -> list[Result]:
    """Those that are among the worst of a table, each once."""
    worst = [r for pass_name in PASSES for name in _others(results) for r in _worst(results, pass_name, name)]
    return list({r.case: r for r in worst}.values())


def _worst(results: list[Result], pass_name: str, name: str) -> list[Result]:
    found = [r for r in results if r.case.pass_name == pass_name and name in r.speed]
    return sorted(found, key=lambda r: r.speed[name].median)[:WORST]


def _others(results: list[Result]) -> list[str]:
    return list(dict.fromkeys(name for r in results for name in r.speed))


def text(results: list[Result], again: dict[Case, Result], facts: dict[str, Any]) -> str:
    """The report in Markdown; again holds the second measurements of random shapes."""
    parts = [
        "# Norm and activation compared with other libraries",
        report.describe(facts),
        "Numbers say how many times as fast jaxnorm is: above 1 it is faster. A mean is geometric, over the cases that "
        "the other one has (lowest to highest).",
    ]
    for pass_name in PASSES:
        chosen = [r for r in results if r.case.pass_name == pass_name]
        parts += [f"## {TITLES[pass_name]}", _means(chosen)]
        if again:
            for name in _others(chosen):
                parts += [f"The slowest compared with {name}, and the same measured again for longer:"]
                parts += [_again(_worst(chosen, pass_name, name), again, name)]
        else:
            parts += ["Each case: median (quartiles), and the share of the speed of a copy.", _cases(chosen)]
    return "\n\n".join(parts)


def _means(results: list[Result]) -> str:
    """A row for all cases, and one for each value of what differs between them."""
    groups: dict[str, list[Result]] = {"all": results}
    for field in ("name", "dtype", "layout", "activation", "residual"):
        values = dict.fromkeys(getattr(r.case, field) for r in results)
        if len(values) > 1 and not (field == "name" and set(values) <= SHAPES.keys()):
            label = {True: "with residual", False: "without residual"}
            groups |= {label.get(v, str(v)): [r for r in results if getattr(r.case, field) == v] for v in values}

    def cell(found: list[Result], name: str) -> str:
        speeds = [r.speed[name].median for r in found if name in r.speed]
        return f"{turns.geometric_mean(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})" if speeds else ""

    names = _others(results)
    rows = [[label, str(len(found)), *(cell(found, name) for name in names)] for label, found in groups.items()]
    return report.table(["", "cases", *(f"than {name}" for name in names)], rows)


def _cases(results: list[Result]) -> str:
    names = _others(results)
    header = ["", "jaxnorm, ms", "of a copy", *(f"than {name}" for name in names)]
    rows = [
        [
            str(r.case),
            f"{r.seconds['jaxnorm'].median * 1e3:.3g}",
            f"{r.share_of_copy:.0%}",
            *(str(r.speed.get(name, "")) for name in names),
        ]
        for r in results
    ]
    return report.table(header, rows)


def _again(worst: list[Result], again: dict[Case, Result], name: str) -> str:
    header = ["", "elements", "jaxnorm, ms", f"{name}, ms", "speed", "again"]
    rows = [
        [
            str(r.case),
            str(r.case.shape.size),
            *(f"{r.seconds[who].median * 1e3:.3g}" for who in ("jaxnorm", name)),
            *(str(measured.speed[name]) for measured in (r, again[r.case])),
        ]
        for r in worst
    ]
    return report.table(header, rows)


def draw(results: list[Result], file: pathlib.Path) -> None:
    """A panel per pass, a row per contender, a dot per case."""
    names = _others(results)
    figure = report.figure(7, 1.6 + 0.35 * len(names) * len(PASSES))
    panels = figure.subplots(len(PASSES), 1, sharex=True)
    for panel, pass_name in zip(panels, PASSES, strict=True):
        panel.axvline(1, color="gray", linewidth=1)
        for dtype, color, shift in zip(DTYPES, ("C0", "C1"), (-0.17, 0.17), strict=True):
            found = [r for r in results if (r.case.pass_name, r.case.dtype) == (pass_name, dtype)]
            for height, name in enumerate(names):
                speeds = [r.speed[name].median for r in found if name in r.speed]
                panel.plot(speeds, [height + shift] * len(speeds), ".", color=color, alpha=0.4)
                panel.plot(turns.geometric_mean(speeds), height + shift, "|", color=color, markersize=12, mew=2)
            panel.plot([], [], ".", color=color, label=dtype)
        panel.set_yticks(range(len(names)), [f"than {name}" for name in names])
        panel.set(xscale="log", title=TITLES[pass_name])
        panel.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"], minor=False)
        panel.minorticks_off()
        panel.invert_yaxis()
    panels[0].legend(loc="lower right")
    panels[-1].set_xlabel("How many times as fast jaxnorm is (dots: shapes; lines: geometric means)")
    figure.savefig(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SHAPES, *TINY]
    parser.add_argument(
        "--shapes", nargs="+", choices=names, default=list(SHAPES), metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--seeds", type=int, nargs="*", metavar="SEED", help="random shapes, of these seeds; none: a new seed, printed"
    )
    parser.add_argument("--count", type=int, default=60, help="random shapes of each seed (default 60)")
    parser.add_argument(
        "--seconds", type=float, help="for the rounds of a case (default 1.5, and 0.4 for a random shape)"
    )
    parser.add_argument(
        "--against", type=pathlib.Path, metavar="PATH", help="a folder with another copy of the package jaxnorm"
    )
    parser.add_argument("--torch-python", metavar="PYTHON", help="an interpreter that has PyTorch, to compare with it")
    report.add_output_options(parser)
    return parser


if __name__ == "__main__":
    main()
