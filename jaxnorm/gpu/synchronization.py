"""How the thread blocks that share an instance wait for each other, and how they merge what each of them found.

    Alone     a block has its instances to itself
    Cluster   up to 8 blocks, which the hardware starts together (Hopper and newer)
    Group     any number of blocks, which wait at a counter in global memory

Every block writes partial results, a few numbers per instance, to global memory. Then all wait, and each reads and
merges the partial results of all.
"""

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import memref

from jaxnorm.gpu.copies import registers
from jaxnorm.gpu.devices import interpreted
from jaxnorm.gpu.tile import CLUSTERS, ELEMENTS_PER_STEP, Tile

# Blocks of a group wait for each other as long as one of them needs to read and add up its part: milliseconds, or
# seconds where a tool watches every access.
_PATIENCE_NS = 20_000_000_000
# Partial results of many blocks stay in registers if they take up to this many chunks, 3 values in 4 registers each.
_MOST_CHUNKS_IN_REGISTERS = 3

# A value per instance for each of some quantities, such as a sum and a sum of squares.
Values = tuple[jax.Array, ...]


class Synchronization(abc.ABC):
    """One thread block's view.

    Attributes:
      index: says which instances the block works on, with the blocks that share them.
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
    def wait_for_all(self) -> None:
        """Returns when all threads of all blocks are here; what they wrote to global memory can be read then."""


class Alone(Synchronization):
    def __init__(self, tile: Tile, scratch: Any) -> None:
        super().__init__(tile, scratch)
        # Before Hopper a block that asked for its place in a cluster would abort the compiler.
        self.index, self.rank = lax.axis_index("blocks"), 0

    def wait_for_all(self) -> None:
        """Does nothing: there are no other blocks."""


class Cluster(Synchronization):
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
            "grid": (tile.thread_blocks // tile.blocks_per_instance,),
            "grid_names": ("blocks",),
            "cluster": (tile.blocks_per_instance,),
            "cluster_names": ("cluster",),
        }

    def wait_for_all(self) -> None:
        # The barrier orders the blocks, but says nothing about memory; it is here because the interpreter checks it.
        # The fence orders memory, by a release and an acquire of all threads; the interpreter skips it.
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)
        _cluster_fence()


class Group(Synchronization):
    """Blocks are numbered in the order in which they start, by a counter that every block adds 1 to.

    So a block never waits for one that cannot start. Of the groups that are not complete, the first has all earlier
    groups behind it, so all blocks that run and wait are its own. They are fewer than the device runs at once, which
    jaxnorm.gpu.tile sees to, so there is room for the next block, and it belongs to this group too.
    """

    def __init__(self, tile: Tile, scratch: Any) -> None:
        super().__init__(tile, scratch)
        groups = tile.thread_blocks // tile.blocks_per_instance
        # XLA sets them to 0 before each launch.
        counters = pl.get_global(plgpu.SemaphoreType.REGULAR((groups + 1,)))
        ticket = _take_ticket(counters.at[pl.ds(groups, 1)], scratch)
        self.index, self.rank = lax.div(ticket, tile.blocks_per_instance), lax.rem(ticket, tile.blocks_per_instance)
        self.counter = counters.at[pl.ds(self.index, 1)]

    @staticmethod
    def scratch(tile: Tile) -> Any:
        return plgpu.SMEM((1,), jnp.int32)

    def wait_for_all(self) -> None:
        _arrive_and_wait(self.counter, self.tile.blocks_per_instance)


def strategy(tile: Tile) -> type[Synchronization]:
    """The class for a tile. The interpreter has no counters: there a group is a cluster, of whatever size."""
    classes: dict[str, type[Synchronization]] = {
        "alone": Alone,
        "cluster": Cluster,
        "group": Cluster if interpreted() else Group,
    }
    return classes[tile.synchronization]


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


def _arrive_and_wait(counter: Any, blocks: int) -> None:
    """Adds 1 to the counter, and returns when it is at least `blocks`.

    One thread does it. Its first access is a release, and the load that sees the count is an acquire, since a fence
    would be one more trip to the memory. The barriers before and after pass both on to all threads. A block that never
    comes must not hang the GPU: after _PATIENCE_NS the kernel traps, and the launch fails.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))  # type: ignore[untyped-decorator]
    def wait(_: Any, counter: Any) -> None:
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
                setp.lt.u32 waiting, seen, {blocks};
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

    wait(counter)


def _cluster_fence() -> None:
    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def fence(_: Any) -> None:
        for instruction in ("arrive.release.aligned", "wait.acquire.aligned"):
            utils.inline_ptx(f"barrier.cluster.{instruction};", has_side_effects=True, convergent=True)

    fence()


class PartialResults(abc.ABC):
    """What the blocks that share an instance have found: a tuple of values per instance for each rank.

    Attributes:
      first: the values of rank 0.
    """

    first: Values

    @abc.abstractmethod
    def spread(self, value: jax.Array) -> jax.Array:
        """A value per instance in a form that a term can be made of."""

    @abc.abstractmethod
    def total(self, term: Callable[..., Values]) -> Values:
        """The sums over all ranks of the values of term(rank, *values)."""


