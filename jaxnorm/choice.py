"""Which implementation computes a pass: the GPU kernel where it has a tile and is proven, else plain XLA.

Forward and backward decide on their own: the backward pass keeps more arrays in shared memory.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.arguments import Activation, Implementation, without_addresses
from jaxnorm.gpu.devices import DEVICES, Device, if_proven, interpreted, is_any_proven
from jaxnorm.gpu.tile import NoTile, Tile, bulk_tile, find_tile


def find_tiles(
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    *,
    residual: bool,
    activation: Activation | None,
    captures: int = 0,
    device: Device | None,
    implementation: Implementation | None = None,
) -> tuple[Tile | NoTile, Tile | NoTile]:
    """The kernel's tiles of the forward and the backward pass, or the reasons why it cannot run.

    Args:
      shape: (B, R, K), the canonical view.
      dtype: of x.
      residual, activation: of the call; the activation takes so many captures besides.
      device: the GPU, or None if there is none or it is not known.
      implementation: as in jaxnorm.instance_norm: None takes only what is proven (jaxnorm.gpu.devices).
    """
    if device is None:
        nothing = NoTile("the computation is not for one CUDA GPU that is known")
        return nothing, nothing
    batch, rows, lanes = shape
    view, itemsize = (batch, rows, lanes), jnp.dtype(dtype).itemsize
    # The gradients depend on the residual only through the activation.
    arrays = {"forward": 1 + residual, "backward": 2 + (residual and activation is not None)}
    if implementation is None and not is_any_proven(device):
        # Whichever tile it were, it would not be taken: the activation is not traced for that.
        forward, backward = (if_proven(find_tile(view, itemsize, number, device), device) for number in arrays.values())
        return forward, backward
    if captures:
        captured = NoTile("the kernel computes no activation that closes over an array")
        return captured, captured
    reason = _not_evaluated(activation)
    if reason is not None:
        return reason, reason
    # Imported where it is wanted.
    from jaxnorm.gpu.cost import instructions

    def tile(name: str) -> Tile | NoTile:
        issued = instructions(activation, name, narrow=itemsize < 4)
        found = find_tile(view, itemsize, arrays[name], device, issued)
        return if_proven(found, device) if implementation is None else found

    tiles = {name: tile(name) for name in arrays}
    if not all(isinstance(tile, NoTile) for tile in tiles.values()):
        lacking = _lacking()
        if lacking is not None:
            return lacking, lacking
    return tiles["forward"], tiles["backward"]


def interpreted_device() -> Device | None:
    """The GPU that Pallas plays on a CPU inside plgpu.force_gpu_interpret_mode, else None."""
    return DEVICES["H100"] if interpreted() else None


def run(
    tile: Tile | NoTile,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    *arguments: Any,
    implementation: Implementation | None,
) -> Any:
    """Computes a pass by the kernel, or by plain XLA where the choice is ours and there is no tile to take.

    Args:
      tile: of find_tiles.
      kernel: takes the arguments and the tile.
      plain: takes the arguments.
      arguments: arrays.
      implementation: None or a name, as in jaxnorm.instance_norm.
    """
    if implementation == "xla" or (implementation is None and isinstance(tile, NoTile)):
        return plain(*arguments)
    if isinstance(tile, NoTile):
        raise ValueError(
            f"implementation='pallas' cannot run here: {tile.reason}. Pass implementation=None, which takes another "
            "where it must, or 'xla'."
        )
    if implementation == "pallas":
        return kernel(*arguments, tile=tile)
    # What is traced for a GPU may be lowered for another platform all the same.
    return lax.platform_dependent(*arguments, cuda=lambda *given: kernel(*given, tile=tile), default=plain)


@functools.cache
def _lacking() -> NoTile | None:
    """What the kernel needs and this JAX does not have: the experimental part of Pallas changes with every release.

    Asked only where a tile would be taken, since Mosaic GPU takes a while to import.
    """
    try:
        # In a thread of its own, since the answer must not depend on the tracing that asks for it first.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_trace_a_kernel).result()
    # Whatever is lacking: there still is plain JAX.
    except Exception as error:
        cause = without_addresses(str(error).strip().partition("\n")[0])
        return NoTile(f"JAX {jax.__version__} does not trace it ({type(error).__name__}: {cause})")
    return None


def _trace_a_kernel() -> None:
    from jaxnorm import pallas_kernel

    x, value = jax.ShapeDtypeStruct((1, 256, 8), jnp.float32), jax.ShapeDtypeStruct((1, 1, 8), jnp.float32)
    forward_tile, backward_tile = (bulk_tile("rows", x.shape, 8, 2, 4, arrays) for arrays in (1, 2))
    forward = functools.partial(pallas_kernel.forward, eps=1.0, activation=jax.nn.relu, tile=forward_tile)
    backward = functools.partial(pallas_kernel.backward, activation=jax.nn.relu, tile=backward_tile)
    _, statistics = jax.eval_shape(forward, x, value, value, None)
    jax.eval_shape(backward, x, statistics, value, value, None, x)


def _not_evaluated(activation: Activation | None) -> NoTile | None:
    if activation is None:
        return None
    from jaxnorm.gpu.elementwise import first_uncovered

    primitive = first_uncovered(activation)
    if primitive is None:
        return None
    return NoTile(f"the kernel cannot evaluate {primitive!r}, a primitive of the activation")
