"""How the thread blocks that share an instance meet to exchange what each has found in its part.

    Alone     a block has its instances to itself
    Cluster   up to 8 blocks, which the hardware starts together (Hopper and newer)
    Group     any number of blocks, which meet through a counter in global memory

What they exchange passes through global memory, a few numbers per instance: see jaxnorm.gpu.parts.
"""

import abc
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import memref

from jaxnorm.gpu.devices import interpreted
from jaxnorm.gpu.tile import Tile

# Blocks of a group wait for each other as long as one of them needs to read and add up its part: milliseconds, or
# seconds where a tool watches every access.
_PATIENCE_NS = 20_000_000_000


class Meeting(abc.ABC):
    """One thread block's view: which block it is, and what the others found.

    Attributes:
      index: of the instances that the block works on, with others.
      rank: of the block among those that share them.
    """

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

    @abc.abstractmethod
    def meet(self) -> None:
        """Until all threads of all blocks have come here; what they wrote to global memory can be read then."""


class Alone(Meeting):
    def __init__(self, tile: Tile, scratch: Any) -> None:
        super().__init__(tile, scratch)
        # Before Hopper a block that asked for its place in a cluster would abort the compiler.
        self.index, self.rank = lax.axis_index("blocks"), 0

    def meet(self) -> None:
        """There is nobody to wait for."""


class Cluster(Meeting):
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

    One thread does it, with a release at first and an acquire at last: by the very load that sees the count, since a
    fence of its own would be one more trip to the memory. The barriers around it pass both on to all threads. A block
    that never comes must not hang the GPU: after _PATIENCE_NS the kernel traps, and the launch fails.
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
                ld.acquire.gpu.global.u32 seen, [$0];
                setp.lt.u32 waiting, seen, {parts};
                mov.u64 now, %globaltimer;
                sub.u64 now, now, start;
                setp.gt.u64 late, now, {_PATIENCE_NS};
                and.pred late, late, waiting;
                @late trap;
                @waiting bra again;
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
