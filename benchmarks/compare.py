"""Time of activation(norm(x) + residual), forward and training step, compared with other libraries.

    python -m benchmarks.compare                                # the listed shapes, with ReLU, without a residual
    python -m benchmarks.compare --seeds 1 2 3                  # 60 random shapes of each seed, compared with Flax
    python -m benchmarks.compare --seeds 1 2 3 --against PATH   # with the copy of jaxnorm in the folder PATH
    python -m benchmarks.compare --seeds 1 2 3 --groups         # group norm, groups of 1 to 64 channels

Contenders take turns, and are compared round by round: a ratio is the median over the rounds of the ratio within a
round. With --against only two copies of jaxnorm are compared, each in a process of its own: others would run in this
process, and a process that has just been woken is slower. The slowest random shapes are measured twice, since the
lowest of many noisy numbers is lower than the truth.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import random
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import report, turns
from benchmarks.contenders import BASELINE, JAXNORM, OTHERS, STABLE, arguments, call, contenders, waiting
from benchmarks.shapes import DTYPES, LAYOUTS, PASSES, SHAPES, TINY, Case, listed, random_cases, random_groups
from benchmarks.turns import Spread, Turn
from benchmarks.worker import ROOT, Worker, WorkerError, jaxnorm_worker, torch_worker

# Arrays of the size of x that a pass must read and write: x and y; and then x, dy and dx.
UNITS = {"forward": 2, "step": 5}
TITLES = {"forward": "Forward", "step": "Training step (y and all gradients)"}
AGAINST, TORCH, COPY = "the other jaxnorm", "PyTorch", "a copy of x"
WORST = 5


@dataclasses.dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
      rounds: the number of rounds.
      seconds: per call, of each contender.
      speed: how many times as fast jaxnorm is as each other contender.
      share_of_copy: the bytes per second that jaxnorm must move, in those of a copy; None if no copy was timed.
    """

    case: Case
    rounds: int
    seconds: dict[str, Spread]
    speed: dict[str, Spread]
    share_of_copy: float | None


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = _options()
    chosen = parser.parse_args(argv)
    if chosen.groups and (chosen.seeds is None or chosen.torch_python):
        parser.error("--groups is for random shapes and for libraries of JAX: add --seeds, leave out --torch-python")
    if chosen.against and chosen.contenders:
        parser.error("--against compares two copies of jaxnorm and nothing else: leave out --contenders")
    if (chosen.torch_python or chosen.against) and jax.default_backend() != "cpu":
        parser.error("--torch-python and --against work on a CPU only: set JAX_PLATFORMS=cpu, or leave them out")
    cases, seconds, others = _what_to_measure(chosen)
    facts = report.machine()
    try:
        with _workers(chosen) as workers:
            facts["versions"] |= {name: worker.hello["version"] for name, worker in workers.items()}
            results = [measure(case, seconds, others, workers) for case in report.progress(cases, "timing")]
            suspects = _slowest_of_each(results) if chosen.seeds is not None else []
            again = {
                result.case: measure(result.case, 5 * seconds, others, workers)
                for result in report.progress(suspects, "timing again")
            }
    except WorkerError as error:
        parser.error(str(error))
    title = "Norm and activation compared with other libraries"
    report.publish(chosen, title, tables(results, again), facts, {"cases": results, "again": list(again.values())})
    if chosen.plot:
        draw(results, chosen.plot)


def _what_to_measure(chosen: argparse.Namespace) -> tuple[list[Case], float, list[str] | None]:
    """The cases, the seconds for each, and the other contenders, where None is all and a copy."""
    if chosen.seeds is None:
        names = chosen.shapes or list(TINY if chosen.quick else SHAPES)
        cases, seconds, others = listed(names, chosen.layouts, chosen.dtypes), 1.5, chosen.contenders
    else:
        seeds = chosen.seeds or [random.SystemRandom().randrange(10**6)]
        draw = random_groups if chosen.groups else random_cases
        cases = [case for seed in seeds for case in draw(seed, 2 if chosen.quick else chosen.count)]
        seconds, others = 0.4, chosen.contenders or [BASELINE]
    if chosen.seconds is not None:
        seconds = chosen.seconds
    return cases, 0 if chosen.quick else seconds, [] if chosen.against else others


