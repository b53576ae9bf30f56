"""Compiles the Mosaic GPU kernels of a JAX function for a GPU that is not there, and runs the function without one.

The function is lowered as for the GPU, and compiled for the CPU with each kernel replaced by a call of the emulator. So
nothing needs to be known of the buffers of a kernel: what goes in is what XLA would pass, and the results are those of
the whole function. One architecture per process: the compiler refuses a second, newer one. JAX's persistent compilation
cache must be off, as the compiler does not write again what comes from there.

This file alone needs JAX, with the CUDA compiler of the extra `aot`; it uses private names of JAX 0.12.
"""

import contextlib
import itertools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol
from unittest import mock

import jax
import numpy as np
from jax._src import compiler as jax_compiler
from jax._src.lib import xla_client
from jax.experimental.mosaic.gpu import core as mosaic
from jaxlib.mlir import ir

from emulator.launch import Compiled, Result, execute
from emulator.machine import Policy
from emulator.translator import Program

_MARK = "mhlo.emulated_kernel"


class Compiler(Protocol):
    """Lowers functions for a GPU that is not there, as benchmarks/aot.py does."""

    def lower(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A jax.stages.Lowered of the platform "cuda"."""


class _Call(NamedTuple):
    """A kernel that was lowered."""

    inputs: list[Any]
    outputs: list[Any]
    aliases: dict[int, int]
    module: Any
    out_types: list[Any]


class Function:
    """A function whose kernels run in the emulator.

    Args:
      compiler: of the GPU.
      function: of arrays; it uses all of them.
      arguments: arrays, or jax.ShapeDtypeStructs.

    Attributes:
      kernels: what was compiled; programs: the same, ready to run.
    """

    def __init__(self, compiler: Compiler, function: Callable[..., Any], *arguments: Any):
        types = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), arguments)
        with _recorded() as calls:
            lowered = compiler.lower(function, *types)
        self.kernels = [_compile(compiler, call) for call in calls]
        self.programs: list[Program] = [kernel.program() for kernel in self.kernels]
        self._structure = lowered.out_tree
        self._results: list[Result | Exception] = []
        self._adversary: tuple[int, Policy | None] = (0, None)
        self._executable = _for_the_cpu(
            lowered.compiler_ir("stablehlo"), [self._callback(i) for i in range(len(calls))]
        )
        # The inputs that each kernel was given when it last ran.
        self.inputs: dict[int, list[np.ndarray]] = {}

    def __call__(self, *arguments: Any, seed: int = 0, policy: Policy | None = None) -> tuple[Any, list[Result]]:
        """What the function returns, and one result for each kernel that ran. Raises KernelError."""
        self._results, self._adversary = [], (seed, policy)
        leaves = [jax.device_put(leaf, jax.devices("cpu")[0]) for leaf in jax.tree.leaves(arguments)]
        outputs = [np.asarray(each) for each in self._executable.execute(leaves)]
        for result in self._results:
            if isinstance(result, Exception):
                raise result
        return jax.tree.unflatten(self._structure, outputs), self._results

    def _callback(self, index):
        def run(*inputs):
            kernel, (seed, policy) = self.kernels[index], self._adversary
            self.inputs[index] = inputs = [np.array(each) for each in inputs]
            try:
                self._results.append(execute(kernel, inputs, seed, policy, program=self.programs[index]))
            # It is raised again by __call__: XLA would make a text of it.
            except Exception as problem:
                self._results.append(problem)
                return tuple(np.zeros(shape, dtype) for shape, dtype in kernel.outputs)
            return tuple(self._results[-1].outputs)

        return run


@contextlib.contextmanager
def _recorded() -> Iterator[list[_Call]]:
    """The kernels that are lowered within; their calls are marked with their numbers."""
    calls, rule = [], mosaic._mosaic_gpu_lowering_rule

    def record(ctx, *args, module, out_types, input_output_aliases=(), **options):
        results = rule(
            ctx, *args, module=module, out_types=out_types, input_output_aliases=input_output_aliases, **options
        )
        number = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), len(calls))
        results[0].owner.attributes[_MARK] = number
        calls.append(_Call(ctx.avals_in, ctx.avals_out, dict(input_output_aliases), module, list(out_types)))
        return results

    with mock.patch.object(mosaic, "_mosaic_gpu_lowering_rule", record):
        yield calls


# The compiler writes what it makes of a kernel only the first time in a process, so no two may be the same to it.
_NUMBERS = itertools.count()


def _compile(compiler, call):
    count = len(call.out_types) - len(call.aliases)
    pairs = zip(
        range(len(call.inputs) - len(call.aliases), len(call.inputs)), range(count, len(call.outputs)), strict=True
    )
    if call.aliases != dict(pairs):
        raise NotImplementedError(f"aliases other than of the last buffers: {call.aliases}")
    types = {"out_types": tuple(call.out_types[:count]), "inout_types": tuple(call.out_types[count:])}
    with call.module.context:
        call.module.operation.attributes["sym_name"] = ir.StringAttr.get(f"emulated_{next(_NUMBERS)}")

    def kernel(*arguments):
        return mosaic.mosaic_gpu_p.bind(*arguments, module=call.module, **types)

    texts = _dumped(compiler, kernel, [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in call.inputs])
    arrays = [[(each.shape, str(each.dtype)) for each in side] for side in (call.inputs, call.outputs)]
    return Compiled(*texts, *arrays, call.aliases)


def _dumped(compiler, kernel, arguments):
    """The PTX and the host's LLVM text of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        switches = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
        with mock.patch.dict(os.environ, switches):
            compiler.lower(kernel, *arguments).compile()
        (ptx,) = pathlib.Path(folder).glob("*.ptx")
        return ptx.read_text(), ptx.with_suffix(".ll").read_text()


def _for_the_cpu(module, callbacks):
    """The executable of a module, with callbacks for its kernels."""

    def replace(operation):
        if _MARK in operation.attributes:
            number = ir.IntegerAttr(operation.attributes[_MARK]).value
            for name in (_MARK, "output_operand_aliases", "backend_config"):
                if name in operation.attributes:
                    del operation.attributes[name]
            index = ir.IntegerAttr.get(ir.IntegerType.get_unsigned(64), number)
            operation.attributes["mhlo.backend_config"] = ir.DictAttr.get({"index": index})
            operation.attributes["call_target_name"] = ir.StringAttr.get("xla_ffi_python_cpu_callback")
        for region in operation.regions:
            for block in region:
                for each in block:
                    replace(each.operation)

    with module.context, ir.Location.unknown():
        replace(module.operation)
    device = jax.devices("cpu")[0]
    return device.client.compile_and_load(
        module,
        executable_devices=xla_client.DeviceList((device,)),
        compile_options=jax_compiler.get_compile_options(num_replicas=1, num_partitions=1),
        host_callbacks=callbacks,
    )
