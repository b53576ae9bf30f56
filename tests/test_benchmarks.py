"""The benchmarks: that contenders compute the same thing and are compared fairly, and that a small run writes all."""

import json
import sys

import compare
import contenders
import growth
import jax
import networks
import numpy as np
import oracle
import pytest
import random_shapes
import tolerance
import torch_process
import turns
from shapes import CHANNEL_AXIS, LAYOUTS, TINY

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", LAYOUTS)
def test_contenders_compute_the_same(layout):
    (tiny,) = TINY.values()
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *tiny.array(layout)), np.float32)
    gamma, beta = rng.standard_normal((2, tiny.channels), np.float32)
    axes = (CHANNEL_AXIS[layout],)
    y64, magnitude = oracle.instance_norm(x, gamma, beta, contenders.EPSILON, channel_axes=axes, activation="relu")
    exact = oracle.gradients(dy, x, gamma, beta, eps=contenders.EPSILON, channel_axes=axes, activation="relu")
    mean, var = oracle.moments(x, axes)
    rstd = 1 / np.sqrt(var + contenders.EPSILON)
    xhat = np.abs((x - mean) * rstd).max()
    norms = contenders.contenders(layout, "cpu")
    assert {"jaxnorm", "flax", "flax, stable"} <= set(norms)
    for name, norm in norms.items():
        y, dx, dgamma, dbeta = jax.jit(contenders.step(norm))(x, gamma, beta, dy)
        positions = x.size // (tiny.batch * tiny.channels)
        atol = tolerance.forward("float32", positions, magnitude)
        np.testing.assert_allclose(y, y64, rtol=0, atol=atol, err_msg=name)
        np.testing.assert_array_equal(y, jax.jit(contenders.forward(norm))(x, gamma, beta, dy), err_msg=name)
        scale = np.abs(gamma).max() * rstd.max()
        atol = tolerance.input_gradient("float32", positions, dx, scale=scale, dz=np.abs(dy).max(), xhat=xhat)
        np.testing.assert_allclose(dx, exact["x"], rtol=0, atol=atol, err_msg=name)
        atol = tolerance.parameter_gradient("float32", "float32", positions, np.abs(dy).sum() * xhat)
        np.testing.assert_allclose(dgamma, exact["gamma"], rtol=0, atol=atol, err_msg=name)
        np.testing.assert_allclose(dbeta, exact["beta"], rtol=0, atol=atol, err_msg=name)


def test_compare_writes_table_picture_and_figures(tmp_path, capsys):
    table, picture, figures = tmp_path / "table.md", tmp_path / "picture.png", tmp_path / "figures.json"
    command = ["--shapes", "tiny", "--dtypes", "float32", "--layouts", "channels-first", "--seconds", "0"]
    compare.main([*command, "--markdown", str(table), "--plot", str(picture), "--json", str(figures)])
    assert table.read_text() == capsys.readouterr().out
    assert "| than flax, stable |" in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(figures.read_text())
    assert written["machine"]["versions"]["jaxnorm"]
    seen = {(result["case"]["pass_name"], result["contender"]) for result in written["results"]}
    assert seen >= {(name, c) for name in ("forward", "step") for c in ("jaxnorm", "flax", "flax, stable")}
    for result in written["results"]:
        assert result["rounds"] == 7
        size = 2 * 5 * 3 * 4 * 4
        moved = {"forward": 2, "step": 5}[result["case"]["pass_name"]] * size
        assert result["bytes_per_second"] == pytest.approx(moved / result["seconds"]["median"])
        if result["contender"] == "flax":
            assert result["speed"] == {"low": 1, "median": 1, "high": 1}
        if result["contender"] == "jaxnorm":
            assert result["behind"] == {"low": 1, "median": 1, "high": 1}


def test_an_interpreter_without_pytorch_gets_one_line(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--shapes", "tiny", "--torch-python", "/nowhere/python"])
    assert "--torch-python: cannot start /nowhere/python: No such file" in capsys.readouterr().err
    if torch_process.default_python() is None:
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


def test_steepness():
    """Beside the cheaper neighbour, and only where both take long enough."""
    cost = {1: [9.0, 9.0], 2: [1.0, 1.0], 3: [2.0, 2.0], 4: [1.5, 1.5]}
    assert growth.steepness(3, [2, 3, 4], cost).median == 2
    assert growth.steepness(2, [2, 3, 4], cost).median == 0.5
    assert growth.steepness(1, [2, 3, 4], cost) is None
    assert growth.steepness(2, [2, 4], cost) is None


def test_random_shapes_are_those_of_the_seed_and_reported(tmp_path, capsys):
    cases = random_shapes.draw(5, 200)
    assert cases == random_shapes.draw(5, 200)
    assert cases != random_shapes.draw(6, 200)
    assert {(len(case.array), case.layout, case.dtype) for case in cases} == {
        (rank, layout, dtype) for rank in (3, 4, 5) for layout in LAYOUTS for dtype in ("float32", "bfloat16")
    }
    for case in cases:
        assert 2e4 <= case.shape.size <= 4e6
        assert 1 <= case.shape.batch <= 128
        assert 1 <= case.shape.channels <= 512
        assert all(2 <= side <= 256 for side in case.shape.spatial)
    figures = tmp_path / "figures.json"
    random_shapes.main(["--seeds", "5", "6", "--count", "2", "--seconds", "0", "--json", str(figures)])
    assert "2 shapes of each seed" in capsys.readouterr().out
    assert [r["seed"] for r in json.loads(figures.read_text())["results"]] == [5] * 4 + [6] * 4


def test_networks_are_compared_with_flax(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    networks.main(["--networks", "tiny", "--seconds", "0", "--compilations", "2", "--json", str(figures)])
    printed = capsys.readouterr().out
    assert "What the norms add to a step" in printed
    results = json.loads(figures.read_text())["results"]
    assert [result["layer"] for result in results] == ["no norm", "flax", "jaxnorm, activation apart", "jaxnorm"]
    counted = {result["layer"]: result["instructions"] for result in results}
    assert counted["no norm"] < min(counted["flax"], counted["jaxnorm"])
