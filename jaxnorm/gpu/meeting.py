"""How the thread blocks that share an instance meet to exchange what each has found in its part.

    Alone     a block has its instances to itself
    Cluster   up to 8 blocks, which the hardware starts together (Hopper and newer)
    Group     any number of blocks, which meet through a counter in global memory

What they exchange passes through global memory: a few numbers per instance.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm.gpu.tiling import Tile

Values = tuple[jax.Array, ...]
# More parts than these are read again, in a loop, whenever they are needed: unrolled they would not fit the registers.
_UNROLLED = 8


class Parts:
    """What the blocks of an instance have found: one tuple of values per instance for each rank."""

    def __init__(self, number: int, part: Callable[[Any], Values]) -> None:
        self.number = number
        self.first = part(0)
        self._rest = part if number > _UNROLLED else [part(rank) for rank in range(1, number)]

    def total(self, term: Callable[..., Values]) -> Values:
        """The sums of the values of term(rank, *part) over all ranks."""
        start = term(0, *self.first)

        def add(total: Values, more: Values) -> Values:
            return tuple(a + b for a, b in zip(total, more, strict=True))

        if isinstance(self._rest, list):
            return functools.reduce(add, (term(i, *part) for i, part in enumerate(self._rest, 1)), start)
        part = self._rest
        total: Values = lax.fori_loop(1, self.number, lambda i, total: add(total, term(i, *part(i))), start)
        return total


def total(parts: Parts) -> Values:
    """The sums of all values."""
    return parts.total(lambda _, *values: values)


def merged_moments(parts: Parts, count: Callable[[Any], Any], positions: int, scale: Any) -> Values:
    """The moments of an instance from those of its parts (Chan et al. 1983), around the center of the first.

    Args:
      parts: of (center, delta, squares): the mean is center + delta, squares the sum of (scale * (x - mean))^2.
      count: the number of positions of a rank.
      positions: of the instance.
      scale: of the squares.
    """
    if parts.number == 1:
        return parts.first
    center = parts.first[0]

    def mean(own: jax.Array, delta: jax.Array) -> jax.Array:
        return (own - center) + delta

    (weighted,) = parts.total(lambda rank, own, delta, _: (count(rank) * mean(own, delta),))
    merged = weighted / positions
    (squares,) = parts.total(
        lambda rank, own, delta, squares: (squares + count(rank) * jnp.square(scale * (mean(own, delta) - merged)),)
    )
    return center, merged, squares


class Meeting(abc.ABC):
    """One thread block's view: which block it is, and what the others found.

    Attributes:
      index: of the instances that the block works on, with others.
      rank: of the block among those that share them.
      has_barriers: as of jaxnorm.gpu.copies.Copies: whether all threads have written when the others are told.
    """

    has_barriers = False
    index: Any
    rank: Any

    def __init__(self, tile: Tile, scratch: Any) -> None:
        self.tile = tile

    @staticmethod
    def scratch(tile: Tile) -> Any:
        """What it needs in shared memory."""
        return None

    @staticmethod
    def grid(tile: Tile) -> dict[str, Any]:
        """How to launch it, for plgpu.kernel."""
        return {"grid": (tile.thread_blocks,), "grid_names": ("blocks",)}

    def exchange(
        self, values: Sequence[jax.Array], write: Callable[..., None], read: Callable[..., jax.Array]
    ) -> Parts:
        """The values of all blocks.

        Args:
          values: of this block.
          write: write(value, rank, i) puts a value where read(rank, i) of another block finds it.
          read: the inverse.
        """
        for i, value in enumerate(values):
            write(value, self.rank, i)
        self.meet()
        return Parts(self.tile.parts, lambda rank: tuple(read(rank, i) for i in range(len(values))))

    @abc.abstractmethod
    def meet(self) -> None:
        """Until all blocks have come here; what they wrote to global memory can be read then."""


class Alone(Meeting):
    has_barriers = True

    def __init__(self, tile: Tile, scratch: Any) -> None:
        super().__init__(tile, scratch)
        # Before Hopper a block that asked for its place in a cluster would abort the compiler.
        self.index, self.rank = lax.axis_index("blocks"), 0

    def exchange(self, values: Sequence[jax.Array], write: Any, read: Any) -> Parts:
        return Parts(1, lambda _: tuple(values))

    def meet(self) -> None:
        """There is nobody to wait for."""


class Cluster(Meeting):
    # All threads of all blocks take part in the fence.
    has_barriers = True

    def __init__(self, tile: Tile, scratch: Any) -> None:
        super().__init__(tile, scratch)
        self.index, self.rank = lax.axis_index("blocks"), lax.axis_index("cluster")
        self.barrier = scratch

    @staticmethod
    def scratch(tile: Tile) -> Any:
        return plgpu.ClusterBarrier(collective_axes=("cluster",))

    @staticmethod
    def grid(tile: Tile) -> dict[str, Any]:
        return {
            "grid": (tile.thread_blocks // tile.parts,),
            "grid_names": ("blocks",),
            "cluster": (tile.parts,),
            "cluster_names": ("cluster",),
        }

    def meet(self) -> None:
        # The barrier is there for the interpreter, which checks it. It orders the blocks, but says nothing about
        # memory: the PTX does, a release and an acquire by all threads at cluster scope, and the interpreter skips it.
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)
        _cluster_fence()


WAYS: dict[str, type[Meeting]] = {"alone": Alone, "cluster": Cluster}


def way(tile: Tile) -> type[Meeting]:
    return WAYS[tile.meeting]


def _cluster_fence() -> None:
    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def fence(_: Any) -> None:
        for instruction in ("arrive.release.aligned", "wait.acquire.aligned"):
            inline_ptx(f"barrier.cluster.{instruction};", has_side_effects=True, convergent=True)

    fence()
