"""The shapes that are measured: feature maps of real networks, and random ones. This module needs no JAX."""

import dataclasses
import itertools
import math
import random
from typing import Any, Literal, NamedTuple, get_args

EPSILON = 1e-5
Layout = Literal["channels-last", "channels-first"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
CHANNEL_AXIS: dict[Layout, int] = {"channels-last": -1, "channels-first": 1}
DTYPES = ("float32", "bfloat16")
# A comparison, an exponential function, and one with a polynomial: names in jax.nn.
ACTIVATIONS = ("relu", "silu", "gelu")
Pass = Literal["forward", "step"]
PASSES: tuple[Pass, ...] = get_args(Pass)


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


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured at a time: activation(norm(x) + residual), the residual only if there is one.

    Attributes:
      name: of the shape in SHAPES, or the seed of a random one.
    """

    name: str
    shape: Shape
    layout: Layout
    dtype: str
    pass_name: Pass = "forward"
    activation: str = "relu"
    residual: bool = False

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Case":
        batch, spatial, channels = fields["shape"]
        return cls(**fields | {"shape": Shape(batch, tuple(spatial), channels)})

    @property
    def array(self) -> tuple[int, ...]:
        return self.shape.array(self.layout)

    def __str__(self) -> str:
        words = [self.name, self.layout, str(self.array), self.dtype, self.activation, *["residual"] * self.residual]
        return " ".join(words)


SHAPES = {
    # The generator for 256 px photographs of Zhu et al. 2017, trained one image at a time.
    "CycleGAN 256": Shape(1, (256, 256), 64),
    "CycleGAN 128": Shape(1, (128, 128), 128),
    "CycleGAN 64": Shape(1, (64, 64), 256),
    # Fast style transfer (Johnson et al. 2016 with the norm of Ulyanov et al.), four crops of 128 px.
    "style 128": Shape(4, (128, 128), 32),
    "style 64": Shape(4, (64, 64), 64),
    "style 32": Shape(4, (32, 32), 128),
    # nnU-Net 3-D (Isensee et al. 2021), patches of 64^3, two at a time; one at the finest level, for a small machine.
    "nnU-Net 64^3": Shape(1, (64, 64, 64), 32),
    "nnU-Net 32^3": Shape(2, (32, 32, 32), 64),
    "nnU-Net 16^3": Shape(2, (16, 16, 16), 128),
    "nnU-Net 8^3": Shape(2, (8, 8, 8), 256),
    "nnU-Net 4^3": Shape(2, (4, 4, 4), 320),
    "digits": Shape(32, (28, 28), 16),
}
# Takes almost no time: it shows whether a benchmark works.
TINY = {"tiny": Shape(2, (5, 3), 4)}


def listed(names: list[str], layouts: list[Layout] = LAYOUTS, dtypes: list[str] = DTYPES) -> list[Case]:
    """Every combination for the shapes of these names."""
    found = SHAPES | TINY
    return [
        Case(name, found[name], layout, dtype, pass_name)
        for dtype, layout, name, pass_name in itertools.product(dtypes, layouts, names, PASSES)
    ]


def random_cases(seed: int, count: int, elements: tuple[float, float] = (2e4, 4e6)) -> list[Case]:
    """So many arrays with a number of elements in that range, forward and in a training step.

    Sizes are uniform in their logarithms: 1 to 128 samples, 1 to 3 spatial axes of 2 to 256, 1 to 512 channels. Each
    activation occurs equally often; one case in four has a residual.
    """
    rng = random.Random(seed)

    def size(low: int, high: int) -> int:
        # We round down from a range that ends one higher; otherwise the largest size would almost never occur.
        return int(low * ((high + 1) / low) ** rng.random())

    arrays: list[tuple[Shape, Layout, str]] = []
    while len(arrays) < count:
        shape = Shape(size(1, 128), tuple(size(2, 256) for _ in range(rng.randint(1, 3))), size(1, 512))
        array = (shape, rng.choice(LAYOUTS), rng.choice(DTYPES))
        if elements[0] <= shape.size <= elements[1]:
            arrays.append(array)
    return [
        Case(f"seed {seed}", *array, pass_name, ACTIVATIONS[i % len(ACTIVATIONS)], residual=i % 4 == 3)
        for i, array in enumerate(arrays)
        for pass_name in PASSES
    ]
