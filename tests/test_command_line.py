"""python -m jaxnorm, and explain: what they print is what would run."""

import json

import jax
import jax.numpy as jnp
import pytest

import jaxnorm
from jaxnorm.__main__ import main
from jaxnorm.gpu.tiling import NoTile
from jaxnorm.report import selfcheck, stopwatch


def test_explain_prints_what_it_returns(capsys):
    x = jax.ShapeDtypeStruct((8, 64, 64, 256), jnp.bfloat16)
    explanation = jaxnorm.explain(x, channel_axis=-1, residual=True, activation=jax.nn.relu, device="H100")
    assert capsys.readouterr().out == f"{explanation}\n"
    size = 8 * 64 * 64 * 256 * 2
    assert (explanation.forward.bytes_moved, explanation.backward.bytes_moved) == (3 * size, 5 * size)
    assert "compute capability 9.0, 132 SMs" in str(explanation)
    assert f"clusters of {explanation.forward.tile.parts}" in str(explanation)


def test_explain_says_why_not():
    explanation = jaxnorm.explain(jnp.ones((2, 3, 8, 8)))
    assert explanation.forward.implementation == explanation.backward.implementation == "xla"
    assert isinstance(explanation.forward.tile, NoTile)
    assert "not for one CUDA GPU" in str(explanation)


def test_explain_command(capsys):
    command = "explain 8x64x64x256 --dtype bfloat16 --channels-last --residual --activation relu --device H100"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "forward: pallas, moves 48.0 MiB" in printed
    assert "backward: pallas, moves 80.0 MiB" in printed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explain 8x64x64 --device H99", "device must be one of A100"),
        ("explain 8x64", "channel axes (1,) for x of shape (8, 64)"),
        ("explain 8x64xx64", "a shape is numbers with x between them"),
        ("explain 8x64x64 --activation nothing", "no such function in jax.nn: 'nothing'"),
        ("explain 8x64x64 --activation softmax", "failed on a scalar"),
    ],
)
def test_wrong_commands(command, message, capsys):
    try:
        status = main(command.split())
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_version_and_help(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit, match="0"):
            main([option])
    printed = capsys.readouterr().out
    assert jaxnorm.__version__ in printed
    assert "selfcheck" in printed


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(selfcheck, "INTERPRETED", selfcheck.INTERPRETED[1:2])


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("few_cases")
def test_selfcheck_runs_the_kernel(capsys, tmp_path):
    file = tmp_path / "report.json"
    assert main(["selfcheck", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "No CUDA GPU" in printed
    assert "1 right, 0 wrong, 0 not run" in printed
    (check,) = json.loads(file.read_text())["checks"]
    assert check["implementation"] == "pallas"
    assert set(check["results"]) == {"y", "dx", "dgamma"}


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("few_cases")
def test_selfcheck_fails_on_a_wrong_number(capsys, monkeypatch):
    right = selfcheck.instance_norm
    monkeypatch.setattr(selfcheck, "instance_norm", lambda *given, **options: right(*given, **options) * 1.0001)
    assert main(["selfcheck"]) == 1
    assert "1 wrong" in capsys.readouterr().out


def test_stopwatch():
    """Its plumbing, on whatever device there is: a row per pass and contender, in turns."""
    rows = stopwatch.compare([("tiny", (1, 4, 4, 8), -1, "float32")])
    contenders = ["jaxnorm", "jaxnorm, xla", "flax"]
    assert [(row["pass"], row["contender"]) for row in rows] == [
        (p, c) for p in ("forward", "step") for c in contenders
    ]
    for row in rows:
        size = 4 * 4 * 8 * 4
        assert row["bytes per second"] == pytest.approx({"forward": 2, "step": 5}[row["pass"]] * size / row["seconds"])
        assert row["share of copy"] > 0
