"""Time of relu(norm(x)), forward and training step, beside what people use.

    python benchmarks/compare.py
    python benchmarks/compare.py --shapes 'CycleGAN 64' digits --dtypes float32 --torch-python /path/to/python

Contenders take turns within one run and are compared round by round. Ratios are speeds, larger is faster. One of the
contenders is a copy of x, to see how near a pass comes to what memory allows: forward must read x and write y; a
training step must read x and write y, and then read x and dy and write dx.
"""

import argparse
import sys
from dataclasses import dataclass

try:
    import jax
    import jax.numpy as jnp
    import plot
    import tables
    from contenders import BASELINE, contenders, forward, step
    from report import add_output_options, describe, machine, progress, publish
    from shapes import LAYOUTS, SUITE, TINY, Layout, Shape
    from torch_process import TorchError, TorchProcess, default_python
    from turns import Spread, Turn, device_turn, ratios, take_turns, wall_turn
except ModuleNotFoundError as error:
    sys.exit(f"compare: {error.name} is not installed. Install what the benchmark needs: pip install 'jaxnorm[bench]'")

DTYPES = ("float32", "bfloat16")
PASSES = {"forward": forward, "step": step}
# Arrays of the size of x that a pass must read and write.
UNITS = {"forward": 2, "step": 5}


@dataclass(frozen=True)
class Case:
    """What is measured at a time."""

    name: str
    shape: Shape
    layout: Layout
    dtype: str
    pass_name: str

    @property
    def array(self) -> tuple[int, ...]:
        return self.shape.array(self.layout)


@dataclass(frozen=True)
class Result:
    """Of one contender.

    Attributes:
      seconds: per call.
      speed: in multiples of Flax's default.
      behind: its time in multiples of jaxnorm's.
      bytes_per_second: of those that must move.
      share_of_copy: of the bytes per second of a copy, in percent.
    """

    case: Case
    contender: str
    rounds: int
    seconds: Spread
    speed: Spread
    behind: Spread
    bytes_per_second: float
    share_of_copy: float


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    on_cpu = jax.default_backend() == "cpu"
    if arguments.torch_python and not on_cpu:
        parser.error("--torch-python: PyTorch takes part on the CPU only; set JAX_PLATFORMS=cpu, or leave it out")
    cases = [
        Case(name, (SUITE | TINY)[name], layout, dtype, pass_name)
        for dtype in arguments.dtypes
        for layout in arguments.layouts
        for name in arguments.shapes
        for pass_name in PASSES
    ]
    facts = machine()
    python = arguments.torch_python or (default_python() if on_cpu else None)
    try:
        if python is None:
            results = measure_all(cases, arguments.seconds)
        else:
            with TorchProcess(python) as torch:
                facts["versions"]["torch"], facts["torch threads"] = torch.version, torch.threads
                results = measure_all(cases, arguments.seconds, torch)
    except TorchError as error:
        parser.error(f"--torch-python: {error}")
    publish(arguments, tables.report(results, facts), {"machine": facts, "results": results})
    if arguments.plot:
        plot.draw_speeds(results, arguments.plot, describe(facts))


def measure_all(cases: list[Case], seconds: float, torch: TorchProcess | None = None) -> list[Result]:
    """So many seconds each, and the time to compile."""
    return [result for case in progress(cases, "timing") for result in measure(case, seconds, torch)]


def measure(case: Case, seconds: float, torch: TorchProcess | None = None) -> list[Result]:
    """One result per contender."""
    times = take_turns(_turns(case, torch), seconds)
    copy = times.pop("copy")
    size = case.shape.size * jnp.dtype(case.dtype).itemsize
    units = UNITS[case.pass_name]
    return [
        Result(
            case=case,
            contender=name,
            rounds=len(taken),
            seconds=Spread.of(taken),
            speed=ratios(times[BASELINE], taken),
            behind=ratios(taken, times["jaxnorm"]),
            bytes_per_second=units * size / Spread.of(taken).median,
            share_of_copy=100 * units / 2 * ratios(copy, taken).median,
        )
        for name, taken in times.items()
    ]


def _turns(case: Case, torch: TorchProcess | None) -> dict[str, Turn]:
    platform = jax.default_backend()
    make_turn = wall_turn if platform == "cpu" else device_turn
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(key, case.array, case.dtype) for key in keys[:2])
    noise = [0.1 * jax.random.normal(key, case.shape.channels) for key in keys[2:]]
    wrap = PASSES[case.pass_name]
    turns = {
        name: make_turn(jax.jit(wrap(norm)), x, 1 + noise[0], noise[1], dy)
        for name, norm in contenders(case.layout, platform).items()
    }
    turns["copy"] = make_turn(jax.jit(jnp.negative), x)
    if torch is not None:
        shape = case.shape.array("channels-first")
        turns["torch"] = torch.turn(shape, case.layout, case.dtype, step=case.pass_name == "step")
    return turns


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SUITE, *TINY]
    parser.add_argument(
        "--shapes", nargs="+", choices=names, default=list(SUITE), metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="for the rounds of a shape, layout, dtype and pass (default 1.5)"
    )
    parser.add_argument(
        "--torch-python", metavar="PYTHON", help="interpreter that has PyTorch (default: this one, if it has)"
    )
    add_output_options(parser)
    return parser


if __name__ == "__main__":
    main()
