"""Feed-forward stylization: a network learns to redraw a photograph as stained glass, in a few minutes.

Instance norm was introduced for this (Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022), because the result should
not depend on the contrast of the content. The same network is trained with instance norm and with batch norm; the
picture shows what they make of the content at three contrasts.

    python examples/stylize.py
    python examples/stylize.py --content photo.jpg --style painting.jpg --norm instance --steps 1000
"""

import argparse
import os
import pathlib
import sys
from typing import get_args

try:
    import jax
    import numpy as np
    from mosaic import stained_glass
    from networks import Norm
    from perception import make_bank
    from pictures import PictureError, as_array, change_contrast, draw, open_picture, sample_content
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from training import Trained, content_target, stylize, train
except ModuleNotFoundError as error:
    sys.exit(f"stylize: {error.name} is not installed. Install what the demo needs: pip install 'jaxnorm[demo]'")

TITLES = {"instance": "instance norm", "batch": "batch norm", "none": "no norm"}
# The final loss is the mean over this share of the steps, because crops differ.
FINAL = 0.1
# The content is this much larger than a crop, so that crops differ.
ZOOM = 1.75
# Of the contents that the picture compares; training stops at a half.
CONTRASTS = (1, 1 / 3, 1 / 10)


def main(argv: list[str] | None = None) -> None:
    """Trains, writes the picture, prints the losses."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check_output(parser, arguments.out)
    try:
        content = open_picture(arguments.content) if arguments.content else sample_content()
        style = open_picture(arguments.style) if arguments.style else stained_glass()
    except PictureError as error:
        parser.error(str(error))
    content = as_array(content, round(arguments.size * ZOOM / 4) * 4)
    style = as_array(style, arguments.size)
    norms = tuple(dict.fromkeys(arguments.norm))

    trained = _train_all(norms, content, style, arguments)
    contents = [change_contrast(content, contrast) for contrast in CONTRASTS]
    results = {
        TITLES[norm]: [np.asarray(stylize(norm, trained[norm].variables, each)) for each in contents] for norm in norms
    }
    draw(arguments.out, style, {"content": contents} | results, CONTRASTS)
    for norm in norms:
        last = trained[norm].losses[-max(1, round(FINAL * arguments.steps)) :]
        print(f"{TITLES[norm]:14s} final loss {np.mean(last):.4f}   {trained[norm].steps_per_second:.2f} steps/s")
    print(f"(final loss: mean over the last {len(last)} of {arguments.steps} steps)")
    print(f"wrote {arguments.out}")


def _train_all(
    norms: tuple[Norm, ...], content: np.ndarray, style: np.ndarray, arguments: argparse.Namespace
) -> dict[Norm, Trained]:
    """The same pictures, filters, crops and initial weights for every norm."""
    bank = make_bank(jax.random.key(arguments.seed + 7), style)
    target = content_target(content, style)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    trained = {}
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        for norm in norms:
            task = progress.add_task(f"{TITLES[norm]:14s}", total=arguments.steps, loss=float("nan"))
            trained[norm] = train(
                norm,
                content,
                target,
                bank,
                steps=arguments.steps,
                size=arguments.size,
                seed=arguments.seed,
                on_step=lambda loss, task=task: progress.update(task, advance=1, loss=loss),
            )
    return trained


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=_at_least(1), default=400, help="training steps per network (default 400)")
    parser.add_argument("--size", type=_side, default=128, help="side of the training crops in pixels (default 128)")
    norms = {"nargs": "+", "choices": get_args(Norm), "default": ["instance", "batch"]}
    parser.add_argument("--norm", **norms, help="which to train (default instance and batch)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("stylize.png"), help="picture to write")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of everything random (default 0)")
    parser.add_argument("--content", type=pathlib.Path, metavar="FILE", help="picture to redraw")
    parser.add_argument("--style", type=pathlib.Path, metavar="FILE", help="picture to take the style from")
    return parser


def _at_least(least: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}: got {text!r}")
        return int(text)

    return number


def _side(text: str) -> int:
    side = _at_least(48)(text)
    if side % 4:
        raise argparse.ArgumentTypeError(f"must be a multiple of 4, since the network halves it twice: got {side}")
    return side


def _check_output(parser: argparse.ArgumentParser, path: pathlib.Path) -> None:
    """Before the minutes of training, not after them."""
    if not path.parent.is_dir():
        parser.error(f"--out: no such folder: {path.parent}")
    if path.is_dir() or path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        parser.error(f"--out must name a .png, .jpg, .pdf or .svg file: got {path}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        parser.error(f"--out: no permission to write {path}")


if __name__ == "__main__":
    main()
