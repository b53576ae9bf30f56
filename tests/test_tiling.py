"""The tiles: what they promise for any shape and device, what they prefer, and the reasons where there is none."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxnorm.gpu.block import values_shape
from jaxnorm.gpu.copies import first_of_span
from jaxnorm.gpu.cost import is_full, microseconds
from jaxnorm.gpu.devices import DEVICES, Device
from jaxnorm.gpu.synchronization import partials_shape
from jaxnorm.gpu.tile import MOST_BOXES, NoTile, bulk_tile, find_tile, fits, is_worth_sharing

H100 = DEVICES["H100"]

views = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 70_000), st.integers(2, 2_000)),
    st.tuples(st.integers(1, 40), st.integers(1, 70_000), st.integers(1, 200).map(lambda n: 8 * n)),
    st.tuples(st.integers(1, 4), st.integers(70_000, 4_000_000), st.integers(1, 8).map(lambda n: 8 * n)),
    st.tuples(st.integers(1, 5_000), st.integers(1, 400_000), st.just(1)),
    st.tuples(st.integers(1, 5_000), st.integers(1, 400).map(lambda n: 8 * n), st.just(1)),
)
# Arrays with more rows, lanes or instances than any GPU holds, and somewhat fewer.
huge_views = st.one_of(
    st.tuples(st.integers(2**20, 2**34), st.integers(1, 2_000), st.just(1)),
    st.tuples(st.integers(2**20, 2**33), st.integers(1, 50), st.integers(1, 8).map(lambda n: 8 * n)),
    st.tuples(st.integers(1, 2**12), st.integers(1, 500), st.integers(2**20, 2**29).map(lambda n: 8 * n)),
)
# Of a thread per element: without an activation, and with dear ones.
instructions = st.floats(8, 150)
others = (st.sampled_from([2, 4]), st.integers(1, 3), st.sampled_from(list(DEVICES.values())), instructions)
calls = st.tuples(views, *others)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(calls)
@example(((472, 2, 1), 2, 1, DEVICES["A100"], 8.0))
def test_a_tile_fits_and_divides(call):
    view, itemsize, arrays, device, *_ = call
    tile = find_tile(*call)
    if isinstance(tile, NoTile):
        assert tile.reason
        return
    assert (tile.arrays, tile.itemsize) == (arrays, itemsize)
    assert tile.arrays * tile.tile_bytes < tile.shared_memory <= device.shared_memory
    assert tile.row_bytes in (16, 32, 64, 128)
    assert tile.rows % tile.chunk == 0
    # Whole instructions: 128 threads with 4 elements each.
    assert tile.chunk * tile.lanes % 512 == 0
    assert tile.positions == view[1]
    outer, rows, lanes = tile.shape
    assert outer * rows * lanes == math.prod(view)
    # Vectors over the lanes are read and written without a check of bounds.
    assert tile.reduces == "lanes" or lanes % tile.lanes == 0
    if tile.copies == "bulk":
        assert device.compute_capability >= (9, 0)
        assert tile.rows <= 256
        assert tile.boxes <= MOST_BOXES


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(calls, st.sampled_from([2, 4, 8, 16, 32, 64]))
def test_a_block_holds_whole_groups(call, size):
    (batch, positions, channels), *others = call
    tile = find_tile((batch, positions, -(-channels // size) * size), *others, group_size=size)
    if isinstance(tile, NoTile):
        assert tile.reason
        return
    assert (tile.reduces, tile.group_size, tile.positions) == ("rows", size, positions * size)
    assert tile.lanes % size == 0


@pytest.mark.slow
@pytest.mark.parametrize("device", ["A100", "H100", "B200", "RTX 4090"])
def test_the_groups_of_autoencoders_have_tiles(device):
    for channels, itemsize, arrays in itertools.product([128, 256, 512, 1024], [2, 4], [1, 2, 3]):
        tile = find_tile((4, 64 * 64, channels), itemsize, arrays, DEVICES[device], group_size=channels // 32)
        assert not isinstance(tile, NoTile), tile.reason


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(calls)
def test_nobody_waits_for_a_block_that_cannot_run(call):
    view, _, _, device, *_ = call
    tile = find_tile(*call)
    if isinstance(tile, NoTile):
        return
    assert (tile.synchronization == "alone") == (tile.blocks_per_instance == 1)
    if tile.synchronization == "cluster":
        assert tile.blocks_per_instance in (2, 4, 8)
        assert device.compute_capability >= (9, 0)
    if tile.synchronization == "group":
        # An SM has room for one block at least: it fits.
        assert tile.blocks_per_instance <= device.sm_count
        # Groups may run one after another, and half a sector would be read twice then.
        assert tile.row_bytes >= 32 or view[2] == 1
        assert (tile.blocks_per_instance - 1) * tile.block_rows < tile.extent


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(calls)
def test_every_row_and_lane_is_covered_once(call):
    view, *_ = call
    tile = find_tile(*call)
    if isinstance(tile, NoTile):
        return
    _, rows, lanes = tile.shape
    assert tile.thread_blocks == tile.shape[0] * tile.blocks * tile.blocks_per_instance
    if tile.span is not None:
        # Whole instances, from one multiple of 16 bytes to another.
        assert tile.blocks * math.prod(tile.span) == math.prod(view)
        assert tile.span[1] == view[1]
        assert math.prod(tile.span) == tile.block_rows * tile.lanes
        assert tile.chunk <= tile.block_rows <= tile.rows < tile.block_rows + tile.chunk
        assert tile.row_bytes == 16
        return
    if tile.reduces == "lanes":
        assert _covered([index * tile.rows for index in range(tile.blocks)], tile.rows, rows) == list(range(rows))
        assert _covered([box * tile.lanes for box in range(tile.boxes)], tile.lanes, lanes) == list(range(lanes))
        assert tile.ragged == (lanes % tile.lanes != 0)
        return
    assert _covered([index * tile.lanes for index in range(tile.blocks)], tile.lanes, lanes) == list(range(lanes))
    seen = []
    for start in range(0, tile.blocks_per_instance * tile.block_rows, tile.block_rows):
        for at in range(start, start + tile.block_rows, tile.rows):
            beyond = at + tile.rows > rows
            assert not beyond or tile.ragged
            if beyond and tile.copies == "plain":
                # It is moved back to end with the instance, and stays among the rows of its own block.
                assert rows - tile.rows >= start
            seen.append((at, min(at + tile.rows, rows)))
    edges = [edge for piece in seen if piece[0] < piece[1] for edge in piece]
    assert edges[0] == 0
    assert edges[-1] == rows
    assert edges[1:-1:2] == edges[2::2]


def _covered(starts, width, size):
    return [i for start in starts for i in range(start, min(start + width, size))]


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.tuples(huge_views, *others))
def test_indices_fit_into_32_bits(call):
    """What the kernel multiplies, at its last thread block; a refusal says what would not fit."""
    tile = find_tile(*call)
    if isinstance(tile, NoTile):
        return
    outer, _, lanes = tile.shape
    ends = [outer, lanes, tile.thread_blocks]
    if tile.span is not None:
        ends += [tile.blocks * tile.block_rows, tile.blocks * tile.span[0]]
    elif tile.reduces == "lanes":
        ends += [tile.blocks * tile.rows, tile.boxes * tile.lanes]
    else:
        ends += [tile.blocks_per_instance * tile.block_rows, tile.blocks * tile.lanes]
    # Each is the end of something that is counted from 0.
    assert max(ends) <= 2**31 - 1


# Where only a span can start, and bulk copies, in both layouts, and small instances.
@pytest.mark.parametrize(
    ("positions", "channels", "itemsize", "device", "unit"),
    [
        (441, 1, 2, "A100", 8),
        (225, 1, 4, "H100", 4),
        (441, 1, 2, "B200", 8),
        (1, 8, 2, "H100", 1),
        (4096, 1, 2, "H100", 1),
        (64, 1, 4, "H100", 1),
    ],
)
def test_the_largest_batch(positions, channels, itemsize, device, unit):
    """The largest one that is admitted counts up to nearly 2^31, and the next one is refused with the reason."""

    def tile(units):
        return find_tile((units * unit, positions, channels), itemsize, 1, DEVICES[device])

    admitted, refused = 1, 2**34
    while refused - admitted > 1:
        middle = (admitted + refused) // 2
        admitted, refused = (admitted, middle) if isinstance(tile(middle), NoTile) else (middle, refused)
    largest = tile(admitted)
    assert 2**31 - 1 - 2**14 <= largest.largest_index <= 2**31 - 1
    assert "counts rows, instances and thread blocks with 32 bits, up to 2147483647" in tile(refused).reason
    if largest.span is not None:
        # The last instance, in the numbers of the device.
        begin = jnp.int32((largest.span[0] - 1) * positions)
        # The kernel is traced without 64-bit numbers, too.
        with jax.enable_x64(False):
            _, row, lane = first_of_span(largest, jnp.int32(largest.blocks - 1), begin)
        assert int(row) * largest.lanes + int(lane) == (admitted * unit - 1) * positions


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(calls, st.integers(2, 20))
def test_no_tile_that_fits_is_ranked_before_it(call, groups):
    view, itemsize, arrays, device, issued = call
    tile = find_tile(*call)
    if isinstance(tile, NoTile) or tile.reduces != "rows" or tile.row_bytes == 16 or tile.copies != "bulk":
        return
    widths = [n // itemsize for n in (128, 64, 32) if view[2] % (n // itemsize) == 0]
    ways = [*((parts, None) for parts in (1, 2, 4, 8)), (device.sm_count // groups, "group")]
    for lanes, (parts, meeting) in itertools.product(widths, ways):
        other = bulk_tile("rows", view, lanes, parts, itemsize, arrays, meeting)
        if fits(other, device) and is_worth_sharing(other):
            assert tile.blocks_per_instance * 2 <= device.sm_count
            assert rank(tile, device, issued) <= rank(other, device, issued)


def rank(tile, device, issued):
    """A group must be faster by a tenth."""
    handicap = 1.1 if tile.synchronization == "group" else 1
    return not is_full(tile, device), microseconds(tile, device, issued) * handicap


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(calls)
def test_every_block_of_a_group_gets_its_turn(call):
    """In the order of their tickets, with room for as few blocks as a group has, nobody waits forever.

    What waits is played with one block on each SM, the least that a tile promises, and for two kernels at once where a
    cluster would have done.
    """
    _, itemsize, arrays, device, *_ = call
    tile = find_tile(*call)
    if isinstance(tile, NoTile) or tile.synchronization != "group":
        return
    kernels = 2 if tile.blocks_per_instance * 2 <= device.sm_count else 1
    assert kernels == 2 or not any(
        fits(bulk_tile(tile.reduces, tile.shape, tile.lanes, parts, itemsize, arrays), device)
        for parts in (1, 2, 4, 8)
        if tile.copies == "bulk"
    )
    room, left = device.sm_count, [tile.thread_blocks] * kernels
    waiting = [0] * kernels
    while any(left):
        started = False
        for kernel in range(kernels):
            # As greedily as can be: each takes all the room there is.
            new = min(left[kernel], room)
            started |= new > 0
            left[kernel] -= new
            complete = (waiting[kernel] + new) // tile.blocks_per_instance * tile.blocks_per_instance
            room += complete - new
            waiting[kernel] += new - complete
        assert started
    assert waiting == [0] * kernels


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(calls)
def test_bytes_stay_at_the_floor(call):
    """What blocks exchange is little beside what they read, and no sector is read by two groups."""
    view, itemsize, arrays, *_ = call
    tile = find_tile(*call)
    if isinstance(tile, NoTile) or tile.blocks_per_instance == 1:
        return
    outer, positions = values_shape(tile)
    exchanged = 3 * 4 * outer * math.prod(partials_shape(tile, positions))
    assert exchanged <= math.prod(view) * itemsize * arrays / 20


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(calls)
def test_the_center_comes_from_a_sixteenth_at_least(call):
    """So that the sum of squares around it cancels as little as the tolerances allow for."""
    tile = find_tile(*call)
    if isinstance(tile, NoTile):
        return
    of = tile.extent if tile.reduces == "lanes" else tile.block_rows
    first = tile.first_boxes * (tile.lanes if tile.reduces == "lanes" else tile.rows)
    assert 1 <= tile.first_boxes <= tile.boxes
    assert first * 16 >= of or tile.first_boxes == tile.boxes


@pytest.mark.parametrize(("cluster", "per_sm", "resident"), [(1, 3, 396), (2, 1, 66), (4, 1, 31), (8, 1, 15)])
def test_clusters_that_an_h100_holds(cluster, per_sm, resident):
    assert H100.resident(cluster, per_sm) == resident


@pytest.mark.parametrize(
    ("view", "itemsize", "arrays", "row_bytes", "cluster"),
    [
        # three blocks at once on every SM; clusters of 4 would leave room for one
        ((8, 4096, 256), 4, 1, 128, 8),
        # dy too: three with narrower rows
        ((8, 4096, 256), 4, 2, 64, 8),
        # 128 blocks would leave SMs idle with wider rows
        ((16, 256, 512), 2, 1, 64, 1),
        # many small instances: no cluster
        ((32, 64, 512), 4, 1, 128, 1),
        # a cluster would hold no more than half a sector of each row
        ((1, 65536, 64), 4, 1, 64, 64),
        # 16 clusters of 8 with narrower rows would take two rounds of 15, and leave room for one block on an SM
        ((2, 16384, 128), 2, 2, 128, 64),
        # channels that only 16 bytes divide
        ((4, 1024, 12), 4, 1, 16, 1),
        # channels-first, a cluster per instance
        ((64, 65536, 1), 4, 1, 128, 4),
        ((2048, 4096, 1), 4, 1, 128, 1),
    ],
)
def test_preferences_on_h100(view, itemsize, arrays, row_bytes, cluster):
    tile = find_tile(view, itemsize, arrays, H100)
    assert (tile.row_bytes, tile.blocks_per_instance) == (row_bytes, cluster)


def test_a_group_where_clusters_of_8_would_leave_sms_idle():
    view, device = (3, 5001, 8), Device((9, 0), 20, 40 * 1024)
    assert fits(bulk_tile("rows", view, 8, 8, 4, 1), device)
    tile = find_tile(view, 4, 1, device)
    assert (tile.synchronization, tile.blocks_per_instance) == ("group", 10)


def test_small_instances_share_a_thread_block():
    tile = find_tile((8192, 196, 1), 4, 1, H100)
    assert (tile.reduces, tile.rows, tile.thread_blocks) == ("lanes", 16, 512)


def test_less_shared_memory_means_larger_clusters():
    large, small = (find_tile((512, 49152, 1), 4, 1, DEVICES[name]) for name in ("H100", "RTX 5090"))
    assert (large.blocks_per_instance, small.blocks_per_instance) == (2, 8)


@pytest.mark.parametrize(
    ("view", "itemsize", "arrays", "device", "how"),
    [
        # What no cluster holds, the whole device does.
        ((1, 262144, 64), 4, 2, "H100", ("bulk", "group")),
        ((1, 884736, 32), 2, 1, "H100", ("bulk", "group")),
        ((8, 4096, 256), 4, 1, "A100", ("plain", "alone")),
        ((8, 4096, 256), 4, 2, "A100", ("plain", "group")),
        ((2048, 4096, 1), 4, 1, "L40S", ("plain", "alone")),
        # Fewer rows than 4 instructions cover, and more than 2.
        ((5, 250, 4), 4, 2, "A100", ("plain", "alone")),
        # Rows that start anywhere.
        ((1024, 225, 1), 4, 1, "H100", ("span", "alone")),
        ((256, 343, 1), 2, 2, "RTX 4090", ("span", "alone")),
        ((32, 49, 1), 4, 1, "A100", ("span", "alone")),
    ],
)
def test_ways(view, itemsize, arrays, device, how):
    tile = find_tile(view, itemsize, arrays, DEVICES[device])
    assert (tile.copies, tile.synchronization) == how


@pytest.mark.parametrize(
    ("view", "itemsize", "arrays", "device", "reason"),
    [
        ((8, 4096, 256), 8, 1, "H100", "these have 8 bytes"),
        ((8, 4096, 3), 4, 1, "H100", ": 3 channels take 12 bytes"),
        ((6, 225, 1), 4, 1, "H100", "4 of 225 positions do, and 4 does not divide the 6 instances"),
        (
            *((64, 65025, 1), 4, 1, "H100"),
            "a span of 4 instances of 65025 positions in an array needs 1.0 MiB of shared memory: a thread block has "
            "227 KiB",
        ),
        (
            *((2, 2097152, 32), 2, 2, "A100"),
            "a slice of 2097152 positions and 16 channels in 2 arrays needs 128.6 MiB of shared memory: the GPU has "
            "17.2 MiB in all",
        ),
        ((1, 884736, 32), 2, 2, "H100", "needs 54.6 MiB of shared memory: the GPU has 29.3 MiB in all"),
        ((1, 67_108_864, 1), 4, 1, "H100", "an instance of 67108864 positions in an array needs 256.7 MiB"),
        ((1, 70_000, 4), 4, 1, "H100", "has 35 boxes of 256 rows in each of 8 thread blocks: .* for 32"),
        ((1, 200_000, 4), 4, 2, "A100", "needs 6.1 MiB of shared memory: a thread block has 163 KiB"),
        ((2, 9, 32), 4, 1, "A100", "an instance of 9 positions is less than"),
        ((0, 4096, 64), 4, 1, "H100", "nothing to normalize"),
    ],
)
def test_reasons(view, itemsize, arrays, device, reason):
    none = find_tile(view, itemsize, arrays, DEVICES[device])
    assert isinstance(none, NoTile)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(str(none))


def test_a_gpu_of_before_ampere():
    none = find_tile((8, 4096, 256), 4, 1, Device((7, 5), 40, 64 * 1024))
    assert "needs compute capability 8.0 .* this is 7.5".replace(".*", "(Ampere) or newer:") in none.reason
