"""The tiles: what they promise for any shape and device, what they prefer, and the reasons where there is none."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnorm.gpu.devices import DEVICES
from jaxnorm.gpu.ranking import is_full, microseconds
from jaxnorm.gpu.tiling import NoTile, find_tile, is_worth_meeting, tile_of_rows

H100 = DEVICES["H100"]
HOPPER_AND_NEWER = [device for device in DEVICES.values() if device.compute_capability >= (9, 0)]

views = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 70_000), st.integers(2, 2_000)),
    st.tuples(st.integers(1, 40), st.integers(1, 70_000), st.integers(1, 200).map(lambda n: 8 * n)),
    st.tuples(st.integers(1, 5_000), st.integers(1, 400_000), st.just(1)),
    st.tuples(st.integers(1, 5_000), st.integers(1, 400).map(lambda n: 8 * n), st.just(1)),
)
calls = st.tuples(views, st.sampled_from([2, 4]), st.integers(1, 3), st.sampled_from(HOPPER_AND_NEWER))


@settings(max_examples=500, deadline=None)
@given(calls)
def test_a_tile_fits_and_divides(call):
    view, itemsize, arrays, device = call
    tile = find_tile(view, itemsize, arrays, device)
    if isinstance(tile, NoTile):
        assert tile.reason
        return
    assert (tile.arrays, tile.itemsize) == (arrays, itemsize)
    assert tile.arrays * tile.tile_bytes < tile.shared_memory <= device.shared_memory
    assert tile.parts in (1, 2, 4, 8)
    assert tile.row_bytes in (16, 32, 64, 128)
    assert tile.rows <= 256
    assert tile.rows % tile.chunk == 0
    # Whole instructions: 128 threads with 4 elements each.
    assert tile.chunk * tile.lanes % 512 == 0
    assert tile.positions == view[1]
    outer, rows, lanes = tile.shape
    assert outer * rows * lanes == view[0] * view[1] * view[2]
    # Vectors over the lanes are read and written without a check of bounds.
    assert tile.reduces == "lanes" or lanes % tile.lanes == 0


@settings(max_examples=200, deadline=None)
@given(calls)
def test_every_row_and_lane_is_covered_once(call):
    view, itemsize, arrays, device = call
    tile = find_tile(view, itemsize, arrays, device)
    if isinstance(tile, NoTile):
        return
    _, rows, lanes = tile.shape
    if tile.reduces == "lanes":
        row_starts = [index * tile.rows for index in range(tile.blocks)]
        lane_starts = [box * tile.lanes for box in range(tile.boxes)]
    else:
        row_starts = [
            rank * tile.block_rows + box * tile.rows
            for rank, box in itertools.product(range(tile.parts), range(tile.boxes))
        ]
        lane_starts = [index * tile.lanes for index in range(tile.blocks)]
    assert _covered(row_starts, tile.rows, rows) == list(range(rows))
    assert _covered(lane_starts, tile.lanes, lanes) == list(range(lanes))
    assert tile.thread_blocks == tile.shape[0] * tile.blocks * tile.parts
    assert tile.ragged == (len(row_starts) * tile.rows > rows if tile.reduces != "lanes" else lanes % tile.lanes != 0)


def _covered(starts, width, size):
    return [i for start in starts for i in range(start, min(start + width, size))]


@settings(max_examples=200, deadline=None)
@given(calls)
def test_no_tile_that_fits_is_ranked_before_it(call):
    view, itemsize, arrays, device = call
    tile = find_tile(view, itemsize, arrays, device)
    if isinstance(tile, NoTile) or tile.reduces != "rows" or tile.row_bytes == 16:
        return
    rank = (not is_full(tile, device), microseconds(tile, device))
    widths = [n // itemsize for n in (128, 64, 32) if view[2] % (n // itemsize) == 0]
    for lanes, cluster in itertools.product(widths, (1, 2, 4, 8)):
        other = tile_of_rows("rows", view, lanes, cluster, itemsize, arrays)
        if other.shared_memory <= device.shared_memory and is_worth_meeting(other):
            assert rank <= (not is_full(other, device), microseconds(other, device))


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
    assert first * 16 >= of


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
        # nothing wider than half a sector fits
        ((1, 65536, 64), 4, 1, 16, 8),
        # channels that only 16 bytes divide
        ((4, 1024, 12), 4, 1, 16, 1),
        # channels-first, a cluster per instance
        ((64, 65536, 1), 4, 1, 128, 8),
        ((2048, 4096, 1), 4, 1, 128, 1),
    ],
)
def test_preferences_on_h100(view, itemsize, arrays, row_bytes, cluster):
    tile = find_tile(view, itemsize, arrays, H100)
    assert (tile.row_bytes, tile.parts) == (row_bytes, cluster)


def test_small_instances_share_a_thread_block():
    tile = find_tile((8192, 196, 1), 4, 1, H100)
    assert (tile.reduces, tile.rows, tile.thread_blocks) == ("lanes", 16, 512)


def test_less_shared_memory_means_larger_clusters():
    large, small = (find_tile((512, 49152, 1), 4, 1, DEVICES[name]) for name in ("H100", "RTX 5090"))
    assert (large.parts, small.parts) == (4, 8)


@pytest.mark.parametrize(
    ("view", "itemsize", "arrays", "device", "reason"),
    [
        ((8, 4096, 256), 4, 1, "A100", "needs compute capability 9.0 .* this is 8.0"),
        ((8, 4096, 256), 8, 1, "H100", "these have 8 bytes"),
        ((8, 4096, 3), 4, 1, "H100", "the 3 channels take 12 bytes"),
        ((24, 225, 1), 4, 1, "H100", "the 225 positions of an instance take 900 bytes"),
        ((1, 65536, 64), 4, 2, "H100", "4 channels of a sample.* 2 arrays take 2097152 bytes.* has 1859584"),
        ((1, 16_777_216, 1), 4, 1, "H100", "an instance of 16777216 positions and 1 array take"),
        ((0, 4096, 64), 4, 1, "H100", "nothing to normalize"),
    ],
)
def test_reasons(view, itemsize, arrays, device, reason):
    none = find_tile(view, itemsize, arrays, DEVICES[device])
    assert isinstance(none, NoTile)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(str(none))
