"""The command line: python -m jaxnorm explain | selfcheck."""

import argparse
import sys
from typing import get_args

import jax
import jax.numpy as jnp

from jaxnorm.arguments import Implementation
from jaxnorm.explain import explain
from jaxnorm.gpu.devices import DEVICES
from jaxnorm.version import __version__


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (TypeError, ValueError) as error:
        print(f"jaxnorm: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxnorm", description="Instance normalization for JAX.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("explain", help="what a call would run on a GPU, and why; needs no GPU")
    command.add_argument("shape", type=_shape, help="of x, such as 8x64x64x256; the batch comes first")
    command.add_argument("--dtype", default="float32", choices=["float16", "bfloat16", "float32"])
    command.add_argument("--channels-last", action="store_true", help="(N, *spatial, C) and not (N, C, *spatial)")
    command.add_argument("--residual", action="store_true", help="the call adds a residual")
    command.add_argument("--activation", type=_activation, metavar="NAME", help="of jax.nn, such as relu")
    command.add_argument("--implementation", choices=get_args(Implementation), help="default: chosen")
    command.add_argument("--device", metavar="NAME", help=f"{', '.join(DEVICES)}; default: the current device")
    command.set_defaults(run=_explain)

    command = commands.add_parser("selfcheck", help="is the GPU kernel right on this machine, and how fast? 10 minutes")
    command.add_argument("--quick", action="store_true", help="2 minutes: fewer cases, no sweep of tiles")
    command.add_argument("--seed", type=int, help="of the cases; default: drawn, and printed")
    command.add_argument("--json", metavar="FILE", help="write the report to FILE too")
    command.add_argument("--markdown", metavar="FILE", help="write the tables to FILE too")
    command.set_defaults(run=_selfcheck)
    return parser


def _explain(arguments: argparse.Namespace) -> int:
    explanation = explain(
        jax.ShapeDtypeStruct(arguments.shape, jnp.dtype(arguments.dtype)),
        channel_axis=-1 if arguments.channels_last else 1,
        residual=arguments.residual,
        activation=arguments.activation,
        implementation=arguments.implementation,
        device=arguments.device,
    )
    print(explanation)
    return 0


def _selfcheck(arguments: argparse.Namespace) -> int:
    from jaxnorm.report.selfcheck import selfcheck

    return selfcheck(arguments.json, arguments.markdown, quick=arguments.quick, seed=arguments.seed)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    # int() would take signs, spaces and underscores as well.
    if not all(size.isascii() and size.isdigit() for size in sizes):
        raise argparse.ArgumentTypeError(f"a shape is numbers with x between them, 8x64x64x256: got {text!r}")
    return tuple(map(int, sizes))


def _activation(name: str) -> object:
    function = getattr(jax.nn, name, None)
    if not callable(function):
        raise argparse.ArgumentTypeError(f"no such function in jax.nn: {name!r}")
    return function


if __name__ == "__main__":
    sys.exit(main())
