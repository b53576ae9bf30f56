"""The demo and the tiles as a person runs them: what they write, what they print, and what they say to wrong input."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import each_command
import numpy as np
import pytest
from cases import exhaustive
from PIL import Image

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def run():
    """Runs an example, with a generator that XLA compiles quickly, and networks that it optimizes less than usual."""
    environment = os.environ | {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return functools.partial(run_script, environment=environment)


def run_script(*arguments, cwd, environment, script="stylize.py"):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def final_losses(output):
    return [float(loss) for loss in re.findall(r"final loss (\d+\.\d+)", output)]


@pytest.fixture(scope="module")
def tiny_run(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return run("--steps", 12, "--size", 48, cwd=folder), folder / "stylize.png"


@exhaustive
def test_compares_two_networks_and_writes_a_picture(tiny_run):
    finished, picture = tiny_run
    assert finished.returncode == 0, finished.stderr
    assert len(final_losses(finished.stdout)) == 2
    assert len(re.findall(r"\d+\.\d\d steps/s", finished.stdout)) == 2
    with Image.open(picture) as image:
        assert min(image.size) > 400
        assert np.asarray(image).std() > 20


@exhaustive
def test_same_seed_same_losses(run, tiny_run, tmp_path):
    again = run("--steps", 12, "--size", 48, "--norm", "batch", cwd=tmp_path)
    assert final_losses(again.stdout) == final_losses(tiny_run[0].stdout)[1:]


@exhaustive
def test_training_lowers_the_loss(run, tiny_run, tmp_path):
    longer = run("--steps", 40, "--size", 48, "--norm", "instance", cwd=tmp_path)
    assert final_losses(longer.stdout)[0] < 0.8 * final_losses(tiny_run[0].stdout)[0]


@exhaustive
def test_own_pictures(run, tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("content.jpg", (90, 130, 3)), ("style.png", (70, 60))):  # color and grayscale
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(tmp_path / name)
    options = ["--steps", 2, "--size", 48, "--norm", "instance", "--out", "mine.png"]
    finished = run(*options, "--content", "content.jpg", "--style", "style.png", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "mine.png").exists()


@exhaustive
def test_tiles_with_the_moments_of_the_whole_have_no_seams(run, tmp_path):
    finished = run("--steps", 2, cwd=tmp_path, script="tiles.py")
    assert finished.returncode == 0, finished.stderr
    whole, with_moments, without = map(float, re.findall(r"at once: (\d+\.\d+)", finished.stdout))
    assert whole == 0
    # Of the biased and the unbiased variance of at least 56 x 84 positions, at every one of the 13 layers.
    assert with_moments < 5e-3
    assert without > 10 * with_moments
    assert (tmp_path / "tiles.png").exists()


WRONG = {
    "--content nowhere.jpg": "no such file: nowhere.jpg",
    "--style text.jpg": "not a picture that Pillow can read: text.jpg",
    "--size 50": "must be a multiple of 4",
    "--size 8": "at least 48",
    "--steps 0": "at least 1",
    "--norm layer": "invalid choice: 'layer'",
    "--out nowhere/a.png": "no such folder: nowhere",
    "--out a.txt": "must name a .png",
}


def test_wrong_input_gets_one_line(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    each_command.assert_refused(EXAMPLES / "stylize.py", WRONG, cwd=tmp_path)
