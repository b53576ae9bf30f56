"""Loads pictures, and draws the one that the demo ends with."""

import pathlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_sample_images

# The part of the flower photograph that is flower.
_FLOWER_BOX = (150, 60, 460, 370)

# Inches of the width of a page of pictures.
_INCHES = 6.6
# Between two pictures, and for the title of a picture, in heights of a picture.
GAP, TITLE = 0.04, 0.2


class PictureError(ValueError):
    """A picture that cannot be used, with a message for the user."""


def sample_content() -> Image.Image:
    """The photograph of a temple in China that scikit-learn ships."""
    return Image.fromarray(load_sample_images().images[0])


def sample_style() -> Image.Image:
    """The photograph of a flower that scikit-learn ships, its middle."""
    return Image.fromarray(load_sample_images().images[1]).crop(_FLOWER_BOX)


def open_picture(path: pathlib.Path) -> Image.Image:
    """The picture in a file, in RGB."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise PictureError(f"no such file: {path}") from None
    except UnidentifiedImageError:
        raise PictureError(f"not a picture that Pillow can read: {path}") from None
    except OSError as error:
        raise PictureError(f"cannot read {path}: {error}") from None


def as_array(picture: Image.Image, short_side: int) -> np.ndarray:
    """(1, H, W, 3) in [0, 1], scaled to the short side; both sides are multiples of 4, for the generator."""
    scale = short_side / min(picture.size)
    width, height = (max(short_side, round(side * scale / 4) * 4) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32)[None] / 255


def change_contrast(picture: np.ndarray, contrast: float) -> np.ndarray:
    """The picture in [0, 1] with its deviations from middle gray times the contrast."""
    return (picture - 0.5) * np.float32(contrast) + 0.5


def draw(
    path: pathlib.Path,
    style: np.ndarray,
    pictures: Mapping[str, Sequence[np.ndarray]],
    contrasts: Sequence[float],
) -> None:
    """Writes one picture: a column per title and a row per contrast, with the style in the corner.

    Args:
      path: of the file to write.
      style: (1, H, W, 3) in [0, 1].
      pictures: by title, one picture (1, H, W, 3) per contrast, all of the same size. Above each of them but the first
        stands the root mean square change from the first one, but for the first title, the content.
      contrasts: of the content, in the order of each sequence of pictures.
    """
    matplotlib.use("Agg")
    wide, style_wide = aspect(next(iter(pictures.values()))[0]), aspect(style)
    page = Page(style_wide + len(pictures) * (wide + GAP), len(contrasts) * (1 + TITLE))
    page.show(style, 0, TITLE, 1, "style")
    for row, contrast in enumerate(contrasts[1:], 1):
        label = f"contrast\n{Fraction(contrast).limit_denominator(100)}"
        page.text(label, style_wide - GAP, row * (1 + TITLE) + TITLE + 0.5)
    for column, (name, variants) in enumerate(pictures.items()):
        left = style_wide + GAP + column * (wide + GAP)
        for row, variant in enumerate(variants):
            change = np.sqrt(np.mean((variant - variants[0]) ** 2))
            caption = name if not row else f"changed by {change:.2f}" if column else ""
            page.show(variant, left, row * (1 + TITLE) + TITLE, 1, caption)
    page.save(path)


class Page:
    """A figure whose axes are placed in heights of a picture, from the upper left corner.

    Its text is 12 pixels high where the figure is 660 pixels wide, as in the documentation.
    """

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = plt.figure(figsize=(_INCHES, _INCHES * height / width))

    def show(self, picture: np.ndarray, left: float, top: float, height: float, title: str) -> Axes:
        width, bottom = height * aspect(picture), self.height - top - height
        place = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.imshow(np.clip(picture[0], 0, 1), aspect="auto", interpolation="lanczos")
        axes.set_title(title, fontsize=9, pad=3)
        axes.set_axis_off()
        return axes

    def text(self, text: str, right: float, middle: float) -> None:
        x, y = right / self.width, 1 - middle / self.height
        self.figure.text(x, y, text, ha="right", va="center", fontsize=9)

    def save(self, path: pathlib.Path) -> None:
        self.figure.savefig(path, dpi=180)
        plt.close(self.figure)


def aspect(picture: np.ndarray) -> float:
    """Width over height of (1, H, W, 3)."""
    return picture.shape[2] / picture.shape[1]
