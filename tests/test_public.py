"""What users import, see and type-check, and what it needs."""

import importlib
import pathlib

import pytest
import typed_use

import jaxnorm
from jaxnorm import nnx


def test_what_is_type_checked_runs():
    """mypy reads tests/typed_use.py in `make lint`, and users' mypy reads jaxnorm because of py.typed."""
    assert (pathlib.Path(jaxnorm.__file__).parent / "py.typed").exists()
    assert [y.shape for y in typed_use.calls()] == [(2, 3, 8, 8)] * 3
    assert typed_use.layers()[1::2] == [nnx.GroupNorm, nnx.InstanceNorm]
    assert len(typed_use.explanations()) == 2
    with pytest.raises(TypeError, match="x must be an array"):
        typed_use.wrong_call()


def test_dir_lists_the_public_names():
    assert sorted(dir(jaxnorm)) == sorted(jaxnorm.__all__)
    assert all(hasattr(jaxnorm, name) for name in dir(jaxnorm))


def test_submodules_can_be_imported():
    for name in ("explanation", "nnx", "gpu.devices", "functional"):
        assert importlib.import_module(f"jaxnorm.{name}").__name__ == f"jaxnorm.{name}"


@pytest.mark.slow
def test_only_selfcheck_needs_rich(run_python):
    run_python(
        "import sys; sys.modules['rich'] = None; import jaxnorm; from jaxnorm.__main__ import main\n"
        "assert main(['explain', '2x8x8x32', '--channels-last']) == 0"
    )
