"""What the norms of networks cost in a training step: time, memory, and time to compile.

    python -m benchmarks.networks            # at the widths that are trained, one image at a time: half an hour
    python -m benchmarks.networks --small    # small ones, in minutes

Each network is trained without norms, with Flax's layer, with its stable variance, with jaxnorm's layer in its place,
and with jaxnorm's layer that also gets the activation and the residual. Steps take turns and are compared round by
round. Where both quartiles are not on the same side of no difference, the figure says that it is not resolved. Times to
compile are CPU seconds of a process that had compiled such a step before.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.contenders import BASELINE, JAXNORM, STABLE, waiting
from benchmarks.hlo import instructions
from benchmarks.models import GROUP_LAYERS, LAYERS, NO_NORM, SEPARATE, Decoder, Generator, Layer, UNet, gradient_descent
from benchmarks.turns import Spread, ratios, take_turns, timed


@dataclass(frozen=True)
class Network:
    """A network, the shape of what it takes, and what makes its norms."""

    make: Callable[..., nn.Module]
    images: tuple[int, ...]
    layers: dict[str, Layer] = field(default_factory=LAYERS.copy)


def unet(*features: int, **options: Any) -> Callable[..., nn.Module]:
    return functools.partial(UNet, features=features, **options)


WIDE = {
    "generator, 64 features": Network(Generator, (1, 256, 256, 3)),
    "2-D U-Net, 32 features": Network(unet(32, 64, 128, 256), (1, 256, 256, 1)),
    "3-D U-Net, 32 features": Network(unet(32, 64, 128, 256), (1, 64, 64, 64, 1)),
    "decoder, group norm, 128 features": Network(Decoder, (1, 16, 16, 4), GROUP_LAYERS),
}
SMALL = {
    "generator, 8 features": Network(functools.partial(Generator, features=8, blocks=3), (1, 256, 256, 3)),
    "2-D U-Net, 16 features": Network(unet(16, 32, 64), (4, 96, 96, 1)),
    "3-D U-Net, 8 features": Network(unet(8, 16, 32), (1, 32, 32, 32, 1)),
    "decoder, group norm, 32 features": Network(
        functools.partial(Decoder, features=(128, 64, 32)), (1, 16, 16, 4), GROUP_LAYERS
    ),
    "2-D U-Net, 16 features, gelu": Network(unet(16, 32, 64, activation=jax.nn.gelu), (4, 96, 96, 1)),
}
TINY = {"tiny generator": Network(functools.partial(Generator, features=2, blocks=1), (1, 8, 8, 3))}
COMPARED = (BASELINE, STABLE, SEPARATE, JAXNORM)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Result:
    """A training step of a network with one kind of layer.

    Attributes:
      seconds: of the step.
      ratio: of its time to that with Flax's layer.
      added: seconds by which the norms make it longer.
      temporary: bytes beside arguments and results.
      compile_seconds: CPU time to trace, lower and compile.
      instructions: of the compiled module.
      on_h100: temporary bytes as compiled for an H100, by dtype.
    """

    network: str
    layer: str
    seconds: Spread
    ratio: Spread
    added: Spread
    temporary: int
    compile_seconds: Spread
    instructions: int
    on_h100: dict[str, int]


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = report.parser(__doc__)
    known = WIDE | SMALL | TINY
    parser.add_argument("--networks", nargs="+", choices=known, metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--small", action="store_true", help="small networks instead of those that are trained")
    parser.add_argument("--seconds", type=float, default=60, help="for the rounds of a network (default 60)")
    parser.add_argument("--compilations", type=int, default=3, help="of each step (default 3)")
    parser.add_argument("--h100", action="store_true", help="also compile for an H100 (dependency group aot)")
    chosen = parser.parse_args(argv)
    names = chosen.networks or list(TINY if chosen.quick else SMALL if chosen.small else WIDE)
    seconds = 0 if chosen.quick else chosen.seconds
    results = [
        result
        for name in report.progress(names, "training")
        for result in measure(name, known[name], seconds, max(chosen.compilations, 2), chosen.h100)
    ]
    report.publish(chosen, "Networks with norms", tables(results), report.machine(), results)


def measure(name: str, network: Network, seconds: float, compilations: int, with_h100: bool) -> Iterator[Result]:
    """A result per kind of layer."""
    x = jax.random.normal(jax.random.key(0), network.images)
    models = {layer: network.make(network.layers[layer]) for layer in (NO_NORM, *COMPARED)}
    given = {layer: step_arguments(model, x) for layer, model in models.items()}
    compiled, taken = {}, {layer: [] for layer in models}
    for _ in range(compilations + 1):
        for layer, model in models.items():
            cpu_seconds, compiled[layer] = compile_step(gradient_descent(model), given[layer])
            taken[layer].append(cpu_seconds)
    calls = {layer: waiting(compiled[layer], *given[layer]) for layer in models}
    # Steps take long enough that the caches as another one left them make no difference: no call goes untimed.
    steps = take_turns({layer: functools.partial(timed, call) for layer, call in calls.items()}, seconds, 5)
    on_h100 = in_another_process(compiled_for_h100, name) if with_h100 else {}
    for layer in models:
        yield Result(
            network=name,
            layer=layer,
            seconds=Spread.of(steps[layer]),
            ratio=ratios(steps[layer], steps[BASELINE]),
            added=Spread.of([a - b for a, b in zip(steps[layer], steps[NO_NORM], strict=True)]),
            temporary=compiled[layer].memory_analysis().temp_size_in_bytes,
            # What is imported or set up once per process falls into the first.
            compile_seconds=Spread.of(taken[layer][1:]),
            instructions=instructions(compiled[layer].as_text()),
            on_h100=on_h100.get(layer, {}),
        )


def step_arguments(model: nn.Module, x: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """Parameters, x, and a target like what the model makes of it."""
    key = jax.random.key(2)
    made, _ = jax.eval_shape(model.init_with_output, key, x)
    return jax.jit(model.init)(key, x), x, jax.random.normal(jax.random.key(1), made.shape)


def compile_step(step: Callable[..., Any], given: tuple[Any, ...]) -> tuple[float, Any]:
    """CPU seconds to trace, lower and compile, and what comes out."""
    jax.clear_caches()
    start = time.process_time()
    compiled = jax.jit(step).lower(*given).compile()
    return time.process_time() - start, compiled


def in_another_process(function: Callable[..., Any], *given: Any) -> Any:
    """A process that compiles for a GPU needs options that are read when JAX starts."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *given).result()


