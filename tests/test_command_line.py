"""python -m jaxnorm, and explain: what they print is what would run."""

import importlib.metadata
import pathlib
import re
import tomllib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm import explanation as explanation_types
from jaxnorm.__main__ import EXAMPLES, main

RELU_ON_H100 = {"channel_axis": -1, "activation": jax.nn.relu, "device": "H100"}
BY_NAME = RELU_ON_H100 | {"implementation": "pallas"}


def test_explain_returns_text_to_be_read(capsys):
    x = jax.ShapeDtypeStruct((8, 64, 64, 256), jnp.bfloat16)
    explanation = jaxnorm.explain(x, residual=True, **BY_NAME)
    assert not capsys.readouterr().out
    assert isinstance(explanation, explanation_types.Explanation)
    assert isinstance(explanation.forward, explanation_types.Pass)
    assert isinstance(explanation.forward.tile, explanation_types.Tile)
    size = 8 * 64 * 64 * 256 * 2
    assert (explanation.forward.bytes_moved, explanation.backward.bytes_moved) == (3 * size, 5 * size)
    text = repr(explanation)
    assert text == str(explanation)
    assert text.startswith(
        "device: H100, compute capability 9.0, 132 SMs\nactivation: fused\nforward: pallas, moves 48.0 MiB\n"
    )
    parts = explanation.forward.tile.blocks_per_instance
    assert (f"clusters of {parts}" if parts > 1 else "no clusters") in text


def test_explain_says_why_not():
    explanation = jaxnorm.explain(jnp.ones((2, 3, 8, 8)))
    assert explanation.forward.implementation == explanation.backward.implementation == "xla"
    assert isinstance(explanation.forward.tile, explanation_types.NoTile)
    # One reason for both passes, said once.
    assert str(explanation).count("kernel: ") == 1


def test_explain_says_once_that_the_kernel_is_unproven():
    x = jax.ShapeDtypeStruct((8, 64, 64, 256), jnp.bfloat16)
    text = str(jaxnorm.explain(x, **RELU_ON_H100))
    reason = "kernel: not used by default: unproven on this GPU. Pass implementation='pallas' to try it."
    assert text.endswith(f"\nbackward: xla, moves 80.0 MiB\n{reason}")
    assert text.count("unproven") == 1


def test_explain_of_an_instance_that_no_gpu_holds():
    text = str(jaxnorm.explain(jax.ShapeDtypeStruct((1, 4096, 4096, 8), "float32"), **BY_NAME))
    assert "forward: pallas\n  raises: " in text
    assert re.search(r"needs 51\d\.\d MiB of shared memory: the GPU has 29\.3 MiB in all", text)


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ({"platform": "cpu", "device_kind": "cpu"}, "CPU, not a CUDA GPU"),
        ({"platform": "tpu", "device_kind": "TPU v5 lite"}, "TPU v5 lite, not a CUDA GPU"),
        (
            {
                "platform": "gpu",
                "device_kind": "NVIDIA H100 80GB HBM3",
                "compute_capability": "9.0",
                "core_count": 132,
            },
            "NVIDIA H100 80GB HBM3, compute capability 9.0, 132 SMs",
        ),
    ],
    ids=["CPU", "TPU", "GPU"],
)
def test_explain_names_the_current_device(device, line, monkeypatch):
    monkeypatch.setattr(explanation_types, "current", lambda x: types.SimpleNamespace(**device))
    assert str(jaxnorm.explain(jnp.ones((2, 3, 8, 8)))).startswith(f"device: {line}\n")


@pytest.mark.parametrize(
    "x", [np.zeros((2, 8, 8, 64)), np.float32(1) + np.zeros((2, 8, 8, 64), np.float32), jnp.zeros((2, 8, 8, 64))]
)
def test_explain_takes_what_instance_norm_takes(x):
    """NumPy's float64 is float32 for JAX, where it has no 64 bits, and half the bytes."""
    with jax.enable_x64(False):
        like_x = jax.ShapeDtypeStruct(x.shape, jaxnorm.instance_norm(x).dtype)
        want = jaxnorm.explain(like_x, residual=True, **BY_NAME)
        for residual in (x, like_x, np.True_):
            assert jaxnorm.explain(x, residual=residual, **BY_NAME) == want
        for residual in (None, False):
            assert jaxnorm.explain(x, residual=residual, **BY_NAME) != want


