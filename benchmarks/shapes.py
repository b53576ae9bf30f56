"""The shapes that are measured: feature maps of real networks, and random ones. This module needs no JAX."""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Sequence
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
    """What is measured or counted at a time: activation(norm(x) + residual).

    Attributes:
      name: of a listed shape.
      residual: whether there is one.
      seed: of a random shape.
      group_size: of group norm; None for instance norm.
    """

    name: str
    shape: Shape
    layout: Layout
    dtype: str
    pass_name: Pass = "step"
    activation: str = "relu"
    residual: bool = False
    seed: int | None = None
    group_size: int | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Case":
        batch, spatial, channels = fields["shape"]
        return cls(**fields | {"shape": Shape(batch, tuple(spatial), channels)})

    @property
    def array(self) -> tuple[int, ...]:
        return self.shape.array(self.layout)

    def __str__(self) -> str:
        start = self.name if self.seed is None else f"seed {self.seed}"
        groups = [] if self.group_size is None else [f"groups of {self.group_size}"]
        array = f"{start}: {self.layout} {self.array} {self.dtype} {self.activation}"
        return ", ".join([array, *["residual"] * self.residual, *groups])

    @property
    def groups(self) -> str:
        """The size of the groups, roughly."""
        most = {1: "of 1", 7: "of 2 to 7", 31: "of 8 to 31", 64: "of 32 to 64"}
        return "" if self.group_size is None else next(name for size, name in most.items() if self.group_size <= size)


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

# Batches that fill a GPU, with the layouts and dtypes that are counted on code compiled for one.
_BOTH, _HALF = DTYPES, ("bfloat16",)
ON_A_GPU: list[tuple[Shape, Layout, tuple[str, ...]]] = [
    (Shape(8, (64, 64), 256), "channels-last", _BOTH),
    (Shape(2, (128, 128), 128), "channels-last", _BOTH),
    (Shape(4, (32, 32), 512), "channels-last", _BOTH),
    (Shape(1, (256, 256), 64), "channels-last", _BOTH),
    (Shape(1, (512, 512), 64), "channels-last", _BOTH),
    (Shape(2, (64, 64, 64), 32), "channels-last", _BOTH),
    (Shape(2, (640, 480), 32), "channels-last", _HALF),
    (Shape(1, (96, 96, 96), 32), "channels-last", _HALF),
    # More than any GPU holds in shared memory.
    (Shape(2, (128, 128, 128), 32), "channels-last", _HALF),
    (Shape(16, (15, 15), 64), "channels-first", _BOTH),
    (Shape(8, (7, 7, 7), 32), "channels-first", _BOTH),
]


def listed(names: Sequence[str], layouts: Sequence[Layout] = LAYOUTS, dtypes: Sequence[str] = DTYPES) -> list[Case]:
    """Every combination for the shapes of these names."""
    found = SHAPES | TINY
    return [
        Case(name, found[name], layout, dtype, pass_name)
        for dtype, layout, name, pass_name in itertools.product(dtypes, layouts, names, PASSES)
    ]


def listed_on_a_gpu(shapes: int | None = None) -> list[Case]:
    """The first so many shapes, or all, with ReLU and without a residual."""
    return [Case("listed", shape, layout, dtype) for shape, layout, dtypes in ON_A_GPU[:shapes] for dtype in dtypes]


def with_groups(cases: list[Case], groups: int) -> list[Case]:
    """Those whose channels stand last and form so many groups of several, with group norm."""
    return [
        dataclasses.replace(case, group_size=case.shape.channels // groups)
        for case in cases
        if case.layout == "channels-last" and case.shape.channels > groups and case.shape.channels % groups == 0
    ]


def random_cases(seed: int, count: int) -> list[Case]:
    """Random arrays of 2e4 to 4e6 elements, forward and in a training step.

    Sizes are uniform in their logarithms: 1 to 128 samples, 1 to 3 spatial axes of 2 to 256, 1 to 512 channels. Each
    activation occurs equally often; one case in four has a residual.
    """
    rng = random.Random(seed)
    size = functools.partial(_size, rng)
    arrays: list[tuple[Shape, Layout, str]] = []
    while len(arrays) < count:
        shape = Shape(size(1, 128), tuple(size(2, 256) for _ in range(rng.randint(1, 3))), size(1, 512))
        array = (shape, rng.choice(LAYOUTS), rng.choice(DTYPES))
        if 2e4 <= shape.size <= 4e6:
            arrays.append(array)
    return [
        Case("random", *array, pass_name, ACTIVATIONS[i % len(ACTIVATIONS)], residual=i % 4 == 3, seed=seed)
        for i, array in enumerate(arrays)
        for pass_name in PASSES
    ]


def random_groups(seed: int, count: int) -> list[Case]:
    """The same for group norm, channels-last, as Flax's layer wants them.

    1 to 64 channels per group, 1 to 64 groups, up to 1024 channels, 1 to 32 samples.
    """
    rng = random.Random(seed)
    size = functools.partial(_size, rng)
    found: list[Case] = []
    while len(found) < count * len(PASSES):
        group_size, spatial = size(1, 64), tuple(size(2, 256) for _ in range(rng.randint(1, 3)))
        shape = Shape(size(1, 32), spatial, group_size * size(1, 64))
        if shape.channels > 1024 or not 2e4 <= shape.size <= 4e6:
            continue
        i, dtype = len(found) // len(PASSES), rng.choice(DTYPES)
        activation = ACTIVATIONS[i % len(ACTIVATIONS)]
        found += [
            Case("random", shape, "channels-last", dtype, pass_name, activation, i % 4 == 3, seed, group_size)
            for pass_name in PASSES
        ]
    return found


def _size(rng: random.Random, low: int, high: int) -> int:
    """Uniform in its logarithm."""
    # We round down from a range that ends one higher; otherwise the largest size would almost never occur.
    return int(low * ((high + 1) / low) ** rng.random())


def random_blocks(seed: int, count: int, elements: tuple[int, int]) -> list[Case]:
    """Random arrays between two matmuls, with so many elements, for GPUs and TPUs.

    Half of the sizes are 2^k or 3 * 2^k, as networks have them, because XLA compiles those differently. Channels are
    multiples of 8, because others are padded for the tensor cores in half precision, with or without a norm; and they
    are fewer than a quarter of the rows, so the weights are small beside x.
    """
    rng = random.Random(seed)

    def size(low: float, high: float, *, is_round: bool) -> int:
        value = 2 ** rng.uniform(low, high)
        return rng.choice((1, 3)) * 2 ** round(math.log2(value)) if is_round else round(value)

    cases: list[Case] = []
    while len(cases) < count:
        is_round = rng.random() < 0.5
        spatial = tuple(size(2, 8, is_round=is_round) for _ in range(rng.randint(1, 3)))
        shape = Shape(size(0, 5, is_round=False), spatial, 8 * size(0, 6, is_round=is_round))
        # Channels-last twice as often, as networks in JAX have it.
        layout = rng.choice(("channels-last", "channels-last", "channels-first"))
        if elements[0] <= shape.size <= elements[1] and 4 * shape.channels <= shape.batch * math.prod(spatial):
            cases.append(Case("random", shape, layout, rng.choice(DTYPES), "step", rng.choice(ACTIVATIONS), seed=seed))
    return cases
