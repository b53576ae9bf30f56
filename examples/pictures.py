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


# Inches of a large picture's height.
_INCHES = 2.7


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
    losses: Mapping[str, Sequence[float]],
) -> None:
    """Writes one picture: the style, the content and the results in one row, their variants below, and the losses.

    Args:
      path: of the file to write.
      style: (1, H, W, 3) in [0, 1].
      pictures: by title, one picture (1, H, W, 3) per contrast, all of the same size; the first is drawn large. Under
        the others stands the root mean square change from it, but for the first title, the content.
      contrasts: of the content, in the order of each sequence of pictures.
      losses: by name, of every step.
    """
    matplotlib.use("Agg")
    first, *others = next(iter(pictures.values()))
    wide, style_wide = _aspect(first), _aspect(style)
    # In heights of the large pictures, from the upper left corner.
    gap, title, strip = 0.035, 0.15, 0.3
    small = (wide - gap * (len(others) - 1)) / len(others) / wide
    page = Page(style_wide + len(pictures) * (wide + gap), 2 * title + 1 + small + title + strip + 0.2)
    page.show(style, 0, title, 1, "style")
    page.text("the same content\nat less contrast", style_wide - gap, 2 * title + 1 + small / 2)
    for column, (name, (large, *variants)) in enumerate(pictures.items()):
        left = style_wide + gap + column * (wide + gap)
        page.show(large, left, title, 1, name)
        for i, (variant, contrast) in enumerate(zip(variants, contrasts[1:], strict=True)):
            caption = f"contrast {Fraction(contrast).limit_denominator(100)}"
            if column:
                caption += f", change {np.sqrt(np.mean((variant - large) ** 2)):.2f}"
            page.show(variant, left + i * (small * wide + gap), 2 * title + 1, small, caption)
    _draw_losses(page.axes(0.3, 3 * title + 1 + small, page.width - 0.3, strip), losses)
    page.figure.savefig(path, dpi=110)
    plt.close(page.figure)


class Page:
    """A figure whose axes are placed in heights of a large picture, from the upper left corner."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = plt.figure(figsize=(_INCHES * width, _INCHES * height))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def show(self, picture: np.ndarray, left: float, top: float, height: float, title: str) -> None:
        axes = self.axes(left, top, height * _aspect(picture), height)
        axes.imshow(np.clip(picture[0], 0, 1), aspect="auto", interpolation="lanczos")
        axes.set_title(title, fontsize=12 if height == 1 else 10, pad=4)
        axes.set_axis_off()

    def text(self, text: str, right: float, middle: float) -> None:
        x, y = right / self.width, 1 - middle / self.height
        self.figure.text(x, y, text, ha="right", va="center", fontsize=11)


def _draw_losses(axes: Axes, losses: Mapping[str, Sequence[float]]) -> None:
    for name, values in losses.items():
        (line,) = axes.plot(np.arange(len(values)), values, alpha=0.2, linewidth=0.8)
        window = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        axes.plot(np.arange(len(smooth)) + window // 2, smooth, color=line.get_color(), label=name)
    # In the first steps the loss of a network is anything.
    top = max(3, 3 * max(np.median(values) for values in losses.values()))
    low = 0.8 * min(np.min(values) for values in losses.values())
    axes.set(
        xlabel="training step",
        ylabel="loss",
        yscale="log",
        ylim=(low, top),
        xlim=(0, max(map(len, losses.values())) - 1),
    )
    ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if low <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", ncols=len(losses), frameon=False)


def _aspect(picture: np.ndarray) -> float:
    """Width over height of (1, H, W, 3)."""
    return picture.shape[2] / picture.shape[1]
