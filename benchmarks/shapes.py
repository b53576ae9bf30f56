"""The shapes that are measured: normalized feature maps of real networks, and a few sizes that are awkward."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

Layout = Literal["channels-last", "channels-first"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
CHANNEL_AXIS: dict[Layout, int] = {"channels-last": -1, "channels-first": 1}


class Shape(NamedTuple):
    """A batch of feature maps."""

    batch: int
    spatial: tuple[int, ...]
    channels: int

    def array(self, layout: Layout) -> tuple[int, ...]:
        if layout == "channels-last":
            return (self.batch, *self.spatial, self.channels)
        return (self.batch, self.channels, *self.spatial)

    @property
    def size(self) -> int:
        return self.batch * math.prod(self.spatial) * self.channels


SUITE = {
    # Generator for 256 px photographs (Zhu et al. 2017), trained one image at a time.
    "CycleGAN 256": Shape(1, (256, 256), 64),
    "CycleGAN 128": Shape(1, (128, 128), 128),
    "CycleGAN 64": Shape(1, (64, 64), 256),
    # Fast style transfer (Johnson et al. 2016 with the norm of Ulyanov et al.), four crops of 128 px.
    "style 128": Shape(4, (128, 128), 32),
    "style 64": Shape(4, (64, 64), 64),
    "style 32": Shape(4, (32, 32), 128),
    # nnU-Net 3-D (Isensee et al. 2021), patches of 64^3, two at a time; the finest level one, for a small machine.
    "nnU-Net 64^3": Shape(1, (64, 64, 64), 32),
    "nnU-Net 32^3": Shape(2, (32, 32, 32), 64),
    "nnU-Net 16^3": Shape(2, (16, 16, 16), 128),
    "nnU-Net 8^3": Shape(2, (8, 8, 8), 256),
    "nnU-Net 4^3": Shape(2, (4, 4, 4), 320),
    "digits": Shape(32, (28, 28), 16),
}
# Takes no time: to see whether the benchmark itself works.
TINY = {"tiny": Shape(2, (5, 3), 4)}


class Sweep(NamedTuple):
    """One size grows, the others stay."""

    layout: Layout
    sizes: tuple[int, ...]
    shape: Callable[[int], Shape]


# Powers of two and their neighbours, sides of 15 (225), and numbers without small factors. A batch of eight makes small
# sizes long enough to time. Arrays stay below 32 MiB: larger ones glibc's malloc gets from the system at every call,
# which is a step in the time of whatever is called.
_POSITIONS = (64, 225, 256, 500, 512, 1001, 1024, 2048, 4095, 4096, 4097, 10000)
_CHANNELS = (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 48, 64, 65, 100, 127, 128)
SWEEPS = {
    "R, channels-last": Sweep("channels-last", _POSITIONS, lambda positions: Shape(8, (positions,), 64)),
    "R, channels-first": Sweep("channels-first", _POSITIONS, lambda positions: Shape(8, (positions,), 64)),
    "K": Sweep("channels-last", _CHANNELS, lambda channels: Shape(8, (4096,), channels)),
    "B": Sweep("channels-last", (1, 2, 3, 4, 7, 8, 16, 32, 33), lambda batch: Shape(batch, (1024,), 64)),
}