def compiled_for_h100(
    name: str, layers: Sequence[str] = (NO_NORM, *COMPARED), dtypes: Sequence[str] = DTYPES
) -> dict[str, dict[str, int]]:
    """Bytes of temporary memory, by layer and dtype. What cuDNN asks for when it runs is not in it."""
    # Nothing is run: without autotuning the compiler needs no GPU.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    from benchmarks.aot import Compiler

    compiler, network = Compiler("H100"), (WIDE | SMALL | TINY)[name]
    x = jax.ShapeDtypeStruct(network.images, jnp.float32)

    def temporary(layer: Layer, dtype: str) -> int:
        model = network.make(layer, dtype=dtype)
        given = jax.eval_shape(functools.partial(step_arguments, model), x)
        step = compiler.lower(gradient_descent(model), *given).compile()
        return step.memory_analysis().temp_size_in_bytes

    return {layer: {dtype: temporary(network.layers[layer], dtype) for dtype in dtypes} for layer in layers}


def tables(results: list[Result]) -> list[str]:
    """A table per figure."""
    by = {(r.network, r.layer): r for r in results}
    networks = list(dict.fromkeys(r.network for r in results))

    def table(cell: Callable[[Result], str]) -> str:
        rows = [[name, *(cell(by[name, layer]) for layer in COMPARED)] for name in networks]
        return report.table(["", *COMPARED], rows)

    def beside_flax(value: Callable[[Result], float], scale: float, form: str) -> str:
        return table(lambda r: f"{value(r) * scale:{form}} ({value(r) / value(by[r.network, BASELINE]):.2f})")

    parts = [
        "A training step in float32, on one batch.",
        "## Time compared with Flax's\n\nMedian (quartiles) over the rounds; below 1 it is faster.",
        table(lambda r: supported(r.ratio, 1, ".2f")),
        "## What the norms add to a training step, ms\n\nCompared with no norm in the same round: median (quartiles).",
        table(lambda r: supported(r.added, 0, ".1f", 1e3)),
        "## A training step, ms\n\nMedian (quartiles).",
        table(lambda r: r.seconds.format(".1f", 1e3)),
        "## Temporary memory, MiB (compared with Flax's)",
        beside_flax(lambda r: r.temporary, 2**-20, ".1f"),
        "## Trace, lower and compile, CPU seconds (compared with Flax's)",
        beside_flax(lambda r: r.compile_seconds.median, 1, ".2f"),
        "## Instructions of the compiled module (compared with Flax's)",
        beside_flax(lambda r: r.instructions, 1, ".0f"),
    ]
    for dtype in DTYPES if results[0].on_h100 else ():
        parts += [f"## Temporary memory as compiled for an H100, {dtype}, MiB (compared with Flax's)"]
        parts += [beside_flax(lambda r, dtype=dtype: r.on_h100[dtype], 2**-20, ".1f")]
    return parts


def supported(value: Spread, nothing: float, form: str, scale: float = 1) -> str:
    """The figure, or only its quartiles where they do not support a difference."""
    if value.excludes(nothing) or value.low == value.high == nothing:
        return value.format(form, scale)
    return f"not resolved ({value.low * scale:{form}} to {value.high * scale:{form}})"


if __name__ == "__main__":
    main()
