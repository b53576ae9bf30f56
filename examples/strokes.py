"""Draws three styles: paint that follows a swirling brush, the same paint as a soft wash, and an engraving in inks."""

import numpy as np
from PIL import Image
from scipy import ndimage

# A night sky, from dark to light.
PAINT = np.array([(12, 20, 66), (24, 60, 140), (52, 116, 188), (140, 190, 210), (246, 214, 96), (252, 244, 190)])
PAPER, INKS = np.array((248, 234, 200)), np.array([(20, 50, 92), (196, 52, 34), (24, 110, 96)])


def brushwork(side: int = 256, *, length: int = 22, seed: int = 0) -> Image.Image:
    """A square picture of curved strokes in blue and yellow: noise, smeared along a swirling field.

    Args:
      side: of the picture, in pixels.
      length: of half a stroke, in pixels.
      seed: of the swirls, the strokes and their colors.
    """
    rng = np.random.default_rng(seed)
    swirls = _smooth(rng, side, 26)
    down, right = np.gradient(swirls)
    size = np.hypot(down, right) + 1e-9
    field = np.stack([right / size, -down / size])  # along the lines of equal height
    strokes = _standardized(_smear(_smooth(rng, side, 1.1), field, length))
    tone = 0.5 + 0.16 * _smooth(rng, side, 20) + 0.2 * strokes
    relief = 1 + 0.12 * strokes[..., None]
    return Image.fromarray(np.clip(_painted(tone) * relief, 0, 255).astype(np.uint8))


def wash(side: int = 256, *, seed: int = 0) -> Image.Image:
    """A square picture of soft clouds in the same blue and yellow, without strokes.

    Args:
      side: of the picture, in pixels.
      seed: of the clouds.
    """
    tone = 0.5 + 0.25 * _smooth(np.random.default_rng(seed), side, 20)
    return Image.fromarray(np.clip(_painted(tone), 0, 255).astype(np.uint8))


def engraving(side: int = 256, *, spacing: float = 7.0, seed: int = 0) -> Image.Image:
    """A square picture of curved lines of ink on paper, thick where it is dark, in blue, red and green.

    Args:
      side: of the picture, in pixels.
      spacing: of the lines, in pixels.
      seed: of their curves, of light and dark, and of the inks.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    phase = (x + y) / np.sqrt(2) + 16 * _smooth(rng, side, 34)
    tone = 0.1 + 0.6 * _smooth(rng, side, 22)  # in units of the sine: ink where the sine is below
    covered = np.clip(1.6 * (tone - np.sin(2 * np.pi * phase / spacing)) + 0.5, 0, 1)[..., None]
    ink = INKS[np.argmax([_smooth(rng, side, 24) for _ in INKS], axis=0)]
    return Image.fromarray((covered * ink + (1 - covered) * PAPER).astype(np.uint8))


def _painted(tone: np.ndarray) -> np.ndarray:
    """The colors (side, side, 3) of PAINT from dark to light, for tones in [0, 1]."""
    levels = np.linspace(0, 1, len(PAINT))
    return np.stack([np.interp(tone, levels, PAINT[:, i]) for i in range(3)], -1)


def _smooth(rng: np.random.Generator, side: int, scale: float) -> np.ndarray:
    """Smooth noise (side, side) with mean 0 and standard deviation 1; its bumps are about 2 * scale wide."""
    return _standardized(ndimage.gaussian_filter(rng.standard_normal((side, side)), scale, mode="wrap"))


def _smear(picture: np.ndarray, field: np.ndarray, length: int) -> np.ndarray:
    """The mean of the picture along the field, length pixels to both sides (line integral convolution)."""
    total = picture.copy()
    for direction in (1, -1):
        place = np.indices(picture.shape, dtype=float)
        for _ in range(length):
            step = [ndimage.map_coordinates(part, place, order=1, mode="wrap") for part in field]
            place += direction * np.stack(step)
            total += ndimage.map_coordinates(picture, place, order=1, mode="wrap")
    return total / (2 * length + 1)


def _standardized(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()
