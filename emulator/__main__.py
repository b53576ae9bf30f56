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
    """1 where something is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="python -m emulator", description=__doc__)
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="the GPU to compile for; none is needed")
    parser.add_argument("--count", type=int, default=6, help="calls; each has a forward and a backward kernel")
    parser.add_argument("--seed", type=int, default=0, help="of the calls, which are random but for the first two")
    parser.add_argument("--adversaries", type=int, default=2, help="schedules that each call is executed with")
    parser.add_argument("--mutations", action="store_true", help="list the synchronization that nobody misses instead")
    options = parser.parse_args(arguments)
    root = pathlib.Path(__file__).parent.parent
    sys.path += [str(root), str(root / "tests")]
    # Nothing runs on a GPU, and where there is one JAX would look for its libraries.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # The compiler must write what it makes of each kernel.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return (mutate if options.mutations else execute)(options)


def executables(options):
    """The calls, compiled, and the time that each took."""
    from benchmarks.aot import Compiler
    from emulator.jaxnorm_calls import Executable, calls

    compiler = Compiler(options.gpu)
    for call in itertools.islice(calls(options.gpu, options.seed), options.count):
        start = time.process_time()
        # Mosaic makes millions of objects that live on: the garbage collector need not look at them.
        gc.disable()
        executable = Executable(compiler, options.gpu, call)
        gc.freeze()
        gc.enable()
        yield executable, time.process_time() - start


def execute(options) -> int:
    """Prints a line for each call, and what is wrong with it."""
    start, wrong, kernels, total = time.process_time(), 0, 0, 0
    for executable, compiling in executables(options):
        begin, problems, executed = time.process_time(), [], 0
        for seed in range(options.adversaries):
            found, results = executable.run(seed)
            problems += [f"adversary {seed}: {problem}" for problem in found]
            executed += sum(result.executed for result in results)
        seconds = f"{compiling:.1f} s to compile, {time.process_time() - begin:.1f} s to run"
        compiled = executable.function.kernels
        uses = " / ".join(kernel.uses() for kernel in compiled)
        print(f"{options.gpu} {executable.call}: {'WRONG' if problems else 'right'} ({uses}; {seconds})")
        for problem in problems:
            print(f"  {problem}", flush=True)
        wrong, kernels, total = wrong + bool(problems), kernels + len(compiled), total + executed
    seconds = time.process_time() - start
    verdict = f"{wrong} calls are WRONG" if wrong else "all right"
    print(
        f"{options.gpu}: {kernels} kernels, {options.adversaries} adversaries each, {total / 1e6:.1f} million "
        f"instructions of warps, {seconds:.0f} CPU seconds: {verdict}"
    )
    return min(wrong, 1)


def mutate(options) -> int:
    """Prints what is changed in each kernel without an objection: it is not needed, or not seen."""
    from emulator.mutations import survivors

    total = missed = 0
    for executable, _ in executables(options):
        if executable.run(0)[0]:
            print(f"{options.gpu} {executable.call}: WRONG as it is; mutations would prove nothing")
            continue
        for index, kernel in enumerate(executable.function.kernels):
            inputs, resident = executable.function.inputs[index], executable.device.sm_count
            mutants, left = survivors(kernel, inputs, options.adversaries, resident)
            print(f"{options.gpu} {executable.call} ({kernel.uses()}): {len(left)} of {len(mutants)} mutants survive")
            for mutant in left:
                text = kernel.ptx.split("\n")[mutant.line - 1].strip()
                print(f"  {mutant.change}, line {mutant.line}: {text}", flush=True)
            total, missed = total + len(mutants), missed + len(left)
    print(f"{options.gpu}: {missed} of {total} mutants survive")
    return 0


if __name__ == "__main__":
    sys.exit(main())
