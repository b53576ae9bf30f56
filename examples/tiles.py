"""Redraws a picture in tiles, as one too large for the memory must be: with the moments of the whole, and without them.

Instance norm ties every pixel to all others by two numbers per channel and layer. A tile that computes its own gets
other ones than its neighbor, and a seam shows. The layers of jaxnorm record the moments of the whole
(track_running_stats=True, momentum=1.0) and normalize the tiles with them (use_running_average=True).

    python examples/tiles.py
    python examples/tiles.py --content photo.jpg --tile 64 --steps 800
"""

import argparse
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.patches import Rectangle
from networks import Generator, make_noise
from perception import make_bank
from pictures import GAP, TITLE, Page, as_array, open_picture, sample_content
from rich.progress import Progress
from strokes import wash
from training import content_target, train

SIZE = 128
# Farther than a pixel of the generator sees, which is 46 to each side; a multiple of 4, since it halves twice.
MARGIN = 48
# Height and width of what is enlarged, in pixels: as wide for its height as the content is.
ZOOMED = (56, 84)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps (default 150)")
    parser.add_argument("--tile", type=int, default=112, help="side of a tile, a multiple of 4 (default 112)")
    parser.add_argument("--content", type=pathlib.Path, help="picture to redraw")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tiles.png"), help="picture to write")
    arguments = parser.parse_args()
    if arguments.tile < 4 or arguments.tile % 4:
        parser.error(
            f"--tile must be a positive multiple of 4, since the network halves it twice: got {arguments.tile}"
        )

    content = as_array(open_picture(arguments.content) if arguments.content else sample_content(), 224)
    style = as_array(wash(), SIZE)
    bank, target = make_bank(jax.random.key(7), style), content_target(content, style)
    with Progress() as progress:
        task = progress.add_task("training", total=arguments.steps)
        advance = functools.partial(progress.advance, task)
        options = {"steps": arguments.steps, "size": SIZE, "seed": 0, "on_step": lambda _: advance()}
        params = train("instance", content, target, bank, **options).variables

    results = compare(params, content, arguments.tile)
    whole = results["the whole at once"]
    for name, picture in results.items():
        print(f"{name:36s} largest difference from the whole at once: {np.abs(picture - whole).max():.4f}")
    draw(arguments.out, results, arguments.tile)
    print(f"wrote {arguments.out}")


def compare(params: Any, picture: jax.Array, side: int) -> dict[str, np.ndarray]:
    """The picture (1, H, W, 3) redrawn at once, in tiles with the moments of the whole, and with those of each tile."""
    noise = make_noise(jax.random.key(0), picture)
    tracked, plain = Generator(tracked=True), Generator()
    _, moments = jax.jit(functools.partial(tracked.apply, train=True, mutable=["batch_stats"]))(params, picture, noise)

    with_moments = functools.partial(tracked.apply, params | moments, train=False)
    without = functools.partial(plain.apply, params, train=False)
    return {
        "the whole at once": np.asarray(jax.jit(without)(picture, noise)),
        "tiles, moments of the whole": in_tiles(jax.jit(with_moments), picture, noise, side),
        "tiles, their own moments": in_tiles(jax.jit(without), picture, noise, side),
    }


def in_tiles(redraw: Callable[..., jax.Array], picture: jax.Array, noise: jax.Array, side: int) -> np.ndarray:
    """redraw(picture, noise), tile by tile. A tile sees MARGIN pixels of its neighbors, which are then cut off."""
    _, height, width, _ = picture.shape
    result = np.zeros(picture.shape, np.float32)
    for top, left in itertools.product(range(0, height, side), range(0, width, side)):
        bottom, right = min(top + side, height), min(left + side, width)
        rows = slice(max(top - MARGIN, 0), min(bottom + MARGIN, height))
        columns = slice(max(left - MARGIN, 0), min(right + MARGIN, width))
        quarter = (slice(rows.start // 4, rows.stop // 4), slice(columns.start // 4, columns.stop // 4))
        tile = np.asarray(redraw(picture[:, rows, columns], noise[:, *quarter]))
        inner = (slice(top - rows.start, bottom - rows.start), slice(left - columns.start, right - columns.start))
        result[:, top:bottom, left:right] = tile[:, *inner]
    return result


def draw(path: pathlib.Path, results: dict[str, np.ndarray], side: int) -> None:
    """The results in one row, those in tiles with the lines between the tiles, and below each a seam enlarged."""
    matplotlib.use("Agg")
    whole, own = list(results.values())[:: len(results) - 1]
    _, height, width, _ = whole.shape
    top, left = worst_seam(own - whole, side)
    wide = width / height
    page = Page(3 * wide + 2 * GAP, 2 * (1 + TITLE))
    for column, (name, picture) in enumerate(results.items()):
        axes = page.show(picture, column * (wide + GAP), TITLE, 1, name)
        if column:
            axes.vlines(np.arange(side, width, side) - 0.5, -0.5, height - 0.5, "white", "dotted", linewidth=0.8)
            axes.hlines(np.arange(side, height, side) - 0.5, -0.5, width - 0.5, "white", "dotted", linewidth=0.8)
        axes.add_patch(Rectangle((left, top), ZOOMED[1], ZOOMED[0], fill=False, edgecolor="white", linewidth=1.5))
        enlarged = picture[:, top : top + ZOOMED[0], left : left + ZOOMED[1]]
        note = f"differs by at most {np.abs(picture - whole).max():.3f}" if column else "the white box, enlarged"
        page.show(enlarged, column * (wide + GAP), 2 * TITLE + 1, 1, note)
    page.save(path)


def worst_seam(difference: np.ndarray, side: int) -> tuple[int, int]:
    """The upper left corner of the box ZOOMED across a vertical seam where (1, H, W, 3) jumps the most."""
    _, height, width, _ = difference.shape
    jumps = {}
    for seam in range(side, width, side):
        jump = np.abs(difference[0, :, seam] - difference[0, :, seam - 1]).mean(-1)
        left = min(max(seam - ZOOMED[1] // 2, 0), width - ZOOMED[1])
        for top in range(0, height - ZOOMED[0] + 1, 4):
            jumps[top, left] = jump[top : top + ZOOMED[0]].mean()
    return max(jumps, key=jumps.__getitem__)


if __name__ == "__main__":
    main()