class Few(PartialResults):
    """Those of a cluster: the values of each rank are in registers of their own."""

    def __init__(self, values: Sequence[Values]) -> None:
        self.first, self._values = values[0], values

    def spread(self, value: jax.Array) -> jax.Array:
        return value

    def total(self, term: Callable[..., Values]) -> Values:
        return functools.reduce(_add, (term(rank, *values) for rank, values in enumerate(self._values)))


class Many(PartialResults):
    """Those of a group: many ranks at a time, one in each row of a chunk, or for "both" in each of its positions.

    They are read whenever they are needed, unless they fit into registers.

    Args:
      tile: of the thread blocks.
      first: the values of the first rank.
      read: read(i, start, count) is value i in that many rows of partials_shape.
      spread: spread(value, shape) of a value per instance.
      sum_up: the sum of a chunk per instance.
    """

    def __init__(
        self,
        tile: Tile,
        first: Values,
        *,
        read: Callable[[int, int, int], jax.Array],
        spread: Callable[..., jax.Array],
        sum_up: Callable[[jax.Array], jax.Array],
    ) -> None:
        self.tile, self.first = tile, first
        self._read, self._spread, self._sum_up = read, spread, sum_up
        self._chunk = (ELEMENTS_PER_STEP // tile.lanes, tile.lanes)
        starts = range(0, _rows(tile), self._chunk[0])
        fit = len(starts) <= _MOST_CHUNKS_IN_REGISTERS
        self._in_registers = {start: self._values(start) for start in starts} if fit else {}

    def spread(self, value: jax.Array) -> jax.Array:
        return self._spread(value, self._chunk)

    def total(self, term: Callable[..., Values]) -> Values:
        # Not a loop, so that the loads of all ranks are on their way at the same time.
        total: Values = functools.reduce(_add, self._terms(term))
        return tuple(map(self._sum_up, total))

    def _terms(self, term: Callable[..., Values]) -> Iterator[Values]:
        layout, (rows, lanes) = registers(self.tile.lanes), self._chunk
        row, lane = (plgpu.broadcasted_iota(jnp.int32, self._chunk, axis, layout=layout) for axis in (0, 1))
        for start in range(0, _rows(self.tile), rows):
            rank = row + start if self.tile.reduces == "rows" else (row + start) * lanes + lane
            found = term(rank, *(self._in_registers.get(start) or self._values(start)))
            # No block writes to what fills up the last chunk.
            yield tuple(jnp.where(rank < self.tile.blocks_per_instance, value, 0.0) for value in found)

    def _values(self, start: int) -> Values:
        return tuple(self._read(i, start, self._chunk[0]) for i in range(len(self.first)))


def are_few(tile: Tile) -> bool:
    """Whether the partial results of all blocks are held in registers at the same time, as those of any cluster are."""
    return tile.blocks_per_instance <= max(CLUSTERS)


def partials_shape(tile: Tile, positions: int) -> tuple[int, int]:
    """The shape of one partial value of all ranks, for each of the outer.

    Args:
      tile: of the thread blocks.
      positions: the values per instance that lie side by side.

    Returns:
      Rows and positions. Each row has one rank, but for "both" with many blocks: there it has one in each lane.
    """
    if are_few(tile):
        return tile.blocks_per_instance, positions
    return _rows(tile), positions if tile.reduces == "rows" else tile.lanes


def total(partials: PartialResults) -> Values:
    """The sums of all values."""
    return partials.total(lambda _, *values: values)


def merged_moments(
    partials: PartialResults, count: Callable[[Any], Any], positions: int, scale: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Center, delta and variance of an instance from the moments of its parts (Chan et al. 1983).

    Args:
      partials: (center, delta, squares) of each part: its mean is center + delta / scale, and squares the sum of
        (scale * (x - mean))^2. The center of the first part becomes that of the instance.
      count: the number of positions of a rank.
      positions: of the instance.
      scale: as above; the variance is scaled by its square.
    """
    center, around, unit = partials.first[0], partials.spread(partials.first[0]), partials.spread(scale)

    def mean(own: jax.Array, delta: jax.Array) -> jax.Array:
        mean: jax.Array = unit * (own - around) + delta
        return mean

    weighted: jax.Array
    (weighted,) = partials.total(lambda rank, own, delta, _: (count(rank) * mean(own, delta),))
    merged = weighted / positions
    of_all = partials.spread(merged)
    (squares,) = partials.total(
        lambda rank, own, delta, squares: (squares + count(rank) * jnp.square(mean(own, delta) - of_all),)
    )
    variance: jax.Array = squares / positions
    return center, merged, variance


def _rows(tile: Tile) -> int:
    """The rows that hold one value of many ranks, rounded up to whole chunks."""
    chunk = ELEMENTS_PER_STEP // tile.lanes
    rows = tile.blocks_per_instance if tile.reduces == "rows" else -(-tile.blocks_per_instance // tile.lanes)
    return -(-rows // chunk) * chunk


def _add(total: Values, more: Values) -> Values:
    return tuple(a + b for a, b in zip(total, more, strict=True))
