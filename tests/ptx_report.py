"""What the PTX of a kernel says, compiled for a GPU that is not there: a part of aot_report.py.

The interpreter of Pallas cannot show how large a store is, which barriers remain, and which additions are fused with a
product.
"""

import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
from activations import ACTIVATIONS

from jaxnorm import pallas_kernel
from jaxnorm.gpu.tile import find_tile


def passes(view, dtype, activation, device):
    """(name, tile, function, arguments) of both passes."""
    batch, _, lanes = view
    x = jax.ShapeDtypeStruct(view, dtype)
    value = jax.ShapeDtypeStruct((batch, 1, lanes), jnp.float32)
    first, second = (find_tile(view, x.dtype.itemsize, arrays, device) for arrays in (1, 2))

    def forward(x, gamma, beta):
        return pallas_kernel.forward(x, gamma, beta, None, eps=1e-5, activation=activation, tile=first)

    def backward(x, statistics, gamma, beta, dy):
        return pallas_kernel.backward(x, statistics, gamma, beta, None, dy, activation=activation, tile=second)

    yield "forward", first, forward, (x, value, value)
    yield "backward", second, backward, (x, pallas_kernel.Moments(value, value, value, value), value, value, x)


def ptx(compiler, function, arguments):
    """Of the one kernel in the function, which must not have been compiled before in this process."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            compiler.lower(function, *arguments).compile()
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        (path,) = pathlib.Path(folder).glob("*.ptx")
        return path.read_text()


def bulk_stores(text):
    """The most bytes that each bulk store other than a tensor copy writes: its size, or the constant that bounds it."""
    names = re.findall(r"cp\.async\.bulk\.global\.shared::cta\.bulk_group \[%rd\d+\], \[%rd\d+\], (%\w+);", text)
    return [_most(text, name) for name in names]


def _most(text, name):
    """A register's constant, through conversions and minima."""
    (operation,) = re.findall(rf"^\s+(\S+\s+{name}, .*);", text, re.MULTILINE)
    operands = operation.split(", ")[1:]
    constants = [int(operand) for operand in operands if operand.isdigit()]
    if operation.startswith(("mov", "min")) and constants:
        return min(constants)
    assert operation.startswith("cvt"), operation
    return _most(text, operands[0])


def fused_sums(text):
    """Fused products and sums that add the number of another thread, which has rounded the product."""
    shuffled = re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", text)
    moved = [new for new, old in re.findall(r"mov\.b32\s+(%\w+), (%\w+);", text) if old in shuffled]
    fused = re.findall(r"^\s+fma\.\S+\s+.*;", text, re.MULTILINE)
    return [line.strip() for line in fused if {*shuffled, *moved} & set(re.findall(r"%\w+", line)[1:])]


def report_ptx(compiler, device, case):
    """One dict for each pass of a case: a canonical view, a dtype and an activation, as "2x250x4:float32:relu"."""
    shape, dtype, activation = case.split(":")
    view = tuple(map(int, shape.split("x")))
    for name, tile, function, arguments in passes(view, dtype, ACTIVATIONS[activation], device):
        text = ptx(compiler, function, arguments)
        yield {
            "case": case,
            "of": name,
            "copies": tile.copies,
            "ragged": tile.ragged,
            "box_bytes": tile.rows * tile.row_bytes,
            "last_bytes": tile.extent % tile.rows * tile.row_bytes,
            "bulk_stores": bulk_stores(text),
            "fused_sums": fused_sums(text),
            "barriers": text.count("bar.sync"),
        }
