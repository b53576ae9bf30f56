"""Where the kernel has been seen to be right: what implementation=None may take by itself.

A wrong barrier hangs a GPU, or spoils a number in a million, and neither an interpreter nor a compiler sees that. So
the kernel is taken by name alone until `python -m jaxnorm selfcheck` has found it right on that kind of GPU, with that
way of copying and of meeting. docs/gpu.md says how to add an entry.
"""

from typing import NamedTuple

from jaxnorm.gpu.devices import Device
from jaxnorm.gpu.tile import Copies, Meeting, NoTile, Tile

NOT_PROVEN = NoTile("not used by default: unproven on this GPU. Pass implementation='pallas' to try it.")


class Way(NamedTuple):
    """How a tile works on a kind of GPU: what is proven, or is not."""

    compute_capability: tuple[int, int]
    copies: Copies
    meeting: Meeting


# The file of the selfcheck report, in benchmarks/results/, that proves each way.
PROVEN: dict[Way, str] = {}


def is_any_proven(device: Device) -> bool:
    """Whether some way is, on that kind of GPU."""
    return any(way.compute_capability == device.compute_capability for way in PROVEN)


def if_proven(tile: Tile | NoTile, device: Device) -> Tile | NoTile:
    """The tile where it is proven, else the reason why it is not taken by itself."""
    if isinstance(tile, NoTile) or Way(device.compute_capability, tile.copies, tile.meeting) in PROVEN:
        return tile
    return NOT_PROVEN
