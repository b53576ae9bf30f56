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
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import memref

from jaxnorm.gpu.devices import interpreted
from jaxnorm.gpu.tile import Tile

Values = tuple[jax.Array, ...]
# Blocks of a group wait for each other as long as one of them needs to read and add up its part: milliseconds, or
# seconds where a tool watches every access.
_PATIENCE_NS = 20_000_000_000
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


def merged_moments(
    parts: Parts, count: Callable[[Any], Any], positions: int, scale: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Center, delta and variance of an instance from the moments of its parts (Chan et al. 1983).

    Args:
      parts: of (center, delta, squares): the mean is center + delta / scale, and squares the sum of
        (scale * (x - mean))^2. The center of the first part becomes that of the instance.
      count: the number of positions of a rank.
      positions: of the instance.
      scale: as above; of the variance its square.
    """
    if parts.number == 1:
        center, delta, squares = parts.first
        return center, delta, squares / positions
    center = parts.first[0]

    def mean(own: jax.Array, delta: jax.Array) -> jax.Array:
        mean: jax.Array = scale * (own - center) + delta
        return mean

    weighted: jax.Array
    (weighted,) = parts.total(lambda rank, own, delta, _: (count(rank) * mean(own, delta),))
    merged = weighted / positions
    (squares,) = parts.total(
        lambda rank, own, delta, squares: (squares + count(rank) * jnp.square(mean(own, delta) - merged),)
    )
    variance: jax.Array = squares / positions
    return center, merged, variance


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


class Group(Meeting):
    """Blocks take their place in the order in which they start, from a counter that every block adds 1 to.

    So a block never waits for one that cannot start: of the groups that are not complete, the first has all earlier
    ones behind it, and all blocks that run and wait are its own; they are fewer than the device runs at once
    (jaxnorm.gpu.tiling sees to that), so that there is room for the next one, which is in this group too.
    """

    # Around the counter.
    has_barriers = True

    def __init__(self, tile: Tile, scratch: Any) -> None:
        super().__init__(tile, scratch)
        groups = tile.thread_blocks // tile.parts
        # XLA sets them to 0 before each launch.
        counters = pl.get_global(plgpu.SemaphoreType.REGULAR((groups + 1,)))
        ticket = _take_ticket(counters.at[pl.ds(groups, 1)], scratch)
        self.index, self.rank = lax.div(ticket, tile.parts), lax.rem(ticket, tile.parts)
        self.counter = counters.at[pl.ds(self.index, 1)]

    @staticmethod
    def scratch(tile: Tile) -> Any:
        return plgpu.SMEM((1,), jnp.int32)

    def meet(self) -> None:
        _arrive_and_wait(self.counter, self.tile.parts)


def way(tile: Tile) -> type[Meeting]:
    """The class for a tile. The interpreter has no counters: there a group is a cluster, of whatever size."""
    ways: dict[str, type[Meeting]] = {"alone": Alone, "cluster": Cluster, "group": Cluster if interpreted() else Group}
    return ways[tile.meeting]


def _take_ticket(counter: Any, slot: Any) -> Any:
    """The value of the counter, the same for all threads of the block, after which it is one more."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))  # type: ignore[untyped-decorator]
    def take(_: Any, counter: Any, slot: Any) -> None:
        i32, one = ir.IntegerType.get_signless(32), "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;"
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            ticket = utils.inline_ptx(one, utils.memref_ptr(counter), result_types=i32, has_side_effects=True)
            memref.store(ticket, slot, [utils.c(0, ir.IndexType.get())])
        utils.warpgroup_barrier()

    take(counter, slot)
    return slot[0]


def _arrive_and_wait(counter: Any, parts: int) -> None:
    """Adds 1 to the counter, and returns when it is at least `parts`.

    One thread does it, with a release at first and an acquire at last; the barriers around it pass both on to all
    threads. A block that never comes must not hang the GPU: after _PATIENCE_NS the kernel traps, and the launch fails.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))  # type: ignore[untyped-decorator]
    def meet(_: Any, counter: Any) -> None:
        utils.warpgroup_barrier()
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            utils.inline_ptx(
                f"""{{
                .reg .pred waiting, late;
                .reg .u32 seen;
                .reg .u64 start, now;
                red.release.gpu.global.add.u32 [$0], 1;
                mov.u64 start, %globaltimer;
                again:
                ld.relaxed.gpu.global.u32 seen, [$0];
                setp.lt.u32 waiting, seen, {parts};
                mov.u64 now, %globaltimer;
                sub.u64 now, now, start;
                setp.gt.u64 late, now, {_PATIENCE_NS};
                and.pred late, late, waiting;
                @late trap;
                @waiting bra again;
                fence.acq_rel.gpu;
                }}""",
                utils.memref_ptr(counter),
                has_side_effects=True,
            )
        utils.warpgroup_barrier()

    meet(counter)


def _cluster_fence() -> None:
    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def fence(_: Any) -> None:
        for instruction in ("arrive.release.aligned", "wait.acquire.aligned"):
            utils.inline_ptx(f"barrier.cluster.{instruction};", has_side_effects=True, convergent=True)

    fence()
