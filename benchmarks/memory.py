"""Peak memory of a training step of a small U-Net, with jaxnorm's layer, Flax's, and none.

    python -m benchmarks.memory

Each layer has a process of its own. Temporary memory is what XLA reserves for the compiled step beside its arguments
and results; the peak of the process is what the operating system saw. With the aot extra the step is compiled for an
H100 too, which need not be there; scratch memory that cuDNN asks for when it runs is not in it.
"""

import argparse
import concurrent.futures
import importlib.util
import multiprocessing
import os
import resource
import sys
import time
from typing import Any

# Read when JAX starts: the CUDA plugin compiles for an H100 from a process that runs on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

try:
    import jax

    from benchmarks.layers import LAYERS
    from benchmarks.report import add_output_options, describe, machine, progress, publish, table
    from benchmarks.segmentation import IMAGES, arguments, training_step
except ModuleNotFoundError as error:
    sys.exit(f"memory: {error.name} is not installed. Install what the benchmark needs: pip install 'jaxnorm[bench]'")

_STEPS = 3
_MIB = 2**20
_HAS_AOT = all(importlib.util.find_spec(name) for name in ("jax_plugins.xla_cuda13", "nvidia"))


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser, plot=False)
    chosen = parser.parse_args(argv)
    results = {layer: measure(layer) for layer in progress(LAYERS, "training")}
    facts = machine()
    publish(chosen, report(results, facts), {"machine": facts, "results": results})


def measure(layer: str) -> dict[str, Any]:
    """The figures of one layer, in bytes and seconds."""
    result = in_own_process(run_here, layer)
    if _HAS_AOT:
        result |= in_own_process(compile_for_h100, layer)
    return result


def in_own_process(function: Any, layer: str) -> Any:
    """A new one: its peak is not that of what ran before."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, layer).result()


def run_here(layer: str) -> dict[str, Any]:
    """Compiles the step and takes a few."""
    params, x, target = arguments(layer)
    start = time.perf_counter()
    compiled = jax.jit(training_step(layer, "float32")).lower(params, x, target).compile()
    seconds = time.perf_counter() - start
    before = _peak()
    for _ in range(_STEPS):
        _, params = jax.block_until_ready(compiled(params, x, target))
    return {
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "peak before": before,
        "peak": _peak(),
        "compile seconds": seconds,
    }


def compile_for_h100(layer: str) -> dict[str, int]:
    """Bytes of temporary memory."""
    # Nothing is run: without autotuning the compiler needs no GPU.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    from benchmarks.aot import Compiler

    compiler = Compiler("H100")
    given = jax.eval_shape(lambda: arguments(layer))
    return {
        f"H100, {dtype}": compiler.lower(training_step(layer, dtype), *given)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for dtype in ("float32", "bfloat16")
    }


def report(results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """A Markdown table."""
    compiled_for = [key for key in results["Flax"] if key.startswith("H100")]

    def beside(layer: str, key: str) -> str:
        ours, flax = results[layer][key], results["Flax"][key]
        return f"{ours / _MIB:.0f} MiB ({ours / flax:.2f})"

    header = ["", "temporary", "peak of the process", "peak before the first step", "compile time"]
    rows = [
        [
            layer,
            beside(layer, "temporary"),
            beside(layer, "peak"),
            f"{result['peak before'] / _MIB:.0f} MiB",
            f"{result['compile seconds']:.1f} s",
            *(beside(layer, key) for key in compiled_for),
        ]
        for layer, result in results.items()
    ]
    return "\n\n".join(
        [
            "# Memory of a training step of a U-Net",
            f"{describe(facts)}. Images {IMAGES}, float32 on this device. In parentheses: in multiples of Flax's.",
            table([*header, *(f"temporary, {key}" for key in compiled_for)], rows),
        ]
    )


def _peak() -> int:
    """Bytes that the process had at most."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024


if __name__ == "__main__":
    main()