@contextlib.contextmanager
def _workers(chosen: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """The contenders that need a process of their own."""
    wanted = []
    if chosen.against:
        wanted += [(JAXNORM, "--against", jaxnorm_worker, ROOT), (AGAINST, "--against", jaxnorm_worker, chosen.against)]
    if chosen.torch_python:
        wanted.append((TORCH, "--torch-python", torch_worker, chosen.torch_python))
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, option, start, where in wanted:
            try:
                workers[name] = start(where)
            except WorkerError as error:
                raise WorkerError(f"{option}: {error}") from error
            stack.callback(workers[name].close)
        yield workers


def measure(case: Case, seconds: float, others: list[str] | None, workers: dict[str, Worker]) -> Result:
    """Compiles all contenders, then lets them take turns for so many seconds."""
    taken = turns.take_turns(_turns(case, others, workers), seconds)
    copy, ours = taken.pop(COPY, None), taken[JAXNORM]
    return Result(
        case=case,
        rounds=len(ours),
        seconds={name: Spread.of(values) for name, values in taken.items()},
        speed={name: turns.ratios(values, ours) for name, values in taken.items() if name != JAXNORM},
        share_of_copy=UNITS[case.pass_name] / 2 * turns.ratios(copy, ours).median if copy else None,
    )


def _turns(case: Case, others: list[str] | None, workers: dict[str, Worker]) -> dict[str, Turn]:
    platform = jax.default_backend()
    make_turn = turns.wall_turn if platform == "cpu" else turns.device_turn
    given = arguments(case)
    names = [n for n in contenders(case, platform) if others is None or n in (JAXNORM, *others)]
    calls = {name: call(name, case, given) for name in names if name not in workers}
    if others is None:
        calls[COPY] = waiting(jax.jit(jnp.negative), given[0])
    return {n: worker.turn(case) for n, worker in workers.items()} | {n: make_turn(one) for n, one in calls.items()}


def _slowest(results: list[Result], pass_name: str, name: str) -> list[Result]:
    found = [r for r in results if r.case.pass_name == pass_name and name in r.speed]
    return sorted(found, key=lambda r: r.speed[name].median)[:WORST]


def _slowest_of_each(results: list[Result]) -> list[Result]:
    """Those that are among the slowest of any table, each once."""
    slowest = [r for pass_name in PASSES for name in _others(results) for r in _slowest(results, pass_name, name)]
    return list({r.case: r for r in slowest}.values())


def _others(results: list[Result]) -> list[str]:
    return list(dict.fromkeys(name for r in results for name in r.speed))


def tables(results: list[Result], again: dict[Case, Result]) -> list[str]:
    """Markdown; again holds the second measurements of random shapes."""
    parts = [
        "How many times as fast jaxnorm is: above 1 it is faster. Means are geometric, over the cases that the other "
        f"contender has (lowest to highest). The contender that is comparable in accuracy is {STABLE}."
    ]
    for pass_name in PASSES:
        chosen = [r for r in results if r.case.pass_name == pass_name]
        parts += [f"## {TITLES[pass_name]}", _means(chosen)]
        if not again:
            parts += ["Median (quartiles); and the share of the speed of a copy of x.", _cases(chosen)]
        for name in _others(chosen) if again else []:
            parts += [f"The slowest compared with {name}, and the same measured again for longer:"]
            parts += [_twice(_slowest(chosen, pass_name, name), again, name)]
    return parts


def _means(results: list[Result]) -> str:
    """A row for all cases, and one for each value of what differs between them."""
    groups = {"all": results}
    for field in ("seed", "dtype", "layout", "activation", "residual", "groups"):
        values = dict.fromkeys(getattr(r.case, field) for r in results)
        if len(values) > 1:
            groups |= {f"{field} {value}": [r for r in results if getattr(r.case, field) == value] for value in values}
    names = _others(results)
    rows = [
        [
            label,
            str(len(found)),
            *(turns.mean_and_range([r.speed[name].median for r in found if name in r.speed]) for name in names),
        ]
        for label, found in groups.items()
    ]
    return report.table(["", "cases", *(f"than {name}" for name in names)], rows)


def _cases(results: list[Result]) -> str:
    names = _others(results)
    rows = [
        [
            str(r.case),
            f"{r.seconds[JAXNORM].median * 1e3:.3g}",
            "" if r.share_of_copy is None else f"{r.share_of_copy:.0%}",
            *(r.speed[name].format() if name in r.speed else "" for name in names),
        ]
        for r in results
    ]
    return report.table(["", "jaxnorm, ms", "copy", *(f"than {name}" for name in names)], rows)


def _twice(slowest: list[Result], again: dict[Case, Result], name: str) -> str:
    rows = [
        [
            str(r.case),
            str(r.case.shape.size),
            *(f"{r.seconds[who].median * 1e3:.3g}" for who in (JAXNORM, name)),
            *(measured.speed[name].format() for measured in (r, again[r.case])),
        ]
        for r in slowest
    ]
    return report.table(["", "elements", "jaxnorm, ms", f"{name}, ms", "speed", "again"], rows)


def draw(results: list[Result], file: pathlib.Path) -> None:
    """A panel per pass, two rows per contender, a dot per case."""
    names = _others(results)
    figure = report.figure(7, 1.6 + 0.35 * len(names) * len(PASSES))
    panels = figure.subplots(len(PASSES), 1, sharex=True)
    for panel, pass_name in zip(panels, PASSES, strict=True):
        panel.axvline(1, color="gray", linewidth=1)
        for dtype, color, shift in zip(DTYPES, ("C0", "C1"), (-0.17, 0.17), strict=True):
            panel.plot([], [], ".", color=color, label=dtype)
            for height, name in enumerate(names):
                speeds = [
                    r.speed[name].median
                    for r in results
                    if (r.case.pass_name, r.case.dtype) == (pass_name, dtype) and name in r.speed
                ]
                panel.plot(speeds, [height + shift] * len(speeds), ".", color=color, alpha=0.4)
        panel.set_yticks(range(len(names)), [f"than {name}" for name in names])
        panel.set(xscale="log", title=TITLES[pass_name])
        panel.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"], minor=False)
        panel.minorticks_off()
        panel.invert_yaxis()
    panels[0].legend(loc="lower right")
    panels[-1].set_xlabel("How many times as fast jaxnorm is; each dot is a shape")
    figure.savefig(file)


def _options() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, plot=True)
    names = [*SHAPES, *TINY]
    parser.add_argument("--shapes", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="default: both")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    parser.add_argument(
        "--seeds", type=int, nargs="*", metavar="SEED", help="random shapes; without a number: of a new seed"
    )
    parser.add_argument("--groups", action="store_true", help="random shapes with group norm")
    parser.add_argument("--count", type=int, default=60, help="random shapes of each seed (default 60)")
    parser.add_argument("--seconds", type=float, help="for the rounds of a case (default 1.5, random shapes 0.4)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=OTHERS,
        metavar="NAME",
        help=f"of {', '.join(OTHERS)} (default: all and a copy; for random shapes {BASELINE})",
    )
    parser.add_argument("--against", type=pathlib.Path, metavar="PATH", help="a folder with another package jaxnorm")
    parser.add_argument("--torch-python", metavar="PYTHON", help="an interpreter that has PyTorch, to compare with it")
    return parser


if __name__ == "__main__":
    main()
