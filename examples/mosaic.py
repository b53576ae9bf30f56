"""Draws a style with structure: a window of stained glass, colored cells between lines of lead."""

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

# Glass as cathedrals have it: cobalt, sapphire, ruby, amber, gold, emerald, turquoise, violet and some nearly clear.
GLASS = np.array(
    [
        (16, 52, 166),
        (22, 96, 200),
        (40, 140, 220),
        (178, 18, 40),
        (214, 60, 32),
        (238, 146, 24),
        (250, 206, 70),
        (18, 128, 84),
        (30, 170, 160),
        (104, 40, 140),
        (246, 236, 200),
    ]
)
SHARES = np.array([4, 4, 3, 3, 2, 3, 3, 2, 2, 1, 2])
LEAD = np.array((14, 13, 18))


def stained_glass(side: int = 256, *, cells: int = 110, lead: float = 3.4, seed: int = 0) -> Image.Image:
    """A square picture of Voronoi cells in saturated colors, each lighter in its middle, with dark lines between them.

    Args:
      side: of the picture, in pixels.
      cells: how many pieces of glass.
      lead: width of the lines, in pixels of a picture of 256.
      seed: of the pieces and their colors.
    """
    rng = np.random.default_rng(seed)
    # Drawn at twice the size and scaled down, so that the lines have smooth borders.
    y, x = np.mgrid[: 2 * side, : 2 * side] / (2 * side)
    pixels = np.stack([x, y], -1).reshape(-1, 2)
    centers = _spread(rng.random((cells, 2)), rng)
    (nearest, second), cell = _nearest_two(centers, pixels)
    colors = GLASS[rng.choice(len(GLASS), cells, p=SHARES / SHARES.sum())] * rng.uniform(0.75, 1.15, (cells, 1))

    from_border = (second - nearest) * 256  # about twice the distance from the border between two cells
    glow = 0.72 + 0.4 * np.clip(from_border / 16, 0, 1)
    grain = 1 + 0.06 * _streaks(rng, 2 * side).reshape(-1)
    glass = colors[cell] * (glow * grain)[:, None]
    is_glass = np.clip(from_border - lead, 0, 1)[:, None]
    painted = np.clip(is_glass * glass + (1 - is_glass) * LEAD, 0, 255).reshape(2 * side, 2 * side, 3)
    return Image.fromarray(painted.astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)


def _spread(centers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lloyd's relaxation on random points, so that no cell is much smaller than the others."""
    for _ in range(3):
        samples = rng.random((40 * len(centers), 2))
        _, cell = cKDTree(centers).query(samples)
        counts = np.maximum(np.bincount(cell, minlength=len(centers)), 1)
        sums = [np.bincount(cell, samples[:, axis], len(centers)) for axis in (0, 1)]
        centers = np.stack(sums, -1) / counts[:, None]
    return centers


def _nearest_two(centers: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances of every pixel from its two nearest centers, (2, pixels), and the index of the nearest."""
    distances, indices = cKDTree(centers).query(pixels, k=2)
    return distances.T, indices[:, 0]


def _streaks(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth noise of unit size, drawn out as in rolled glass, (side, side)."""
    coarse = Image.fromarray(rng.standard_normal((side // 6, side // 24)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
