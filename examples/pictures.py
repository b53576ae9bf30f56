"""Loads pictures, and draws the one that the demo ends with."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_sample_images

# The part of the flower photograph that is flower.
_FLOWER_BOX = (150, 60, 460, 370)


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


def draw(
    path: pathlib.Path,
    given: Mapping[str, np.ndarray],
    results: Mapping[str, np.ndarray],
    losses: Mapping[str, Sequence[float]],
) -> None:
    """Writes one picture: what was given, the results, and the loss curves.

    Args:
      path: of the file to write.
      given, results: by title, pictures (1, H, W, 3).
      losses: by name, of every step.
    """
    matplotlib.use("Agg")
    count = len(given) + len(results)
    figure = plt.figure(figsize=(2.6 * count, 5.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    for axes, (title, picture) in zip(
        upper.subplots(1, count, squeeze=False)[0], (given | results).items(), strict=True
    ):
        axes.imshow(np.clip(picture[0], 0, 1))
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    axes = lower.subplots()
    for name, values in losses.items():
        (line,) = axes.plot(np.arange(len(values)), values, alpha=0.2, linewidth=0.8)
        window = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        axes.plot(np.arange(len(smooth)) + window // 2, smooth, color=line.get_color(), label=name)
    # Before the first steps the loss of a network without norm is anything.
    top = 3 * max(np.median(values) for values in losses.values())
    axes.set(xlabel="training step", ylabel="loss (style + content)", yscale="log", ylim=(None, top))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
