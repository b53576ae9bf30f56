"""The notebooks run top to bottom, are committed with their outputs, and say nothing of the machine that ran them."""

import pathlib
import re

import nbformat
import pytest
from cases import exhaustive

from notebooks.execute import execute

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# Of the machine: absolute paths of files and packages, and warnings and errors.
UNWANTED = re.compile(
    r"(?<![\w.])/[\w.-]+/[\w./-]+\.py|/(home|root|tmp|opt|usr|Users)/|site-packages|Traceback|WARNING|Warning:"
)
# Enough to run every cell; the committed outputs are of the whole.
QUICK = {
    "02_stylization": ("SIZE, STEPS = 96, 150", "SIZE, STEPS = 64, 3"),
    "04_gpu": ("for shape in [(8, 64, 64, 256), (2, 128, 128, 128)]:", "for shape in [(8, 64, 64, 256)]:"),
}


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.slow
@exhaustive
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.timeout(600)
def test_it_runs(path, tmp_path, monkeypatch):
    """An error in a cell raises."""
    # What takes long is to compile, for a few small arrays.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if path.stem == "02_stylization":
        # XLA compiles this generator many times faster than the default one.
        monkeypatch.setenv("JAX_DEFAULT_PRNG_IMPL", "rbg")
    if path.stem in QUICK:
        path = quick(path, tmp_path)
    execute(path)


def quick(path, tmp_path):
    """A copy, beside what the notebook imports from the repository."""
    text, (whole, part) = path.read_text(), QUICK[path.stem]
    assert text.count(whole) == 1
    copy = tmp_path / "notebooks" / path.name
    copy.parent.mkdir()
    for folder in ("examples", "benchmarks"):
        (tmp_path / folder).symlink_to(path.parents[1] / folder)
    copy.write_text(text.replace(whole, part))
    return copy


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_executed(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", {}))
    text = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not [line for line in text if UNWANTED.search(line)]
