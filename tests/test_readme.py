"""The README's Python examples run as they stand, one after the other, as a reader would paste them."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_every_python_block_runs():
    namespace = {}
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["loss"].shape == ()


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()))
def test_links_lead_somewhere(target):
    assert (README.parent / target).exists()