WRONG = {
    "int32": ({"x": jnp.ones((2, 3, 4), int)}, {}),
    "tuple": ({"x": (jnp.ones((2, 3, 4)),)}, {}),
    "number": ({"x": 1.0}, {}),
    "text": ({"x": "2x3x4"}, {}),
    "rank": ({"x": jnp.ones((2, 3))}, {}),
    "no positions": ({"x": jnp.ones((2, 3, 0))}, {}),
    "channel axis": ({"x": jnp.ones((2, 3, 4))}, {"channel_axis": 3}),
    "residual of another shape": ({"x": jnp.ones((2, 3, 4))}, {"residual": jnp.ones((2, 3, 5))}),
    "residual of another dtype": ({"x": jnp.ones((2, 3, 4))}, {"residual": jnp.ones((2, 3, 4), jnp.bfloat16)}),
    "residual that is a number": ({"x": jnp.ones((2, 3, 4))}, {"residual": 1.0}),
    "activation": ({"x": jnp.ones((2, 3, 4))}, {"activation": "relu"}),
    "implementation": ({"x": jnp.ones((2, 3, 4))}, {"implementation": "triton"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_explain_refuses_what_instance_norm_refuses(name):
    (given, options) = WRONG[name]
    with pytest.raises((TypeError, ValueError)) as want:
        jaxnorm.instance_norm(**given, **options)
    with pytest.raises(want.type) as got:
        jaxnorm.explain(**given, **options, device="H100")
    assert str(got.value) == str(want.value)


def test_explain_refuses_what_is_no_array_at_all():
    with pytest.raises(ValueError, match=r"sizes of at least 0: got shape \(2, -3, 4\)"):
        jaxnorm.explain(jax.ShapeDtypeStruct((2, -3, 4), "float32"))
    with pytest.raises(TypeError, match="product name: got int"):
        jaxnorm.explain(jnp.ones((2, 3, 4)), device=0)


def test_explain_of_a_named_implementation():
    x = jax.ShapeDtypeStruct((1, 256, 256, 64), jnp.float32)
    size = 256 * 256 * 64 * 4
    xla = jaxnorm.explain(x, implementation="xla", **RELU_ON_H100)
    assert (xla.forward.implementation, xla.forward.bytes_moved) == ("xla", 49 * size // 16)
    assert "implementation='xla' was named" in str(xla)
    reference = jaxnorm.explain(x, implementation="reference", **RELU_ON_H100)
    assert (reference.backward.implementation, reference.backward.bytes_moved) == ("reference", None)
    odd = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    pallas = jaxnorm.explain(odd, **BY_NAME)
    assert (pallas.forward.implementation, pallas.forward.bytes_moved) == ("pallas", None)
    assert "forward: pallas\nbackward: pallas\nraises: " in str(pallas)


def test_explain_command(capsys):
    command = "explain 8x64x64x256 --dtype bfloat16 --channels-last --residual --activation relu --device H100"
    assert main([*command.split(), "--implementation", "pallas"]) == 0
    printed = capsys.readouterr().out
    assert "forward: pallas, moves 48.0 MiB" in printed
    assert "backward: pallas, moves 80.0 MiB" in printed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explain 8x64x64 --device H99", "the name of a known GPU: got 'H99'. The nearest names are H200, H100"),
        (
            "explain 8x64x64 --device V100",
            "V100 is too old: compute capability 8.0 is needed. The nearest",
        ),
        ("explain 8x64x64 --device Tesla-T4", "Tesla-T4 is too old: compute capability 8.0 is needed."),
        ("explain 8x64", "x must have rank 3 or more"),
        ("explain 8x64xx64", "a shape is numbers with x between them"),
        ("explain 2x-3x4", "a shape is numbers with x between them"),
        ("explain 2x3_0x4", "a shape is numbers with x between them"),
        ("explain 8x0x64x64 --channels-last", "at least one spatial position"),
        ("explain 8x64x64 --implementation triton", "invalid choice: 'triton'"),
        ("explain 8x64x64 --activation nothing", "no such function in jax.nn: 'nothing'"),
    ],
)
def test_wrong_commands(command, message, capsys):
    try:
        status = main(command.split())
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="there may be a GPU")
def test_explain_of_the_kernel_needs_a_gpu_or_its_name(capsys):
    assert main(["explain", "8x64x64", "--implementation", "pallas"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "jaxnorm: no CUDA GPU here: use --device H100\n"
    assert not printed.out


def test_version_and_help(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit, match="0"):
            main([option])
    printed = capsys.readouterr().out
    assert jaxnorm.__version__ in printed
    assert "selfcheck" in printed
    assert printed.endswith(EXAMPLES)


@pytest.mark.parametrize("command", ["explain", "selfcheck"])
def test_every_option_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert printed.endswith(EXAMPLES)
    options = re.split(r"\n  (?=-)", printed.partition("options:")[2].partition("examples:")[0])[1:]
    assert len(options) >= 5
    for option in options:
        assert re.search(r"\s{2,}\S", option), option


@pytest.mark.parametrize("line", re.findall(r"jaxnorm (explain .*)", EXAMPLES))
def test_the_examples_run(line, capsys):
    assert main(line.split()) == 0
    assert capsys.readouterr().out.startswith("device: ")


def test_the_command_is_installed():
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    command = importlib.metadata.EntryPoint("jaxnorm", project["scripts"]["jaxnorm"], "console_scripts")
    assert command.load() is main
