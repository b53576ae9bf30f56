"""The benchmarks: that contenders compute the same thing and are compared fairly, and that a small run writes all."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import oracle
import pytest
import tolerance
from cases import exhaustive

from benchmarks import compare, contenders, networks, turns
from benchmarks.contenders import BASELINE, JAXNORM, STABLE
from benchmarks.models import NO_NORM, SEPARATE
from benchmarks.shapes import CHANNEL_AXIS, DTYPES, EPSILON, LAYOUTS, TINY, Case, random_cases

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("layout", "residual"),
    [
        (LAYOUTS[0], False),
        (LAYOUTS[1], True),
        pytest.param(LAYOUTS[0], True, marks=exhaustive),
        pytest.param(LAYOUTS[1], False, marks=exhaustive),
    ],
)
def test_contenders_compute_the_same(layout, residual):
    (tiny,) = TINY.values()
    case = Case("tiny", tiny, layout, "float32", residual=residual)
    x, gamma, beta, dy, *add = map(np.asarray, contenders.arguments(case))
    options = {"channel_axes": (CHANNEL_AXIS[layout],), "activation": "relu", "residual": add[0] if add else None}
    y64, magnitude = oracle.instance_norm(x, gamma, beta, EPSILON, **options)
    exact = oracle.gradients(dy, x, gamma, beta, eps=EPSILON, **options)
    mean, var = oracle.moments(x, (CHANNEL_AXIS[layout],))
    rstd = 1 / np.sqrt(var + EPSILON)
    xhat = np.abs((x - mean) * rstd).max()
    names = contenders.contenders(case, "cpu")
    assert {JAXNORM, BASELINE, STABLE} <= set(names)
    for name in names:
        norm = contenders.norm_of(name, case)
        y, dx, dgamma, dbeta, *dresidual = jax.jit(contenders.step(norm))(x, gamma, beta, dy, *add)
        positions = x.size // (tiny.batch * tiny.channels)
        atol = tolerance.forward("float32", positions, magnitude)
        np.testing.assert_allclose(y, y64, rtol=0, atol=atol, err_msg=name)
        np.testing.assert_array_equal(y, jax.jit(contenders.forward(norm))(x, gamma, beta, dy, *add), err_msg=name)
        scale = np.abs(gamma).max() * rstd.max()
        atol = tolerance.input_gradient("float32", positions, dx, scale=scale, dz=np.abs(dy).max(), xhat=xhat)
        np.testing.assert_allclose(dx, exact["x"], rtol=0, atol=atol, err_msg=name)
        atol = tolerance.parameter_gradient("float32", "float32", positions, np.abs(dy).sum() * xhat)
        np.testing.assert_allclose(dgamma, exact["gamma"], rtol=0, atol=atol, err_msg=name)
        np.testing.assert_allclose(dbeta, exact["beta"], rtol=0, atol=atol, err_msg=name)
        if residual:
            np.testing.assert_array_equal(dresidual[0], exact["residual"].astype("float32"), err_msg=name)


def test_compare_writes_table_picture_and_figures(tmp_path, capsys):
    table, picture, figures = tmp_path / "table.md", tmp_path / "picture.png", tmp_path / "figures.json"
    command = ["--shapes", "tiny", "--dtypes", "float32", "--layouts", "channels-first", "--seconds", "0"]
    compare.main([*command, "--markdown", str(table), "--plot", str(picture), "--json", str(figures)])
    assert table.read_text() == capsys.readouterr().out
    assert "than Flax, stable" in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(figures.read_text())
    assert written["machine"]["versions"]["jaxnorm"]
    assert [result["case"]["pass_name"] for result in written["results"]["cases"]] == ["forward", "step"]
    for result in written["results"]["cases"]:
        assert result["rounds"] == 7
        assert {"Flax", "Flax, stable"} <= set(result["speed"])
        assert set(result["seconds"]) == {"jaxnorm", *result["speed"]}
        assert result["share_of_copy"] > 0


@exhaustive
def test_another_copy_of_jaxnorm_is_timed_in_its_own_process(tmp_path, capsys):
    """The copy here returns its input, so we can tell by its version and its speed that it is the one that ran."""
    package = tmp_path / "jaxnorm"
    package.mkdir()
    (package / "__init__.py").write_text(
        "__version__ = 'of the test'\ninstance_norm = lambda x, gamma, beta, *, residual, **options: x\n"
    )
    figures = tmp_path / "figures.json"
    command = ["--seeds", "5", "--count", "1", "--seconds", "0", "--json", str(figures), "--against"]
    compare.main([*command, str(tmp_path)])
    assert "than the other jaxnorm" in capsys.readouterr().out
    written = json.loads(figures.read_text())
    assert written["machine"]["versions"]["the other jaxnorm"] == "of the test"
    # It returns its input, which is quicker than a norm.
    assert all(result["speed"]["the other jaxnorm"]["median"] < 1 for result in written["results"]["cases"])
    with pytest.raises(SystemExit):
        compare.main([*command, str(tmp_path / "jaxnorm")])
    assert "--against: the process ended: no package jaxnorm in" in capsys.readouterr().err


def test_an_interpreter_without_pytorch_gets_one_line(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--shapes", "tiny", "--torch-python", "/nowhere/python"])
    assert "--torch-python: cannot start /nowhere/python: No such file" in capsys.readouterr().err
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(SystemExit):
            compare.main(["--shapes", "tiny", "--torch-python", sys.executable])
        assert "No module named 'torch'" in capsys.readouterr().err


def test_turns_are_shared_and_compared_round_by_round():
    """A machine that becomes slower and slower: the ratio stays."""
    log = []

    def turn(name, seconds):
        def take(calls):
            log.append(name)
            return seconds * max(1, (len(log) - 3) // 2)

        return take

    taken = turns.take_turns({"a": turn("a", 1.0), "b": turn("b", 3.0)}, seconds=0)
    assert len(taken["a"]) == len(taken["b"]) == 7
    # Two turns each to warm up and to see how long a call takes; then each has one turn per round.
    rounds = [set(log[i : i + 2]) for i in range(4, len(log), 2)]
    assert rounds == [{"a", "b"}] * 7
    assert taken["a"] == [1, 2, 3, 4, 5, 6, 7]
    assert turns.ratios(taken["b"], taken["a"]) == turns.Spread(3, 3, 3)
    assert turns.ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == turns.Spread(2, 2, 2)


def test_random_shapes_are_those_of_the_seed():
    cases = random_cases(5, 200)
    assert cases == random_cases(5, 200)
    assert cases != random_cases(6, 200)
    assert {(len(case.array), case.layout, case.dtype) for case in cases} == {
        (rank, layout, dtype) for rank in (3, 4, 5) for layout in LAYOUTS for dtype in DTYPES
    }
    assert len({(case.activation, case.residual) for case in cases}) == 6
    for case in cases:
        assert 2e4 <= case.shape.size <= 4e6
        assert 1 <= case.shape.batch <= 128
        assert 1 <= case.shape.channels <= 512
        assert all(2 <= side <= 256 for side in case.shape.spatial)


@exhaustive
def test_results_on_random_shapes_name_their_seed(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    compare.main(["--seeds", "5", "6", "--count", "2", "--seconds", "0", "--json", str(figures)])
    printed = capsys.readouterr().out
    assert "seed 5" in printed
    assert "measured again" in printed
    results = json.loads(figures.read_text())["results"]
    assert [result["case"]["seed"] for result in results["cases"]] == [5] * 4 + [6] * 4
    assert results["again"]


@exhaustive
@pytest.mark.timeout(600)
def test_networks_are_compared_with_flax(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    networks.main(["--quick", "--compilations", "2", "--json", str(figures)])
    printed = capsys.readouterr().out
    assert "What the norms add to a training step" in printed
    results = json.loads(figures.read_text())["results"]
    assert [result["layer"] for result in results] == [NO_NORM, BASELINE, STABLE, SEPARATE, JAXNORM]
    counted = {result["layer"]: result["instructions"] for result in results}
    assert counted[NO_NORM] < min(counted[BASELINE], counted[JAXNORM])
    assert counted[JAXNORM] < counted[SEPARATE]


def test_a_difference_that_the_quartiles_do_not_support_is_not_printed():
    assert networks.supported(turns.Spread(0.90, 0.91, 0.95), 1, ".2f") == "0.91 (0.90 to 0.95)"
    assert networks.supported(turns.Spread(0.70, 0.91, 1.01), 1, ".2f") == "not resolved (0.70 to 1.01)"
    assert networks.supported(turns.Spread(-0.075, 0.0176, 0.0725), 0, ".1f", 1e3) == "not resolved (-75.0 to 72.5)"


GPU = "jax_plugins.xla_cuda13"


@exhaustive
def test_a_training_step_is_compiled_for_an_h100():
    pytest.importorskip(GPU)
    (found,) = networks.in_another_process(
        networks.compiled_for_h100, "tiny generator", [JAXNORM], ["bfloat16"]
    ).values()
    assert found["bfloat16"] > 0


@exhaustive
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("accuracy", None),
        ("compare --seeds", None),
        ("overhead", None),
        ("traffic --devices H100", GPU),
        ("throughput", GPU),
    ],
)
def test_each_benchmark_runs_as_a_module_and_writes_its_report(command, needs, tmp_path):
    if needs:
        pytest.importorskip(needs)
    name, *options = command.split()
    table, figures = tmp_path / "table.md", tmp_path / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--quick"]
    command += ["--markdown", str(table), "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == table.read_text()
    written = json.loads(figures.read_text())
    assert written["machine"]["device"] in done.stdout
    assert written["results"]
