"""What the norms of small networks cost in a training step: time, memory, and time to compile.

    python -m benchmarks.networks

Each network is trained without norms, with Flax's layer, with jaxnorm's layer and a separate activation after it, and
with jaxnorm's layer that computes the activation. Steps take turns. What the norms add is the difference between a step
and the one without norms in the same round; where convolutions take nearly all of the time it is lost in their noise,
as the quartiles show. Times to compile are CPU seconds of a process that had compiled such a step before.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

try:
    import flax.linen as nn
    import jax

    from benchmarks.contenders import BASELINE
    from benchmarks.generator import Generator
    from benchmarks.hlo import instructions
    from benchmarks.layers import LAYERS, Layer
    from benchmarks.report import add_output_options, describe, machine, progress, publish, table
    from benchmarks.segmentation import UNet, gradient_descent
    from benchmarks.turns import Spread, take_turns, wall_turn
except ModuleNotFoundError as error:
    sys.exit(f"networks: {error.name} is not installed. Install what the benchmark needs: pip install 'jaxnorm[bench]'")


@dataclass(frozen=True)
class Network:
    """A network, the images that it takes and the shape of what it gives."""

    make: Callable[[Layer], nn.Module]
    images: tuple[int, ...]
    target: tuple[int, ...]


NETWORKS = {
    "ResNet generator": Network(lambda norm: Generator(norm, features=8), (1, 256, 256, 3), (1, 256, 256, 3)),
    "2-D U-Net": Network(UNet, (4, 96, 96, 1), (4, 96, 96)),
    "3-D U-Net": Network(lambda norm: UNet(norm, features=(8, 16, 32)), (1, 32, 32, 32, 1), (1, 32, 32, 32)),
    "2-D U-Net, gelu": Network(lambda norm: UNet(norm, activation=jax.nn.gelu), (4, 96, 96, 1), (4, 96, 96)),
}
TINY = {"tiny": Network(lambda norm: UNet(norm, features=(2, 3)), (1, 4, 4, 1), (1, 4, 4))}
WITHOUT = "no norm"
COMPARED = (BASELINE, "jaxnorm, activation apart", "jaxnorm")


@dataclass(frozen=True)
class Result:
    """A step of a network with one kind of layer.

    Attributes:
      seconds: of the step.
      added: seconds, by the norms.
      temporary: bytes beside arguments and results.
      compile_seconds: CPU time to trace, lower and compile.
      instructions: of the compiled module.
    """

    network: str
    layer: str
    seconds: Spread
    added: Spread
    temporary: int
    compile_seconds: Spread
    instructions: int


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = NETWORKS | TINY
    parser.add_argument("--networks", nargs="+", choices=names, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=30, help="for the rounds of a network (default 30)")
    parser.add_argument("--compilations", type=int, default=5, help="of each step (default 5)")
    add_output_options(parser, plot=False)
    chosen = parser.parse_args(argv)
    results = [
        result
        for name in progress(chosen.networks, "training")
        for result in measure(name, names[name], chosen.seconds, max(chosen.compilations, 2))
    ]
    facts = machine()
    publish(chosen, report(results, facts), {"machine": facts, "results": results})


def measure(name: str, network: Network, seconds: float, compilations: int) -> list[Result]:
    """A result per kind of layer."""
    x, target = (jax.random.normal(jax.random.key(seed), s) for seed, s in enumerate((network.images, network.target)))
    models = {layer: network.make(LAYERS[layer]) for layer in (WITHOUT, *COMPARED)}
    given = {layer: (jax.jit(model.init)(jax.random.key(2), x), x, target) for layer, model in models.items()}
    compiled, taken = {}, {layer: [] for layer in models}
    for _ in range(compilations + 1):
        for layer, model in models.items():
            cpu_seconds, compiled[layer] = compile_step(gradient_descent(model), given[layer])
            taken[layer].append(cpu_seconds)
    steps = take_turns({layer: wall_turn(_waiting(compiled[layer], given[layer])) for layer in models}, seconds)
    return [
        Result(
            network=name,
            layer=layer,
            seconds=Spread.of(steps[layer]),
            added=Spread.of([a - b for a, b in zip(steps[layer], steps[WITHOUT], strict=True)]),
            temporary=compiled[layer].memory_analysis().temp_size_in_bytes,
            # What is imported or set up once per process falls into the first.
            compile_seconds=Spread.of(taken[layer][1:]),
            instructions=instructions(compiled[layer].as_text()),
        )
        for layer in models
    ]


def _waiting(function: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*given))


def compile_step(step: Callable[..., Any], given: tuple[Any, ...]) -> tuple[float, Any]:
    """CPU seconds to trace, lower and compile, and what comes out."""
    jax.clear_caches()
    start = time.process_time()
    compiled = jax.jit(step).lower(*given).compile()
    return time.process_time() - start, compiled


def report(results: list[Result], facts: dict[str, Any]) -> str:
    """A table per figure; all beside Flax's."""
    by = {(r.network, r.layer): r for r in results}
    networks = list(dict.fromkeys(r.network for r in results))

    def rows(value: Callable[[Result], float], scale: float, form: str) -> list[list[str]]:
        def cell(name: str, layer: str) -> str:
            ours, flax = value(by[name, layer]), value(by[name, BASELINE])
            return f"{ours * scale:{form}} ({ours / flax:.2f})"

        return [[name, *(cell(name, layer) for layer in COMPARED)] for name in networks]

    def added(name: str, layer: str) -> str:
        ours, flax = by[name, layer].added, by[name, BASELINE].added
        # A ratio of differences says nothing where Flax's is not above the noise.
        ratio = f"{ours.median / flax.median:.2f}" if flax.low > 0 else "-"
        return f"{ours.median * 1e3:.1f}, {ours.low * 1e3:.1f} to {ours.high * 1e3:.1f} ({ratio})"

    header = ["", *COMPARED]
    return "\n\n".join(
        [
            "# Networks with norms",
            f"{describe(facts)}. A training step in float32, in parentheses in multiples of Flax's.",
            "## What the norms add to a step, ms",
            "Median and quartiles over the rounds.",
            table(header, [[name, *(added(name, layer) for layer in COMPARED)] for name in networks]),
            "## A step, ms",
            table(header, rows(lambda r: r.seconds.median, 1e3, ".1f")),
            "## Temporary memory, MiB",
            table(header, rows(lambda r: r.temporary, 2**-20, ".1f")),
            "## Trace, lower and compile, CPU seconds",
            table(header, rows(lambda r: r.compile_seconds.median, 1, ".2f")),
            "## Instructions of the compiled module",
            table(header, rows(lambda r: r.instructions, 1, ".0f")),
        ]
    )


if __name__ == "__main__":
    main()
