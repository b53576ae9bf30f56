"""Executes jaxnorm's kernels without a GPU: python -m emulator --gpu H100 --count 20 --seed 7"""

import argparse
import gc
import itertools
import os
import pathlib
import sys
import time

GPUS = ("A100", "RTX 3090", "L40S", "H100", "B200", "RTX 5090")


def main(arguments: list[str] | None = None) -> int:
    """The number of calls that are wrong."""
    parser = argparse.ArgumentParser(prog="python -m emulator", description=__doc__)
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="the GPU to compile for; none is needed")
    parser.add_argument("--count", type=int, default=6, help="calls; each has a forward and a backward kernel")
    parser.add_argument("--seed", type=int, default=0, help="of the random calls, after the listed ones")
    parser.add_argument("--adversaries", type=int, default=2, help="schedules that each call is executed with")
    parser.add_argument("--skip-listed", action="store_true", help="random calls only")
    options = parser.parse_args(arguments)
    root = pathlib.Path(__file__).parent.parent
    sys.path += [str(root / folder) for folder in ("benchmarks", "tests")]
    # Nothing runs on a GPU, and where there is one JAX would look for its libraries.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from emulator.jaxnorm_calls import drawn, listed

    fixed = [] if options.skip_listed else listed(options.gpu)
    calls = itertools.islice(itertools.chain(fixed, drawn(options.gpu, options.seed)), options.count)
    return execute(options.gpu, calls, options.adversaries)


def execute(gpu, calls, adversaries) -> int:
    """Prints a line for each call, and what is wrong with it; returns how many are wrong."""
    from aot import Compiler

    from emulator.jaxnorm_calls import Executable

    compiler, start, wrong, kernels, total = Compiler(gpu), time.process_time(), 0, 0, 0
    for call in calls:
        begin, problems, executed = time.process_time(), [], 0
        # Mosaic makes millions of objects that live on: the garbage collector need not look at them.
        gc.disable()
        executable = Executable(compiler, gpu, call)
        gc.freeze()
        gc.enable()
        compiled = time.process_time() - begin
        for seed in range(adversaries):
            found, results = executable.run(seed)
            problems += [f"adversary {seed}: {problem}" for problem in found]
            executed += sum(result.executed for result in results)
        ran = time.process_time() - begin - compiled
        verdict = "WRONG" if problems else "right"
        print(
            f"{gpu} {call}: {verdict}; {compiled:.1f} s to compile, {ran:.1f} s for {executed / 1e3:.0f}k instructions"
        )
        for problem in problems:
            print(f"  {problem}", flush=True)
        wrong, kernels, total = wrong + bool(problems), kernels + len(executable.function.kernels), total + executed
    seconds = time.process_time() - start
    print(
        f"{gpu}: {kernels} kernels, {adversaries} adversaries each, {total / 1e6:.1f}M instructions of warps", end=", "
    )
    print(f"{seconds:.0f} CPU seconds: {f'{wrong} calls are WRONG' if wrong else 'all right'}")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
