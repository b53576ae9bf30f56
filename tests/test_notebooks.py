"""The notebooks run top to bottom, are committed with their outputs, and say nothing of the machine that ran them."""

import pathlib
import re

import nbformat
import pytest
from execute import execute

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# Of the machine: absolute paths, and warnings and errors.
UNWANTED = re.compile(r"/(home|root|tmp|opt|usr|Users)/|site-packages|Traceback|Warning:")


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path):
    """An error in a cell raises."""
    execute(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_executed(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", {}))
    text = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not [line for line in text if UNWANTED.search(line)]
